"""The truncated convolutions that run, in order: how large each one's problem is, and what the original answers."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..layers.harmonic import HarmonicMixin
from ..network.distributed import from_first_rank, world_size
from ..network.layers import convolutions
from .capture import ConvCall, watch_convolutions
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

    ``calls``: name and output shape of each call in one forward of one example, in order. ``wanted`` positions are
    sampled of each row of a map.
    """

    names: tuple[str, ...]
    calls: tuple[tuple[str, tuple[int, ...]], ...]
    groups: int
    unknowns: int
    wanted: int
    method: type[Problem]

    @property
    def positions(self) -> int:
        """Positions that one input offers."""
        return sum(shape[0] * math.prod(shape[2:]) for _, shape in self.calls)

    @property
    def sampled(self) -> int:
        """Positions sampled of one input."""
        return _sampled(self.calls, self.wanted)


def running_sites(
    original: nn.Module, converted: dict[str, HarmonicMixin], data: CalibrationSet, memory: int
) -> tuple[list[Site], dict[str, str]]:
    """The sites of ``converted`` layers that run on the calibration inputs, in the order in which the original runs
    them; and why others that run cannot be refitted, by name.

    Raises:
        UsageError: the network does not run on the inputs.
    """
    originals = convolutions(original)
    shared: dict[int, list[tuple[str, tuple[int, ...]]]] = {}
    odd = dict.fromkeys(data.runs.varying & converted.keys(), "its input differs from run to run on the same example")

    def see(name: str, call: ConvCall | None) -> None:
        if call is None:
            odd[name] = "it convolves otherwise than once in a forward"
        else:
            rows, *rest = call.output.shape
            shape = (-(-rows // len(data.probe)), *rest)
            shared.setdefault(id(converted[name].coefficients), []).append((name, shape))

    watch_convolutions(original, {name: originals[name] for name in converted}, data.probe.input, see)
    plain = [calls for calls in shared.values() if not any(name in odd for name, _ in calls)]
    sites = [_site(converted[calls[0][0]], calls, data, memory) for calls in plain]
    return from_first_rank(sites), odd


Answer = tuple[str, tuple[int, ...], Tensor]  # layer, shape of its output, its values (N, P, O) at sampled positions


class Targets:
    """What the original network answers at the sampled positions: of as many layers in one run as ``memory`` holds."""

    def __init__(
        self, original: nn.Module, sites: Sequence[Site], data: CalibrationSet, seed: int, memory: int
    ) -> None:
        self._original, self._sites, self._data = original, sites, data
        self._seed, self._memory = seed, memory
        self._layers = convolutions(original)
        self._kept: dict[tuple[str, ...], dict[int, list[Answer]]] = {}

    def of(self, site: Site, batch: Batch) -> list[Answer]:
        """The original's answers to one batch, call by call."""
        if site.method is Operator:  # whole maps: one batch at a time
            return self._run([site], [batch])[site.names].get(id(batch), [])
        if site.names not in self._kept:
            batches = (*self._data.fit, *self._data.held)
            try:
                self._kept = self._run(self._following(site), batches)
            except (torch.OutOfMemoryError, MemoryError):
                self._kept = {}
                self._kept = self._run([site], batches)
        return self._kept[site.names].pop(id(batch), [])  # none where the layer did not run

    def forget(self, site: Site) -> None:
        """Free what is kept for a site."""
        self._kept.pop(site.names, None)

    def _following(self, site: Site) -> list[Site]:
        chosen: list[Site] = []
        used = 0.0
        for other in self._sites[self._sites.index(site) :]:
            used += 4 * max(shape[1] for _, shape in other.calls) * other.sampled * self._data.total
            if chosen and (used > self._memory or other.method is Operator):
                break
            chosen.append(other)
        return chosen

    def _run(self, sites: Sequence[Site], batches: Sequence[Batch]) -> dict[tuple[str, ...], dict[int, list[Answer]]]:
        owner = {name: site for site in sites for name in site.names}
        found: dict[tuple[str, ...], dict[int, list[Answer]]] = {site.names: {} for site in sites}
        for batch in batches:

            def see(name: str, call: ConvCall | None, batch: Batch = batch) -> None:
                site = owner[name]
                shape = tuple(call.output.shape) if call else ()
                values = torch.empty(0)
                if call:
                    picks = pick_positions(rows_of(batch, shape[0]), shape[2:], site.wanted, self._seed)
                    values = outputs(call.output, picks).clone()
                found[site.names].setdefault(id(batch), []).append((name, shape, values))

            calls = sum(len(site.calls) for site in sites)
            stop = None if self._data.runs.complete else calls
            watch_convolutions(self._original, {n: self._layers[n] for n in owner}, batch.input, see, stop)
        return found


def rows_of(batch: Batch, rows: int) -> list[int]:
    """The example that each row of a layer's input belongs to: a network may cut examples into frames or windows."""
    return [batch.examples[row * len(batch) // rows] for row in range(rows)]


def _site(conv: HarmonicMixin, calls: list[tuple[str, tuple[int, ...]]], data: CalibrationSet, memory: int) -> Site:
    groups, transposed = cast(int, conv.groups), cast(bool, conv.transposed)
    first, second, kept = conv.coefficients.shape
    out, inside = (second, first // groups) if transposed else (first // groups, second)
    unknowns = inside * kept
    rows = sum(shape[0] for _, shape in calls)
    least = max(POSITIONS_PER_UNKNOWN * unknowns, LEAST_POSITIONS_GROUPED if groups > 8 else LEAST_POSITIONS)
    wanted = math.ceil(least / max(data.fit_total, 1) / rows)
    sampled = _sampled(calls, wanted)
    fit, held = sampled * data.fit_total, sampled * (data.total - data.fit_total)
    method = solver(groups, out, unknowns, fit, held, memory, world_size() == 1)
    if method is Operator:
        wanted = sys.maxsize  # the convolution computes every position, on maps of whatever size
    return Site(tuple(dict.fromkeys(name for name, _ in calls)), tuple(calls), groups, unknowns, wanted, method)


def _sampled(calls: Sequence[tuple[str, tuple[int, ...]]], wanted: int) -> int:
    return sum(shape[0] * min(wanted, math.prod(shape[2:])) for _, shape in calls)
