"""Find the layers to refit and the size of their equations, and compute the original network's outputs for them."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..network.distributed import from_first_rank, world_size
from ..network.layers import parameter_of, weighted_layers
from .capture import NOT_ONE_CONVOLUTION, ConvCall, watch_convolutions
from .equations import Problem
from .inputs import Batch, CalibrationSet
from .layers import coefficients_of
from .responses import outputs, pick_positions
from .solvers import Operator, solver

# Number of positions that are sampled for each layer: this many per unknown, and at least so many in total. On two
# trained networks the refit was measurably worse with 8 per unknown, and no better with 256 than with 32.
POSITIONS_PER_UNKNOWN = 32
LEAST_POSITIONS = 1 << 15
# Depthwise layers have few unknowns per channel, and each channel costs time: fewer positions are enough.
LEAST_POSITIONS_GROUPED = 1 << 12


@dataclass(frozen=True)
class TiedLayers:
    """The layers that share one set of coefficients (often only one layer), and the size of their equations.

    ``calls``: name and output shape of each call in one forward of one example, in order. ``groups``: groups of the
    convolution. ``unknowns``: per output channel. ``sample_count``: number of positions that are sampled of each row
    (example) of a map. ``method``: how the equations are stored and solved.
    """

    names: tuple[str, ...]
    calls: tuple[tuple[str, tuple[int, ...]], ...]
    groups: int
    unknowns: int
    sample_count: int
    method: type[Problem]

    @property
    def positions_per_input(self) -> int:
        """Return the number of positions in one input."""
        return sum(shape[0] * math.prod(shape[2:]) for _, shape in self.calls)

    @property
    def sampled_per_input(self) -> int:
        """Return the number of positions that are sampled of one input."""
        return _sampled_per_input(self.calls, self.sample_count)


def find_tied_layers(
    original: nn.Module, converted: Mapping[str, nn.Module], data: CalibrationSet, memory: int
) -> tuple[list[TiedLayers], dict[str, str]]:
    """Run the original on one example and group the ``converted`` layers that run by their coefficients.

    Returns the groups in the order in which the original runs them, and by name why other layers that run cannot be
    refitted.

    Raises:
        UsageError: the network does not run on the inputs.
    """
    originals = weighted_layers(original)
    calls_by_coefficients: dict[int, list[tuple[str, tuple[int, ...]]]] = {}
    varying = data.runs.varying & converted.keys()
    not_refittable = dict.fromkeys(varying, "its input differs from run to run on the same example")

    def on_call(name: str, call: ConvCall | None) -> None:
        if call is None:
            not_refittable[name] = NOT_ONE_CONVOLUTION
        else:
            rows, *rest = call.output.shape
            shape = (-(-rows // len(data.probe)), *rest)
            calls_by_coefficients.setdefault(id(parameter_of(converted[name])), []).append((name, shape))

    watch_convolutions(original, {name: originals[name] for name in converted}, data.probe.input, on_call)
    groups = calls_by_coefficients.values()
    refittable = [calls for calls in groups if not any(name in not_refittable for name, _ in calls)]
    tied_layers = [_tied_layers(converted[calls[0][0]], calls, data, memory) for calls in refittable]
    return from_first_rank(tied_layers), not_refittable


def why_not_observed(name: str, layers: Collection[str]) -> str:
    """Return why a layer has no equations; ``layers``: names of the layers that can have some."""
    return "it is not called on the calibration inputs" if name in layers else "its inputs cannot be observed"


Target = tuple[str, tuple[int, ...], Tensor]  # layer, shape of its output, its values (N, P, O) at sampled positions


class Targets:
    """The original network's outputs at the sampled positions, computed for several layers in one run.

    ``memory``: the most bytes of outputs that are stored; it limits the number of layers in one run.
    """

    def __init__(
        self, original: nn.Module, tied_layers: Sequence[TiedLayers], data: CalibrationSet, seed: int, memory: int
    ) -> None:
        self._original, self._tied_layers, self._data = original, tied_layers, data
        self._seed, self._memory = seed, memory
        self._layers = weighted_layers(original)
        self._stored: dict[tuple[str, ...], dict[int, list[Target]]] = {}

    def of(self, tied: TiedLayers, batch: Batch) -> list[Target]:
        """Return the original's outputs on one batch, call by call."""
        if tied.method is Operator:  # this method needs whole maps: store only one batch
            return self._run([tied], [batch])[tied.names].get(id(batch), [])
        if tied.names not in self._stored:
            batches = (*self._data.fit, *self._data.held)
            try:
                self._stored = self._run(self._next_that_fit(tied), batches)
            except (torch.OutOfMemoryError, MemoryError):
                self._stored = {}
                self._stored = self._run([tied], batches)
        return self._stored[tied.names].pop(id(batch), [])  # empty if the layer did not run

    def forget(self, tied: TiedLayers) -> None:
        """Delete the stored outputs of these layers."""
        self._stored.pop(tied.names, None)

    def _next_that_fit(self, tied: TiedLayers) -> list[TiedLayers]:
        """Return these layers and the following ones, as many as fit into memory."""
        chosen: list[TiedLayers] = []
        used = 0.0
        for other in self._tied_layers[self._tied_layers.index(tied) :]:
            used += 4 * max(shape[1] for _, shape in other.calls) * other.sampled_per_input * self._data.total
            if chosen and (used > self._memory or other.method is Operator):
                break
            chosen.append(other)
        return chosen

    def _run(
        self, tied_layers: Sequence[TiedLayers], batches: Sequence[Batch]
    ) -> dict[tuple[str, ...], dict[int, list[Target]]]:
        tied_by_name = {name: tied for tied in tied_layers for name in tied.names}
        targets: dict[tuple[str, ...], dict[int, list[Target]]] = {tied.names: {} for tied in tied_layers}
        for batch in batches:

            def on_call(name: str, call: ConvCall | None, batch: Batch = batch) -> None:
                tied = tied_by_name[name]
                shape = tuple(call.output.shape) if call else ()
                values = torch.empty(0)
                if call:
                    picks = pick_positions(rows_of(batch, shape[0]), shape[2:], tied.sample_count, self._seed)
                    values = outputs(call.output, picks).clone()
                targets[tied.names].setdefault(id(batch), []).append((name, shape, values))

            calls = sum(len(tied.calls) for tied in tied_layers)
            stop = None if self._data.runs.complete else calls
            watch_convolutions(self._original, {n: self._layers[n] for n in tied_by_name}, batch.input, on_call, stop)
        return targets


