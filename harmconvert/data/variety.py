"""Check whether a network's outputs vary over images; if they do not, the pre-processing or the weights are wrong."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..network.running import evaluating
from ..network.values import tensors_in

# Fewer images allow no conclusion.
_FEWEST = 16
# Share of the images with the same top-1, and standard deviation of the outputs over the images relative to their size.
# Measured on classifiers of digits and photographs: 0.14 to 0.33 and 0.8 to 1 as trained; 0.98 to 1 and 0.005 to 0.4
# with pixels wrong by a factor of 255; the deviation is 0.14 on images of one class alone.
_SAME_CLASS, _LEAST_DEVIATION = 0.95, 0.05
# Most outputs of an image that are used; of a larger map, evenly spaced ones.
_MOST_OUTPUTS = 4096


class Variety:
    """Statistics of a network's outputs, batch by batch, and a remark where they do not vary.

    >>> variety = Variety()
    >>> variety.add(torch.eye(4)[torch.zeros(20, dtype=torch.long)])
    >>> variety.remark()
    'the network gives 100% of 20 images the same class: unless they show one, preprocessing or weights are wrong'
    """

    def __init__(self) -> None:
        self.images = 0
        self._sum = self._squares = self._predicted = self._labels = torch.zeros(0, dtype=torch.float64)

    def add(self, outputs: Tensor, labels: Tensor | None = None) -> None:
        """Add the outputs (N, ...) of one batch, and their labels (N,; negative: unknown) where there are any."""
        flat = outputs.detach().flatten(1)
        flat = flat[:, :: max(1, flat.shape[1] // _MOST_OUTPUTS)].double().cpu()
        if self.images and flat.shape[1] != len(self._sum):
            return  # outputs of another size, such as the map of a larger image, cannot be added up
        if not self.images:
            self._sum, self._squares = torch.zeros(2, flat.shape[1], dtype=torch.float64)
        self.images += len(flat)
        self._sum, self._squares = self._sum + flat.sum(0), self._squares + flat.square().sum(0)
        if outputs.dim() == 2 and outputs.shape[1] > 1:
            self._predicted = _add_to_counts(self._predicted, flat.argmax(1))
        if labels is not None:
            self._labels = _add_to_counts(self._labels, labels[labels >= 0])

    def remark(self) -> str | None:
        """Return what is probably wrong; None where the outputs vary or there are too few images."""
        if self.images < _FEWEST or not self._sum.isfinite().all():
            return None
        if self._labels.sum() and self._labels.max() >= _SAME_CLASS * self._labels.sum():
            return None  # nearly all images have the same label
        mean, square = self._sum / self.images, self._squares.mean() / self.images
        deviation = ((square - mean.square().mean()).clamp_min(0) / square.clamp_min(1e-300)).sqrt().item()
        share = self._predicted.max().item() / self.images if len(self._predicted) else 0.0
        if share >= _SAME_CLASS:
            what, unless = f"gives {share:.0%} of {self.images} images the same class", "unless they show one, "
        elif deviation < _LEAST_DEVIATION:
            what, unless = f"has outputs that vary by {deviation:.1%} of their size over {self.images} images", ""
        else:
            return None
        return f"the network {what}: {unless}preprocessing or weights are wrong"


def remark_on(model: nn.Module, batches: Iterable[Any]) -> str | None:
    """Run a network on batches of inputs and return `Variety.remark`; None also where the network does not run."""
    variety = Variety()
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    try:
        with evaluating(model):
            for batch in batches:
                outputs = tensors_in(model(batch.to(device)))
                if not outputs or outputs[0].shape[:1] != batch.shape[:1]:
                    return None
                variety.add(outputs[0])
    except (RuntimeError, ValueError, TypeError, IndexError):  # the calibration reports it
        return None
    return variety.remark()


def _add_to_counts(counts: Tensor, numbers: Tensor) -> Tensor:
    more = numbers.cpu().bincount(minlength=len(counts)).double()
    more[: len(counts)] += counts
    return more
