"""Bases of kernels: their vectors, the order of frequencies, and which of them a lambda keeps (paper sec. 3 and 4).

A *frequency* is a tuple of indices, one per kernel axis; its *level* is their sum. A kernel of shape (A, B) has A x B
frequencies on A + B - 1 levels. The DCT is the paper's basis and the default; it names wavelets and derivatives of
Gaussians as others (sec. 1), which stand here beside it under the same frequencies. Pure functions of numbers and
tensors.
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


def haar_vectors(size: int) -> Tensor:
    """Orthonormal Haar wavelets of one axis, shape (index, position), float64: the mean, then differences of halves,
    coarse to fine, left to right. Where a stretch cannot be halved its left part is the longer one.

    >>> haar_vectors(2)
    tensor([[ 0.7071,  0.7071],
            [ 0.7071, -0.7071]], dtype=torch.float64)
    """
    vectors = torch.zeros(size, size, dtype=torch.float64, device="cpu")
    vectors[0] = 1 / math.sqrt(size)
    stretches, row = [(0, size)], 1
    while stretches:
        first, last = stretches.pop(0)
        if last - first < 2:
            continue
        middle = first + (last - first + 1) // 2
        left, right = middle - first, last - middle
        vectors[row, first:middle] = math.sqrt(right / (left * (left + right)))
        vectors[row, middle:last] = -math.sqrt(left / (right * (left + right)))
        stretches += [(first, middle), (middle, last)]
        row += 1
    return vectors


def gaussian_vectors(size: int) -> Tensor:
    """Derivatives of a Gaussian on one axis, orders 0 to size - 1, made orthonormal in that order, shape (order,
    position), float64. Its standard deviation is a quarter of the axis, so that the axis holds two to each side.

    The first n span what the Gaussian and its first n - 1 derivatives span: each is the Gaussian times a polynomial of
    its order. They are grown from one another (Arnoldi), as sampled derivatives of high order are nearly dependent.

    >>> gaussian_vectors(2).round(decimals=4)
    tensor([[ 0.7071,  0.7071],
            [ 0.7071, -0.7071]], dtype=torch.float64)
    """
    position = torch.arange(size, dtype=torch.float64, device="cpu") - (size - 1) / 2
    vectors = torch.zeros(size, size, dtype=torch.float64, device="cpu")
    vector = torch.exp(-0.5 * (position / (size / 4)) ** 2)
    for order in range(size):
        for _ in range(2):  # once leaves rounding that grows from order to order
            vector = vector - vectors[:order].T @ (vectors[:order] @ vector)
        vectors[order] = vector / vector.norm()
        vector = -position * vectors[order]
    return vectors


def klt_vectors(kernel: Tensor) -> Tensor:
    """Orthonormal eigenvectors (K, K) of the filters of ``kernel`` (O, I, *kernel_size), strongest first, float64: the
    basis in which that one layer's first n coefficients hold the most energy (Karhunen-Loeve)."""
    filters_NK = kernel.detach().flatten(2).flatten(0, 1).to(torch.float64)
    if filters_NK.is_meta:
        return torch.eye(filters_NK.shape[1], dtype=torch.float64, device="meta")
    # Only proportions matter, and squares of 1e200 or 1e-200 have none.
    filters_NK = filters_NK / largest_of(filters_NK)
    # An eigenvector's sign is the solver's whim: its largest entry is made positive.
    vectors_KK = torch.linalg.eigh(filters_NK.T @ filters_NK)[1].flip(1).T
    largest = vectors_KK.gather(1, vectors_KK.abs().argmax(1, keepdim=True))
    return vectors_KK * torch.where(largest < 0, -1.0, 1.0)


def largest_of(tensor: Tensor) -> float:
    """The largest magnitude in a tensor, 1 where all are zero: what to divide by before squaring."""
    if not tensor.numel():
        return 1.0
    low, high = tensor.detach().aminmax()
    return max(-low.item(), high.item()) or 1.0


