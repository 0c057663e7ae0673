"""The built-in metrics by name. A new one is a file in this folder and its place in `_FILES`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import UsageError
from ..user_code import import_function
from . import classification, detection, restoration, segmentation
from .metric import Metric
from .user import user_metric

_FILES = (classification, segmentation, detection, restoration)
METRICS: dict[str, Metric] = {metric.name: metric for file in _FILES for metric in file.METRICS}

# What callers may give for a metric.
MetricLike = str | Metric | Callable[..., Any]


def metric_of(metric: MetricLike) -> Metric:
    """Return the metric of a name, of ``FILE.py:FUNCTION``, or of a function; return a metric unchanged.

    >>> metric_of("miou").title, list(METRICS)
    ('mIoU', ['top1', 'top5', 'agreement', 'kl', 'miou', 'map', 'psnr', 'ssim'])

    Raises:
        UsageError: there is no such metric, file or function. InputError: the file raises an error.
    """
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, str):
        if metric in METRICS:
            return METRICS[metric]
        if ":" not in metric:
            raise UsageError(f"unknown metric {metric!r}: use {', '.join(METRICS)}, or FILE.py:FUNCTION")
        return user_metric(import_function(metric), metric)
    if callable(metric):
        return user_metric(metric)
    raise UsageError(f"a metric is a name, a Metric or a function, not a {type(metric).__name__}")
