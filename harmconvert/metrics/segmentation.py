"""Mean intersection over union of the classes of pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..errors import InputError, counted
from .metric import Metric, Outcome
from .outputs import describe, main_output

# Pixels of this class are not counted, as in the masks of Pascal VOC, Cityscapes and ADE20K.
IGNORED = 255


def pixel_logits(output: Any, size: tuple[int, int]) -> Tensor:
    """Return the logits (N, classes, H, W) of a network's output at the size of the masks.

    Many networks compute them at a part of this size; they are then interpolated, as in their own evaluation.

    Raises:
        InputError: the outputs are not logits of pixels.
    """
    logits = main_output(output)
    if not isinstance(logits, Tensor) or logits.dim() != 4:
        raise InputError(f"masks are compared with logits (images, classes, H, W): the output has {describe(logits)}")
    if logits.shape[2:] == size:
        return logits
    return functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def masks_of(targets: Any) -> Tensor:
    """Return the masks (N, H, W) of class numbers in the targets of a batch.

    Raises:
        InputError: these are no masks.
    """
    if not isinstance(targets, Tensor) or targets.dim() != 3 or targets.is_floating_point():
        raise InputError(
            f"pixels are measured with masks (images, H, W) of class numbers: these are {describe(targets)}"
        )
    return targets.long()


def check_masks(masks: Tensor, classes: int) -> None:
    """Raise InputError if masks have a class that the network does not have."""
    known = masks[masks != IGNORED]
    extremes = (int(known.min()), int(known.max())) if known.numel() else ()
    if wrong := [number for number in extremes if not 0 <= number < classes]:
        raise InputError(
            f"a mask has the class {wrong[0]}, the network has {counted(classes, 'class')}: classes are numbered from "
            f"0, and {IGNORED} is not counted"
        )


def _intersections_and_unions(outcome: Outcome) -> np.ndarray:
    """Return, for each image, the pixels in the intersection and in the union of each class (N, 2, classes)."""
    masks = masks_of(outcome.targets)
    logits = pixel_logits(outcome.outputs, (masks.shape[1], masks.shape[2]))
    classes = max(2, logits.shape[1])
    check_masks(masks, classes)
    masks = masks.to(logits.device)
    predicted = logits.argmax(1) if logits.shape[1] > 1 else (logits[:, 0] > 0).long()
    states = []
    for mask, guess in zip(masks, predicted, strict=True):
        counted_pixels = mask != IGNORED
        pairs = (classes * mask[counted_pixels] + guess[counted_pixels]).bincount(minlength=classes**2)
        matrix = pairs.view(classes, classes).double().cpu()
        inside = matrix.diagonal()
        states.append(torch.stack([inside, matrix.sum(0) + matrix.sum(1) - inside]).numpy())
    return np.stack(states)


def _mean_over_classes(states: Any) -> Callable[[np.ndarray], float]:
    """Return the mean over the classes that occur of the sum of intersections, divided by the sum of unions."""
    sums = np.asarray(states, dtype=np.float64)

    def value(counts: np.ndarray) -> float:
        inside, union = np.tensordot(counts, sums, 1)
        return float((inside[union > 0] / union[union > 0]).mean()) if (union > 0).any() else float("nan")

    return value


METRICS = (Metric("miou", "mIoU", _intersections_and_unions, _mean_over_classes, unit="%", scale=100),)
