"""Measure how far two outputs are apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference divided by the largest expected value.

    The result is infinite if the shapes differ or values that are not finite differ. It is NaN if no value is finite.
    """
    if actual.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    if not (expected.is_floating_point() or expected.is_complex()):
        return 0.0 if torch.equal(actual, expected) else float("inf")
    finite = expected.isfinite()
    if not torch.equal(actual[~finite].nan_to_num(nan=0.5), expected[~finite].nan_to_num(nan=0.5)):
        return float("inf")
    if not finite.any():
        return float("nan")
    difference = (actual[finite] - expected[finite]).abs().max().item()
    largest = expected[finite].abs().max().item()
    return difference / largest if largest > 0 else difference


def close(actual: Tensor, expected: Tensor) -> bool:
    """Return whether two outputs are equal except for rounding, as it comes from sums in another order."""
    dtype = expected.dtype
    rounding = float(torch.finfo(dtype).eps ** 0.5) if dtype.is_floating_point or dtype.is_complex else 0.0
    return relative_difference(actual, expected) <= rounding  # False if no value is finite


def top1_agreement(outputs: Sequence[tuple[Tensor, Tensor]], rounding: float = 0.0) -> float | None:
    """Return the share of examples with the same top-1 class, or None if the outputs are not logits.

    Args:
        outputs: pairs of (original, converted) outputs.
        rounding: two classes count as tied if their logits in the original differ by at most ``rounding`` times the
            largest logit. A constant network has no top-1 class: then rounding noise decides, which means nothing.
    """
    logits = len(outputs) == 1 and outputs[0][0].is_floating_point() and outputs[0][0].dim() == 2
    if not logits or outputs[0][0].shape[1] < 2:
        return None
    original, converted = outputs[0]
    top1 = converted.argmax(1)
    shortfall = original.amax(1) - original.gather(1, top1[:, None])[:, 0]
    tied = shortfall <= rounding * original.abs().amax(1)
    return ((original.argmax(1) == top1) | tied).double().mean().item()


def greatest_difference(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest `relative_difference` of pairs of tensors; infinity if the numbers of tensors differ."""
    if len(actual) != len(expected):
        return float("inf")
    return max((relative_difference(a, e) for a, e in zip(actual, expected, strict=True)), default=0.0)
