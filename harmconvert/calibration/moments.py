"""What each layer of an uncut network is fed: second moments of its DCT responses, from which the output error of any
cut of that layer follows without running the network again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from ..conv import HarmonicMixin
from ..distributed import any_rank
from .capture import ConvCall, explained, watch_convolutions
from .equations import Layer, Problem
from .inputs import Batch, CalibrationSet
from .layers import Kernel, refittable_bias
from .refit import DAMPINGS, weakest_damping
from .responses import outputs, pick_positions, responses
from .sites import LEAST_POSITIONS, Site, rows_of, running_sites
from .solvers import NormalEquations

# Up to so many unknowns a layer's equations are solved whole: at the limit about half a minute on two cores.
MOST_UNKNOWNS = 4608


@dataclass(frozen=True)
class Moments:
    """One layer: second moments (G, I F, I F) of its responses to all frequencies, damped as the weakest refit is, and
    its coefficients (G, O, I F). Where ``apart``, the input channels were taken as uncorrelated: G counts them all, and
    I is 1."""

    gram: Tensor
    coefficients: Tensor
    apart: bool


class ChannelEquations(NormalEquations):
    """Second moments within each input channel alone: linear in the channels, where all of them are quadratic."""

    name = "channels apart"

    def __init__(self, layer: Layer) -> None:
        # Across channels only means are shared, and those a bias or the batch norm behind repairs.
        Problem.__init__(self, replace(layer, fits_bias=True))
        frequencies = len(layer.basis)
        groups = layer.coefficients.shape[0] * layer.unknowns // frequencies
        self.gram_GNN = layer.coefficients.new_zeros(groups, frequencies, frequencies)
        self.sum_GN = layer.coefficients.new_zeros(groups, frequencies)
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
    waiting = [_Taking(site, converted, layers, data, seed, memory) for site in sites]
    while waiting:
        together = _first(waiting, memory)
        waiting = waiting[len(together) :]
        failure: Exception | None = None
        try:
            for batch in data.fit:
                _take_in(converted, together, batch)
        except Exception as error:
            failure = error
        if any_rank(failure is not None):  # or the sums of the others would wait for this one's
            raise failure or RuntimeError("another process could not take in its inputs")
        while together:
            taking = together.pop(0)  # and let go, once its moments are used
            yield taking.site.names, taking.moments()


class _Taking:
    """One site's equations as the inputs come in."""

    def __init__(
        self,
        site: Site,
        converted: nn.Module,
        layers: Mapping[str, HarmonicMixin],
        data: CalibrationSet,
        seed: int,
        memory: int,
    ) -> None:
        self.site, self.seed = site, seed
        self.modules = {name: layers[name] for name in site.names}
        self.fits_bias = refittable_bias(converted, list(self.modules.values())) is not None
        groups = cast(int, layers[site.names[0]].groups)
        # The moments, the inverse that is made of them, and two copies on the way.
        self.bytes = 32 * groups * site.unknowns**2
        self.apart = self.bytes > memory or site.unknowns > MOST_UNKNOWNS
        if self.apart:
            self.bytes = 0
        rows = sum(shape[0] for _, shape in site.calls)
        # Apart, a channel's few unknowns want no more positions than any layer gets.
        self.wanted = math.ceil(LEAST_POSITIONS / data.fit_total / rows) if self.apart else site.wanted
        self.problem: NormalEquations | None = None
        self.why: str | None = None

    def take(self, name: str, call: ConvCall | None, batch: Batch) -> None:
        if self.why is not None:
            return
        try:
            if call is None:
                raise ValueError("it convolves otherwise than once in a forward")
            if self.problem is None:
                layer = Kernel.of(self.modules[name], call).layer(call, self.fits_bias, self.wanted, self.seed)
                self.problem = ChannelEquations(layer) if self.apart else NormalEquations(layer)
            examples = rows_of(batch, len(call.input))
            picks = pick_positions(examples, call.output.shape[2:], self.wanted, self.seed)
            self.problem.add(call, outputs(call.output, picks), examples)
        except Exception as error:  # one layer's trouble must not cost the others theirs
            self.why = explained(error)

    def moments(self) -> Moments | str:
        if any_rank(self.problem is None or self.why is not None):
            return self.why or "another process could not take in its inputs"
        assert self.problem is not None
        self.problem.reduce()
        if not self.problem.finite:
            return "its activations are NaN or infinite on the calibration inputs"
        gram_GNN, layer = self.problem.centred_gram, self.problem.layer
        size = gram_GNN.shape[1]
        coefficients_GON = layer.coefficients
        if self.apart:
            coefficients_GON = coefficients_GON.unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1)
        power = gram_GNN.diagonal(dim1=1, dim2=2)
        # A dead group's responses are all zero; anything will do for its scale.
        scale_G1 = torch.where(power.sum(1, keepdim=True) > 0, power.mean(1, keepdim=True), 1.0)
        damping = max(weakest_damping(self.problem.count / size), DAMPINGS[-1])
        power += damping * scale_G1
        return Moments(gram_GNN, coefficients_GON, self.apart)


def _take_in(converted: nn.Module, together: Sequence[_Taking], batch: Batch) -> None:
    owner = {name: taking for taking in together for name in taking.modules}
    modules = {name: taking.modules[name] for name, taking in owner.items()}
    calls = sum(len(taking.site.calls) for taking in together)
    watch_convolutions(converted, modules, batch.input, lambda name, call: owner[name].take(name, call, batch), calls)


def _first(waiting: Sequence[_Taking], memory: int) -> list[_Taking]:
    """As many of the first as ``memory`` holds the moments of, one at least."""
    used, count = 0, 0
    for taking in waiting:
        used += taking.bytes
        if count and used > memory:
            break
        count += 1
    return list(waiting[:count])
