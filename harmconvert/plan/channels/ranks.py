"""What a layer keeps on the channel axis, and the setting from which a plan is made."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite, prod
from typing import Any, ClassVar

from ...errors import Argument, UsageError, shortened
from ...kernels.ranks import full_rank
from ...network.layers import LayerInfo
from ..axes import Kept


@dataclass(frozen=True)
class Rank(Kept):
    """The rank of a layer's weight in each group of channels; None: the weight is not divided.

    ``kernel_second``: the second of the two matrices has the kernel (`kernels.ranks`). ``groups``, ``transposed``:
    facts about the layer, with which its weight becomes a matrix. ``matrix``: its rows, channels and frequencies, if a
    search needs them.
    """

    axis: ClassVar[str] = "channels"
    rank: int | None
    kernel_second: bool = False
    groups: int = 1
    transposed: bool = False
    matrix: tuple[int, int, int] | None = field(default=None, compare=False)

    @property
    def whole(self) -> bool:
        return self.rank is None

    @property
    def key(self) -> str:
        if self.rank is None:
            return "full rank"
        return f"rank {self.rank}{', kernel second' if self.kernel_second else ''}"

    @property
    def share(self) -> float | None:
        if self.rank is None or self.matrix is None:
            return None if self.rank is not None else 1.0
        return pair_size(*self.matrix, self.rank, self.kernel_second) / prod(self.matrix)

    def to_json(self) -> dict[str, Any]:
        facts = {"kernel_second": self.kernel_second, "transposed": self.transposed}
        own = {"groups": self.groups} if self.groups > 1 else {}
        return {"rank": self.rank, **own, **{key: True for key, value in facts.items() if value}}

    def __str__(self) -> str:
        return self.key


@dataclass(frozen=True)
class RankSetting:
    """The setting of the channel axis: a rank for all layers, or ranks by pattern (the last match decides).

    A float is a share of the full rank, an integer is the rank itself. ``whole``: all layers keep their full rank, and
    say so in the plan; a search starts from this.

    >>> RankSetting.of(0.5), RankSetting.of({"layer4.*": 16})
    (RankSetting(rank=0.5, patterns={}, whole=False), RankSetting(rank=None, patterns={'layer4.*': 16}, whole=False))
    """

    rank: float | int | None = None
    patterns: Mapping[str, float | int] = field(default_factory=dict)
    whole: bool = False

    @classmethod
    def of(cls, rank: float | int | Mapping[str, float | int]) -> RankSetting:
        """Return the setting for the argument ``rank`` of `convert`.

        Raises:
            UsageError: a share is not above 0 and at most 1, or an integer is not at least 1.
        """
        if isinstance(rank, Mapping):
            if not rank:
                raise UsageError(Argument("rank"), " names no pattern: give a number, or 'PATTERN=R'")
            return cls(None, {str(pattern): _checked(one, f"of {pattern!r} ") for pattern, one in rank.items()})
        return cls(_checked(rank, ""))

    def planned(self, layers: Sequence[LayerInfo], named: Collection[str], notes: dict[str, str]) -> dict[str, Rank]:
        """Return the rank of each layer whose rank is reduced, by name.

        Without patterns, the layer that reads the input, depthwise layers and the classifier keep their full rank
        unless they are ``named``. A layer also keeps it if the two matrices would not be smaller than its weight.

        Raises:
            UsageError: a pattern matches no layer, or an integer is above the full rank of a layer that it names.
        """
        if self.whole:
            return {layer.name: replace(rank_of(layer, None), matrix=matrix_of(layer)) for layer in layers}
        if self.rank is not None:
            asked = {
                layer.name: self.rank
                for layer in layers
                if layer.name in named or not _stays_whole(layer, notes)
            }  # fmt: skip
        else:
            names, asked = [layer.name for layer in layers], dict[str, float | int]()
            for pattern, one in self.patterns.items():
                if not (matches := fnmatch.filter(names, pattern)):
                    known = shortened(names, 5) or "none"
                    raise UsageError(f"{pattern!r} matches no convolution or linear layer (there are: {known})")
                asked.update(dict.fromkeys(matches, one))
        planned = {}
        for layer in layers:
            if layer.name in asked and (kept := self._rank_of(layer, asked[layer.name], notes)) is not None:
                planned[layer.name] = kept
        return planned

    def _rank_of(self, layer: LayerInfo, asked: float | int, notes: dict[str, str]) -> Rank | None:
        """Return the rank of one layer; None, and a note, if it would not make the layer smaller."""
        whole = rank_of(layer, None)
        rows, channels, frequencies = matrix_of(layer)
        most = full_rank(rows, channels, frequencies, whole.kernel_second)
        if isinstance(asked, int) and asked > most and self.rank is None:
            raise UsageError(
                Argument("rank", asked), f" of layer {layer.name} is out of range: its full rank is {most}"
            )
        rank = min(asked, most) if isinstance(asked, int) else max(1, round(asked * most))
        if pair_size(rows, channels, frequencies, rank, whole.kernel_second) >= rows * channels * frequencies:
            notes.setdefault(layer.name, f"full rank: two matrices of rank {rank} would not be smaller than its weight")
            return None
        return rank_of(layer, rank)

    def __str__(self) -> str:
        if self.rank is not None:
            return f"{self.rank:g}"
        return ",".join(f"{pattern}={rank:g}" for pattern, rank in self.patterns.items())


def rank_of(layer: LayerInfo, rank: int | None) -> Rank:
    """Return the value of a layer with a rank: a transposed convolution with fewer outputs has its kernel second."""
    second = layer.transposed and prod(layer.kernel_size) > 1 and layer.outputs <= layer.inputs
    return Rank(rank, second, layer.groups, layer.transposed)


def matrix_of(layer: LayerInfo) -> tuple[int, int, int]:
    """Return the rows, channels and frequencies of the coefficients of one group of a layer."""
    kept = layer.kept_positions or prod(layer.kernel_size)
    return layer.outputs // layer.groups, layer.inputs // layer.groups, kept


def pair_size(rows: int, channels: int, frequencies: int, rank: int, kernel_second: bool) -> int:
    """Return the number of values in the two matrices of one group.

    >>> pair_size(64, 64, 9, 16, kernel_second=False), pair_size(64, 32, 9, 16, kernel_second=True)
    (10240, 9728)
    """
    if kernel_second:
        return rank * (channels + rows * frequencies)
    return rank * (channels * frequencies + rows)


def _stays_whole(layer: LayerInfo, notes: dict[str, str]) -> bool:
    reasons = {
        "it reads the network's input": layer.reads_input,
        "a fixed transform, which is not trained": layer.fixed,
        "depthwise, unless a pattern names it": layer.depthwise,
        "the classifier, unless a pattern names it": layer.classifier,
    }
    reason = next((why for why, holds in reasons.items() if holds), None)
    if reason is not None:
        notes.setdefault(layer.name, f"full rank: {reason}")
    return reason is not None


def _checked(rank: Any, where: str) -> float | int:
    """Return a rank, after a check of its type and range."""
    if isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1:
        return rank
    if isinstance(rank, float) and isfinite(rank) and 0 < rank <= 1:
        return rank
    what = f" {where}must be a share of the full rank above 0 and at most 1.0, or a whole number from 1"
    raise UsageError(Argument("rank", rank), what)
