"""Deploy converted networks: export them for other programs and runtimes, and time each form.

What belongs here: the steps after a conversion. What does not: the forms of a network (`network`).
"""

from .benchmark import Benchmark, BenchmarkSettings, Row, peak_bytes, time_forms
from .export import check_target, export
from .graphs import Exported

__all__ = [
    "Benchmark",
    "BenchmarkSettings",
    "Exported",
    "Row",
    "check_target",
    "export",
    "peak_bytes",
    "time_forms",
]
