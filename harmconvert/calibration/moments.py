"""Measure the second moments of the responses in each layer of an uncut network.

The output error of any cut of a layer follows from these moments, without running the network again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..layers.harmonic import HarmonicMixin
from .collecting import EquationCollector, collect_together
from .inputs import CalibrationSet
from .refit import DAMPINGS, weakest_damping
from .solvers import ChannelEquations, NormalEquations
from .tied_layers import LEAST_POSITIONS, TiedLayers, find_tied_layers

# Layers with more unknowns are measured channel by channel. At the limit the equations of all channels together take
# about half a minute on two cores.
MOST_UNKNOWNS = 4608


@dataclass(frozen=True)
class Moments:
    """The moments of one layer.

    ``gram`` (G, I F, I F): second moments of its responses to all basis kernels, with the weakest damping of a refit.
    ``coefficients`` (G, O, I F). ``apart``: correlations between input channels were ignored; then G counts all input
    channels of all groups, and I is 1.
    """

    gram: Tensor
    coefficients: Tensor
    apart: bool


def response_moments(
    converted: nn.Module, layers: Mapping[str, HarmonicMixin], data: CalibrationSet, seed: int, memory: int
) -> Iterator[tuple[tuple[str, ...], Moments | str]]:
    """Yield the names of layers with their moments on the inputs for the fit, in the order in which the layers run.

    Instead of the moments there may be a text: the reason why there are none. Layers that share coefficients are
    measured together.

    Args:
        converted: the network in harmonic form, with nothing cut.
        layers: the layers of ``converted`` to measure.
        memory: in one run, as many layers are measured as have moments of this many bytes.

    Raises:
        UsageError: the network does not run on the inputs.
    """
    tied_layers, not_measurable = find_tied_layers(converted, dict(layers), data, memory)
    yield from (((name,), why) for name, why in not_measurable.items())
    collectors = [_collector(tied, converted, layers, data, seed, memory) for tied in tied_layers]
    for collector, result in collect_together(converted, collectors, [data.fit], memory, data.runs.complete):
        yield collector.tied.names, result if isinstance(result, str) else _moments(cast(NormalEquations, result[0]))


def _collector(
    tied: TiedLayers,
    converted: nn.Module,
    layers: Mapping[str, HarmonicMixin],
    data: CalibrationSet,
    seed: int,
    memory: int,
) -> EquationCollector:
    # Memory for the moments, their inverse, and two temporary copies.
    bytes = 32 * tied.groups * tied.unknowns**2
    if bytes <= memory and tied.unknowns <= MOST_UNKNOWNS:
        return EquationCollector(tied, converted, layers, seed, tied.sample_count, NormalEquations, bytes)
    # A single channel has few unknowns, so the least number of positions is enough.
    sample_count = math.ceil(LEAST_POSITIONS / data.fit_total / sum(shape[0] for _, shape in tied.calls))
    return EquationCollector(tied, converted, layers, seed, sample_count, ChannelEquations, 0)


def _moments(problem: NormalEquations) -> Moments:
    gram_GNN, coefficients_GON = problem.centred_gram, problem.layer.coefficients
    size, apart = gram_GNN.shape[1], isinstance(problem, ChannelEquations)
    if apart:
        coefficients_GON = coefficients_GON.unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1)
    power = gram_GNN.diagonal(dim1=1, dim2=2)
    # If all responses of a group are zero, its scale does not matter.
    scale_G1 = torch.where(power.sum(1, keepdim=True) > 0, power.mean(1, keepdim=True), 1.0)
    damping = max(weakest_damping(problem.count / size), DAMPINGS[-1])
    power += damping * scale_G1
    return Moments(gram_GNN, coefficients_GON, apart)
