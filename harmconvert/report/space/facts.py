"""The facts about layers that come from the space axis: kept frequencies and spectra."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from torch import nn

from ...errors import counted
from ...kernels.basis import Frequency, all_frequencies
from ...plan import Frequencies, LayerPlan, Plan, bases_text
from ..facts import LayerFacts
from .kernels import layers_of
from .spectrum import spectrum


def planned_facts(layer: LayerPlan, kind: str) -> LayerFacts:
    """Return the facts that the plan contains; a layer that is not on the space axis keeps its whole kernel."""
    space = layer.on("space")
    if isinstance(space, Frequencies):
        keeps, levels = _keeps(space.kernel_size, space.frequencies), space.levels
    else:
        keeps, levels = (True,) * prod(layer.kernel_size), None
    other_axes = ", ".join(str(kept) for kept in layer.keeps if kept is not space and not kept.whole)
    counts = sum(keeps), len(keeps)
    return LayerFacts(layer.name, kind, layer.kernel_size, *counts, keeps, levels, other_axes=other_axes)


def block_facts(model: nn.Module, planned: Collection[str]) -> list[LayerFacts]:
    """Return the facts about harmonic layers that are not in the plan: blocks were never plain convolutions."""
    why = "a block with weights of its own for each frequency"
    facts = []
    for layer in layers_of(model):
        if layer.harmonic and layer.name not in planned:
            keeps = _keeps(layer.kernel_size, layer.frequencies)
            counts = sum(keeps), len(keeps)
            facts.append(LayerFacts(layer.name, "HarmonicBlock2d", layer.kernel_size, *counts, keeps, None, why=why))
    return facts


def with_spectra(
    layers: Sequence[LayerFacts], model: nn.Module, plan: Plan, recorded: Mapping[str, Mapping[str, Any]]
) -> list[LayerFacts]:
    """Return the layers with their spectra if the basis is the DCT.

    The spectrum of the uncut kernel is used if `convert` recorded it, else that of the coefficients.
    """
    if bases_text(plan) != "dct" or not layers_of(model):
        return list(layers)
    spectra = {layer.name: layer.magnitudes for layer in spectrum(model).layers}
    facts = []
    for layer in layers:
        if layer.kept and layer.name in spectra:
            before_cut = recorded.get(layer.name, {}).get("spectrum")
            if before_cut is not None and len(before_cut) == layer.total:
                layer = replace(layer, spectrum=tuple(map(float, before_cut)), spectrum_uncut=True)
            else:
                layer = replace(layer, spectrum=spectra[layer.name])
        facts.append(layer)
    return facts


def kept_text(layer: LayerFacts) -> str:
    """Return how many frequencies a layer keeps, for the page."""
    lam = f" (λ = {layer.levels})" if layer.levels and layer.cut else ""
    return f"keeps {layer.kept} of {counted(layer.total, 'frequency')}{lam}"


def _keeps(kernel_size: Sequence[int], frequencies: Sequence[Frequency]) -> tuple[bool, ...]:
    kept = set(frequencies)
    return tuple(frequency in kept for frequency in all_frequencies(kernel_size))
