"""What all figures share: colours, style, an empty canvas."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ...errors import printable

COLOURS = colormaps["viridis"]
# Okabe and Ito's colours, told apart by people who see fewer of them.
BLUE, VERMILION, GREY, PALE = "#0072B2", "#D55E00", "#555555", "#e4e4e4"
_STYLE: dict[Any, Any] = {
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


@contextmanager
def style() -> Iterator[None]:
    """Our settings alone, whatever the user's matplotlibrc says; put back afterwards."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box stands for it
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def canvas(width: float, height: float) -> Figure:
    """An empty figure of that many inches, off any screen."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def share_bar(figure: Figure, axes: Sequence[Axes], title: str, of: ScalarMappable | None = None) -> None:
    """A thin scale of `COLOURS` from 0 to 100 % above the axes."""
    thickness, length, pad = 0.12, 0.5 * (figure.get_figwidth() - 1.5), 0.2 / figure.get_figheight()
    bar = figure.colorbar(
        of or ScalarMappable(Normalize(0, 100), COLOURS),
        ax=list(axes),
        location="top",
        anchor=(0, 0),
        shrink=0.5,
        aspect=length / thickness,
        pad=pad,
        format="%g %%",
    )
    bar.set_label(title, fontsize=10.0, labelpad=6)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2, labelsize=8.0)


def label(name: str, limit: int = 48) -> str:
    """A name from a file: no control characters, and the middle left out where it is long."""
    text = printable(name.replace("\n", "?"))
    return text if len(text) <= limit else f"{text[: limit // 2 - 1]}…{text[-limit // 2 :]}"
