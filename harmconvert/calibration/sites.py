"""The truncated convolutions that run, in order: how large each one's problem is, and what the original answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from ..conv import HarmonicMixin
from ..distributed import world_size
from .capture import conv_calls
from .equations import Problem
from .inputs import Batch, CalibrationSet
from .responses import outputs, pick_positions
from .solvers import Operator, solver

# Positions sampled of each layer: this many per unknown, and no fewer than that many in all. On two trained networks
# 8 per unknown left the refit measurably worse, and 256 no better than 32.
POSITIONS_PER_UNKNOWN = 32
LEAST_POSITIONS = 1 << 15
# Depthwise layers have a handful of unknowns for each channel, and every channel costs: fewer will do there.
LEAST_POSITIONS_GROUPED = 1 << 12


@dataclass(frozen=True)
class Site:
    """One set of coefficients: the layers that share it, and the problem that refitting it is.

    ``calls``: name and output shape of each call in one forward of ``batch`` examples, in order. ``wanted`` positions
    are sampled of each row of a map.
    """

    names: tuple[str, ...]
    calls: tuple[tuple[str, tuple[int, ...]], ...]
    batch: int
    unknowns: int
    wanted: int
    method: type[Problem]

    @property
    def positions(self) -> float:
        """Positions that one input offers."""
        return sum(shape[0] * math.prod(shape[2:]) for _, shape in self.calls) / self.batch

    @property
    def sampled(self) -> float:
        """Positions sampled of one input."""
        return _sampled(self.calls, self.wanted) / self.batch


def find_sites(
    original: nn.Module,
    converted: dict[str, HarmonicMixin],
    layers: dict[str, nn.Module],
    data: CalibrationSet,
    memory: int,
) -> list[Site]:
    """The sites of ``layers`` of the original that run on the calibration inputs, in the order in which they do."""
    first = (*data.fit, *data.held)[0]
    shared: dict[int, list[tuple[str, tuple[int, ...]]]] = {}
    for name, call in conv_calls(original, layers, first.input):
        shared.setdefault(id(converted[name].coefficients), []).append((name, tuple(call.output.shape)))
    return [_site(converted[calls[0][0]], calls, len(first), data, memory) for calls in shared.values()]


class Targets:
    """What the original network answers at the sampled positions: of as many layers in one run as ``memory`` holds."""

    def __init__(
        self, original: nn.Module, layers: dict[str, nn.Module], sites: Sequence[Site], seed: int, memory: int
    ):
        self._original, self._layers, self._sites, self._seed, self._memory = original, layers, sites, seed, memory
        self._kept: dict[tuple[str, ...], dict[int, list[tuple[str, tuple[int, ...], Tensor]]]] = {}

    def of(self, site: Site, data: CalibrationSet) -> dict[int, list[tuple[str, tuple[int, ...], Tensor]]]:
        """For each batch (by id): name, output shape and answers (N, P, O) of each call of the site; given out once."""
        if site.names not in self._kept:
            self._run(self._next(site, data), data)
        return self._kept.pop(site.names)

    def _next(self, site: Site, data: CalibrationSet) -> list[Site]:
        following = self._sites[self._sites.index(site) :]
        chosen, used = [site], 0.0
        for other in following[1:]:
            channels = max(shape[1] for _, shape in other.calls)
            used += 4 * channels * other.sampled * data.total
            if used > self._memory:
                break
            chosen.append(other)
        return chosen

    def _run(self, sites: list[Site], data: CalibrationSet) -> None:
        owner = {name: site for site in sites for name in site.names}
        layers = {name: self._layers[name] for name in owner}
        self._kept = {site.names: {} for site in sites}
        for batch in (*data.fit, *data.held):
            for site in sites:
                self._kept[site.names][id(batch)] = []
            for name, call in conv_calls(self._original, layers, batch.input, sum(len(s.calls) for s in sites)):
                site, shape = owner[name], tuple(call.output.shape)
                picks = pick_positions(rows_of(batch, shape[0]), shape[2:], site.wanted, self._seed)
                answers = outputs(call.output, picks).contiguous()
                self._kept[site.names][id(batch)].append((name, shape, answers))


def rows_of(batch: Batch, rows: int) -> list[int]:
    """The example that each row of a layer's input belongs to: a network may cut examples into frames or windows."""
    return [batch.examples[row * len(batch) // rows] for row in range(rows)]


def _site(
    conv: HarmonicMixin, calls: list[tuple[str, tuple[int, ...]]], batch: int, data: CalibrationSet, memory: int
) -> Site:
    groups, transposed = cast(int, conv.groups), cast(bool, conv.transposed)
    first, second, kept = conv.coefficients.shape
    out, inside = (second, first // groups) if transposed else (first // groups, second)
    unknowns = inside * kept
    rows = sum(shape[0] for _, shape in calls) / batch
    least = max(POSITIONS_PER_UNKNOWN * unknowns, LEAST_POSITIONS_GROUPED if groups > 8 else LEAST_POSITIONS)
    wanted = math.ceil(least / max(data.fit_total, 1) / rows)
    sampled = _sampled(calls, wanted) / batch
    fit, held = (math.ceil(sampled * count) for count in (data.fit_total, data.total - data.fit_total))
    method = solver(groups, out, unknowns, fit, held, memory, world_size() == 1)
    if method is Operator:
        wanted = max(math.prod(shape[2:]) for _, shape in calls)
    return Site(tuple(dict.fromkeys(name for name, _ in calls)), tuple(calls), batch, unknowns, wanted, method)


def _sampled(calls: Sequence[tuple[str, tuple[int, ...]]], wanted: int) -> int:
    return sum(shape[0] * min(wanted, math.prod(shape[2:])) for _, shape in calls)
