"""What a checkpoint keeps of its conversion, so that a report can tell of it when the uncut network is gone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from ..convert import Conversion
from ..evaluation import Evaluation
from .kernels import layers_of

KEY = "conversion"
_DIGITS = 4  # of a mean |coefficient|: an eye sees two


def record_of(
    conversion: Conversion, original: nn.Module, held_out: Mapping[str, Evaluation] | None = None
) -> dict[str, Any]:
    """The entry for a checkpoint's history, for ``save(..., history=record_of(...))``: energy, error and the uncut
    spectrum of each layer, costs, and the budget search.

    >>> from harmconvert.convert import convert
    >>> network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3))
    >>> sorted(record_of(convert(network, 2), network)["conversion"])
    ['cost', 'drops', 'held_out', 'layers', 'search']

    Args:
        held_out: what the uncut and the converted network did on images that chose nothing.
    """
    cut = {layer.name for layer in conversion.plan.layers if not layer.whole}
    uncut = {layer.name: layer for layer in layers_of(original) if layer.name in cut}
    layers: dict[str, dict[str, Any]] = {}
    for layer in conversion.layers:
        if layer.skipped:
            continue
        layers[layer.name] = {"energy": layer.energy, "error": layer.error}
        # Of a layer that stays whole the coefficients themselves tell; a shared one has one name in `layers_of`.
        if layer.name in uncut and layer.energy is not None and conversion.plan.basis == "dct":
            means = uncut[layer.name].coefficients().abs().mean((0, 1)).tolist()
            layers[layer.name]["spectrum"] = [float(f"{mean:.{_DIGITS}g}") for mean in means]
    return {
        KEY: {
            "cost": asdict(conversion.cost),
            "layers": layers,
            "search": conversion.search.to_json() if conversion.search else None,
            "drops": [asdict(step) for step in conversion.drops],
            "held_out": {name: found.to_json() for name, found in held_out.items()} if held_out else None,
        }
    }
