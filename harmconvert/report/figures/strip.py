"""The network as a strip of layers, coloured by what share of its frequencies each keeps."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from ..sheets import Strip
from .canvas import COLOURS, GREY, PALE, canvas, share_bar
from .charts import NAMED, layer_names, names_height

_IN_A_ROW = 50  # of layers too many for names
_HATCH = "////"


def draw_strip(strip: Strip) -> Figure:
    """One row with names and counts where there is room, else rows of fifty with the number of the first."""
    count = len(strip.layers)
    named = count <= NAMED
    columns = count if named else _IN_A_ROW
    rows = math.ceil(count / columns)
    width = min(6.8, 1.6 + 0.35 * count) if named else 6.8
    names = [layer.name or "(root)" for layer in strip.layers]
    figure = canvas(max(width, 4.2), 0.5 + 1.4 + names_height(names) if named else 0.17 * rows + 1.4)
    figure.set_layout_engine("constrained", h_pad=0.1)
    ax = figure.subplots()
    for index, layer in enumerate(strip.layers):
        row, column = divmod(index, columns)
        colour = COLOURS(layer.share)
        look = {"facecolor": colour} if layer.kept else {"facecolor": PALE, "edgecolor": GREY, "hatch": _HATCH}
        ax.add_patch(Rectangle((column + 0.05, row + 0.04), 0.9, 0.92, linewidth=0, **look))
        if named and layer.kept:
            _count(ax, (column, row), f"{layer.kept}/{layer.total}", layer.share, count)
    ax.set(xlim=(0, columns), ylim=(rows, 0))
    ax.spines[:].set_visible(False)
    if named:
        ax.set_yticks([])
        layer_names(ax, names, 0.5)
    else:
        step = math.ceil(rows / 25)
        shown = range(0, rows, step)
        ax.set_yticks([row + 0.5 for row in shown], [str(row * columns + 1) for row in shown])
        ax.set_xticks([])
        ax.tick_params(axis="y", length=0, labelsize=8.0)
        ax.set_ylabel("number of the first")
    ax.set_xlabel("layer, in the order of the network")
    share_bar(figure, [ax], "share of its frequencies that each layer keeps")
    if not all(layer.kept for layer in strip.layers):
        skipped = Patch(facecolor=PALE, edgecolor=GREY, hatch=_HATCH, linewidth=0, label="skipped")
        figure.legend(handles=[skipped], loc="upper right")
    return figure


def _count(ax: Axes, place: tuple[int, int], text: str, share: float, count: int) -> None:
    """How many it keeps, read upwards, dark on the bright end of the scale."""
    ax.text(
        place[0] + 0.5, place[1] + 0.5, text, ha="center", va="center", rotation=90, fontsize=min(8.0, 300 / count),
        color="black" if share > 0.6 else "white",
    )  # fmt: skip
