"""Checkpoints side by side, as tables for a terminal."""

from __future__ import annotations

from rich.table import Table

from ..errors import counted
from .comparison import Column, Comparison
from .tables import fitted_table
from .text import layer_name, megabytes, millions


def comparison_table(comparison: Comparison) -> Table:
    """Return a row for each fact, with a column for each checkpoint."""
    columns = comparison.columns
    coded = any(column.bits is not None for column in columns)
    facts: list[tuple[str, list[str]]] = [
        ("network", [column.source or "not recorded" for column in columns]),
        ("plan", [column.plan for column in columns]),
        ("basis", [column.basis if column.basis != "dct" else "" for column in columns]),
        ("layers cut", [f"{column.cut} of {column.converted}" for column in columns]),
        ("skipped", [str(column.skipped or "") for column in columns]),
        ("parameters", [f"{millions(c.parameters)} ({c.share:.1%})" for c in columns]),
        ("tensors", [megabytes(column.bytes) for column in columns]),
        ("bits per coded weight", ["-" if c.bits is None else f"{c.bits:.2f}" for c in columns if coded]),
        ("MACs, factored", [_factored(column) for column in columns]),
        (
            "calibrated on",
            [f"{counted(c.calibration_inputs, 'input')}" if c.calibration_inputs else "" for c in columns],
        ),
        ("divergence", ["" if c.divergence is None else f"{c.divergence:.3g}" for c in columns]),
        ("trained", [f"{counted(column.epochs, 'epoch')}" if column.epochs else "" for column in columns]),
        ("top-1", ["not known" if c.top1 is None else f"{c.top1:.2%} ({c.stage})" for c in columns]),
        ("95 %", ["" if not c.top1_interval else "{:.2%} to {:.2%}".format(*c.top1_interval) for c in columns]),
        *_measurements(columns),
        ("same class as uncut", ["" if column.agreement is None else f"{column.agreement:.2%}" for column in columns]),
    ]
    rows = [[fact, *values] for fact, values in facts if any(values)]
    return fitted_table(["", *(column.name for column in columns)], rows, left={0})


def _measurements(columns: tuple[Column, ...]) -> list[tuple[str, list[str]]]:
    """Return a row for each metric that was measured, and one for its interval."""
    rows = []
    for title in dict.fromkeys(c.measurement.title for c in columns if c.measurement is not None):
        found = [c.measurement if c.measurement is not None and c.measurement.title == title else None for c in columns]
        rows.append((title, ["not known" if m is None else m.in_unit(m.value) for m in found]))
        bounds = ["" if m is None or m.interval is None else " to ".join(map(m.in_unit, m.interval)) for m in found]
        rows.append((f"{title}, 95 %", bounds))
    return rows


def differences_table(comparison: Comparison) -> Table:
    """Return a row for each layer of the comparison, with a column for each checkpoint."""
    rows = [[layer_name(name), *map(_kept_of_total, row)] for name, row in comparison.layers.items()]
    return fitted_table(["layer", *(column.name for column in comparison.columns)], rows, left={0})


def _kept_of_total(counts: tuple[int, int] | None) -> str:
    if counts is None:
        return "-"
    kept, total = counts
    return f"{kept}/{total}" if kept else "skipped"


def _factored(column: Column) -> str:
    if column.factored_macs is None or not column.dense_macs:
        return "unknown"
    return f"{millions(column.factored_macs)} ({column.factored_macs / column.dense_macs:.1%})"
