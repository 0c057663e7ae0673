"""Collect the equations of several layers in one run of a network whose layers are not changed in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from ..network.distributed import all_or_none, any_rank
from .capture import NOT_ONE_CONVOLUTION, ConvCall, explain_error, watch_convolutions
from .equations import Layer
from .inputs import Batch
from .layers import Kernel, refittable_bias
from .responses import outputs, pick_positions
from .solvers import NormalEquations, Samples
from .tied_layers import TiedLayers, rows_of

Equations = NormalEquations | Samples


@dataclass(eq=False)
class EquationCollector:
    """Collects the equations of layers that share coefficients, for each part of the calibration inputs.

    The targets are the layer's own outputs, so that all residuals are zero.

    Args:
        sample_count: number of positions that are sampled of each row of a map.
        method: makes empty equations of a layer.
        bytes: memory that the equations and their use need.
    """

    tied: TiedLayers
    converted: nn.Module
    layers: Mapping[str, nn.Module]
    seed: int
    sample_count: int
    method: Callable[[Layer], Equations]
    bytes: int

    def __post_init__(self) -> None:
        self.modules = {name: self.layers[name] for name in self.tied.names}
        self.fits_bias = refittable_bias(self.converted, list(self.modules.values())) is not None
        self.parts: dict[int, Equations] = {}
        self.why_failed: str | None = None

    def add(self, part: int, name: str, call: ConvCall | None, batch: Batch) -> None:
        """Add one call to the equations of a part."""
        if self.why_failed is not None:
            return
        try:
            if call is None:
                raise ValueError(NOT_ONE_CONVOLUTION)
            if part not in self.parts:
                layer = Kernel.of(self.modules[name], call).layer(call, self.fits_bias, self.sample_count, self.seed)
                self.parts[part] = self.method(layer)
            examples = rows_of(batch, len(call.input))
            picks = pick_positions(examples, call.output.shape[2:], self.sample_count, self.seed)
            self.parts[part].add(call, outputs(call.output, picks), examples)
        except Exception as error:  # an error in one layer must not stop the collection for the others
            self.why_failed = explain_error(error)

    def result(self, parts: int) -> list[Equations] | str:
        """Return the equations of each part, summed over the processes, or why there are none."""
        if any_rank(len(self.parts) < parts or self.why_failed is not None):
            return self.why_failed or "another process could not process its inputs"
        equations = [self.parts[part] for part in range(parts)]
        for problem in equations:
            problem.reduce()
        if not all(problem.finite for problem in equations):
            return "its activations are NaN or infinite on the calibration inputs"
        return equations


def collect_together(
    converted: nn.Module,
    collectors: Sequence[EquationCollector],
    parts: Sequence[Sequence[Batch]],
    memory: int,
    complete: bool,
) -> Iterator[tuple[EquationCollector, list[Equations] | str]]:
    """Run the network and yield each collector with its equations (see `EquationCollector.result`), in order.

    Args:
        parts: the parts of the inputs; each has its own equations.
        memory: in one run, equations of at most this many bytes are collected.
        complete: do not interrupt runs.

    Raises:
        UsageError: the network does not run on the inputs.
    """
    while collectors:
        together = _first_that_fit(collectors, memory)
        collectors = collectors[len(together) :]
        all_or_none(
            partial(_run_and_collect, converted, together, parts, complete),
            RuntimeError("another process could not process its inputs"),
        )
        for collector in together:
            yield collector, collector.result(len(parts))
            collector.parts.clear()  # the caller has the other references to the equations


def _run_and_collect(
    converted: nn.Module, together: Sequence[EquationCollector], parts: Sequence[Sequence[Batch]], complete: bool
) -> None:
    collector_of = {name: collector for collector in together for name in collector.modules}
    modules = {name: collector.modules[name] for name, collector in collector_of.items()}
    calls = sum(len(collector.tied.calls) for collector in together)
    for part, batches in enumerate(parts):
        for batch in batches:

            def on_call(name: str, call: ConvCall | None, part: int = part, batch: Batch = batch) -> None:
                collector_of[name].add(part, name, call, batch)

            watch_convolutions(converted, modules, batch.input, on_call, None if complete else calls)


def _first_that_fit(collectors: Sequence[EquationCollector], memory: int) -> list[EquationCollector]:
    """Return the first collectors whose equations fit into ``memory`` together, at least one."""
    used, count = 0, 0
    for collector in collectors:
        used += collector.bytes
        if count and used > memory:
            break
        count += 1
    return list(collectors[:count])
