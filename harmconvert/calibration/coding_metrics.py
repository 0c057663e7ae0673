"""The metric in which the error of a coded weight is measured: second moments of the responses of its layer.

A weight is coded as it is stored, so its metric is that of the stored coefficients: the scale of the basis and the
standardisation of the kernel are part of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..network.layers import harmonic_layers, observable_layers
from ..plan import CodedWeight
from .collecting import EquationCollector, collect_together
from .equations import Layer, Problem
from .inputs import CalibrationSet
from .solvers import ChannelEquations, NormalEquations, Operator, Samples
from .tied_layers import LEAST_POSITIONS, TiedLayers, find_tied_layers, why_not_observed

# Weights with more columns are coded with the correlations within each input channel alone: a Cholesky factor of this
# size takes about half a minute on two cores.
MOST_COLUMNS = 8192
# For the choice of the levels, a metric over this many positions for each column is enough.
_POSITIONS_PER_COLUMN = 8
# Coding adds more than this share of the mean to the diagonal of a metric.
_TRUSTED = 2.0**-10
# An eigendecomposition of this size takes a second.
_LARGEST_EIGENPROBLEM = 1024


@dataclass(frozen=True)
class ErrorMetric:
    """Second moments of responses (blocks, columns, columns), float64 where they are used for rounding.

    A block is a group of the convolution, or one input channel of a group (``apart``). ``positions``: over how many
    positions they are the mean.
    """

    gram_BNN: Tensor
    apart: bool = False
    positions: int = 0

    def blocks(self, matrices_GON: Tensor) -> Tensor:
        """Return coefficients (groups, rows, columns) as (blocks, rows, columns of a block)."""
        if not self.apart:
            return matrices_GON
        return matrices_GON.unflatten(2, (-1, self.gram_BNN.shape[1])).transpose(1, 2).flatten(0, 1)

    def to(self, dtype: torch.dtype) -> ErrorMetric:
        """Return the moments in another dtype."""
        return ErrorMetric(self.gram_BNN.to(dtype), self.apart, self.positions)

    def of_columns(self, columns: Tensor) -> ErrorMetric:
        """Return the moments of some columns of each block, by their indices."""
        return ErrorMetric(self.gram_BNN[:, columns][:, :, columns], self.apart, self.positions)

    def from_blocks(self, blocks_BON: Tensor, groups: int) -> Tensor:
        """Return (groups, rows, columns); inverse of `blocks`."""
        if not self.apart:
            return blocks_BON
        return blocks_BON.unflatten(0, (groups, -1)).transpose(1, 2).flatten(2)


def spread_columns(size: int, most: int, frequencies: int) -> Tensor:
    """Return the indices of at most about ``most`` of ``size`` columns: those of channels at equal distances.

    >>> spread_columns(12, 6, 2).tolist()
    [0, 1, 4, 5, 10, 11]

    Args:
        frequencies: columns of each channel.
    """
    channels = size // frequencies
    count = min(channels, max(1, most // frequencies))
    chosen = torch.linspace(0, channels - 1, count).long()
    return (chosen[:, None] * frequencies + torch.arange(frequencies)).flatten()


def pooled(first: ErrorMetric, second: ErrorMetric) -> ErrorMetric:
    """Return the moments over the positions of both."""
    positions = first.positions + second.positions
    share = first.positions / max(positions, 1)
    return ErrorMetric(second.gram_BNN.lerp(first.gram_BNN, share), first.apart, positions)


def identity(weight: CodedWeight) -> ErrorMetric:
    """Return the metric of a weight whose inputs are not known: all coefficients count the same."""
    size = weight.layout.frequencies
    blocks = weight.layout.groups * weight.layout.channels
    return ErrorMetric(torch.eye(size, dtype=torch.float64).expand(blocks, size, size), apart=True)


def moments_of(problem: Problem, scales_F: Tensor) -> ErrorMetric | None:
    """Return the moments in the metric of the stored coefficients; None if the problem does not have them.

    Args:
        scales_F: the norm of each basis kernel.
    """
    layer, apart = problem.layer, isinstance(problem, ChannelEquations)
    if isinstance(problem, Operator) or (layer.unknowns > MOST_COLUMNS and not apart):
        return None
    assert isinstance(problem, NormalEquations | Samples)
    gram_GNN = _semidefinite(problem.centred_gram.to(torch.float64))
    # The moments of a large layer are a large part of the memory in use, so the new copy is changed in place.
    gram_GNN = layer.restricted(layer.restricted(gram_GNN / problem.count).mT)
    scales_N = scales_F.repeat(gram_GNN.shape[1] // len(scales_F)).to(gram_GNN)
    gram_GNN *= scales_N
    gram_GNN *= scales_N[:, None]
    return ErrorMetric(gram_GNN.cpu(), apart, problem.count)


def _semidefinite(gram_GNN: Tensor) -> Tensor:
    """Return second moments without negative eigenvalues.

    Centred moments are differences of sums in float32. Where inputs hardly vary, they are rounding errors, for example
    behind a mean over all positions. Large moments get a multiple of the identity instead of an eigendecomposition,
    which would take minutes: the least of a few multiples that is enough.
    """
    diagonal_GN = gram_GNN.diagonal(dim1=-2, dim2=-1)  # changed in place: a copy of the moments would need memory
    values_GN = diagonal_GN.clone()
    mean_G1, share_G1 = values_GN.mean(-1, keepdim=True), torch.full_like(values_GN[:, :1], _TRUSTED)
    large = gram_GNN.shape[-1] > _LARGEST_EIGENPROBLEM
    while bool((share_G1 <= (1 if large else _TRUSTED)).all()):
        diagonal_GN.copy_(values_GN + share_G1 * mean_G1)
        failed_G1 = torch.linalg.cholesky_ex(gram_GNN)[1][:, None] != 0
        if not failed_G1.any():
            diagonal_GN.copy_(values_GN + torch.where(share_G1 > _TRUSTED, share_G1, 0.0) * mean_G1)
            return gram_GNN
        share_G1 = torch.where(failed_G1, 4 * share_G1, share_G1)
    diagonal_GN.copy_(values_GN)
    values_GN, vectors_GNN = torch.linalg.eigh(gram_GNN)
    return vectors_GNN * values_GN.clamp_min(0)[..., None, :] @ vectors_GNN.mT


def measured_moments(
    network: nn.Module, weights: Sequence[CodedWeight], data: CalibrationSet, seed: int, memory: int
) -> Iterator[tuple[CodedWeight, tuple[ErrorMetric, ErrorMetric | None] | str]]:
    """Yield each weight with its moments on the inputs for the fit and on the others, or the reason why there are none.

    Raises:
        UsageError: the network does not run on the inputs.
    """
    layers = observable_layers(network)
    modules = {name: layers[name] for weight in weights for name in weight.names if name in layers}
    weight_of = {name: weight for weight in weights for name in weight.names}
    tied_layers, why = find_tied_layers(network, modules, data, memory)
    collectors = [_collector(tied, network, modules, data, seed, memory) for tied in tied_layers]
    measured = set()
    parts = [data.fit, data.held] if data.total > data.fit_total else [data.fit]
    for collector, result in collect_together(network, collectors, parts, memory, data.runs.complete):
        weight = weight_of[collector.tied.names[0]]
        measured.add(weight.key)
        if isinstance(result, str):
            yield weight, result
            continue
        norms = basis_norms(network, weight)
        moments = [one for part in result if (one := moments_of(part, norms)) is not None]
        yield weight, (moments[0], moments[1] if len(moments) > 1 else None)
    for weight in weights:
        if weight.key not in measured:
            reasons = [why[name] for name in weight.names if name in why]
            yield weight, reasons[0] if reasons else why_not_observed(weight.names[0], layers)


def basis_norms(network: nn.Module, weight: CodedWeight) -> Tensor:
    """Return the norm of each basis kernel of a weight's layer, (frequencies,)."""
    layer = harmonic_layers(network).get(weight.names[0])
    return torch.ones(1, dtype=torch.float64) if layer is None else layer.kernels.norm(dim=1).cpu()


class QuickEquations(NormalEquations):
    """Second moments in float32: exact enough for the choice of the levels, and those of all layers are in memory."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.gram_GNN = self.gram_GNN.float()

    def accumulate(self, z_RGN: Tensor, residual_RGO: Tensor) -> None:
        """Add responses to the sums; the residuals are zero."""
        self._add_moments(z_RGN)


def _collector(
    tied: TiedLayers, network: nn.Module, modules: Mapping[str, nn.Module], data: CalibrationSet, seed: int, memory: int
) -> EquationCollector:
    bytes = 48 * tied.groups * tied.unknowns**2
    whole = bytes <= memory and tied.unknowns <= MOST_COLUMNS
    rows = sum(shape[0] for _, shape in tied.calls)
    wanted = max(_POSITIONS_PER_COLUMN * tied.unknowns, LEAST_POSITIONS // 4) if whole else LEAST_POSITIONS // 4
    count = min(tied.sample_count, math.ceil(wanted / max(data.fit_total, 1) / rows))
    method: type[NormalEquations] = QuickEquations if whole else ChannelEquations
    return EquationCollector(tied, network, modules, seed, count, method, bytes if whole else 0)
