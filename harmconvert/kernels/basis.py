"""Bases of kernels: their vectors, the order of frequencies, and the frequencies that a lambda keeps (sec. 3 and 4).

A *frequency* is a tuple of indices, one per kernel axis; its *level* is the sum of these indices. A kernel of shape
(A, B) has A x B frequencies on A + B - 1 levels. The DCT is the paper's basis and the default. The paper names wavelets
and derivatives of Gaussians as alternatives (sec. 1); they are here too, with the same frequency indices. All functions
are pure functions of numbers and tensors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import UsageError

Frequency = tuple[int, ...]

NORMALIZATIONS = ("ortho", "l1")


def dct_vectors(size: int) -> Tensor:
    """Return the orthonormal DCT-II of one axis, shape (frequency, position), float64 (eq. 1, normalised).

    >>> dct_vectors(2)
    tensor([[ 0.7071,  0.7071],
            [ 0.7071, -0.7071]], dtype=torch.float64)
    """
    # Always on the CPU, also inside `with torch.device(...)`: the result is a constant that may be cached.
    position = torch.arange(size, dtype=torch.float64, device="cpu")
    frequency = position[:, None]
    vectors = torch.cos(math.pi / size * (position + 0.5) * frequency) * math.sqrt(2 / size)
    vectors[0] = math.sqrt(1 / size)
    return vectors


def all_frequencies(kernel_size: Sequence[int]) -> tuple[Frequency, ...]:
    """Return every frequency of a kernel, sorted by level, then lexicographically.

    >>> all_frequencies((2, 2))
    ((0, 0), (0, 1), (1, 0), (1, 1))
    """
    return _all_frequencies(tuple(kernel_size))


@lru_cache(maxsize=64)
def _all_frequencies(kernel_size: tuple[int, ...]) -> tuple[Frequency, ...]:
    return tuple(sorted(itertools.product(*map(range, kernel_size)), key=lambda f: (sum(f), f)))


def level_count(kernel_size: Sequence[int]) -> int:
    """Return the number of levels of a kernel: 5 for 3x3, 13 for 7x7, 7 for 1x7."""
    return sum(kernel_size) - len(kernel_size) + 1


def frequencies_below(kernel_size: Sequence[int], levels: int) -> tuple[Frequency, ...]:
    """Return the frequencies whose index sum is below ``levels``: the lambda of the paper, taken literally.

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
    """Return how many levels of a kernel a lambda that is meant for 3x3 keeps: ceil(lambda * K / 3), at most all.

    K is the longest axis, so that a 1x7 kernel keeps the same share of its frequency band as a 7x7 kernel.

    >>> scaled_levels((7, 7), 2), scaled_levels((3, 3), 2), scaled_levels((1, 7), 2)
    (5, 2, 5)
    """
    return min(math.ceil(lam * max(kernel_size) / 3), level_count(kernel_size))


def haar_vectors(size: int) -> Tensor:
    """Return the orthonormal Haar wavelets of one axis, shape (index, position), float64.

    The first row is the mean. Each other row is the difference between the halves of an interval: coarse to fine, left
    to right. If an interval has an odd length, its left part is the longer one.

    >>> haar_vectors(2)
    tensor([[ 0.7071,  0.7071],
            [ 0.7071, -0.7071]], dtype=torch.float64)
    """
    vectors = torch.zeros(size, size, dtype=torch.float64, device="cpu")
    vectors[0] = 1 / math.sqrt(size)
    intervals, row = [(0, size)], 1
    while intervals:
        first, last = intervals.pop(0)
        if last - first < 2:
            continue
        middle = first + (last - first + 1) // 2
        left, right = middle - first, last - middle
        vectors[row, first:middle] = math.sqrt(right / (left * (left + right)))
        vectors[row, middle:last] = -math.sqrt(left / (right * (left + right)))
        intervals += [(first, middle), (middle, last)]
        row += 1
    return vectors


