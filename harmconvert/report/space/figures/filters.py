"""Figure 2: the filter bank, and the filters that each lambda keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ...figures.canvas import COLOURS, GREY, PALE, canvas
from ...grid import edges
from ...text import size_text
from ..filters import FilterBank

_LABELLED = 0.6  # inches: the smallest filter that has room for a label


def draw_filters(bank: FilterBank) -> Figure:
    """Draw the filters in the order of their indices, and for each lambda a line around the filters that it keeps."""
    high, wide = bank.kernel_size if len(bank.kernel_size) == 2 else (1, *bank.kernel_size)
    tile = min(0.95, max(0.2, 7 / max(high, wide)))
    figure = canvas(tile * wide + 0.8, tile * high + 0.9)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, wide), ylim=(high, 0), aspect="equal")
    lines_above = 0 if wide == 1 else 1 if tile < _LABELLED else 3 if bank.cuts else 2
    ax.set_title(_filters_title(bank), pad=8 + 12 * lines_above)
    for one in bank.filters:
        row, column = one.frequency if len(one.frequency) == 2 else (0, *one.frequency)
        alpha = 1.0 if one.kept_by else 0.25
        if one.level % 2:
            ax.add_patch(Rectangle((column, row), 1, 1, color="#f0f0f0", linewidth=0, zorder=0))
        _filter_image(ax, one.values, (high, wide), (row, column), alpha)
        if bank.cuts and tile >= _LABELLED:
            caption = f"{one.kept_by} of {bank.layers}"
            ax.text(column + 0.5, row + 0.9, caption, ha="center", va="center", fontsize=7.0, color=GREY)
    layers_by_lambda = dict(bank.cuts)
    for lam, count in bank.lambdas:
        coloured = not bank.cuts or lam in layers_by_lambda
        colour = COLOURS(0.72 * (lam - 1) / max(len(bank.lambdas) - 1, 1)) if coloured else PALE
        lines = edges([[column < lam - row for column in range(wide)] for row in range(high)])
        width = min(3.0, 7 * tile) if coloured else 1.0
        order = 3 if coloured else 2
        ax.add_collection(LineCollection(lines, colors=[colour], linewidths=width, capstyle="projecting", zorder=order))
        if coloured and (tile >= 0.3 or lam % 3 == 1 or bank.cuts):
            _lambda_label(ax, (lam, count, layers_by_lambda.get(lam)), wide, tile, colour)
    ax.set(xticks=[], yticks=[])
    if wide > 1:
        ax.set_xticks([column + 0.5 for column in range(wide)], map(str, range(wide)))
        ax.set_xlabel("frequency along the width, v" if high > 1 else "frequency")
    if high > 1:
        ax.set_yticks([row + 0.5 for row in range(high)], map(str, range(high)))
        ax.set_ylabel("frequency along the height, u" if wide > 1 else "frequency")
    ax.tick_params(length=0, labelsize=min(9.0, 24 * tile))
    ax.spines[:].set_visible(False)
    return figure


def _filters_title(bank: FilterBank) -> str:
    without_lambda = dict(bank.cuts).get(None)
    more = f", {without_lambda} of which match no λ" if without_lambda else ""
    first = f"{size_text(bank.kernel_size)} DCT filters, {bank.layers} layer{'s' * (bank.layers > 1)}{more}"
    return f"{first}\nλ = n keeps the filters above and to the left of its line"


def _filter_image(
    ax: Axes, values: Sequence[float], size: tuple[int, int], cell: tuple[int, int], alpha: float
) -> None:
    """Draw one filter in a thin frame: zero is grey, and the largest |value| is black or white."""
    high, wide = size
    limit = max(map(abs, values))
    side = 0.76
    top, left = cell[0] + 0.07, cell[1] + (1 - side) / 2
    ax.pcolormesh(
        [left + side * x / wide for x in range(wide + 1)],
        [top + side * y / high for y in range(high + 1)],
        [values[y * wide : (y + 1) * wide] for y in range(high)],
        cmap="gray",
        vmin=-limit,
        vmax=limit,
        alpha=alpha,
        linewidth=0,
        rasterized=high * wide > 64,  # else the file contains hundreds of thousands of rectangles
    )
    ax.add_patch(Rectangle((left, top), side, side, fill=False, edgecolor=GREY, alpha=alpha, linewidth=0.5))


def _lambda_label(ax: Axes, counts: tuple[int, int, int | None], wide: int, tile: float, colour: Any) -> None:
    """Write a lambda, its filters and its layers at the end of its line: above or to the right of the filter bank."""
    lam, count, layers = counts
    parts = [str(lam)]
    if tile >= _LABELLED:
        parts = [f"λ = {lam}", f"{count} filter{'s' * (count > 1)}"]
        parts += [f"{layers} layer{'s' * (layers > 1)}"] if layers else []
    above = lam < wide
    ax.annotate(
        ("\n" if above else ", ").join(parts),
        (lam, 0) if above else (wide, lam - wide + 1),
        (0, 4) if above else (5, 0),
        textcoords="offset points",
        ha="center" if above else "left",
        va="bottom" if above else "center",
        color=colour,
        fontsize=min(8.0, 26 * tile),
        annotation_clip=False,
    )
