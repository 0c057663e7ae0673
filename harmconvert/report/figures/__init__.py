"""Figures 2, 3 and 4 of the paper, and the charts of the page one by one, drawn by matplotlib from plain numbers; the
same numbers give the same bytes."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from ..filters import FilterBank
from ..sheets import Sheet, Strip
from ..spectrum import Spectrum
from ..tradeoff import Tradeoff
from .canvas import style
from .charts import draw_sheet
from .filters import draw_filters
from .spectrum import draw_spectrum
from .strip import draw_strip
from .tradeoff import draw_tradeoff

DPI = 150
# matplotlib would write its version and the time.
_METADATA: dict[str, dict[str, None]] = {"png": {"Software": None}, "svg": {"Creator": None, "Date": None}}


def draw(found: FilterBank | Spectrum | Tradeoff | Sheet | Strip) -> Figure:
    """The figure of these numbers."""
    with style():
        if isinstance(found, FilterBank):
            return draw_filters(found)
        if isinstance(found, Sheet):
            return draw_sheet(found)
        if isinstance(found, Strip):
            return draw_strip(found)
        return draw_spectrum(found) if isinstance(found, Spectrum) else draw_tradeoff(found)


def save(figure: Figure, path: Path, suffix: str) -> None:
    """Write a figure as ``.png`` or ``.svg``."""
    kind = suffix.removeprefix(".")
    with style():
        figure.savefig(path, format=kind, metadata=_METADATA[kind], dpi=DPI, bbox_inches="tight", pad_inches=0.15)
