"""How far two outputs are apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference over largest value; values that are not finite must be the same in both."""
    if found.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    if not (expected.is_floating_point() or expected.is_complex()):
        return 0.0 if torch.equal(found, expected) else float("inf")
    finite = expected.isfinite()
    if not torch.equal(found[~finite].nan_to_num(nan=0.5), expected[~finite].nan_to_num(nan=0.5)):
        return float("inf")
    if not finite.any():
        return float("nan")
    difference = (found[finite] - expected[finite]).abs().max().item()
    largest = expected[finite].abs().max().item()
    return difference / largest if largest > 0 else difference


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether two outputs are the same to rounding, which another order of sums brings."""
    dtype = expected.dtype
    rounding = float(torch.finfo(dtype).eps ** 0.5) if dtype.is_floating_point or dtype.is_complex else 0.0
    return relative_difference(found, expected) <= rounding  # False where no value is finite


def top1_agreement(outputs: Sequence[tuple[Tensor, Tensor]], rounding: float = 0.0) -> float | None:
    """Share of examples with the same top-1 class; None where (original, converted) outputs are no logits.

    Classes are tied whose logits in the original are no further apart than ``rounding`` times its largest: constant
    networks have no top-1, and which class noise puts first says nothing.
    """
    logits = len(outputs) == 1 and outputs[0][0].is_floating_point() and outputs[0][0].dim() == 2
    if not logits or outputs[0][0].shape[1] < 2:
        return None
    original, converted = outputs[0]
    chosen = converted.argmax(1)
    shortfall = original.amax(1) - original.gather(1, chosen[:, None])[:, 0]
    tied = shortfall <= rounding * original.abs().amax(1)
    return ((original.argmax(1) == chosen) | tied).double().mean().item()


def greatest_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest `relative_difference` of pairs of tensors; infinity where there are not as many of both."""
    if len(found) != len(expected):
        return float("inf")
    return max((relative_difference(f, e) for f, e in zip(found, expected, strict=True)), default=0.0)
