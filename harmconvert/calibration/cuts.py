"""What the refit of any cut of one layer is solved from, by one look at what the whole layer is fed.

Where nothing before a layer is cut, x' is x, and what the cut layer answers wrongly is linear in the responses z to the
whole basis: u = (C - C_S) z, with C the coefficients of the whole layer and C_S those kept, zero elsewhere. All sums
that the equations of a cut are made of are then products of these with the second moments and the mean of z.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels.basis import Frequency
from ..layers.harmonic import HarmonicMixin
from .equations import Layer
from .inputs import CalibrationSet
from .sites import Site, running_sites
from .solvers import NormalEquations, Operator, Samples, bytes_of
from .taking import Equations, Taking, taken_together


@dataclass(frozen=True)
class WholeLayer:
    """Equations of one layer, nothing of it cut, over the inputs fitted on and those held back."""

    frequencies: tuple[Frequency, ...]
    fit: Equations
    held: Equations

    def cut(self, layer: Layer, frequencies: Sequence[Frequency]) -> tuple[Equations, Equations]:
        """Those of the layer with ``frequencies`` kept, as `Layer` describes it then, and all else whole."""
        kept = [self.frequencies.index(frequency) for frequency in frequencies]
        return _cut(self.fit, layer, kept), _cut(self.held, layer, kept)


def whole_layers(
    converted: nn.Module, layers: Mapping[str, HarmonicMixin], data: CalibrationSet, seed: int, memory: int
) -> Iterator[tuple[str, WholeLayer]]:
    """Each of ``layers`` by name, in the order in which they run; left out are those that share their coefficients or
    run twice, because then a cut changes what they are fed, and those whose moments ``memory`` bytes do not hold.

    ``converted`` is the network in harmonic form, nothing cut.

    Raises:
        UsageError: the network does not run on the inputs.
    """
    if data.total == data.fit_total:
        return  # nothing to choose on
    sites, _ = running_sites(converted, dict(layers), data, memory)
    waiting = []
    for site in sites:
        bytes = _bytes(site, layers[site.names[0]], data)
        if len(site.calls) == 1 and site.method is not Operator and bytes <= memory:
            hold = NormalEquations if site.method is NormalEquations else Samples
            waiting.append(Taking(site, converted, layers, seed, site.wanted, hold, bytes))
    for taking, found in taken_together(converted, waiting, [data.fit, data.held], memory, data.runs.complete):
        if not isinstance(found, str):
            (name,) = taking.site.names
            yield name, WholeLayer(layers[name].frequencies, *found)


def _bytes(site: Site, conv: HarmonicMixin, data: CalibrationSet) -> int:
    """What is held of the whole layer, fitted on and held back, and the equations of one cut beside it."""
    out = conv.coefficients.numel() // (site.groups * site.unknowns)
    fit, held = site.sampled * data.fit_total, site.sampled * (data.total - data.fit_total)
    whole = 2 * site.unknowns if site.method is NormalEquations else fit + held
    return 8 * site.groups * whole * site.unknowns + bytes_of(site.method, site.groups, out, site.unknowns, fit, held)


def _cut(whole: Equations, layer: Layer, kept: Sequence[int]) -> Equations:
    first_N1 = torch.arange(0, whole.layer.unknowns, len(whole.layer.basis))[:, None]
    columns = (first_N1 + torch.tensor(kept)).flatten().to(whole.channels.device)
    answer_GON = torch.zeros_like(whole.layer.coefficients)
    answer_GON[:, :, columns] = layer.coefficients
    rest_GON = whole.layer.coefficients - answer_GON
    if isinstance(whole, NormalEquations):
        cut, sums = _cut_moments(whole, layer, columns, answer_GON, rest_GON)
    else:
        cut, sums = _cut_samples(whole, layer, columns, answer_GON, rest_GON)
    cut.count, cut.inputs = whole.count, whole.inputs
    cut.channels = torch.stack([*sums, whole.channels[5]])
    return cut


def _cut_moments(
    whole: NormalEquations, layer: Layer, columns: Tensor, answer_GON: Tensor, rest_GON: Tensor
) -> tuple[Equations, list[Tensor]]:
    """The equations, and the sums of u, a, a a, a u and u u (`Problem.channels`)."""
    answered_GON, missed_GON = answer_GON @ whole.gram_GNN, rest_GON @ whole.gram_GNN
    cut = NormalEquations(layer)
    cut.gram_GNN = whole.gram_GNN[:, columns][:, :, columns]
    cut.cross_GON = missed_GON[:, :, columns]
    cut.sum_GN = whole.sum_GN[:, columns]
    products = answered_GON * answer_GON, answered_GON * rest_GON, missed_GON * rest_GON
    means = [(coefficients @ whole.sum_GN[..., None])[..., 0] for coefficients in (rest_GON, answer_GON)]
    return cut, [*means, *(product.sum(-1) for product in products)]


def _cut_samples(
    whole: Samples, layer: Layer, columns: Tensor, answer_GON: Tensor, rest_GON: Tensor
) -> tuple[Equations, list[Tensor]]:
    """The same of responses held one by one; what is left of the unknowns may be fewer than they are."""
    z_GRN, _ = whole.everything()
    answer_RGO, residual_RGO = ((z_GRN @ by.mT).transpose(0, 1) for by in (answer_GON, rest_GON))
    cut = NormalEquations(layer) if layer.unknowns <= whole.count else Samples(layer)
    cut.keep(z_GRN[:, :, columns].transpose(0, 1), residual_RGO)
    cut.reduce()
    terms = residual_RGO, answer_RGO, answer_RGO**2, answer_RGO * residual_RGO, residual_RGO**2
    return cut, [term.sum(0) for term in terms]
