"""What plans cost on a clock: measured times of layers in the form that is faster here, not multiplications."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..calibration import Progress
from ..layers.factored import reason_not_factorable
from ..layers.layer_times import Site, layer_times
from ..network.forms import sites_of
from ..network.layers import convolutions, is_harmonic_layer, kernel_size
from ..network.tracing import Trace
from ..plan import LayerPlan, Plan, apply_plan
from .choices import Choice, Item

# Convolutions over 1x1 are at most this share of a network's time.
MOST_OF_IT = 0.95


def latency_costs(
    model: nn.Module,
    items: Sequence[Item],
    example_input: Any,
    trace: Trace,
    whole: float,
    progress: Progress,
) -> tuple[int, list[list[int]]]:
    """Microseconds of a forward that takes ``whole`` seconds dense, and by how much each choice of each item changes
    that: a layer is factored where that is faster on this machine, else dense.

    Times of layers are taken alone and added up (`layer_times`, which keeps them); what `factor` then makes of the plan
    is measured as a whole.
    """
    convs = convolutions(model)
    sites = sites_of(model, {name: convs[name] for item in items for name in item.names}, example_input)
    total, done = sum(len(item.choices) - 1 for item in items), 0
    gains: list[list[float]] = []  # seconds by each choice but the whole
    parts: list[float] = []  # seconds of the layers themselves, dense
    for item in items:
        calls = {name: trace.layers[name].calls for name in item.names if name in sites and name in trace.layers}
        row, taken = [], []
        for choice in item.choices[1:]:
            progress(done, total, f"timing {item.names[0]}")
            done += 1
            times = {name: _times(convs[name], sites[name], choice) for name in calls}
            row.append(sum(calls[name] * max(0.0, dense - factored) for name, (dense, factored) in times.items()))
            taken.append(sum(calls[name] * dense for name, (dense, _) in times.items()))
        gains.append(row)
        parts.append(max(taken, default=0.0))
    progress(total, total, "all layers timed")
    # Layers alone, at another moment, may come to more than the whole that they are parts of.
    taken_by_all = sum(parts)
    scale = min(1.0, MOST_OF_IT * whole / taken_by_all) if taken_by_all else 1.0
    return round(1e6 * whole), [[0, *(-round(1e6 * scale * gain) for gain in row)] for row in gains]


def _times(conv: nn.Module, site: Site, choice: Choice) -> tuple[float, float]:
    """Seconds of a call in the dense and the factored form of a choice; 0 for both where there is no such form."""
    layer = LayerPlan("", kernel_size(conv), choice)
    converted = apply_plan(conv, Plan((layer,)))
    if not is_harmonic_layer(converted) or reason_not_factorable(converted):
        return 0.0, 0.0
    return layer_times(converted, site)
