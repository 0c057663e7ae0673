"""Figures 2, 3 and 4 of the paper, drawn by matplotlib from plain numbers; the same numbers give the same bytes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import singledispatch
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from .filters import FilterBank
from .kernels import size_text
from .spectrum import LayerSpectrum, Spectrum
from .tradeoff import Point, Tradeoff

DPI = 150
MAX_HEIGHT = 40.0  # inches: beyond that rows grow thinner instead
_LEVELS = colormaps["viridis"]
_SHARES = colormaps["cividis"]
# Okabe and Ito's colours, told apart by people who see fewer of them.
_BLUE, _VERMILION, _GREY, _PALE = "#0072B2", "#D55E00", "#555555", "#e4e4e4"
_STYLE = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "axes.linewidth": 0.6,
    "legend.frameon": False,
    # Names of layers are data: a $ in one is a $.
    "text.parse_math": False,
    # As outlines: a reader who lacks the font sees what was drawn; and the same names for the same things.
    "svg.fonttype": "path",
    "svg.hashsalt": "harmconvert",
}
# matplotlib would write its version and the time.
_METADATA: dict[str, dict[str, None]] = {"png": {"Software": None}, "svg": {"Creator": None, "Date": None}}


@contextmanager
def _style() -> Iterator[None]:
    """Our settings alone, whatever the user's matplotlibrc says; put back afterwards."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box stands for it
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def draw(found: FilterBank | Spectrum | Tradeoff) -> Figure:
    """The figure of these numbers."""
    with _style():
        return _draw(found)


def save(figure: Figure, path: Path, suffix: str) -> None:
    """Write a figure as ``.png`` or ``.svg``."""
    kind = suffix.removeprefix(".")
    with _style():
        figure.savefig(path, format=kind, metadata=_METADATA[kind], dpi=DPI, bbox_inches="tight", pad_inches=0.15)


@singledispatch
def _draw(found: Any) -> Figure:
    raise TypeError(f"there is no figure of a {type(found).__name__}")


# --- filters ---


@_draw.register
def _filters(bank: FilterBank) -> Figure:
    """Filters in the order of their indices, a frame in the colour of their level, and each lambda's outline."""
    high, wide = bank.kernel_size if len(bank.kernel_size) == 2 else (1, *bank.kernel_size)
    tile = min(0.95, max(0.2, 7 / max(high, wide)))
    figure, ax = _figure(tile * wide + 0.8, tile * high + 0.9)
    ax.set(xlim=(0, wide), ylim=(high, 0), aspect="equal")
    ax.set_title(_filters_title(bank), pad=26 if tile >= 0.6 else 18)
    levels = bank.lambdas[-1][0]
    for one in bank.filters:
        row, column = one.frequency if len(one.frequency) == 2 else (0, *one.frequency)
        faded = 1.0 if one.kept_by else 0.25
        colour = _LEVELS(0.95 * one.level / max(levels - 1, 1))
        ax.add_patch(Rectangle((column + 0.05, row + 0.05), 0.9, 0.9, color=colour, alpha=faded, linewidth=0))
        _filter_image(ax, one.values, bank.kernel_size, row, column, faded)
        if bank.cuts and tile >= 0.45:
            caption = f"{one.kept_by} of {bank.layers}" if tile >= 0.7 else str(one.kept_by)
            ax.text(column + 0.5, row + 0.985, caption, ha="center", va="bottom", fontsize=min(6.5, 9 * tile))
    in_use = {lam for lam, _ in bank.cuts}
    for lam, count in bank.lambdas:
        used = lam in in_use
        edges = _edges([[column < lam - row for column in range(wide)] for row in range(high)])
        colour, width = (_VERMILION, 2.2) if used else ("black", 0.9)
        ax.add_collection(LineCollection(edges, colors=colour, linewidths=width, capstyle="projecting"))
        if used or tile >= 0.3 or lam % 3 == 1:
            _lambda_label(ax, lam, count, wide, tile, colour)
    ax.set_xticks([column + 0.5 for column in range(wide)], range(wide))
    ax.set_yticks([row + 0.5 for row in range(high)], range(high))
    ax.tick_params(length=0, labelsize=min(9.0, 24 * tile))
    ax.set(xlabel="frequency along the width, v", ylabel="frequency along the height, u" if high > 1 else "")
    ax.spines[:].set_visible(False)
    return figure


def _filters_title(bank: FilterBank) -> str:
    title = f"{size_text(bank.kernel_size)} DCT filters and the levels that λ counts"
    whole = len(bank.filters)
    counts = dict(bank.lambdas)
    cuts = [
        f"{layers} {'keep' if layers > 1 else 'keeps'} "
        + (f"λ = {lam} ({counts[lam]} of {whole})" if lam else "others")
        for lam, layers in bank.cuts
    ]
    of = f"{bank.layers} layer{'s' * (bank.layers > 1)} of this size"
    return f"{title}\n{of}: {', '.join(cuts)}" if cuts else f"{title}\n{of}"


