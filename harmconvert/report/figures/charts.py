"""The charts of the page as images: the same positions, marks and colours, with layer names instead of hover texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from ..charts import BAR_WIDTH, Axis, Chart, Heat, Series
from ..sheets import Sheet
from .canvas import BLUE, COLOURS, GREY, PALE, VERMILION, canvas, label, share_bar

NAMED = 64  # the largest number of layers whose names are written
_LONGEST = 32  # letters of a name; longer names are shortened
_COLOURS = {"a": BLUE, "b": VERMILION, "grey": GREY}


def draw_sheet(sheet: Sheet) -> Figure:
    """Draw the charts below each other. If x counts layers, their names are below the last chart."""
    named = 0 < len(sheet.names) <= NAMED
    figure = canvas(6.8, 3.1 * len(sheet.charts) + 0.3 + (names_height(sheet.names) if named else 0.0))
    figure.set_layout_engine("constrained", h_pad=0.1)
    axes = figure.subplots(len(sheet.charts), 1, squeeze=False)[:, 0]
    for ax, chart in zip(axes, sheet.charts, strict=True):
        _chart(figure, ax, chart)
    if named:
        for ax in axes[:-1]:
            ax.set_xlabel("")
        layer_names(axes[-1], sheet.names, 1)
    return figure


def names_height(names: Sequence[str]) -> float:
    """Return the height in inches that `layer_names` needs."""
    return 0.085 * max(len(label(name, _LONGEST)) for name in names)


def layer_names(ax: Axes, names: Sequence[str], first: float) -> None:
    """Write a name, rotated upwards, below each whole number of x; the first name is at ``first``."""
    ax.set_xticks([first + index for index in range(len(names))], [label(name, _LONGEST) for name in names])
    ax.tick_params(axis="x", length=0, labelsize=min(8.0, 340 / len(names)), labelrotation=90)


def _chart(figure: Figure, ax: Axes, chart: Chart) -> None:
    _axis(ax, chart.x, "x")
    _axis(ax, chart.y, "y")
    incomplete = chart.heat is not None and not chart.heat.complete
    entries = sum(bool(series.name) for series in chart.series) + bool(chart.limit) + incomplete
    columns = entries if entries <= 3 else 2
    ax.set_title(chart.title, pad=12 + 14 * math.ceil(entries / columns))
    if chart.limit:
        ax.axvline(chart.limit[0], color=PALE, linewidth=4.0, zorder=0, label=chart.limit[1])
    if chart.heat:
        _heat(figure, ax, chart, chart.heat)
    for x, low, high in chart.stems:
        ax.plot([x, x], [low, high], color=GREY, linewidth=0.7, alpha=0.6, zorder=1.5)
    for series in chart.series:
        _series(ax, series, chart.y)
    if not chart.heat:
        ax.grid(axis="y", color=PALE, linewidth=0.6)
        ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
    # Above the plot, so that the legend covers no points.
    ax.legend(
        loc="lower left", bbox_to_anchor=(0, 1.02), ncols=columns, borderaxespad=0, borderpad=0, handlelength=1.0,
        handletextpad=0.4, columnspacing=1.4,
    )  # fmt: skip


def _heat(figure: Figure, ax: Axes, chart: Chart, heat: Heat) -> None:
    """Draw the colours behind a chart, and their scale above it."""
    cells = np.array(heat.shares(), dtype=float)  # None becomes NaN
    ax.imshow(
        np.ma.masked_invalid(cells), COLOURS, vmin=0, vmax=1, aspect="auto", interpolation="nearest", zorder=0.5,
        extent=(chart.x.low, chart.x.high, chart.y.low, chart.y.high),
    )  # fmt: skip
    share_bar(figure, [ax], heat.label, ScalarMappable(LogNorm(heat.low, heat.high), COLOURS))
    if not heat.complete:
        ax.set_facecolor(PALE)
        ax.scatter([], [], marker="s", color=PALE, label="not recorded")


def _axis(ax: Axes, axis: Axis, which: Literal["x", "y"]) -> None:
    matplotlib_axis = getattr(ax, f"{which}axis")
    if axis.log:
        ax.set(**{f"{which}scale": "log"})
        matplotlib_axis.set_minor_locator(NullLocator())
        matplotlib_axis.set_minor_formatter(NullFormatter())
    ax.set(**{f"{which}lim": (axis.low, axis.high), f"{which}label": axis.label})
    matplotlib_axis.set_ticks(axis.ticks, [words for _, words in axis.words()])
    ax.tick_params(axis=which, length=0 if which == "y" else 2, labelsize=8.0)


def _series(ax: Axes, series: Series, y: Axis) -> None:
    colour = _COLOURS[series.colour]
    # A value outside the axis, such as 0 on a logarithmic axis, is drawn at the end of the axis.
    xs, ys = [x for x, _, _ in series.points], [min(max(value, y.low), y.high) for _, value, _ in series.points]
    legend = series.name or "_"  # matplotlib omits names that begin with _ from the legend
    if series.look == "line":
        ax.plot(xs, ys, color=colour, linewidth=1.2, label=legend, clip_on=False)
        return
    if series.look == "bars":
        ax.bar(xs, ys, BAR_WIDTH, color=colour, linewidth=0, label=legend)
        return
    if series.look == "levels":
        for under, width in (("white", 3.2), (colour, 1.6)):
            ends = [x - 0.5 for x in xs], [x + 0.5 for x in xs]
            name = legend if under == colour else "_"
            ax.hlines(ys, *ends, under, linewidth=width, label=name, zorder=2, capstyle="projecting")
        return
    size = 11.0 if series.look == "halo" else 4.5 if len(xs) <= 200 else 2.5
    hollow = {"markerfacecolor": "white" if series.look == "rings" else "none", "markeredgewidth": 1.3}
    ax.plot(
        xs, ys, "o", color=colour, markersize=size, label=legend, clip_on=False, zorder=3,
        **(hollow if series.look in ("rings", "halo") else {"markeredgewidth": 0}),
    )  # fmt: skip
