"""Deploy converted networks: export them for other programs and runtimes, and time each form.

What belongs here: the steps after a conversion. What does not: the forms of a network (`network`).
"""

from .advice import Benchmark, Row
from .benchmark import BenchmarkSettings, peak_bytes, time_forms
from .export import check_target, export, write_timm_files
from .graph_files import PrecisionSettings, factor_for
from .graphs import Exported, onnx_bytes
from .quantised_graphs import HeldBack
from .runtimes import Target

__all__ = [
    "Benchmark",
    "BenchmarkSettings",
    "Exported",
    "HeldBack",
    "PrecisionSettings",
    "Row",
    "Target",
    "check_target",
    "export",
    "factor_for",
    "onnx_bytes",
    "peak_bytes",
    "time_forms",
    "write_timm_files",
]