def _filter_image(ax: Axes, values: Sequence[float], size: Sequence[int], row: int, column: int, faded: float) -> None:
    """One filter, its largest |value| black or white and zero grey."""
    high, wide = size if len(size) == 2 else (1, *size)
    limit = max(map(abs, values))
    left, top, side = column + 0.12, row + 0.12, 0.76
    ax.pcolormesh(
        [left + side * x / wide for x in range(wide + 1)],
        [top + side * y / high for y in range(high + 1)],
        [values[y * wide : (y + 1) * wide] for y in range(high)],
        cmap="gray",
        vmin=-limit,
        vmax=limit,
        alpha=faded,
        linewidth=0,
        rasterized=high * wide > 64,  # hundreds of thousands of rectangles else
    )


def _lambda_label(ax: Axes, lam: int, count: int, wide: int, tile: float, colour: str) -> None:
    """At the end of the outline, above the bank or to the right of it."""
    text = f"λ = {lam}" if tile >= 0.6 else str(lam)
    kept = f"{count} filter{'s' * (count > 1)}"
    above = lam <= wide
    x, y = (lam, 0) if above else (wide, lam - wide)
    if tile >= 0.6:
        text += ("\n" if above else ", ") + kept
    ax.annotate(
        text,
        (x, y),
        (0, 3) if above else (4, 0),
        textcoords="offset points",
        ha=("right" if lam == wide else "center") if above else "left",
        va="bottom" if above else "center",
        color=colour,
        fontsize=min(8.0, 26 * tile),
        annotation_clip=False,
    )


# --- spectrum ---


@_draw.register
def _spectrum(found: Spectrum) -> Figure:
    """A heat map for each kernel size: a row for each layer, a column for each frequency."""
    panels = found.panels
    rows = sum(map(len, panels.values()))
    row_height = min(0.2, (MAX_HEIGHT - 1.1 * len(panels)) / rows)
    widest = max(len(layers[0].frequencies) for layers in panels.values())
    heights = [row_height * len(layers) + 0.25 for layers in panels.values()]
    figure = _canvas(Figure(figsize=(min(12.0, max(6.5, 2.5 + 0.16 * widest)), sum(heights) + 1.0 * len(panels))))
    figure.set_layout_engine("constrained", h_pad=0.12)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (size, layers) in zip(axes, panels.items(), strict=True):
        _panel(figure, ax, size, layers, row_height)
    return figure


def _panel(figure: Figure, ax: Axes, size: tuple[int, ...], layers: Sequence[LayerSpectrum], row_height: float) -> None:
    frequencies, levels = layers[0].frequencies, layers[0].levels
    count = len(frequencies)
    shares = [
        [100 * share if kept else float("nan") for share, kept in zip(layer.shares, layer.kept, strict=True)]
        for layer in layers
    ]
    ax.set_facecolor(_PALE)
    mesh = ax.pcolormesh(shares, cmap=_SHARES, vmin=0, linewidth=0, rasterized=count * len(layers) > 20000)
    ax.set(xlim=(0, count), ylim=(len(layers), 0))
    ax.set_title(f"{size_text(size)}, {len(layers)} layer{'s' * (len(layers) > 1)}")
    starts = [index for index in range(count) if index == 0 or levels[index] != levels[index - 1]]
    ax.vlines(starts[1:], 0, len(layers), colors="white", linewidth=1.0)
    cut = LineCollection(_edges([layer.kept for layer in layers]), colors=_VERMILION, linewidths=1.8)
    ax.add_collection(cut)
    _layer_names(ax, [layer.name or "(root)" for layer in layers], row_height)
    _frequency_names(ax, frequencies, starts, figure.get_figwidth())
    bar = figure.colorbar(mesh, ax=ax, pad=0.02, aspect=max(4.0, 12 * ax.get_position().height * 2), shrink=1.0)
    bar.set_label("mean |coefficient|,\n% of the layer's sum")
    bar.outline.set_visible(False)


def _layer_names(ax: Axes, names: Sequence[str], row_height: float) -> None:
    size = min(8.0, 72 * row_height * 0.85)
    step = 1
    while size * step < 4.5:  # smaller cannot be read: every second name, every third, ...
        step += 1
    places = range(0, len(names), step)
    ax.set_yticks([place + 0.5 for place in places], [_printable(names[place]) for place in places])
    ax.tick_params(axis="y", length=0, labelsize=max(size, 4.5))