def gaussian_vectors(size: int) -> Tensor:
    """Return orthonormal derivatives of a Gaussian on one axis, orders 0 to size - 1, shape (order, position), float64.

    The standard deviation is a quarter of the axis, so that the axis covers two standard deviations to each side. The
    first n rows span the same space as the Gaussian and its first n - 1 derivatives, because the derivative of order k
    is the Gaussian times a polynomial of degree k. Each row is computed from the row before it (Arnoldi iteration),
    because sampled derivatives of high order are nearly linearly dependent.

    >>> gaussian_vectors(2).round(decimals=4)
    tensor([[ 0.7071,  0.7071],
            [ 0.7071, -0.7071]], dtype=torch.float64)
    """
    position = torch.arange(size, dtype=torch.float64, device="cpu") - (size - 1) / 2
    vectors = torch.zeros(size, size, dtype=torch.float64, device="cpu")
    vector = torch.exp(-0.5 * (position / (size / 4)) ** 2)
    for order in range(size):
        for _ in range(2):  # one pass leaves rounding errors that grow with the order
            vector = vector - vectors[:order].T @ (vectors[:order] @ vector)
        vectors[order] = vector / vector.norm()
        vector = -position * vectors[order]
    return vectors


def klt_vectors(kernel: Tensor) -> Tensor:
    """Return the Karhunen-Loeve basis of one layer: eigenvectors (K, K) of its filters, strongest first, float64.

    In this basis the first n coefficients of the layer hold the most energy. ``kernel`` has shape (O, I, *kernel_size).
    """
    filters_NK = kernel.detach().flatten(2).flatten(0, 1).to(torch.float64)
    if filters_NK.is_meta:
        return torch.eye(filters_NK.shape[1], dtype=torch.float64, device="meta")
    # Eigenvectors do not depend on the scale of the kernel, and the squares of 1e200 or 1e-200 are inf or 0.
    filters_NK = filters_NK / largest_of(filters_NK)
    # The solver may return an eigenvector with either sign: choose the sign that makes its largest entry positive.
    vectors_KK = torch.linalg.eigh(filters_NK.T @ filters_NK)[1].flip(1).T
    largest = vectors_KK.gather(1, vectors_KK.abs().argmax(1, keepdim=True))
    return vectors_KK * torch.where(largest < 0, -1.0, 1.0)


def largest_of(tensor: Tensor) -> float:
    """Return the largest magnitude in a tensor, or 1 if all values are zero: the divisor to use before squaring."""
    if not tensor.numel():
        return 1.0
    low, high = tensor.detach().aminmax()
    return max(-low.item(), high.item()) or 1.0


# Each function returns the vectors of one axis; the basis of a kernel consists of their outer products.
_AXIS_VECTORS: dict[str, Callable[[int], Tensor]] = {
    "dct": dct_vectors, "haar": haar_vectors, "gaussian": gaussian_vectors,
}  # fmt: skip
BASES = (*_AXIS_VECTORS, "klt")


