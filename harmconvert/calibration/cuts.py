"""Compute the equations of every possible cut of one layer from one run of the whole network.

If no layer before a layer is cut, its input in the converted network is the same as in the original. Then the output
error of the cut layer is linear in the responses z to the whole basis: u = (C - C_S) z, with C the coefficients of the
whole layer and C_S the kept ones (zero elsewhere). So all sums in the equations of a cut are products of these
coefficients with the second moments and the mean of z.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels.basis import Frequency, all_frequencies
from ..layers.harmonic import is_harmonic_layer
from ..network.layers import kernel_size, parameter_of
from .collecting import EquationCollector, Equations, collect_together
from .equations import Layer
from .inputs import CalibrationSet
from .solvers import NormalEquations, Operator, Samples, bytes_of
from .tied_layers import TiedLayers, find_tied_layers


@dataclass(frozen=True)
class WholeLayer:
    """Equations of one uncut layer: ``fit`` over the inputs for the fit, ``held`` over those that are held back."""

    frequencies: tuple[Frequency, ...]
    fit: Equations
    held: Equations

    def cut(self, layer: Layer, conv: nn.Module) -> tuple[Equations, Equations]:
        """Return the equations for a cut of the layer: ``conv`` is the cut layer, and ``layer`` describes it."""
        kept = [self.frequencies.index(frequency) for frequency in _frequencies_of(conv)]
        return _equations_of_cut(self.fit, layer, kept), _equations_of_cut(self.held, layer, kept)


def whole_layers(
    converted: nn.Module, layers: Mapping[str, nn.Module], data: CalibrationSet, seed: int, memory: int
) -> Iterator[tuple[str, WholeLayer]]:
    """Yield the equations of each uncut layer by name, in the order in which the layers run.

    Left out are layers that share coefficients or run twice, because then a cut changes their input, and layers whose
    equations need more than ``memory`` bytes.

    Args:
        converted: the network in harmonic form, with nothing cut.
        layers: the layers of ``converted`` to measure.

    Raises:
        UsageError: the network does not run on the inputs.
    """
    if data.total == data.fit_total:
        return  # no inputs are held back, so no refit can be chosen
    tied_layers, _ = find_tied_layers(converted, dict(layers), data, memory)
    collectors = []
    for tied in tied_layers:
        bytes = _bytes_needed(tied, layers[tied.names[0]], data)
        if len(tied.calls) == 1 and tied.method is not Operator and bytes <= memory:
            method = NormalEquations if tied.method is NormalEquations else Samples
            collectors.append(EquationCollector(tied, converted, layers, seed, tied.sample_count, method, bytes))
    parts = [data.fit, data.held]
    for collector, result in collect_together(converted, collectors, parts, memory, data.runs.complete):
        if not isinstance(result, str):
            (name,) = collector.tied.names
            yield name, WholeLayer(_frequencies_of(layers[name]), *result)


def _frequencies_of(layer: nn.Module) -> tuple[Frequency, ...]:
    """Return the frequencies of a layer; the positions of its kernel if it is not harmonic."""
    return layer.frequencies if is_harmonic_layer(layer) else all_frequencies(kernel_size(layer) or (1,))


def _bytes_needed(tied: TiedLayers, conv: nn.Module, data: CalibrationSet) -> int:
    """Return the memory for both sets of equations of the whole layer, and for the equations of one cut."""
    out = parameter_of(conv).numel() // (tied.groups * tied.unknowns)
    fit = tied.sampled_per_input * data.fit_total
    held = tied.sampled_per_input * (data.total - data.fit_total)
    whole = 2 * tied.unknowns if tied.method is NormalEquations else fit + held
    return 8 * tied.groups * whole * tied.unknowns + bytes_of(tied.method, tied.groups, out, tied.unknowns, fit, held)


def _equations_of_cut(whole: Equations, layer: Layer, kept: Sequence[int]) -> Equations:
    first_N1 = torch.arange(0, whole.layer.unknowns, len(whole.layer.basis))[:, None]
    columns = (first_N1 + torch.tensor(kept)).flatten().to(whole.channels.device)
    kept_GON = torch.zeros_like(whole.layer.coefficients)
    kept_GON[:, :, columns] = layer.coefficients
    removed_GON = whole.layer.coefficients - kept_GON
    if isinstance(whole, NormalEquations):
        cut, sums = _cut_moments(whole, layer, columns, kept_GON, removed_GON)
    else:
        cut, sums = _cut_samples(whole, layer, columns, kept_GON, removed_GON)
    cut.count, cut.inputs = whole.count, whole.inputs
    cut.channels = torch.stack([*sums, whole.channels[5]])
    return cut


def _cut_moments(
    whole: NormalEquations, layer: Layer, columns: Tensor, kept_GON: Tensor, removed_GON: Tensor
) -> tuple[Equations, list[Tensor]]:
    """Return the equations of a cut, and the sums of u, a, a a, a u and u u (see `Problem.channels`)."""
    kept_gram_GON, removed_gram_GON = kept_GON @ whole.gram_GNN, removed_GON @ whole.gram_GNN
    cut = NormalEquations(layer)
    cut.gram_GNN = whole.gram_GNN[:, columns][:, :, columns]
    cut.cross_GON = removed_gram_GON[:, :, columns]
    cut.sum_GN = whole.sum_GN[:, columns]
    products = kept_gram_GON * kept_GON, kept_gram_GON * removed_GON, removed_gram_GON * removed_GON
    means = [(coefficients @ whole.sum_GN[..., None])[..., 0] for coefficients in (removed_GON, kept_GON)]
    return cut, [*means, *(product.sum(-1) for product in products)]


def _cut_samples(
    whole: Samples, layer: Layer, columns: Tensor, kept_GON: Tensor, removed_GON: Tensor
) -> tuple[Equations, list[Tensor]]:
    """Return the same as `_cut_moments` if all responses are stored.

    A cut has fewer unknowns, so it may have more positions than unknowns although the whole layer has not.
    """
    z_GRN, _ = whole.all_samples()
    output_RGO, residual_RGO = ((z_GRN @ by.mT).transpose(0, 1) for by in (kept_GON, removed_GON))
    cut = NormalEquations(layer) if layer.unknowns <= whole.count else Samples(layer)
    cut.accumulate(z_GRN[:, :, columns].transpose(0, 1), residual_RGO)
    cut.reduce()
    terms = residual_RGO, output_RGO, output_RGO**2, output_RGO * residual_RGO, residual_RGO**2
    return cut, [term.sum(0) for term in terms]