# The vectors of one axis; a kernel's basis is their outer products.
_AXES: dict[str, Callable[[int], Tensor]] = {"dct": dct_vectors, "haar": haar_vectors, "gaussian": gaussian_vectors}
BASES = (*_AXES, "klt")


@dataclass(frozen=True)
class Basis:
    """A named basis of kernels, an orthogonal one for every kernel size, in the order of `all_frequencies`.

    ``dct``, ``haar`` and ``gaussian`` are outer products of one vector an axis. ``klt`` is a layer's own: the strongest
    eigenvector of its filters stands under the first frequency, the next under the second, so that a lambda keeps as
    many as it does of the others. ``ortho`` gives kernels of unit norm; ``l1`` of unit L1 norm (sec. 5.2), which only
    rescales coefficients.

    >>> Basis("haar").kernels((2, 2), [(0, 0)])
    tensor([[0.5000, 0.5000, 0.5000, 0.5000]], dtype=torch.float64)

    Raises:
        UsageError: unknown name or normalisation.
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
        """Whether its kernels depend on the layer, so that a file has to hold them."""
        return self.name not in _AXES

    def kernels(self, kernel_size: Sequence[int], frequencies: Sequence[Frequency] | None = None) -> Tensor:
        """Kernels of the given frequencies (all where None), shape (F, K) with K = prod(kernel_size), float64.

        Raises:
            UsageError: a frequency outside the kernel, or a basis that is fitted: see `kernels_for`.
        """
        if self.fitted:
            raise UsageError(f"the {self.name} basis is a layer's own: it is made from that layer's kernel")
        frequencies = all_frequencies(kernel_size) if frequencies is None else frequencies
        check_frequencies(kernel_size, frequencies)
        # Never the cached one itself.
        return _outer_products(self, tuple(kernel_size), tuple(map(tuple, frequencies))).clone()

    def kernels_for(self, kernel: Tensor, frequencies: Sequence[Frequency] | None = None) -> Tensor:
        """As `kernels`, of the size of ``kernel`` (O, I, *kernel_size), and fitted to it where this basis is fitted."""
        if not self.fitted:
            return self.kernels(kernel.shape[2:], frequencies)
        every = all_frequencies(kernel.shape[2:])
        frequencies = every if frequencies is None else frequencies
        check_frequencies(kernel.shape[2:], frequencies)
        place = {frequency: index for index, frequency in enumerate(every)}
        vectors_FK = klt_vectors(kernel)[[place[tuple(frequency)] for frequency in frequencies]]
        return self._normalized(vectors_FK)

    def _normalized(self, vectors_FK: Tensor) -> Tensor:
        return vectors_FK / vectors_FK.abs().sum(1, keepdim=True) if self.normalization == "l1" else vectors_FK


@lru_cache(maxsize=64)
def _outer_products(basis: Basis, kernel_size: tuple[int, ...], frequencies: tuple[Frequency, ...]) -> Tensor:
    axes = [_AXES[basis.name](size) for size in kernel_size]
    index = torch.tensor(frequencies, dtype=torch.long, device="cpu").reshape(len(frequencies), len(kernel_size))
    vectors_FK = torch.ones(len(frequencies), 1, dtype=torch.float64, device="cpu")
    for axis, vectors in enumerate(axes):
        vectors_FK = (vectors_FK[:, :, None] * vectors[index[:, axis]][:, None, :]).flatten(1)
    return basis._normalized(vectors_FK)


def dct_basis(
    kernel_size: Sequence[int], frequencies: Sequence[Frequency] | None = None, normalization: str = "ortho"
) -> Tensor:
    """DCT kernels of the given frequencies, shape (F, K), float64: `Basis.kernels` of the paper's basis.

    >>> dct_basis((3, 3), [(0, 0)]) * 3
    tensor([[1., 1., 1., 1., 1., 1., 1., 1., 1.]], dtype=torch.float64)
    """
    return Basis("dct", normalization).kernels(kernel_size, frequencies)


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
