"""How far a converted network's outputs are from the original's."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..network.comparison import top1_agreement
from ..network.declared import pretrained_config
from ..network.distributed import gathered, sum_over_ranks
from ..network.values import tensors_in
from .capture import explained, forward
from .inputs import Batch

# Logits of any set are far less; dense maps of a large one are run anew each time.
MOST_BYTES = 1 << 28


def divergence(original: nn.Module, converted: nn.Module, batches: Iterable[Batch]) -> tuple[float | None, str | None]:
    """What `Divergence` of ``original`` finds, once."""
    return Divergence(original, batches)(converted)


class Divergence:
    """How far networks' outputs on ``batches`` are from the original's, which are kept as far as `MOST_BYTES` goes.

    ``undo``: restore what the runs change in the networks. ``agreement``: of the network compared last, the share of
    inputs with the same top-1 class as the original's; None where outputs are no logits.
    """

    def __init__(self, original: nn.Module, batches: Iterable[Batch], undo: bool = False) -> None:
        self._original, self._batches, self._undo = original, tuple(batches), undo
        self._kept: dict[int, list[Tensor]] = {}
        self._bytes = 0
        self.agreement: float | None = None

    def __call__(self, converted: nn.Module) -> tuple[float | None, str | None]:
        """Mean KL divergence of class probabilities (nats) for a classifier, which says so by ``num_classes``; for
        others the squared difference of all floating outputs over their square. None, and the reason, where outputs
        have other shapes, are not finite, or do not come at all."""
        self.agreement = None
        sums = torch.zeros(5, dtype=torch.float64)  # distance, weight, same top-1, of how many, batches not comparable
        why: str | None = None
        for index, batch in enumerate(self._batches):
            try:
                ours = self._originals(index)
                theirs = _floats(forward(converted, batch.input, undo=self._undo))
                sums[:2] += _distance(ours, theirs, _classes(self._original))
                sums[2:4] += _same_top1(ours, theirs)
            except Exception as error:  # every process must come to the sum below
                sums[4] += 1
                why = why or explained(error)
        sum_over_ranks([sums])
        distance, weight, same, compared, lost = sums.tolist()
        if lost:
            return None, next(reason for reason in gathered(why) if reason is not None)
        value = distance / weight if weight > 0 else math.nan
        if math.isfinite(value):
            self.agreement = same / compared if compared else None
            return value, None
        nothing = weight == 0
        return None, "they are all zero, or there are none" if nothing else "they are not finite"

    def _originals(self, index: int) -> list[Tensor]:
        if index in self._kept:
            return self._kept[index]
        # Cloned, because a network may hand out a buffer of its own.
        output = forward(self._original, self._batches[index].input, undo=self._undo)
        outputs = [tensor.clone() for tensor in _floats(output)]
        bytes = sum(tensor.numel() * tensor.element_size() for tensor in outputs)
        if self._bytes + bytes <= MOST_BYTES:
            self._kept[index] = outputs
            self._bytes += bytes
        return outputs


def _floats(outputs: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(outputs, arrays=True) if tensor.is_floating_point()]


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


def _same_top1(ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """How many examples have the same top-1 class, and of how many; zeros where outputs are no logits."""
    rounding = torch.finfo(ours[0].dtype).eps
    share = top1_agreement([*zip(ours, theirs, strict=True)], rounding)
    count = 0 if share is None else len(ours[0])
    return torch.tensor([(share or 0.0) * count, count], dtype=torch.float64)


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
