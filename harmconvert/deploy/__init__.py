"""Networks for other programs and other runtimes: export, and a benchmark of each form.

What belongs here: what happens after a conversion is finished. The forms themselves belong to `network`."""

from .benchmark import Benchmark, Row, benchmark, peak_bytes
from .export import check_target, export
from .graphs import Exported

__all__ = [
    "Benchmark",
    "Exported",
    "Row",
    "benchmark",
    "check_target",
    "export",
    "peak_bytes",
]
