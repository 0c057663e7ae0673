"""The filter bank of a kernel size and the levels that lambda counts (paper fig. 2), as numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from torch import nn

from ..errors import Argument, UsageError
from ..kernels.basis import Frequency
from .kernels import filters_of, layers_of, level, size_text, with_kernel


@dataclass(frozen=True)
class Filter:
    """One filter: its values along the kernel, the last axis running fastest, and how many layers keep it."""

    frequency: Frequency
    values: tuple[float, ...]
    kept_by: int

    @property
    def level(self) -> int:
        """Lambda keeps the filters whose level is below it."""
        return level(self.frequency)


@dataclass(frozen=True)
class FilterBank:
    """Every filter of one kernel size in the house order, and how many ``layers`` of the network have that size.

    ``cuts`` counts the layers by the literal lambda that they keep (None: a set of filters that no lambda gives);
    empty for a plain network, which nobody has cut.
    """

    kernel_size: tuple[int, ...]
    layers: int
    filters: tuple[Filter, ...]
    cuts: tuple[tuple[int | None, int], ...] = ()

    @property
    def lambdas(self) -> tuple[tuple[int, int], ...]:
        """Each literal lambda and the number of filters that it keeps: (1, 1), (2, 3), (3, 6), (4, 8), (5, 9)."""
        levels = [one.level for one in self.filters]
        return tuple((lam, sum(at < lam for at in levels)) for lam in range(1, max(levels) + 2))

    def rows(self) -> list[dict[str, Any]]:
        """A row for each filter, one column for each position of the kernel."""
        places = ["_".join(map(str, place)) for place in product(*map(range, self.kernel_size))]
        return [
            {
                "kernel": size_text(self.kernel_size),
                "frequency": str(one.frequency),
                "level": one.level,
                "kept_by": one.kept_by,
                "layers": self.layers,
                **{f"value_{place}": value for place, value in zip(places, one.values, strict=True)},
            }
            for one in self.filters
        ]


def filter_bank(model: nn.Module, kernel_size: Sequence[int] | None = None) -> FilterBank:
    """The filters of a kernel size of ``model``: by default of the most common one over 1x1 (the first of several).

    >>> filter_bank(nn.Conv2d(3, 8, 3)).lambdas
    ((1, 1), (2, 3), (3, 6), (4, 8), (5, 9))

    Raises:
        UsageError: no layer has that kernel, or it has more than two axes. InputError: no kernel over 1x1.
    """
    layers = with_kernel(layers_of(model), kernel_size)
    counts = Counter(layer.kernel_size for layer in layers)
    flat = [size for size, _ in counts.most_common() if len(size) <= 2]
    if not flat:
        what = f"filters of {size_text(next(iter(counts)))} have more axes than a page"
        raise UsageError(what, ": ", Argument("kind", "spectrum"), " shows them")
    size = flat[0]
    mine = [layer for layer in layers if layer.kernel_size == size]
    kept = Counter(frequency for layer in mine for frequency in layer.frequencies)
    filters = tuple(Filter(frequency, values, kept[frequency]) for frequency, values in filters_of(size))
    bank = FilterBank(size, len(mine), filters)
    if not any(layer.harmonic for layer in mine):
        return bank
    lambda_by_count = {count: lam for lam, count in bank.lambdas}
    cuts = Counter(_lambda_of(layer.frequencies, lambda_by_count) for layer in mine)
    return replace(bank, cuts=tuple(sorted(cuts.items(), key=lambda cut: cut[0] or 0)))


def _lambda_of(kept: Sequence[Frequency], lambda_by_count: Mapping[int, int]) -> int | None:
    """The literal lambda that keeps just these frequencies, or None where none does."""
    lam = max(map(level, kept)) + 1
    return lam if lambda_by_count.get(len(kept)) == lam else None
