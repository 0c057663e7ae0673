"""Divide labelled images into two halves: one chooses the size of a network, the other measures the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..data.datasets import DataRequest, Subset, open_data
from ..data.loading import evaluation_batches
from ..data.pictures import Pictures
from ..data.preprocessing import color_mode, evaluation_transform
from ..errors import Argument, InputError, UsageError
from ..training.evaluation import Evaluation, evaluate
from .finetuning import check_classes
from .inputs import Sizes, image_config
from .listener import Listener

BATCH_SIZE = 256


@dataclass(frozen=True)
class Halves:
    """Test images in two halves: ``evaluate`` uses half 0, which chooses, or half 1, which is held out."""

    evaluate: Callable[[int, nn.Module], Evaluation]

    def metric(self, network: nn.Module) -> float:
        """Return the top-1 in % of a network on the half that chooses."""
        return 100 * (self.evaluate(0, network).top1 or 0.0)

    def held_out(self, uncut: nn.Module, converted: nn.Module) -> dict[str, Evaluation]:
        """Evaluate both networks on the held-out half; return the evaluations by name."""
        return {"uncut": self.evaluate(1, uncut), "converted": self.evaluate(1, converted)}


def halves(
    data: str | Path | DataRequest,
    model: nn.Module,
    *,
    sizes: Sizes,
    preprocessing: Mapping[str, Any],
    listener: Listener,
) -> Halves:
    """Divide labelled test images into two halves.

    Args:
        data: a folder with a folder for each class, ``sample:mnist5k`` or a timm data set.
        sizes: the sizes (C, H, W) of the network's inputs, if the caller gives them.

    Raises:
        UsageError: the images do not exist, or are a stream.
        InputError: the images have no labels or other classes than the network, or there are fewer than two.
    """
    request = DataRequest.parse(data, holdout=0.0)
    argument = Argument("labelled", request.dataset or request.data_dir)
    opened = open_data(request, ("test",))
    pictures = opened.test
    if not isinstance(pictures, Pictures):
        raise UsageError(argument, " is a stream, which cannot be divided: give a folder or another data set")
    unlabelled = InputError(argument, " has no labels: give a folder with a folder for each class")
    if not pictures.labelled:
        raise unlabelled
    if len(pictures) < 2:
        raise InputError(argument, f" has {len(pictures)} image: give two or more")
    config = image_config(model, preprocessing, listener, sizes[0] if sizes else None)
    image_halves = [Subset(pictures, np.arange(start, len(pictures), 2)) for start in (0, 1)]
    check_classes(opened, model, "convert a network of the data's classes")

    def evaluate_on(half: int, network: nn.Module) -> Evaluation:
        transform = evaluation_transform(config)
        loading = evaluation_batches(image_halves[half], transform, color_mode(config), BATCH_SIZE)
        evaluation = evaluate(network, loading.epoch(0))
        if evaluation.top1 is None:
            raise unlabelled
        return evaluation

    return Halves(evaluate_on)