def _frequency_names(ax: Axes, frequencies: Sequence[Sequence[int]], starts: Sequence[int], width: float) -> None:
    """The indices below each column where there is room for them, and the levels above."""
    count = len(frequencies)
    room = 72 * (width - 2.8) / count
    if room >= 6:
        labels = [",".join(map(str, frequency)) for frequency in frequencies]
        ax.set_xticks([index + 0.5 for index in range(count)], labels)
        ax.tick_params(axis="x", length=0, labelsize=min(8.0, room * 0.8), labelrotation=0 if room > 24 else 90)
        ax.set_xlabel("frequency (indices along the kernel's axes)" if len(frequencies[0]) > 1 else "frequency")
    else:
        ax.set_xticks([])
        ax.set_xlabel(f"{count} frequencies, by level")
    middles = [(first + last) / 2 for first, last in zip(starts, (*starts[1:], count), strict=True)]
    levels = range(0, len(starts), 1 + len(starts) // 32)
    above = ax.secondary_xaxis("top")
    above.set_xticks([middles[index] for index in levels], levels)
    above.tick_params(length=0, labelsize=8.0)
    above.set_xlabel("level")
    above.spines[:].set_visible(False)


# --- trade-off ---


@_draw.register
def _tradeoff(found: Tradeoff) -> Figure:
    """Error against parameters; without labels disagreement with the uncut network, and KL below it."""
    size, unit = next(
        (
            (n, u)
            for n, u in ((1e9, "thousand million"), (1e6, "million"), (1e3, "thousand"))
            if found.uncut.parameters >= n
        ),
        (1, ""),
    )
    panels = 1 if found.labelled else 2
    figure = _canvas(Figure(figsize=(6.8, 0.8 + 3.6 * panels)))
    figure.set_layout_engine("constrained", h_pad=0.1)
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    if found.labelled:
        _curve(axes[0], found, size, "error", "error_interval", "top-1 error, %")
    else:
        _curve(axes[0], found, size, "disagreement", "disagreement_interval", "other top-1 than the uncut network, %")
        _curve(axes[1], found, size, "divergence", None, "KL from the uncut network, nats")
    axes[-1].set_xlabel(f"parameters, {unit}" if unit else "parameters")
    whole = found.uncut.parameters / size
    above = axes[0].secondary_xaxis("top", functions=(lambda x: 100 * x / whole, lambda x: x * whole / 100))
    above.set_xlabel("share of the uncut network's, %")
    axes[0].legend(loc="upper right")
    return figure


def _curve(ax: Axes, found: Tradeoff, size: float, value: str, interval: str | None, label: str) -> None:
    """The plain and the calibrated cuts with their intervals, and the uncut network as a line."""
    uncut = getattr(found.uncut, value)
    ax.axhline(uncut, color=_GREY, linewidth=1.0, linestyle=(0, (5, 3)), label="uncut", zorder=1)
    if interval is not None:
        ax.axhspan(*getattr(found.uncut, interval), color=_GREY, alpha=0.12, linewidth=0, zorder=0)
    plain = [point for point in found.points if not point.calibrated]
    # Nothing is cut at the right end: both curves begin there.
    whole = [point for point in plain if "full" in point.lambdas]
    calibrated = [point for point in found.points if point.calibrated]
    _line(ax, plain, size, value, interval, ("plain cut", _BLUE, "o", 1))
    if calibrated:
        _line(ax, [*whole, *calibrated], size, value, interval, ("calibrated", _VERMILION, "s", -1))
    ax.set_ylabel(label)
    ax.yaxis.set_major_locator(MaxNLocator(6))
    ax.grid(axis="y", color=_PALE, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.margins(0.09, 0.12)
    ax.spines[["right"]].set_visible(False)


def _line(
    ax: Axes, points: Sequence[Point], size: float, value: str, interval: str | None, look: tuple[str, str, str, int]
) -> None:
    name, colour, marker, side = look
    xs, ys = [point.parameters / size for point in points], [getattr(point, value) for point in points]
    bounds = [getattr(point, interval) if interval else (y, y) for point, y in zip(points, ys, strict=True)]
    reach = [
        [max(0.0, y - low) for y, (low, _) in zip(ys, bounds, strict=True)],
        [max(0.0, high - y) for y, (_, high) in zip(ys, bounds, strict=True)],
    ]
    ax.errorbar(
        xs, ys, reach, color=colour, marker=marker, markersize=5, linewidth=1.3, elinewidth=0.9, capsize=2.5, label=name
    )
    for point, x, (low, high) in zip(points, xs, bounds, strict=True):
        if side < 0 and "full" in point.lambdas:
            continue  # the other curve has named it
        ax.annotate(
            " = ".join(point.lambdas),
            (x, high if side > 0 else low),
            (0, 5 * side),
            textcoords="offset points",
            ha="center",
            va="bottom" if side > 0 else "top",
            color=colour,
            fontsize=8.0,
        )


# --- shared ---


def _canvas(figure: Figure) -> Figure:
    FigureCanvasAgg(figure)
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = _canvas(Figure(figsize=(width, height)))
    return figure, figure.add_axes((0, 0, 1, 1))


def _edges(kept: Sequence[Sequence[bool]]) -> list[list[tuple[int, int]]]:
    """Lines between the kept and the cut cells of a grid, each cell one wide and one high."""
    lines = []
    for row, cells in enumerate(kept):
        for column, cell in enumerate(cells):
            if column and cell != cells[column - 1]:
                lines.append([(column, row), (column, row + 1)])
            if row and cell != kept[row - 1][column]:
                lines.append([(column, row), (column + 1, row)])
    return lines


def _printable(name: str, limit: int = 48) -> str:
    """A name from a file: no control characters, and the middle left out where it is long."""
    text = "".join(c if c.isprintable() else "?" for c in name)
    return text if len(text) <= limit else f"{text[: limit // 2 - 1]}…{text[-limit // 2 :]}"
