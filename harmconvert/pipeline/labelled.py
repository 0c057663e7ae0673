"""Divide data with targets into two halves: one chooses the size of a network, the other measures the loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..data.datasets import DataRequest, Subset
from ..data.loading import Batch, evaluation_batches
from ..data.pictures import Pictures
from ..data.preprocessing import color_mode, sample_transform
from ..errors import Argument, InputError, UsageError, counted
from ..metrics import AGREEMENT, KL, TOP1, Metric, NetworkMetric, TaskBatches
from ..metrics.metric import UNCUT
from ..training.evaluation import Evaluation, evaluate
from .finetuning import check_classes
from .inputs import Sizes, image_config
from .listener import Listener
from .testing import TaskData, metric_for, opened_data, own_loader

BATCH_SIZE = 256


@dataclass(frozen=True)
class Halves:
    """Test data in two halves: one chooses, the other is held out.

    ``uncut`` is the network that is converted. ``metric`` is None for the top-1 of a classifier.
    """

    uncut: nn.Module
    parts: tuple[Iterable[Batch], Iterable[Batch]]
    metric: Metric | None
    data: str

    def chooser(self) -> NetworkMetric:
        """Return the metric, in points, on the half that chooses."""
        metric = self.metric or TOP1

        def value(network: nn.Module) -> float:
            measurement = self._evaluate(0, network, metric).measurement
            assert measurement is not None
            return measurement.value

        return NetworkMetric(value, metric.name, metric.higher_is_better)

    def held_out(self, converted: nn.Module) -> dict[str, Evaluation]:
        """Evaluate both networks on the held-out half; return the evaluations by name."""
        networks = {"uncut": self.uncut, "converted": converted}
        return {name: self._evaluate(1, network, self.metric) for name, network in networks.items()}

    def _evaluate(self, half: int, network: nn.Module, metric: Metric | None) -> Evaluation:
        compared = metric is not None and UNCUT in metric.compares_with and metric.finite
        other = self.uncut if compared else None
        return evaluate(network, self.parts[half], other, metric=metric, data=f"half of {self.data}")


def halves(
    data: TaskData,
    model: nn.Module,
    metric: Metric | None = None,
    *,
    sizes: Sizes,
    preprocessing: Mapping[str, Any],
    listener: Listener,
) -> Halves:
    """Divide test data into two halves.

    Args:
        data: a folder with a folder for each class, ``sample:mnist5k`` or a timm data set; or batches of your own.
        metric: what is measured; None: the top-1 of a classifier. Metrics that compare with the uncut network need no
            labels.
        sizes: the sizes (C, H, W) of the network's inputs, if the caller gives them.

    Raises:
        UsageError: the images do not exist, or are a stream.
        InputError: the images have no labels or other classes than the network, or there are fewer than two.
    """
    data, name = own_loader(data)
    if not isinstance(data, str | Path | DataRequest):
        batches = tuple(TaskBatches(data))
        if len(batches) < 2:
            number = counted(len(batches), "batch")
            raise InputError(Argument("labelled"), f" has {number}: one half chooses, the other measures; give two")
        return Halves(model, (batches[::2], batches[1::2]), metric, name or "the labelled batches")
    request = DataRequest.parse(data, holdout=0.0)
    opened = opened_data(request, ("test",), listener)
    pictures, metric = opened.test, metric_for(metric, opened.task)
    if not isinstance(pictures, Pictures):
        raise UsageError(f"{request.name} is a stream, which cannot be divided: give a folder or another data set")
    if not pictures.labelled and (metric is None or metric.needs_targets):
        remedy = "give a folder with a folder for each class, or "
        raise InputError(f"{request.name} has no labels: ", remedy, Argument("metric", "agreement"))
    if len(pictures) < 2:
        raise InputError(f"{request.name} has {len(pictures)} image: give two or more")
    config = image_config(model, preprocessing, listener, sizes[0] if sizes else None, opened.task)
    if metric is None or metric not in (AGREEMENT, KL):
        check_classes(opened, model, "convert a network of the data's classes")
    parts = [
        evaluation_batches(
            Subset(pictures, np.arange(start, len(pictures), 2)), sample_transform(config), color_mode(config),
            BATCH_SIZE,
        )
        for start in (0, 1)
    ]  # fmt: skip
    return Halves(model, (parts[0], parts[1]), metric, request.name)
