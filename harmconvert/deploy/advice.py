"""The times of a network's forms, and the advice which form to deploy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import UsageError, counted
from ..metrics.metric import Measurement
from ..network.forms import Factoring

# Times that vary more than this between runs do not tell which form is faster.
_MOST_SPREAD = 0.2
_RUNTIME_NAMES = {"torch": "torch", "onnx": "ONNX Runtime", "openvino": "OpenVINO"}


@dataclass(frozen=True)
class Row:
    """The measurements of one form of a network in one layout, for one batch size and number of threads.

    ``seconds``: median of a forward pass. ``spread``: half the distance of the quartiles, as a share of the median.
    ``peak_bytes``: the most memory in use, minus the memory in use before (None: the system does not report it).
    ``error``: greatest difference from the outputs of the original network, relative to the largest output. ``note``:
    why there are no measurements. ``runtime``, ``precision``: what runs the network (torch, onnx or openvino), and what
    it computes in (f32, bf16 or int8). ``agreement``: share of the images with the same top-1 as the original.
    ``measurement``: of a metric on the data of the benchmark.
    """

    form: str
    compiled: bool
    layout: str
    batch: int
    threads: int
    seconds: float | None = None
    spread: float | None = None
    examples_per_second: float | None = None
    peak_bytes: int | None = None
    error: float | None = None
    note: str | None = None
    runtime: str = "torch"
    precision: str = "f32"
    agreement: float | None = None
    measurement: Measurement | None = None


@dataclass(frozen=True)
class Benchmark:
    """All rows, the result of `factor` for each (batch, threads), the machine, and the source of the network.

    ``source`` is None if it is unknown. ``notes``: runtimes that are not installed. ``max_drop``: the largest loss of
    low precision that the advice allows, in % (`fastest`).
    """

    rows: tuple[Row, ...]
    factorings: dict[tuple[int, int], Factoring]
    machine: dict[str, Any]
    source: str | None = None
    notes: tuple[str, ...] = ()
    max_drop: float = 1.0

    def fastest(self, batch: int, threads: int, max_drop: float | None = 0.0) -> Row:
        """Return the row of the fastest form.

        Args:
            max_drop: leave out low precision that gives another top-1 on more than this share of the images, in %, or
                whose loss is not known; None: leave out nothing.

        Raises:
            UsageError: there is no time for this batch size and number of threads.
        """
        timed = [row for row in self._rows(batch, threads) if row.seconds is not None and _within(row, max_drop)]
        if not timed:
            raise UsageError(f"nothing was timed at batch {batch} with {counted(threads, 'thread')}")
        return min(timed, key=lambda row: row.seconds or 0.0)

    def _rows(self, batch: int, threads: int) -> list[Row]:
        return [row for row in self.rows if (row.batch, row.threads) == (batch, threads)]

    def advice(self) -> list[str]:
        """Return a sentence for each batch size and number of threads."""
        return [self._advice(*key) for key in self._inputs()]

    def advised(self) -> list[Row]:
        """Return the rows that the advice names, each form once, within the allowed loss first."""
        inputs = [key for key in self._inputs() if any(row.seconds for row in self._rows(*key))]
        rows = [self.fastest(*key, drop) for drop in (self.max_drop, None) for key in inputs]
        return [*{(row.form, row.runtime, row.precision): row for row in reversed(rows)}.values()][::-1]

    def _inputs(self) -> list[tuple[int, int]]:
        return [*dict.fromkeys((row.batch, row.threads) for row in self.rows)]

    def _advice(self, batch: int, threads: int) -> str:
        rows = self._rows(batch, threads)
        condition = f"batch {batch}, {counted(threads, 'thread')}"
        if not any(row.seconds for row in rows):
            return f"{condition}: {rows[0].note}"
        best = self.fastest(batch, threads, self.max_drop)
        eager = [row for row in rows if row.seconds and _is_dense_eager(row)]
        dense = [row.seconds for row in eager if row.seconds]
        speedup = ""
        if dense and best.seconds:
            speedup = f": {min(dense) / best.seconds:.2f} times as fast as the dense form, eager"
        form = f"{best.form} form, {best.layout}, {'compiled' if best.compiled else 'eager'}"
        if (best.runtime, best.precision) != ("torch", "f32"):
            form = f"{best.form} form, {_RUNTIME_NAMES[best.runtime]} with {best.precision}{_agreement_of(best)}"
        low_precision = self._low_precision(batch, threads, best, dense)
        return f"{condition}: deploy the {form}{speedup}{low_precision}{_doubt([best, *eager])}"

    def _low_precision(self, batch: int, threads: int, best: Row, dense: list[float]) -> str:
        """Return a sentence about the fastest row of low precision, if it is faster than ``best``."""
        row = self.fastest(batch, threads, None)
        if row is best or not row.seconds or not dense:
            return ""
        where = f"{row.form} form, {_RUNTIME_NAMES[row.runtime]} with {row.precision}"
        known = _agreement_of(row) or " (its loss is not measured without images)"
        return f"; faster still: the {where}, {min(dense) / row.seconds:.2f} times{known}"

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        factorings = [
            {"batch": batch, "threads": threads, **factoring.to_json()}
            for (batch, threads), factoring in self.factorings.items()
        ]
        source = {} if self.source is None else {"source": self.source}
        return {
            **source, "machine": self.machine, "rows": [asdict(row) for row in self.rows], "factored": factorings,
            "advice": self.advice(), "notes": list(self.notes),
        }  # fmt: skip


def _within(row: Row, max_drop: float | None) -> bool:
    """Return whether the loss of a row is at most ``max_drop`` %; in float32 nothing is lost."""
    if row.precision == "f32" or max_drop is None:
        return True
    return row.agreement is not None and round(100 * (1 - row.agreement), 6) <= max_drop


def _doubt(rows: Sequence[Row]) -> str:
    """Return a sentence if the times of rows vary too much to be compared."""
    largest = max(row.spread or 0.0 for row in rows)
    if largest <= _MOST_SPREAD:
        return ""
    return f"; these times vary by {largest:.0%} between runs: repeat this on an idle machine before you rely on it"


def _agreement_of(row: Row) -> str:
    return "" if row.agreement is None else f" (same top-1 on {row.agreement:.1%} of the images)"


def _is_dense_eager(row: Row) -> bool:
    return (row.form, row.runtime, row.precision, row.compiled) == ("dense", "torch", "f32", False)
