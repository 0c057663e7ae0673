"""What responses to basis kernels cost."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from ...kernels.basis import Frequency


def response_macs(kernel_size: Sequence[int], frequencies: Sequence[Frequency], separable: bool = True) -> int:
    """Multiply-adds to compute all kept responses of one channel at one position, axis by axis from the last where the
    basis kernels are products of vectors.

    >>> response_macs((3, 3), [(0, 0), (0, 1), (1, 0)])  # two rows of three, then three columns of three
    15
    """
    if not separable:
        return prod(kernel_size) * len(frequencies)
    return sum(size * len({f[axis:] for f in frequencies}) for axis, size in enumerate(kernel_size))
