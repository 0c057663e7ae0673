"""Labelled images in two halves: one to choose a network by, the other to say what the choice cost."""

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

BATCH = 256  # images at once


@dataclass(frozen=True)
class Halves:
    """Test images in two halves: every second one chooses, the others judge."""

    evaluate: Callable[[int, nn.Module], Evaluation]

    def metric(self, network: nn.Module) -> float:
        """Top-1 in % of a network on the half that chooses."""
        return 100 * (self.evaluate(0, network).top1 or 0.0)

    def held_out(self, uncut: nn.Module, converted: nn.Module) -> dict[str, Evaluation]:
        """How two networks do on the half that judges, by name."""
        return {"uncut": self.evaluate(1, uncut), "converted": self.evaluate(1, converted)}


def halves(
    data: str | Path | DataRequest,
    model: nn.Module,
    *,
    sizes: Sizes,
    preprocessing: Mapping[str, Any],
    listener: Listener,
) -> Halves:
    """The two halves of labelled test images.

    Args:
        data: a folder with a folder for each class, ``sample:mnist5k`` or a timm data set.
        sizes: of the network's inputs (C, H, W), where they were given.

    Raises:
        UsageError, InputError: no such images, without labels, or of other classes than the network's.
    """
    request = DataRequest.parse(data, holdout=0.0)
    named = Argument("labelled", request.dataset or request.data_dir)
    found = open_data(request, ("test",))
    pictures = found.test
    if not isinstance(pictures, Pictures):
        raise UsageError(named, " is a stream, which cannot be halved: give a folder or another data set")
    unlabelled = InputError(named, " has no labels: give a folder with a folder for each class")
    if not pictures.labelled:
        raise unlabelled
    if len(pictures) < 2:
        raise InputError(named, f" holds {len(pictures)} image: give two or more, of which half choose")
    config = image_config(model, preprocessing, listener, sizes[0] if sizes else None)
    parts = [Subset(pictures, np.arange(start, len(pictures), 2)) for start in (0, 1)]
    check_classes(found, model, "give images of the network's classes")

    def on(part: int, network: nn.Module) -> Evaluation:
        loading = evaluation_batches(parts[part], evaluation_transform(config), color_mode(config), BATCH)
        evaluation = evaluate(network, loading.epoch(0))
        if evaluation.top1 is None:
            raise unlabelled
        return evaluation

    return Halves(on)
