"""Cost of plans as time: each layer is measured on this machine, in the form that is faster here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..calibration import Progress
from ..layers.layer_times import LayerInput, layer_times
from ..layers.low_rank import reason_without_fast_form
from ..network.forms import layer_inputs
from ..network.layers import converted_layers, kernel_size, weighted_layers
from ..network.tracing import Trace
from ..plan import LayerPlan, Plan, apply_plan
from .choices import Choice, Item

# Convolutions and linear layers are taken to need at most this share of a network's time.
LARGEST_SHARE = 0.95


def latency_costs(
    model: nn.Module,
    items: Sequence[Item],
    example_input: Any,
    trace: Trace,
    whole: float,
    progress: Progress,
) -> tuple[int, list[list[int]]]:
    """Return the time of a forward pass, and by how much each choice of each item changes it, in microseconds.

    A layer runs factored where that is faster on this machine, else dense. Each layer is timed alone (`layer_times`
    stores the times), and the times are added up.

    Args:
        whole: seconds of a forward pass of the uncut network in its dense form.
    """
    convs = weighted_layers(model)
    inputs_by_name = layer_inputs(model, {name: convs[name] for item in items for name in item.names}, example_input)
    total, done = sum(len(item.choices) - 1 for item in items), 0
    gains: list[list[float]] = []  # seconds saved by each choice except the first, which keeps everything
    parts: list[float] = []  # seconds of each item's layers in the dense form
    for item in items:
        calls = {
            name: trace.layers[name].calls for name in item.names if name in inputs_by_name and name in trace.layers
        }
        row, dense_times = [], []
        for choice in item.choices[1:]:
            progress(done, total, f"timing {item.names[0]}")
            done += 1
            times = {name: _times_of_both_forms(convs[name], inputs_by_name[name], choice) for name in calls}
            row.append(sum(calls[name] * max(0.0, dense - factored) for name, (dense, factored) in times.items()))
            dense_times.append(sum(calls[name] * dense for name, (dense, _) in times.items()))
        gains.append(row)
        parts.append(max(dense_times, default=0.0))
    progress(total, total, "all layers timed")
    # Layers timed alone, at another moment, may need more time in sum than the whole network did.
    time_of_all = sum(parts)
    scale = min(1.0, LARGEST_SHARE * whole / time_of_all) if time_of_all else 1.0
    return round(1e6 * whole), [[0, *(-round(1e6 * scale * gain) for gain in row)] for row in gains]


def _times_of_both_forms(conv: nn.Module, layer_input: LayerInput, choice: Choice) -> tuple[float, float]:
    """Return the seconds of a call in the dense and the factored form; 0 for both where it cannot be factored."""
    layer = LayerPlan("", kernel_size(conv), choice)
    converted = apply_plan(conv, Plan((layer,)))
    if not converted_layers(converted) or reason_without_fast_form(converted):
        return 0.0, 0.0
    return layer_times(converted, layer_input)
