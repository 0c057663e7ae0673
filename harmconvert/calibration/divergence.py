"""Measure how far a converted network's outputs are from the original's."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..network.comparison import top1_agreement
from ..network.declared import pretrained_config
from ..network.distributed import gathered, sum_over_ranks
from ..network.heads import compared_outputs
from ..network.values import tensors_in
from .capture import explain_error, forward
from .inputs import Batch

# The original's outputs are stored up to this size: enough for logits of any set. Larger ones are computed each time.
MOST_BYTES = 1 << 28


def divergence(original: nn.Module, converted: nn.Module, batches: Iterable[Batch]) -> tuple[float | None, str | None]:
    """Compare the outputs of two networks; see `Divergence.__call__`."""
    return Divergence(original, batches)(converted)


class Divergence:
    """Compares networks' outputs on ``batches`` with the original's, which are stored up to `MOST_BYTES`.

    ``agreement``: after a comparison, the share of inputs with the same top-1 class as the original; None if the
    outputs are not logits.

    Args:
        undo: restore everything that the runs change in the networks.
    """

    def __init__(self, original: nn.Module, batches: Iterable[Batch], undo: bool = False) -> None:
        self._original, self._batches, self._undo = original, tuple(batches), undo
        self._stored: dict[int, list[Tensor]] = {}
        self._bytes = 0
        self.agreement: float | None = None

    def __call__(self, converted: nn.Module) -> tuple[float | None, str | None]:
        """Return the divergence of a network's outputs from the original's, and why it is None if it is.

        For a classifier (a network with ``num_classes``) this is the mean KL divergence of the class probabilities, in
        nats; for other networks the squared difference of all floating-point outputs, divided by their squares (of
        detectors: the outputs of their heads). It is None if the outputs have other shapes or are not finite, or if the
        network does not run.
        """
        self.agreement = None
        # distance, its divisor, examples with the same top-1 class, examples compared, batches that cannot be compared
        sums = torch.zeros(5, dtype=torch.float64)
        why: str | None = None
        for index, batch in enumerate(self._batches):
            try:
                expected = self._original_outputs(index)
                actual = _floats(self._run(converted, batch.input))
                sums[:2] += _distance(expected, actual, class_count(self._original))
                sums[2:4] += _same_top1(expected, actual)
            except Exception as error:  # every process must reach the sum below
                sums[4] += 1
                why = why or explain_error(error)
        sum_over_ranks([sums])
        distance, divisor, same, compared, failed = sums.tolist()
        if failed:
            return None, next(reason for reason in gathered(why) if reason is not None)
        value = distance / divisor if divisor > 0 else math.nan
        if math.isfinite(value):
            self.agreement = same / compared if compared else None
            return value, None
        return None, "they are all zero, or there are none" if divisor == 0 else "they are not finite"

    def _original_outputs(self, index: int) -> list[Tensor]:
        if index in self._stored:
            return self._stored[index]
        # Cloned, because a network may return one of its buffers.
        output = self._run(self._original, self._batches[index].input)
        outputs = [tensor.clone() for tensor in _floats(output)]
        bytes = sum(tensor.numel() * tensor.element_size() for tensor in outputs)
        if self._bytes + bytes <= MOST_BYTES:
            self._stored[index] = outputs
            self._bytes += bytes
        return outputs

    def _run(self, network: nn.Module, input: Any) -> Any:
        return compared_outputs(network, lambda: forward(network, input, undo=self._undo))


def _floats(outputs: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(outputs, arrays=True) if tensor.is_floating_point()]


def _distance(expected: list[Tensor], actual: list[Tensor], classes: int | None) -> Tensor:
    """Return the distance of one batch's outputs, and by what the sum of distances is divided, as a tensor (2,)."""
    shapes = [", ".join("x".join(map(str, t.shape)) for t in outputs) for outputs in (expected, actual)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the converted network's are {shapes[1]}, the original's {shapes[0]}")
    if not expected:
        raise ValueError("none of them is a tensor of floating point")
    if len(expected) == 1 and expected[0].dim() == 2 and expected[0].shape[1] == classes:
        return torch.tensor([_kl(expected[0], actual[0]), len(expected[0])], dtype=torch.float64)
    difference = sum(_sum_of_squares(a.double() - e.double()) for e, a in zip(expected, actual, strict=True))
    return torch.tensor([difference, sum(_sum_of_squares(e.double()) for e in expected)], dtype=torch.float64)


def _same_top1(expected: list[Tensor], actual: list[Tensor]) -> Tensor:
    """Return the number of examples with the same top-1 class and the number of examples; zeros if not logits."""
    rounding = torch.finfo(expected[0].dtype).eps
    share = top1_agreement([*zip(expected, actual, strict=True)], rounding)
    count = 0 if share is None else len(expected[0])
    return torch.tensor([(share or 0.0) * count, count], dtype=torch.float64)


def class_count(model: nn.Module) -> int | None:
    """Return the number of classes that a network or its ``pretrained_cfg`` names, as timm's do; else None."""
    classes = getattr(model, "num_classes", pretrained_config(model).get("num_classes"))
    return classes if isinstance(classes, int) and classes > 1 else None


def _kl(original: Tensor, converted: Tensor) -> float:
    p, q = (torch.log_softmax(logits.double(), 1) for logits in (original, converted))
    # A class that the original masks with -inf has probability 0 and adds nothing; NaN must stay NaN.
    return float(torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum())


def _sum_of_squares(tensor: Tensor) -> float:
    return float(tensor.square().sum())
