"""Code that all figures share: colours, style, an empty canvas."""

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
# Colours of Okabe and Ito, which people with colour vision deficiency can distinguish.
BLUE, VERMILION, GREY, PALE = "#0072B2", "#D55E00", "#555555", "#e4e4e4"
_STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "axes.linewidth": 0.6,
    "legend.frameon": False,
    # Names of layers are data: a $ in a name must not begin a formula.
    "text.parse_math": False,
    # Outlines need no font on the reader's machine. A fixed salt gives the same ids in every run.
    "svg.fonttype": "path",
    "svg.hashsalt": "harmconvert",
}


@contextmanager
def style() -> Iterator[None]:
    """Use the settings of this module only, not the user's matplotlibrc, and restore the user's settings at the end."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box is drawn instead
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def canvas(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches, without a window."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def share_bar(figure: Figure, axes: Sequence[Axes], title: str, of: ScalarMappable | None = None) -> None:
    """Draw a thin scale of `COLOURS` from 0 to 100 % above the axes."""
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
    """Return a name from a file with control characters escaped; a long name is shortened in the middle."""
    text = printable(name.replace("\n", "?"))
    return text if len(text) <= limit else f"{text[: limit // 2 - 1]}…{text[-limit // 2 :]}"
