"""What plans cost on a clock: measured times of layers in the form that is faster here, not multiplications."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

from torch import nn

from ..basis import Basis, Frequency
from ..calibration import Progress
from ..conv import HarmonicMixin, to_harmonic
from ..factored import reason_not_factorable
from ..forms import run_times, sites_of
from ..layer_times import Site, layer_times
from ..surgery import Trace, convolutions
from .choices import Item


def latency_costs(
    model: nn.Module, items: Sequence[Item], family: Basis, example_input: Any, trace: Trace, progress: Progress
) -> tuple[int, list[list[int]]]:
    """Microseconds of a forward of the whole network in its faster dense layout, and by how much each choice of each
    item changes that: a layer is factored where that is faster on this machine, else dense.

    Times of layers are taken alone and added up (`layer_times`, which keeps them); what `factor` then makes of the plan
    is measured as a whole.
    """
    whole = round(1e6 * min(run_times(model, example_input).values()))
    convs = convolutions(model)
    sites = sites_of(model, {name: convs[name] for item in items for name in item.names}, example_input)
    total, done = sum(len(item.sets) - 1 for item in items), 0
    changes = []
    for item in items:
        row = [0]
        for frequencies in item.sets[1:]:
            progress(done, total, f"timing {item.names[0]}")
            done += 1
            gain = partial(_gained, family=family, frequencies=frequencies)
            seconds = sum(
                trace.layers[name].calls * gain(convs[name], sites[name])
                for name in item.names
                if name in sites and name in trace.layers
            )
            row.append(-round(1e6 * seconds))
        changes.append(row)
    progress(total, total, "all layers timed")
    return whole, changes


def _gained(conv: nn.Module, site: Site, family: Basis, frequencies: tuple[Frequency, ...]) -> float:
    """Seconds that the factored form with those frequencies saves of one call, 0 where it saves nothing."""
    harmonic = cast(HarmonicMixin, to_harmonic(conv, frequencies, family))
    if reason_not_factorable(harmonic):
        return 0.0
    dense, factored = layer_times(harmonic, site)
    return max(0.0, dense - factored)
