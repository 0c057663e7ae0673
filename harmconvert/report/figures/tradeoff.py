"""Figure 4: error against parameters as lambda varies."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from ..tradeoff import Point, Tradeoff
from .canvas import BLUE, GREY, PALE, VERMILION, canvas


def draw_tradeoff(found: Tradeoff) -> Figure:
    """Error against parameters; without labels disagreement with the uncut network, and KL below it."""
    units = ((1e9, "thousand million"), (1e6, "million"), (1e3, "thousand"), (1.0, ""))
    size, unit = next(one for one in units if found.uncut.parameters >= one[0] or one[0] == 1)
    panels = 1 if found.labelled else 2
    figure = canvas(6.8, 0.8 + 3.4 * panels)
    figure.set_layout_engine("constrained", h_pad=0.1)
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    if found.labelled:
        _curves(axes[0], found, size, _ERROR)
    else:
        _curves(axes[0], found, size, _DISAGREEMENT)
        _curves(axes[1], found, size, _DIVERGENCE)
    axes[-1].set_xlabel(f"parameters, {unit}" if unit else "parameters")
    whole = found.uncut.parameters / size
    above = axes[0].secondary_xaxis("top", functions=(lambda x: 100 * x / whole, lambda x: x * whole / 100))
    above.set_xlabel("of the uncut network's parameters, %")
    axes[0].legend(loc="best")
    return figure


@dataclass(frozen=True)
class _Quantity:
    """What is drawn upwards: its label, its value of a point, and its interval."""

    label: str
    value: Callable[[Point], float]
    interval: Callable[[Point], tuple[float, float]]


_ERROR = _Quantity("top-1 error, %", lambda p: p.error or 0.0, lambda p: p.error_interval or (0.0, 0.0))
_DISAGREEMENT = _Quantity(
    "top-1 other than the uncut network's, %", lambda p: p.disagreement, lambda p: p.disagreement_interval
)
_DIVERGENCE = _Quantity(
    "KL from the uncut network, nats", lambda p: p.divergence, lambda p: (p.divergence, p.divergence)
)


def _curves(ax: Axes, found: Tradeoff, size: float, what: _Quantity) -> None:
    """The plain and the calibrated cuts with their intervals, and the uncut network as a line."""
    ax.axhline(what.value(found.uncut), color=GREY, linewidth=1.0, linestyle=(0, (5, 3)), label="uncut", zorder=1)
    ax.axhspan(*what.interval(found.uncut), color=GREY, alpha=0.12, linewidth=0, zorder=0)
    plain = [point for point in found.points if not point.calibrated]
    calibrated = [point for point in found.points if point.calibrated]
    _curve(ax, plain, size, what, ("plain cut", BLUE, "o"))
    _labels(ax, plain, size, what, (BLUE, 1))
    if calibrated:
        # Nothing is cut at the right end: both curves begin there, and one of them names it.
        whole = [point for point in plain if "full" in point.lambdas]
        _curve(ax, [*whole, *calibrated], size, what, ("calibrated", VERMILION, "s"))
        _labels(ax, calibrated, size, what, (VERMILION, -1))
    _scale(ax, [what.value(point) for point in (found.uncut, *found.points)])
    ax.set_ylabel(what.label)
    ax.grid(axis="y", color=PALE, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.margins(x=0.12)
    ax.spines[["right"]].set_visible(False)


def _curve(ax: Axes, points: Sequence[Point], size: float, what: _Quantity, look: tuple[str, str, str]) -> None:
    name, colour, marker = look
    ys = [what.value(point) for point in points]
    bounds = [what.interval(point) for point in points]
    # Rounding may leave the value a hair outside.
    reach = [
        [max(0.0, y - low) for y, (low, _) in zip(ys, bounds, strict=True)],
        [max(0.0, high - y) for y, (_, high) in zip(ys, bounds, strict=True)],
    ]
    xs = [point.parameters / size for point in points]
    ax.errorbar(
        xs, ys, reach, color=colour, marker=marker, markersize=5, linewidth=1.3, elinewidth=0.9, capsize=2.5, label=name
    )


def _labels(ax: Axes, points: Sequence[Point], size: float, what: _Quantity, look: tuple[str, int]) -> None:
    """The lambdas, up and to the right of the upper curve's points, or down and to the left of the lower one's."""
    colour, side = look
    for point in points:
        ax.annotate(
            ", ".join(f"λ = {lam}" if lam.isdecimal() else lam for lam in point.lambdas),
            (point.parameters / size, what.value(point)),
            (5 * side, 4 * side),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            va="bottom" if side > 0 else "top",
            color=colour,
            fontsize=8.0,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )


def _scale(ax: Axes, values: Sequence[float]) -> None:
    """From zero on; logarithmic but for the stretch next to it where values are of different orders."""
    most, least = max(values), min((value for value in values if value > 1e-6), default=1.0)
    if most < 10 * least:
        ax.set_ylim(bottom=0)
        ax.yaxis.set_major_locator(MaxNLocator(6))
        return
    decade = math.floor(math.log10(least))
    ax.set_yscale("symlog", linthresh=10.0**decade, linscale=0.5)
    ticks = [0.0, *(10.0**power for power in range(decade, math.ceil(math.log10(most)) + 1))]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_ylim(0, most * 2.5)
