"""The strip of layers: the colour of a layer shows the share of its kernel that is kept."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from ..sheets import Strip
from ..text import layer_name
from .canvas import COLOURS, GREY, PALE, canvas, share_bar
from .charts import NAMED, layer_names, names_height

_PER_ROW = 50  # layers in a row, if there are too many for names
_HATCH = "////"


def draw_strip(strip: Strip) -> Figure:
    """Draw one row with names and counts if there is room; else rows of 50, each with its first layer's number."""
    count = len(strip.layers)
    named = count <= NAMED
    columns = count if named else _PER_ROW
    rows = math.ceil(count / columns)
    width = min(6.8, 1.6 + 0.35 * count) if named else 6.8
    names = [layer_name(layer.name) for layer in strip.layers]
    figure = canvas(max(width, 4.2), 0.5 + 1.4 + names_height(names) if named else 0.17 * rows + 1.4)
    figure.set_layout_engine("constrained", h_pad=0.1)
    ax = figure.subplots()
    for index, layer in enumerate(strip.layers):
        row, column = divmod(index, columns)
        colour = COLOURS(layer.share)
        look = {"facecolor": colour} if layer.kept else {"facecolor": PALE, "edgecolor": GREY, "hatch": _HATCH}
        ax.add_patch(Rectangle((column + 0.05, row + 0.04), 0.9, 0.92, linewidth=0, **look))
        if named and layer.kept:
            _write_count(ax, (column, row), f"{layer.kept}/{layer.total}", layer.share, count)
    ax.set(xlim=(0, columns), ylim=(rows, 0))
    ax.spines[:].set_visible(False)
    if named:
        ax.set_yticks([])
        layer_names(ax, names, 0.5)
    else:
        step = math.ceil(rows / 25)
        numbered = range(0, rows, step)
        ax.set_yticks([row + 0.5 for row in numbered], [str(row * columns + 1) for row in numbered])
        ax.set_xticks([])
        ax.tick_params(axis="y", length=0, labelsize=8.0)
        ax.set_ylabel("number of the first layer")
    ax.set_xlabel("layer, in the order of the network")
    share_bar(figure, [ax], "share of its frequencies that each layer keeps")
    if not all(layer.kept for layer in strip.layers):
        skipped = Patch(facecolor=PALE, edgecolor=GREY, hatch=_HATCH, linewidth=0, label="skipped")
        figure.legend(handles=[skipped], loc="upper right")
    return figure


def _write_count(ax: Axes, cell: tuple[int, int], text: str, share: float, count: int) -> None:
    """Write how many parts a layer keeps, rotated upwards; the text is black on bright colours, else white."""
    ax.text(
        cell[0] + 0.5, cell[1] + 0.5, text, ha="center", va="center", rotation=90, fontsize=min(8.0, 300 / count),
        color="black" if share > 0.6 else "white",
    )  # fmt: skip
