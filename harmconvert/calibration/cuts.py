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

from ..basis import Frequency
from ..conv import HarmonicMixin
from .equations import Layer
from .inputs import CalibrationSet
from .sites import Site, running_sites
from .solvers import NormalEquations, solver
from .taking import Taking, taken_together


@dataclass(frozen=True)
class WholeLayer:
    """Equations of one layer, nothing of it cut, over the inputs fitted on and those held back."""

    frequencies: tuple[Frequency, ...]
    fit: NormalEquations
    held: NormalEquations

    def cut(self, layer: Layer, frequencies: Sequence[Frequency]) -> tuple[NormalEquations, NormalEquations]:
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
    waiting = [
        Taking(site, converted, layers, seed, site.wanted, NormalEquations, bytes)
        for site in sites
        if len(site.calls) == 1 and (bytes := _bytes(site, layers[site.names[0]], data, memory))
    ]
    for taking, found in taken_together(converted, waiting, [data.fit, data.held], memory):
        if not isinstance(found, str):
            (name,) = taking.site.names
            yield name, WholeLayer(layers[name].frequencies, *found)


def _bytes(site: Site, conv: HarmonicMixin, data: CalibrationSet, memory: int) -> int:
    """What both sets of moments take, and solving the equations of one cut beside them; 0 where that is too much."""
    groups, out = site.groups, conv.coefficients.numel() // (site.groups * site.unknowns)
    both = 16 * groups * site.unknowns**2
    positions = site.sampled * data.fit_total, site.sampled * (data.total - data.fit_total)
    fits = solver(groups, out, site.unknowns, *positions, memory - both, alone=False) is NormalEquations
    return both + 8 * groups * site.unknowns * (5 * site.unknowns + 6 * out) if fits else 0


def _cut(whole: NormalEquations, layer: Layer, kept: Sequence[int]) -> NormalEquations:
    frequencies = len(whole.layer.basis)
    first_N1 = torch.arange(0, whole.layer.unknowns, frequencies)[:, None]
    columns = (first_N1 + torch.tensor(kept)).flatten().to(whole.gram_GNN.device)
    answer_GON = torch.zeros_like(whole.layer.coefficients)
    answer_GON[:, :, columns] = layer.coefficients
    rest_GON = whole.layer.coefficients - answer_GON
    answered_GON, missed_GON = answer_GON @ whole.gram_GNN, rest_GON @ whole.gram_GNN

    def summed(coefficients_GON: Tensor) -> Tensor:
        return (coefficients_GON @ whole.sum_GN[..., None])[..., 0]

    cut = NormalEquations(layer)
    cut.count, cut.inputs = whole.count, whole.inputs
    cut.gram_GNN = whole.gram_GNN[:, columns][:, :, columns]
    cut.cross_GON = missed_GON[:, :, columns]
    cut.sum_GN = whole.sum_GN[:, columns]
    products = answered_GON * answer_GON, answered_GON * rest_GON, missed_GON * rest_GON
    squares = [product.sum(-1) for product in products]
    cut.channels = torch.stack([summed(rest_GON), summed(answer_GON), *squares, whole.channels[5]])
    return cut