@dataclass(frozen=True)
class Basis:
    """A named basis of kernels: orthogonal for every kernel size, in the order of `all_frequencies`.

    ``dct``, ``haar`` and ``gaussian`` are outer products of one vector per axis. ``klt`` is fitted to each layer: the
    strongest eigenvector of the layer's filters takes the place of the first frequency, the next one the place of the
    second, and so on, so that a lambda keeps as many kernels as in the other bases. With ``ortho`` the kernels have
    unit norm, with ``l1`` unit L1 norm (sec. 5.2); the choice only rescales the coefficients.

    >>> Basis("haar").kernels((2, 2), [(0, 0)])
    tensor([[0.5000, 0.5000, 0.5000, 0.5000]], dtype=torch.float64)

    Raises:
        UsageError: the name or the normalisation is unknown.
    """

    name: str = "dct"
    normalization: str = "ortho"

    def __post_init__(self) -> None:
        if self.name not in BASES:
            raise UsageError(f"unknown basis {self.name!r}: use one of {', '.join(BASES)}")
        if self.normalization not in NORMALIZATIONS:
            raise UsageError(f"unknown normalization {self.normalization!r}: use one of {', '.join(NORMALIZATIONS)}")

    def __str__(self) -> str:
        return f"{self.name} ({self.normalization})"

    @property
    def fitted(self) -> bool:
        """Whether the kernels depend on the layer, so that a file must store them."""
        return self.name not in _AXIS_VECTORS

    def kernels(self, kernel_size: Sequence[int], frequencies: Sequence[Frequency] | None = None) -> Tensor:
        """Return the kernels of the given frequencies (None: all), shape (F, K) with K = prod(kernel_size), float64.

        Raises:
            UsageError: a frequency is outside the kernel, or the basis is fitted to a layer (use `kernels_for`).
        """
        if self.fitted:
            raise UsageError(
                f"the {self.name} basis is fitted to each layer: pass the kernel of the layer (Basis.kernels_for)"
            )
        frequencies = all_frequencies(kernel_size) if frequencies is None else frequencies
        check_frequencies(kernel_size, frequencies)
        # A copy, because the caller may change it and the original stays in the cache.
        return _outer_products(self, tuple(kernel_size), tuple(map(tuple, frequencies))).clone()

    def kernels_for(self, kernel: Tensor, frequencies: Sequence[Frequency] | None = None) -> Tensor:
        """Return the same as `kernels` for ``kernel`` (O, I, *kernel_size); a fitted basis is fitted to this kernel."""
        if not self.fitted:
            return self.kernels(kernel.shape[2:], frequencies)
        every = all_frequencies(kernel.shape[2:])
        frequencies = every if frequencies is None else frequencies
        check_frequencies(kernel.shape[2:], frequencies)
        index_of = {frequency: index for index, frequency in enumerate(every)}
        vectors_FK = klt_vectors(kernel)[[index_of[tuple(frequency)] for frequency in frequencies]]
        return self._normalized(vectors_FK)

    def _normalized(self, vectors_FK: Tensor) -> Tensor:
        return vectors_FK / vectors_FK.abs().sum(1, keepdim=True) if self.normalization == "l1" else vectors_FK


@lru_cache(maxsize=64)
def _outer_products(basis: Basis, kernel_size: tuple[int, ...], frequencies: tuple[Frequency, ...]) -> Tensor:
    axes = [_AXIS_VECTORS[basis.name](size) for size in kernel_size]
    index = torch.tensor(frequencies, dtype=torch.long, device="cpu").reshape(len(frequencies), len(kernel_size))
    vectors_FK = torch.ones(len(frequencies), 1, dtype=torch.float64, device="cpu")
    for axis, vectors in enumerate(axes):
        vectors_FK = (vectors_FK[:, :, None] * vectors[index[:, axis]][:, None, :]).flatten(1)
    return basis._normalized(vectors_FK)


def dct_basis(
    kernel_size: Sequence[int], frequencies: Sequence[Frequency] | None = None, normalization: str = "ortho"
) -> Tensor:
    """Return the DCT kernels of the given frequencies, shape (F, K), float64: `Basis.kernels` of the paper's basis.

    >>> dct_basis((3, 3), [(0, 0)]) * 3
    tensor([[1., 1., 1., 1., 1., 1., 1., 1., 1.]], dtype=torch.float64)
    """
    return Basis("dct", normalization).kernels(kernel_size, frequencies)


def check_frequencies(kernel_size: Sequence[int], frequencies: Sequence[Frequency]) -> None:
    """Raise UsageError unless ``frequencies`` are distinct, in the order of `all_frequencies` and inside the kernel."""
    shape = "x".join(map(str, kernel_size))
    for f in frequencies:
        if len(f) != len(kernel_size) or not all(0 <= i < k for i, k in zip(f, kernel_size, strict=True)):
            raise UsageError(f"frequency {tuple(f)} is outside a {shape} kernel: each index must be below its axis")
    if not frequencies or list(frequencies) != sorted(set(frequencies), key=lambda f: (sum(f), f)):
        raise UsageError(
            f"the frequencies of a {shape} kernel must be at least one, all different, and sorted by level, "
            f"then lexicographically: got {list(frequencies)[:10]}"
        )
