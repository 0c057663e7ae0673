"""The DCT basis: vectors, the order of frequencies, and which of them a lambda keeps (paper sec. 3 and 4).

A *frequency* is a tuple of indices, one per kernel axis; its *level* is their sum. A kernel of shape (A, B) has A x B
frequencies on A + B - 1 levels. Everything here is a pure function of numbers and tensors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .errors import UsageError

Frequency = tuple[int, ...]

NORMALIZATIONS = ("ortho", "l1")


def dct_vectors(size: int) -> Tensor:
    """Orthonormal DCT-II of one axis, shape (frequency, position), float64 (eq. 1 with its normalising factors).

    >>> dct_vectors(2)
    tensor([[ 0.7071,  0.7071],
            [ 0.7071, -0.7071]], dtype=torch.float64)
    """
    # On the CPU whatever `with torch.device(...)` is in force: these are constants, and they are kept.
    position = torch.arange(size, dtype=torch.float64, device="cpu")
    frequency = position[:, None]
    vectors = torch.cos(math.pi / size * (position + 0.5) * frequency) * math.sqrt(2 / size)
    vectors[0] = math.sqrt(1 / size)
    return vectors


def all_frequencies(kernel_size: Sequence[int]) -> tuple[Frequency, ...]:
    """Every frequency of a kernel, by level, then lexicographically.

    >>> all_frequencies((2, 2))
    ((0, 0), (0, 1), (1, 0), (1, 1))
    """
    return _all_frequencies(tuple(kernel_size))


@lru_cache(maxsize=64)
def _all_frequencies(kernel_size: tuple[int, ...]) -> tuple[Frequency, ...]:
    return tuple(sorted(itertools.product(*map(range, kernel_size)), key=lambda f: (sum(f), f)))


def level_count(kernel_size: Sequence[int]) -> int:
    """Number of levels of a kernel: 5 for 3x3, 13 for 7x7, 7 for 1x7."""
    return sum(kernel_size) - len(kernel_size) + 1


def frequencies_below(kernel_size: Sequence[int], levels: int) -> tuple[Frequency, ...]:
    """Frequencies whose index sum is below ``levels``: the lambda of the paper, taken literally.

    >>> len(frequencies_below((3, 3), 2)), len(frequencies_below((3, 3), 3))
    (3, 6)

    Raises:
        UsageError: ``levels`` is not between 1 and the kernel's number of levels.
    """
    if not 1 <= levels <= level_count(kernel_size):
        shape = "x".join(map(str, kernel_size))
        raise UsageError(
            f"lambda {levels} does not fit a {shape} kernel: it has {level_count(kernel_size)} levels; "
            f"use a number from 1 to {level_count(kernel_size)}"
        )
    return tuple(f for f in all_frequencies(kernel_size) if sum(f) < levels)


def scaled_levels(kernel_size: Sequence[int], lam: int) -> int:
    """Levels that a bare lambda, meant for 3x3, keeps of a kernel: ceil(lambda * K / 3), at most all of them.

    K is the longest axis, so that 1x7 keeps the share of its band that 7x7 does.

    >>> scaled_levels((7, 7), 2), scaled_levels((3, 3), 2), scaled_levels((1, 7), 2)
    (5, 2, 5)
    """
    return min(math.ceil(lam * max(kernel_size) / 3), level_count(kernel_size))


def dct_basis(
    kernel_size: Sequence[int],
    frequencies: Sequence[Frequency] | None = None,
    normalization: str = "ortho",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """DCT kernels of the given frequencies, shape (F, K) with K = prod(kernel_size); computed in float64.

    ``ortho`` gives orthonormal rows; ``l1`` divides each row by its L1 norm (sec. 5.2), which only rescales
    coefficients.

    >>> dct_basis((3, 3), [(0, 0)]) * 3
    tensor([[1., 1., 1., 1., 1., 1., 1., 1., 1.]], dtype=torch.float64)

    Raises:
        UsageError: unknown normalisation, or a frequency outside the kernel.
    """
    if normalization not in NORMALIZATIONS:
        raise UsageError(f"unknown normalization {normalization!r}: use one of {', '.join(NORMALIZATIONS)}")
    if frequencies is None:
        frequencies = all_frequencies(kernel_size)
    check_frequencies(kernel_size, frequencies)
    basis_FK = _dct_basis(tuple(kernel_size), tuple(map(tuple, frequencies)), normalization)
    return basis_FK.to(dtype, copy=True)  # never the cached one itself


@lru_cache(maxsize=64)
def _dct_basis(kernel_size: tuple[int, ...], frequencies: tuple[Frequency, ...], normalization: str) -> Tensor:
    axes = [dct_vectors(size) for size in kernel_size]
    index = torch.tensor(frequencies, dtype=torch.long, device="cpu").reshape(len(frequencies), len(kernel_size))
    basis_FK = torch.ones(len(frequencies), 1, dtype=torch.float64, device="cpu")
    for axis, vectors in enumerate(axes):
        basis_FK = (basis_FK[:, :, None] * vectors[index[:, axis]][:, None, :]).flatten(1)
    if normalization == "l1":
        basis_FK = basis_FK / basis_FK.abs().sum(1, keepdim=True)
    return basis_FK


def check_frequencies(kernel_size: Sequence[int], frequencies: Sequence[Frequency]) -> None:
    """Raise UsageError unless ``frequencies`` are distinct, in the house order and inside the kernel."""
    shape = "x".join(map(str, kernel_size))
    for f in frequencies:
        if len(f) != len(kernel_size) or not all(0 <= i < k for i, k in zip(f, kernel_size, strict=True)):
            raise UsageError(f"frequency {tuple(f)} is outside a {shape} kernel")
    if not frequencies or list(frequencies) != sorted(set(frequencies), key=lambda f: (sum(f), f)):
        raise UsageError(
            f"the frequencies of a {shape} kernel must be distinct, at least one, and in order of level, "
            f"then lexicographic: got {list(frequencies)[:10]}"
        )
