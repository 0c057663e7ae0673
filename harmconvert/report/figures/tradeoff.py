"""Figure 4: error against parameters as lambda varies; or against bytes as bits per weight vary."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from ..text import byte_unit
from ..tradeoff import Point, Tradeoff
from .canvas import BLUE, GREY, PALE, VERMILION, canvas


def draw_tradeoff(tradeoff: Tradeoff) -> Figure:
    """Draw the error against the size; without labels, the disagreement with the uncut network and the KL."""
    size = _coded_size(tradeoff) if tradeoff.coded else _parameters(tradeoff)
    panels = 1 if tradeoff.labelled else 2
    figure = canvas(6.8, 0.8 + 3.4 * panels)
    figure.set_layout_engine("constrained", h_pad=0.1)
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    if tradeoff.labelled:
        _curves(axes[0], tradeoff, size, _ERROR)
    else:
        _curves(axes[0], tradeoff, size, _DISAGREEMENT)
        _curves(axes[1], tradeoff, size, _DIVERGENCE)
    axes[-1].set_xlabel(size.label)
    whole = size.value(tradeoff.uncut)
    above = axes[0].secondary_xaxis("top", functions=(lambda x: 100 * x / whole, lambda x: x * whole / 100))
    above.set_xlabel(f"of the uncut network's {size.name}, %")
    axes[0].legend(loc="best")
    return figure


@dataclass(frozen=True)
class _Size:
    """The quantity on the x axis: its name, its label, and its value for a point."""

    name: str
    label: str
    value: Callable[[Point], float]


def _parameters(tradeoff: Tradeoff) -> _Size:
    units = ((1e9, ", thousand million"), (1e6, ", million"), (1e3, ", thousand"), (1.0, ""))
    scale, unit = next(one for one in units if tradeoff.uncut.parameters >= one[0] or one[0] == 1)
    return _Size("parameters", f"parameters{unit}", lambda point: point.parameters / scale)


def _coded_size(tradeoff: Tradeoff) -> _Size:
    scale, unit = byte_unit(max(point.bytes for point in tradeoff.every[1:]))
    return _Size("bytes", f"tensors in the file, {unit}", lambda point: point.bytes / scale)


@dataclass(frozen=True)
class _Quantity:
    """A quantity on the y axis: its label, its value for a point, and its interval for a point."""

    label: str
    value: Callable[[Point], float]
    interval: Callable[[Point], tuple[float, float]]


_ERROR = _Quantity("top-1 error, %", lambda p: p.error or 0.0, lambda p: p.error_interval or (0.0, 0.0))
_DISAGREEMENT = _Quantity(
    "top-1 other than the uncut network's, %", lambda p: p.disagreement, lambda p: p.disagreement_interval
)
_DIVERGENCE = _Quantity(
    "KL divergence from the uncut network", lambda p: p.divergence, lambda p: (p.divergence, p.divergence)
)


def _curves(ax: Axes, tradeoff: Tradeoff, size: _Size, quantity: _Quantity) -> None:
    """Draw the plain and the calibrated networks with their intervals, and the uncut network as a line."""
    ax.axhline(
        quantity.value(tradeoff.uncut), color=GREY, linewidth=1.0, linestyle=(0, (5, 3)), label="uncut", zorder=1
    )
    ax.axhspan(*quantity.interval(tradeoff.uncut), color=GREY, alpha=0.12, linewidth=0, zorder=0)
    names = ("coded", "coded, calibrated") if tradeoff.coded else ("plain cut", "calibrated")
    plain = [point for point in tradeoff.points if not point.calibrated]
    calibrated = [point for point in tradeoff.points if point.calibrated]
    if plain:
        _curve(ax, plain, size, quantity, (names[0], BLUE, "o"))
        _labels(ax, plain, size, quantity, (BLUE, 1))
    if calibrated:
        # The uncut network is the right end of both curves, but only one of them has its label.
        whole = [point for point in plain if "full" in point.lambdas]
        _curve(ax, [*whole, *calibrated], size, quantity, (names[1], VERMILION, "s"))
        _labels(ax, calibrated, size, quantity, (VERMILION, -1))
    if tradeoff.this_file:
        _curve(
            ax, [tradeoff.this_file], size, quantity, (f"this file, {tradeoff.this_file.bits:.3g} bits", "black", "D")
        )
    _scale(ax, [quantity.value(point) for point in tradeoff.every])
    ax.set_ylabel(quantity.label)
    ax.grid(axis="y", color=PALE, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.margins(x=0.12)
    ax.spines[["right"]].set_visible(False)


def _curve(ax: Axes, points: Sequence[Point], size: _Size, quantity: _Quantity, look: tuple[str, str, str]) -> None:
    name, colour, marker = look
    ys = [quantity.value(point) for point in points]
    bounds = [quantity.interval(point) for point in points]
    # Rounding may put the value slightly outside its interval.
    reach = [
        [max(0.0, y - low) for y, (low, _) in zip(ys, bounds, strict=True)],
        [max(0.0, high - y) for y, (_, high) in zip(ys, bounds, strict=True)],
    ]
    xs = [size.value(point) for point in points]
    ax.errorbar(
        xs, ys, reach, color=colour, marker=marker, markersize=5, linewidth=1.3, elinewidth=0.9, capsize=2.5, label=name
    )


def _labels(ax: Axes, points: Sequence[Point], size: _Size, quantity: _Quantity, look: tuple[str, int]) -> None:
    """Write the lambdas or the bits beside the points: above and to the right, or below and to the left."""
    colour, side = look
    for point in points:
        ax.annotate(
            ", ".join(f"λ = {lam}" if lam.isdecimal() else lam for lam in point.lambdas) or point.name,
            (size.value(point), quantity.value(point)),
            (5 * side, 4 * side),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            va="bottom" if side > 0 else "top",
            color=colour,
            fontsize=8.0,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )


def _scale(ax: Axes, values: Sequence[float]) -> None:
    """Begin the y axis at 0. If the largest value is at least 10 times the smallest, use a symlog scale."""
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
