"""What each layer of an uncut network is fed: second moments of its DCT responses, from which the output error of any
cut of that layer follows without running the network again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from ..layers.harmonic import HarmonicMixin
from .capture import ConvCall
from .equations import Layer, Problem
from .inputs import CalibrationSet
from .refit import DAMPINGS, weakest_damping
from .responses import responses
from .sites import LEAST_POSITIONS, Site, running_sites
from .solvers import NormalEquations
from .taking import Taking, taken_together

# Up to so many unknowns a layer's equations are solved whole: at the limit about half a minute on two cores.
MOST_UNKNOWNS = 4608


@dataclass(frozen=True)
class Moments:
    """One layer: second moments (G, I F, I F) of its responses to all basis kernels, damped as the weakest refit is,
    and its coefficients (G, O, I F). Where ``apart``, the input channels were taken as uncorrelated: G counts them all,
    and I is 1."""

    gram: Tensor
    coefficients: Tensor
    apart: bool


class ChannelEquations(NormalEquations):
    """Second moments within each input channel alone: linear in the channels, where all of them are quadratic."""

    name = "channels apart"

    def __init__(self, layer: Layer) -> None:
        # Across channels only means are shared, and those a bias or the batch norm behind repairs.
        Problem.__init__(self, replace(layer, fits_bias=True))
        count = len(layer.basis)
        groups = layer.coefficients.shape[0] * layer.unknowns // count
        self.gram_GNN = layer.coefficients.new_zeros(groups, count, count)
        self.sum_GN = layer.coefficients.new_zeros(groups, count)
        self.cross_GON = layer.coefficients.new_zeros(0)  # nothing is solved for

    def _keep(self, call: ConvCall, residual_RGO: Tensor, picks: Tensor | None) -> None:
        z_RGN = responses(call, self.layer.basis, picks).to(self.gram_GNN.device)
        z_GRN = z_RGN.reshape(len(z_RGN), *self.sum_GN.shape).transpose(0, 1)
        self.gram_GNN.baddbmm_(z_GRN.mT, z_GRN)
        self.sum_GN += z_GRN.sum(1)


def response_moments(
    converted: nn.Module, layers: Mapping[str, HarmonicMixin], data: CalibrationSet, seed: int, memory: int
) -> Iterator[tuple[tuple[str, ...], Moments | str]]:
    """The moments of each of ``layers`` that runs, in the order in which they run, on the inputs that are not held
    back; the reason in their place where there are none. Layers that share their coefficients come together.

    ``converted`` is the network in harmonic form, nothing cut; it is run for as many layers at once as ``memory`` bytes
    hold the moments of.

    Raises:
        UsageError: the network does not run on the inputs.
    """
    sites, odd = running_sites(converted, dict(layers), data, memory)
    yield from (((name,), why) for name, why in odd.items())
    waiting = [_taking(site, converted, layers, data, seed, memory) for site in sites]
    for taking, found in taken_together(converted, waiting, [data.fit], memory, data.runs.complete):
        yield taking.site.names, found if isinstance(found, str) else _moments(cast(NormalEquations, found[0]))


def _taking(
    site: Site,
    converted: nn.Module,
    layers: Mapping[str, HarmonicMixin],
    data: CalibrationSet,
    seed: int,
    memory: int,
) -> Taking:
    # The moments, the inverse that is made of them, and two copies on the way.
    bytes = 32 * site.groups * site.unknowns**2
    if bytes <= memory and site.unknowns <= MOST_UNKNOWNS:
        return Taking(site, converted, layers, seed, site.wanted, NormalEquations, bytes)
    # Apart, a channel's few unknowns want no more positions than any layer gets.
    wanted = math.ceil(LEAST_POSITIONS / data.fit_total / sum(shape[0] for _, shape in site.calls))
    return Taking(site, converted, layers, seed, wanted, ChannelEquations, 0)


def _moments(problem: NormalEquations) -> Moments:
    gram_GNN, coefficients_GON = problem.centred_gram, problem.layer.coefficients
    size, apart = gram_GNN.shape[1], isinstance(problem, ChannelEquations)
    if apart:
        coefficients_GON = coefficients_GON.unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1)
    power = gram_GNN.diagonal(dim1=1, dim2=2)
    # A dead group's responses are all zero; anything will do for its scale.
    scale_G1 = torch.where(power.sum(1, keepdim=True) > 0, power.mean(1, keepdim=True), 1.0)
    damping = max(weakest_damping(problem.count / size), DAMPINGS[-1])
    power += damping * scale_G1
    return Moments(gram_GNN, coefficients_GON, apart)
