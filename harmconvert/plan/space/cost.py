"""Compute the cost of responses to basis kernels."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from ...kernels.basis import Frequency


def response_macs(kernel_size: Sequence[int], frequencies: Sequence[Frequency], separable: bool = True) -> int:
    """Return the multiply-adds for all kept responses of one channel at one position.

    If the basis is separable, responses are computed axis by axis, beginning with the last axis.

    >>> response_macs((3, 3), [(0, 0), (0, 1), (1, 0)])  # two rows of three, then three columns of three
    15
    """
    if not separable:
        return prod(kernel_size) * len(frequencies)
    return sum(size * len({f[axis:] for f in frequencies}) for axis, size in enumerate(kernel_size))
