"""compare(): harmonic checkpoints side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..arguments import check_harmonic
from ..data.datasets import DataRequest
from ..errors import UsageError
from ..metrics import Measurement, MetricLike, metric_of
from ..pipeline.evaluate import evaluate
from ..pipeline.inputs import Sizes
from ..pipeline.listener import SILENT, Listener
from ..pipeline.networks import Openable, is_given, text_of
from ..sources.request import SourceRequest
from .comparison import Comparison, check_enough, comparison_of
from .facts import Report
from .report import report


def compare(
    *models: Openable,
    all_layers: bool = False,
    input_sizes: Sizes = (),
    metric: MetricLike | None = None,
    data: str | Path | DataRequest | Iterable[Any] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    listener: Listener = SILENT,
) -> Comparison:
    """Compare two or more harmonic checkpoints: sizes, accuracies, and differences between the plans.

    With ``data``, the networks are measured; without, the recorded accuracies are shown.

    >>> import harmconvert as hc
    >>> network = hc.open_source("sample:resnet_mnist5k").model
    >>> comparison = compare(hc.convert(network, 2), hc.convert(network, {"stage3.*": 2}))
    >>> [f"{column.share:.0%}" for column in comparison.columns], comparison.layers["stage1.0.conv1"]
    (['34%', '50%'], ((3, 9), (9, 9)))

    Args:
        models: paths of harmonic checkpoints, requests or harmonic networks.
        all_layers: also list the layers that keep the same number of parts in all checkpoints.
        input_sizes: the size (C, H, W) of each input of one example, on which MACs are counted; default: the sizes that
            the networks declare.
        metric: what to measure on ``data``, as for `evaluate` (default: top-1); without data, the name of a recorded
            metric.
        data: as for `evaluate`; batches of your own must be a list or a loader that can be read again.
        preprocessing: of images, as for `evaluate`.
        listener: receives a message for each checkpoint that is read.

    Raises:
        UsageError: there are fewer than two checkpoints, or one is not harmonic.
    """
    check_enough(models)
    chosen = metric_of(metric or "top1") if metric is not None or data is not None else None
    for model in models:
        if not is_given(model):
            check_harmonic(text_of(model))
    reports = [report(model, input_sizes=input_sizes, listener=listener).report for model in models]
    measurements: list[Measurement | None] = []
    if data is not None:
        data = tuple(data) if isinstance(data, Iterator) else data
        for model, facts in zip(models, reports, strict=True):
            measured = evaluate(
                model, data, metric=chosen, compare=_uncut(model, facts) if chosen and chosen.needs_uncut else None,
                preprocessing=preprocessing, listener=listener,
            )  # fmt: skip
            measurements.append(measured.measurement)
    return comparison_of(reports, all_layers, chosen.name if chosen else None, measurements)


def _uncut(model: Openable, facts: Report) -> Openable:
    """Return the source of the network from which a checkpoint was made.

    Raises:
        UsageError: the checkpoint does not record it.
    """
    if facts.source is None:
        raise UsageError(f"{facts.name} does not record the uncut network: choose a metric that needs none")
    request = model if isinstance(model, SourceRequest) else SourceRequest("")
    return replace(request, text=str(facts.source), weights=None)
