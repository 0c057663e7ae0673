"""How far a converted network's outputs are from the original's."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import gathered, sum_over_ranks
from ..surgery import pretrained_config, tensors_in
from .capture import explained, forward
from .inputs import Batch

# Logits of any set are far less; dense maps of a large one are run anew each time.
MOST_BYTES = 1 << 28


def divergence(original: nn.Module, converted: nn.Module, batches: Iterable[Batch]) -> tuple[float | None, str | None]:
    """What `Divergence` of ``original`` finds, once."""
    return Divergence(original, batches)(converted)


class Divergence:
    """How far networks' outputs on ``batches`` are from the original's, which are kept as far as `MOST_BYTES` goes."""

    def __init__(self, original: nn.Module, batches: Iterable[Batch]) -> None:
        self._original, self._batches = original, tuple(batches)
        self._kept: dict[int, list[Tensor]] = {}
        self._bytes = 0

    def __call__(self, converted: nn.Module) -> tuple[float | None, str | None]:
        """Mean KL divergence of class probabilities (nats) for a classifier, which says so by ``num_classes``; for
        others the squared difference of all floating outputs over their square. None, and the reason, where outputs
        have other shapes, are not finite, or do not come at all."""
        sums = torch.zeros(3, dtype=torch.float64)  # distance, weight, batches that cannot be compared
        why: str | None = None
        for index, batch in enumerate(self._batches):
            try:
                ours, theirs = self._originals(index), _floats(forward(converted, batch.input))
                sums[:2] += _distance(ours, theirs, _classes(self._original))
            except Exception as error:  # every process must come to the sum below
                sums[2] += 1
                why = why or explained(error)
        sum_over_ranks([sums])
        distance, weight, lost = sums.tolist()
        if lost:
            return None, next(reason for reason in gathered(why) if reason is not None)
        value = distance / weight if weight > 0 else math.nan
        if math.isfinite(value):
            return value, None
        nothing = weight == 0
        return None, "they are all zero, or there are none" if nothing else "they are not finite"

    def _originals(self, index: int) -> list[Tensor]:
        if index in self._kept:
            return self._kept[index]
        # Cloned, because a network may hand out a buffer of its own.
        outputs = [tensor.clone() for tensor in _floats(forward(self._original, self._batches[index].input))]
        bytes = sum(tensor.numel() * tensor.element_size() for tensor in outputs)
        if self._bytes + bytes <= MOST_BYTES:
            self._kept[index] = outputs
            self._bytes += bytes
        return outputs


def _floats(outputs: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(outputs) if tensor.is_floating_point()]


def _distance(ours: list[Tensor], theirs: list[Tensor], classes: int | None) -> Tensor:
    shapes = [", ".join("x".join(map(str, t.shape)) for t in outputs) for outputs in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the converted network's are {shapes[1]}, the original's {shapes[0]}")
    if not ours:
        raise ValueError("none of them is a tensor of floating point")
    if len(ours) == 1 and ours[0].dim() == 2 and ours[0].shape[1] == classes:
        return torch.tensor([_kl(ours[0], theirs[0]), len(ours[0])], dtype=torch.float64)
    difference = sum(_squares(b.double() - a.double()) for a, b in zip(ours, theirs, strict=True))
    return torch.tensor([difference, sum(_squares(a.double()) for a in ours)], dtype=torch.float64)


def _classes(model: nn.Module) -> int | None:
    """Number of classes, which timm's classifiers and their configurations name; None where nothing says so."""
    classes = getattr(model, "num_classes", pretrained_config(model).get("num_classes"))
    return classes if isinstance(classes, int) and classes > 1 else None


def _kl(original: Tensor, converted: Tensor) -> float:
    p, q = (torch.log_softmax(logits.double(), 1) for logits in (original, converted))
    # A class masked out by -inf says nothing; NaN does.
    return float(torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum())


def _squares(tensor: Tensor) -> float:
    return float(tensor.square().sum())
