"""The ranks that layers keep and the power of their outputs outside these ranks, as facts and as a chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..kernels.ranks import SPECTRUM_STEPS, full_rank
from ..layers.ranked import sizes_of
from ..network.low_rank import ranked_layers
from .charts import Axis, Chart, Heat, Series, counted
from .facts import LayerRank
from .text import layer_name

# The ends of the colour scale in percent of the power: a rank that loses less than the lower one loses nothing visible.
_LOW, _HIGH = 0.01, 100.0


def layer_ranks(model: nn.Module, refits: Mapping[str, Mapping[str, Any]]) -> tuple[LayerRank, ...]:
    """Return the layers of low rank in the order of the network; a shared layer appears once.

    Args:
        model: the network in harmonic form. refits: what the calibration recorded, by layer name.
    """
    facts = []
    for name, layer in ranked_layers(model).items():
        _, rows, channels, frequencies = sizes_of(layer)
        most = full_rank(rows, channels, frequencies, layer.kernel_second)
        spectrum = refits.get(name, {}).get("spectrum")
        facts.append(LayerRank(name, layer.rank, most, None if spectrum is None else tuple(map(float, spectrum))))
    return tuple(facts)


def rank_chart(layers: Sequence[LayerRank]) -> Chart | None:
    """Return a chart with a column for each layer of low rank; None if there is none.

    The colour at a height shows the power of the outputs that a rank of this share of the full rank loses. Without any
    spectrum, bars show the kept ranks.
    """
    if not layers:
        return None
    x = counted("layer of low rank, in the order of the network", len(layers))
    y = Axis("share of the full rank", 0.0, 1.0, False, (0.0, 0.25, 0.5, 0.75, 1.0))
    kept = tuple((number, layer.share, rank_text(layer)) for number, layer in enumerate(layers, 1))
    if all(layer.spectrum is None for layer in layers):
        return Chart("ranks", "Rank of each layer", x, y, (Series("rank kept", "bars", "a", kept),))
    heights = [(step + 0.5) / SPECTRUM_STEPS for step in reversed(range(SPECTRUM_STEPS))]
    rows = tuple(tuple(_percent(layer.outside_at(height)) for layer in layers) for height in heights)
    heat = Heat(rows, "output power outside a rank of this height", _LOW, _HIGH)
    levels = Series("rank kept", "levels", "b", kept)
    return Chart("ranks", "Output power outside each rank", x, y, (levels,), heat=heat)


def rank_text(layer: LayerRank) -> str:
    """Describe the rank of a layer in a few lines."""
    lines = [layer_name(layer.name), f"keeps rank {layer.rank} of {layer.full_rank} ({layer.share:.0%})"]
    if layer.outside is None:
        return "\n".join([*lines, "spectrum not recorded"])
    return "\n".join([*lines, f"output power outside the rank: {power_text(layer.outside)}"])


def power_text(share: float | None) -> str:
    """Return a share of power in percent with two significant digits.

    >>> power_text(0.0123), power_text(1.0), power_text(1e-9)
    ('1.2 %', '100 %', 'below 0.001 %')
    """
    if share is None:
        return ""
    return f"{100 * share:.2g} %".replace("1e+02", "100") if share >= 1e-5 else "below 0.001 %"


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
