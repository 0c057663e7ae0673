"""Show results: tables for the terminal, figures, the page, and a card that is published with a checkpoint.

What belongs here: showing results that exist as data. What does not: measurements. `space` contains everything about
frequencies. Figures need matplotlib, an optional dependency, so `figures` is imported only when a figure is drawn.
"""

from .charts import axis, counted
from .compare import compare
from .comparison import Column, Comparison, comparison_of
from .comparison_tables import comparison_table, differences_table
from .facts import LayerBytes, LayerRank, NextStep, Report
from .figure import Figure, TradeoffSettings, figure
from .page import page, write_report
from .push import Pushed, push
from .report import Reported, report
from .reproduce import OPTION_NAMES, commands
from .sheets import Sheet, Strip, bits_sheet, error_sheet, layer_strip, ranks_sheet, search_sheet, training_sheet
from .space import Spectrum, filter_bank, spectrum
from .summary import report_of
from .tables import calibration_lines, tradeoff_table
from .text import shortened_name
from .tradeoff import CodedFile, Point, Tradeoff, tradeoff
from .writing import drawing, write_figure

__all__ = [
    "OPTION_NAMES",
    "CodedFile",
    "Column",
    "Comparison",
    "Figure",
    "LayerBytes",
    "LayerRank",
    "NextStep",
    "Point",
    "Pushed",
    "Report",
    "Reported",
    "Sheet",
    "Spectrum",
    "Strip",
    "Tradeoff",
    "TradeoffSettings",
    "axis",
    "bits_sheet",
    "calibration_lines",
    "commands",
    "compare",
    "comparison_of",
    "comparison_table",
    "counted",
    "differences_table",
    "drawing",
    "error_sheet",
    "figure",
    "filter_bank",
    "layer_strip",
    "page",
    "push",
    "ranks_sheet",
    "report",
    "report_of",
    "search_sheet",
    "shortened_name",
    "spectrum",
    "tradeoff",
    "tradeoff_table",
    "training_sheet",
    "write_figure",
    "write_report",
]
