"""Checkpoints side by side: their sizes, costs and accuracies, and the layers in which they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import UsageError
from ..metrics.metric import Measurement
from ..plan import bases_text
from .facts import Report, StageFacts


@dataclass(frozen=True)
class Column:
    """One checkpoint: sizes, MACs per example in factored form, and its last known accuracy. None means not known.

    ``bits``: per coded weight; None if no weight is coded. ``measurement``: of a metric other than the accuracy, or of
    the metric that was asked for.
    """

    name: str
    source: str | None
    weights: str | None
    plan: str
    basis: str
    converted: int
    cut: int
    skipped: int
    uncut_parameters: int
    parameters: int
    bytes: int
    bits: float | None
    dense_macs: int | None
    factored_macs: int | None
    calibration_inputs: int | None
    divergence: float | None
    epochs: int
    stage: str | None
    top1: float | None
    top1_interval: tuple[float, float] | None
    agreement: float | None
    images: int | None
    measurement: Measurement | None = None

    @property
    def share(self) -> float:
        """Return the number of parameters, divided by that of the uncut network."""
        return self.parameters / max(self.uncut_parameters, 1)


@dataclass(frozen=True)
class Comparison:
    """Checkpoints and their layers.

    ``layers``: by layer name, for each checkpoint how many parts are kept, and of how many; None if the checkpoint has
    no layer of this name.
    """

    columns: tuple[Column, ...]
    layers: dict[str, tuple[tuple[int, int] | None, ...]]

    @property
    def notes(self) -> tuple[str, ...]:
        """Return the reasons why the columns are hard to compare."""
        notes = []
        if len({column.source for column in self.columns}) > 1:
            notes.append("these checkpoints are of different networks")
        elif len({column.weights for column in self.columns} - {None}) > 1:
            notes.append("these checkpoints were converted from different weights of the same network")
        if len({column.images for column in self.columns if column.top1 is not None}) > 1:
            notes.append("the accuracies were measured on different numbers of images")
        measured = [column.measurement for column in self.columns if column.measurement is not None]
        if len({(one.metric, one.samples, one.data) for one in measured}) > 1:
            notes.append("the metrics were measured on different data: " + "; ".join(map(str, measured)))
        return tuple(notes)

    def to_json(self) -> dict[str, Any]:
        """Return a dict for JSON."""
        columns = [{**asdict(column), "share": column.share} for column in self.columns]
        return {"checkpoints": columns, "layers": {k: list(v) for k, v in self.layers.items()}, "notes": self.notes}


def check_enough(what: Sequence[Any]) -> None:
    """Raise UsageError where there are fewer than two checkpoints; call it before they are read."""
    if len(what) < 2:
        raise UsageError("a comparison needs two checkpoints or more")


def comparison_of(
    reports: Sequence[Report], all_layers: bool = False, metric: str | None = None,
    measurements: Sequence[Measurement | None] = (),
) -> Comparison:  # fmt: skip
    """Compare the reports of two or more checkpoints.

    Args:
        all_layers: list all layers, and not only those of which the checkpoints keep different numbers of parts.
        metric: the name of the metric whose recorded value is shown; None: the last one that is recorded.
        measurements: of each checkpoint, instead of those that are recorded.

    Raises:
        UsageError: there are fewer than two reports.
    """
    check_enough(reports)
    kept = [{layer.name: (layer.kept, layer.total) for layer in report.layers} for report in reports]
    names = dict.fromkeys(layer.name for report in reports for layer in report.layers)
    rows = {name: tuple(by_name.get(name) for by_name in kept) for name in names}
    listed = {name: row for name, row in rows.items() if all_layers or len(set(row)) > 1}
    shown = measurements or [_recorded(report, metric) for report in reports]
    columns = [replace(_column(report), measurement=one) for report, one in zip(reports, shown, strict=True)]
    return Comparison(tuple(columns), listed)


def _recorded(report: Report, metric: str | None) -> Measurement | None:
    """Return the last measurement that is recorded, of a metric of this name if one is given."""
    measured = [stage.measurement for stage in report.stages if stage.measurement is not None]
    chosen = [one for one in measured if metric in (None, one.metric)]
    return chosen[-1] if chosen else None


def _column(report: Report) -> Column:
    dense, harmonic, factored = (report.form(name) for name in ("dense", "harmonic", "factored"))
    known = [stage for stage in report.stages if stage.top1 is not None or stage.agreement is not None]
    stage = known[-1] if known else StageFacts("")
    calibration = report.calibration or {}
    return Column(
        name=report.name,
        source=str(report.source) if report.source else None,
        weights=report.source.sha256 if report.source else None,
        plan=report.plan.policy,
        basis=bases_text(report.plan),
        converted=sum(layer.kept > 0 for layer in report.layers),
        cut=len(report.cut),
        skipped=sum(layer.kept == 0 for layer in report.layers),
        uncut_parameters=dense.parameters,
        parameters=harmonic.parameters,
        bytes=harmonic.bytes,
        bits=report.bits,
        dense_macs=dense.macs,
        factored_macs=factored.macs,
        calibration_inputs=calibration.get("inputs"),
        divergence=calibration.get("divergence"),
        epochs=sum(len(run.get("epochs") or []) for run in report.training),
        stage=stage.name or None,
        top1=stage.top1,
        top1_interval=stage.top1_interval,
        agreement=stage.agreement,
        images=stage.images,
    )
