"""Check whether a network's outputs vary over images. Uniform outputs mean wrong pre-processing or wrong weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..network.running import evaluating
from ..network.values import match_dtype, tensors_in

# A smaller number of images does not allow a conclusion.
_MIN_IMAGES = 16
# Limits for the share of the images with the same top-1, and for the standard deviation of the outputs over the images,
# relative to their size. Measured on classifiers of digits and photographs: 0.14 to 0.33 and 0.8 to 1 with correct
# pixels; 0.98 to 1 and 0.005 to 0.4 with pixels wrong by a factor of 255. The deviation is 0.14 on images of one class.
_MAX_SAME_CLASS, _MIN_DEVIATION = 0.95, 0.05
# The number of outputs of an image that are used; from a larger output, evenly spaced ones.
_MAX_OUTPUTS = 4096


class Variety:
    """Collects a network's outputs, batch by batch; has a warning if the outputs do not vary.

    >>> variety = Variety()
    >>> variety.add(torch.eye(4)[torch.zeros(20, dtype=torch.long)])
    >>> variety.warning()
    'the network gives 100% of 20 images the same class: unless all show one class, preprocessing or weights are wrong'
    """

    def __init__(self) -> None:
        self.images = 0
        self._sum = self._squares = self._predicted = self._labels = torch.zeros(0, dtype=torch.float64)

    def add(self, outputs: Tensor, labels: Tensor | None = None) -> None:
        """Add the outputs (N, ...) of one batch and, if known, the labels (N,; negative: unknown)."""
        flat = outputs.detach().flatten(1)
        flat = flat[:, :: max(1, flat.shape[1] // _MAX_OUTPUTS)].double().cpu()
        if self.images and flat.shape[1] != len(self._sum):
            return  # outputs of different sizes, as for a larger image, cannot be added
        if not self.images:
            self._sum, self._squares = torch.zeros(2, flat.shape[1], dtype=torch.float64)
        self.images += len(flat)
        self._sum, self._squares = self._sum + flat.sum(0), self._squares + flat.square().sum(0)
        if outputs.dim() == 2 and outputs.shape[1] > 1:
            self._predicted = _add_to_counts(self._predicted, flat.argmax(1))
        if labels is not None:
            self._labels = _add_to_counts(self._labels, labels[labels >= 0])

    def warning(self) -> str | None:
        """Return a message about the probable error; None if the outputs vary or there are too few images."""
        if self.images < _MIN_IMAGES or not self._sum.isfinite().all():
            return None
        if self._labels.sum() and self._labels.max() >= _MAX_SAME_CLASS * self._labels.sum():
            return None  # nearly all images have the same label
        mean, square = self._sum / self.images, self._squares.mean() / self.images
        deviation = ((square - mean.square().mean()).clamp_min(0) / square.clamp_min(1e-300)).sqrt().item()
        share = self._predicted.max().item() / self.images if len(self._predicted) else 0.0
        if share >= _MAX_SAME_CLASS:
            problem = f"gives {share:.0%} of {self.images} images the same class"
            condition = "unless all show one class, "
        elif deviation < _MIN_DEVIATION:
            problem = f"has outputs that vary by only {deviation:.1%} of their size over {self.images} images"
            condition = ""
        else:
            return None
        return f"the network {problem}: {condition}preprocessing or weights are wrong"


def uniform_output_warning(model: nn.Module, batches: Iterable[Any]) -> str | None:
    """Run a network on batches of inputs; return `Variety.warning`, or None if the network does not run."""
    variety = Variety()
    try:
        with evaluating(model):
            for batch in batches:
                outputs = tensors_in(model(match_dtype(batch, model)))
                if not isinstance(batch, Tensor) or not outputs or outputs[0].shape[:1] != batch.shape[:1]:
                    return None
                variety.add(outputs[0])
    except (RuntimeError, ValueError, TypeError, IndexError):  # the calibration reports this error
        return None
    return variety.warning()


def _add_to_counts(counts: Tensor, numbers: Tensor) -> Tensor:
    more = numbers.cpu().bincount(minlength=len(counts)).double()
    more[: len(counts)] += counts
    return more
