"""Evaluate a network on a set of samples: accuracy of a classifier and its agreement with another, or any metric."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from ..data.loading import Batch
from ..data.variety import Variety
from ..errors import counted
from ..metrics.classification import AGREEMENT, KL, LOSS, TOP1, TOP5
from ..metrics.intervals import wilson_interval
from ..metrics.measuring import Measured, measure, measure_whole
from ..metrics.metric import Measurement, Metric, difference_of

_MEASUREMENTS = ("measurement", "difference")


@dataclass(frozen=True)
class Evaluation:
    """The result of a network on a set of images, over all processes.

    ``images``: number of images, or other samples, that were read. ``labelled``: number of images with a label.
    ``top1``, ``top5`` (shares) and ``loss`` (mean cross-entropy in nats) are measured on the labelled images; they are
    None without labels. ``agreement`` (share of images with the same top-1) and ``divergence`` (mean KL of the class
    probabilities, in nats) compare with a second network; they are None without one. ``images_per_second``: speed of
    the forward passes alone. ``unreadable``: names of images that could not be read and were left out.
    ``measurement``: of the metric that was asked for; None if none was. For a metric that is not one of classes, all
    accuracies are None. ``difference``: of top-1, or of the metric, from that of the second network, with a paired
    interval; None if it was not asked for.
    """

    images: int
    labelled: int
    top1: float | None
    top5: float | None
    loss: float | None
    agreement: float | None
    divergence: float | None
    images_per_second: float
    unreadable: tuple[str, ...] = ()
    measurement: Measurement | None = None
    difference: Measurement | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Return the 95 % confidence interval of top-1 (`wilson_interval`)."""
        return None if self.top1 is None else wilson_interval(self.top1, self.labelled)

    @property
    def second_network(self) -> str:
        """Return the metric of the second network, and the difference of the first one from it; empty without one."""
        difference, measured = self.difference, self.measurement
        if difference is None:
            return ""
        title = "top-1" if measured is None else measured.title
        own = 100 * (self.top1 or 0.0) if measured is None else measured.value
        form, unit = ("+.2f", "points") if difference.unit == "%" else ("+.3g", difference.unit)
        between = " to ".join(f"{bound:{form}}" for bound in difference.interval or ())
        gap = f"difference {difference.value:{form}} {unit}".rstrip() + (f" (95 %: {between})" if between else "")
        return f"{title} {difference.in_unit(own - difference.value)}; {gap}"

    def __str__(self) -> str:
        if self.measurement is not None:
            return str(self.measurement)
        if self.top1 is not None and self.interval is not None:
            low, high = self.interval
            return f"top-1 {self.top1:.2%} (95 %: {low:.2%} to {high:.2%}), {counted(self.labelled, 'image')}"
        if self.agreement is not None:
            return f"agreement {self.agreement:.2%}, KL {self.divergence:.3g}, {counted(self.images, 'image')}"
        return f"{counted(self.images, 'image')} without labels"

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict, including the confidence interval."""
        result = {**asdict(self), "top1_interval": self.interval}
        return {key: value for key, value in result.items() if key not in _MEASUREMENTS or value is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Evaluation:
        """Return the evaluation that `to_json` wrote."""
        known = {key: data[key] for key in cls.__dataclass_fields__ if key in data}
        known |= {key: Measurement.from_json(known[key]) for key in _MEASUREMENTS if known.get(key)}
        return cls(**{**known, "unreadable": tuple(known["unreadable"])})


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    other: nn.Module | None = None,
    *,
    metric: Metric | None = None,
    data: str = "",
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    variety: Variety | None = None,
    paired: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Return top-1, top-5, loss and agreement with another network, or another metric, over all processes.

    The network runs in eval mode on its own device; its state is restored afterwards.

    Args:
        other: the network to compare with.
        metric: what to measure; None: the accuracy of a classifier.
        data: the name of the data, for the measurement.
        variety: collects the outputs of this process, to check whether they vary.
        paired: also measure the difference from the other network.
        progress: called with the number of images of each batch.

    Raises:
        UsageError: the network does not run on images of this size.
        InputError: there are no images, a label is beyond the network's classes, or the outputs or the targets do not
            fit the metric.
    """
    if metric is not None and metric.whole is not None:
        with autocast():
            return _evaluation(measure_whole(model, batches, metric), metric, data)
    compared = (AGREEMENT, KL) if other is not None else ()
    labelled = (TOP1, TOP5, LOSS)
    metrics: tuple[Metric, ...] = (*labelled, *compared)
    if metric is not None and metric not in labelled:
        metrics = compared if metric in compared else (metric,)
    judged = TOP1 if metric is None else metric
    differences = (difference_of(judged),) if paired and other is not None and not judged.needs_uncut else ()
    measured = measure(
        model, batches, (*metrics, *differences), other, autocast=autocast, variety=variety, progress=progress
    )
    found = [one for one in differences if len(measured[one])]
    return replace(
        _evaluation(measured, metric, data), difference=measured.measurement(found[0], data) if found else None
    )


def _evaluation(measured: Measured, metric: Metric | None, data: str) -> Evaluation:
    def value(one: Metric) -> float | None:
        return measured[one].value if one.name in measured.collected else None

    return Evaluation(
        measured.samples,
        len(measured[TOP1]) if TOP1.name in measured.collected else 0,
        value(TOP1),
        value(TOP5),
        value(LOSS),
        value(AGREEMENT),
        value(KL),
        measured.samples / max(measured.seconds, 1e-9),
        measured.unreadable,
        None if metric is None else measured.measurement(metric, data),
    )
