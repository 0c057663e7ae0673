"""Draw figures with matplotlib: figures 2, 3 and 4 of the paper, and single charts of the page.

What belongs here: drawing numbers that were computed elsewhere. The same numbers give the same bytes. What does not:
the drawings of frequencies (`space.figures`), and all computations.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from ..sheets import Sheet, Strip
from ..space import FilterBank, Spectrum
from ..tradeoff import Tradeoff
from .canvas import style
from .charts import draw_sheet
from .strip import draw_strip
from .tradeoff import draw_tradeoff

DPI = 150
# Without these, matplotlib would write its version and the time, and the bytes would differ.
_METADATA: dict[str, dict[str, None]] = {"png": {"Software": None}, "svg": {"Creator": None, "Date": None}}


def draw(content: FilterBank | Spectrum | Tradeoff | Sheet | Strip) -> Figure:
    """Return the figure of these numbers."""
    # Imported here, because these files import the canvas of this folder.
    from ..space.figures import draw_filters, draw_spectrum

    with style():
        if isinstance(content, FilterBank):
            return draw_filters(content)
        if isinstance(content, Sheet):
            return draw_sheet(content)
        if isinstance(content, Strip):
            return draw_strip(content)
        return draw_spectrum(content) if isinstance(content, Spectrum) else draw_tradeoff(content)


def save(figure: Figure, path: Path, suffix: str) -> None:
    """Write a figure in the format of ``suffix``, .png or .svg."""
    format = suffix.removeprefix(".")
    with style():
        figure.savefig(path, format=format, metadata=_METADATA[format], dpi=DPI, bbox_inches="tight", pad_inches=0.15)
