"""What a person reads: tables for the terminal, figures, the page.

What belongs here: showing results that are given as data. Measuring anything does not. Figures need matplotlib, which
is an extra: `figures` is imported when the first one is drawn."""

from .charts import axis, counted
from .compare import compare
from .comparison import Column, Comparison, comparison_of
from .figure import Figure, TradeoffSettings, figure
from .filters import filter_bank
from .page import page, shortened_name, write_report
from .report import Reported, report
from .reproduce import OPTION_NAMES, commands
from .sheets import Sheet, Strip, error_sheet, layer_strip, search_sheet, training_sheet
from .spectrum import Spectrum, spectrum
from .summary import Report, report_of
from .tables import calibration_lines, comparison_table, differences_table, tradeoff_table
from .tradeoff import Point, Tradeoff, tradeoff
from .writing import drawing, write_figure

__all__ = [
    "OPTION_NAMES",
    "Column",
    "Comparison",
    "Figure",
    "Point",
    "Report",
    "Reported",
    "Sheet",
    "Spectrum",
    "Strip",
    "Tradeoff",
    "TradeoffSettings",
    "axis",
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
