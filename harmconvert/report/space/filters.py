"""The filter bank of a kernel size, and the filters that each lambda keeps (paper fig. 2), as numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from torch import nn

from ...errors import Argument, UsageError
from ...kernels.basis import Frequency
from ..text import size_text
from .kernels import filters_of, layers_with_kernel, level


@dataclass(frozen=True)
class Filter:
    """One filter: its values in C order, and the number of layers that keep it."""

    frequency: Frequency
    values: tuple[float, ...]
    kept_by: int

    @property
    def level(self) -> int:
        """Return the level of the filter's frequency: a lambda keeps the filters with lower levels."""
        return level(self.frequency)


@dataclass(frozen=True)
class FilterBank:
    """All filters of one kernel size, in the order of `all_frequencies`.

    ``layers``: the number of layers of the network with this kernel size. ``cuts``: the number of layers for each
    literal lambda (None: they keep a set of filters that no lambda gives); empty for a plain network.
    """

    kernel_size: tuple[int, ...]
    layers: int
    filters: tuple[Filter, ...]
    cuts: tuple[tuple[int | None, int], ...] = ()

    @property
    def lambdas(self) -> tuple[tuple[int, int], ...]:
        """Return each literal lambda with the number of filters that it keeps."""
        levels = [one.level for one in self.filters]
        return tuple((lam, sum(number < lam for number in levels)) for lam in range(1, max(levels) + 2))

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each filter, with a column for each position of the kernel."""
        positions = ["_".join(map(str, position)) for position in product(*map(range, self.kernel_size))]
        return [
            {
                "kernel": size_text(self.kernel_size),
                "frequency": str(one.frequency),
                "level": one.level,
                "kept_by": one.kept_by,
                "layers": self.layers,
                **{f"value_{position}": value for position, value in zip(positions, one.values, strict=True)},
            }
            for one in self.filters
        ]


def filter_bank(model: nn.Module, kernel_size: Sequence[int] | None = None) -> FilterBank:
    """Return the filters of one kernel size of a network.

    >>> filter_bank(nn.Conv2d(3, 8, 3)).lambdas
    ((1, 1), (2, 3), (3, 6), (4, 8), (5, 9))

    Args:
        kernel_size: default: the most common size larger than 1x1; if several are as common, the first of them.

    Raises:
        UsageError: no layer has this kernel size, or the kernel has more than two axes.
        InputError: no kernel is larger than 1x1.
    """
    layers = layers_with_kernel(model, kernel_size)
    counts = Counter(layer.kernel_size for layer in layers)
    drawable = [size for size, _ in counts.most_common() if len(size) <= 2]
    if not drawable:
        what = f"filters of {size_text(next(iter(counts)))} have more than two axes and cannot be drawn: use "
        raise UsageError(what, Argument("kind", "spectrum"))
    size = drawable[0]
    same_size = [layer for layer in layers if layer.kernel_size == size]
    kept = Counter(frequency for layer in same_size for frequency in layer.frequencies)
    filters = tuple(Filter(frequency, values, kept[frequency]) for frequency, values in filters_of(size))
    bank = FilterBank(size, len(same_size), filters)
    if not any(layer.harmonic for layer in same_size):
        return bank
    lambda_by_count = {count: lam for lam, count in bank.lambdas}
    cuts = Counter(_lambda_of(layer.frequencies, lambda_by_count) for layer in same_size)
    return replace(bank, cuts=tuple(sorted(cuts.items(), key=lambda cut: cut[0] or 0)))


def _lambda_of(kept: Sequence[Frequency], lambda_by_count: Mapping[int, int]) -> int | None:
    """Return the literal lambda that keeps exactly these frequencies, or None if there is none."""
    lam = max(map(level, kept)) + 1
    return lam if lambda_by_count.get(len(kept)) == lam else None