def rows_of(batch: Batch, rows: int) -> list[int]:
    """Return the number of the example of each row of a layer's input. A network may divide examples into frames."""
    return [batch.examples[row * len(batch) // rows] for row in range(rows)]


def _tied_layers(
    layer: nn.Module, calls: list[tuple[str, tuple[int, ...]]], data: CalibrationSet, memory: int
) -> TiedLayers:
    groups, transposed = getattr(layer, "groups", 1), getattr(layer, "transposed", False)
    first, second, kept = coefficients_of(layer).shape
    out, inside = (second, first // groups) if transposed else (first // groups, second)
    unknowns = inside * kept
    rows = sum(shape[0] for _, shape in calls)
    least = max(POSITIONS_PER_UNKNOWN * unknowns, LEAST_POSITIONS_GROUPED if groups > 8 else LEAST_POSITIONS)
    sample_count = math.ceil(least / max(data.fit_total, 1) / rows)
    sampled = _sampled_per_input(calls, sample_count)
    fit, held = sampled * data.fit_total, sampled * (data.total - data.fit_total)
    method = solver(groups, out, unknowns, fit, held, memory, world_size() == 1)
    if method is Operator:
        sample_count = sys.maxsize  # the convolution computes every position, whatever the size of the map
    names = tuple(dict.fromkeys(name for name, _ in calls))
    return TiedLayers(names, tuple(calls), groups, unknowns, sample_count, method)


def _sampled_per_input(calls: Sequence[tuple[str, tuple[int, ...]]], sample_count: int) -> int:
    return sum(shape[0] * min(sample_count, math.prod(shape[2:])) for _, shape in calls)
