"""Figures 2 and 3 of the paper, drawn by matplotlib."""

from .filters import draw_filters
from .spectrum import draw_spectrum

__all__ = ["draw_filters", "draw_spectrum"]
