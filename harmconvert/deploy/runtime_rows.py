"""The networks that a benchmark times besides torch's in float32: in bfloat16, in ONNX Runtime and in OpenVINO."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from ..calibration import Batch, CalibrationContext
from ..errors import first_line
from ..layers.layer_times import kernels_to_channels_last
from ..network.exchange import exchange
from ..network.forms import factoring, fuse
from ..network.layers import converted_layers
from ..network.values import batch_size, images_to_channels_last, map_tensors, tensors_in
from .graph_files import factor_for
from .graphs import onnx_bytes
from .quantised_graphs import quantise_within, to_int8
from .runtimes import Target

RUNTIMES = ("torch", "onnx", "openvino")
# Precisions that are timed; float16 is a format of weights in OpenVINO's files, and not faster.
TIMED_PRECISIONS = ("f32", "bf16", "int8")
_TARGETS = (
    Target("onnx"), Target("onnx", "int8"), Target("openvino"), Target("openvino", "bf16"), Target("openvino", "int8"),
)  # fmt: skip


@dataclass(frozen=True)
class Deployed:
    """A network as it would be deployed. ``network`` is None if it cannot be made, and ``note`` says why.

    ``for_any_batch``: makes the network for other batch sizes than that of ``input``.
    """

    runtime: str
    precision: str
    form: str
    network: nn.Module | None
    input: Any = None
    note: str | None = None
    for_any_batch: Callable[[], nn.Module] | None = None

    def agreement(self, context: CalibrationContext | None) -> float | None:
        """Return the share of images held back with the same top-1 as the original; None if there are none."""
        if context is None or self.precision == "f32" or self.network is None:
            return None
        context.compare(self.for_batches())
        return context.compare.agreement

    def for_batches(self) -> nn.Module:
        """Return the network for any batch size, with inputs and outputs in float32."""
        assert self.network is not None
        return self.for_any_batch() if self.for_any_batch else _InBfloat16(self.network)


class _InBfloat16(nn.Module):
    """A network in bfloat16 that is called with float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = map_tensors(lambda t: t.bfloat16() if t.is_floating_point() else t, (args, kwargs))
        return map_tensors(lambda t: t.float() if t.is_floating_point() else t, self.network(*args, **kwargs))


class EightBits:
    """Makes graphs in 8 bits. Those that are calibrated on images are made once for each runtime, for all batch sizes.

    Args:
        context: calibration inputs; without them, 8 bits are calibrated on the example input: this does not change the
            time.
    """

    def __init__(self, context: CalibrationContext | None) -> None:
        self.context = context
        self._graphs: dict[str, bytes] = {}

    def of_input(self, graph: bytes, runtime: str, input: Any) -> bytes:
        """Return a graph in 8 bits that is calibrated on one input."""
        return to_int8(graph, [Batch(input, tuple(range(batch_size(input) or 1)), 0)], runtime)

    def of_dense(self, dense: nn.Module, graph: bytes, target: Target, input: Any) -> bytes:
        """Return the graph of the dense form in 8 bits."""
        if self.context is None:
            return self.of_input(graph, target.runtime, input)
        if target.runtime not in self._graphs:
            quantised, _ = quantise_within(
                dense, lambda one: onnx_bytes(one, input), target, self.context, 100.0, lambda what: None
            )
            self._graphs[target.runtime] = quantised.content
        return self._graphs[target.runtime]


def in_low_precision_and_runtimes(
    model: nn.Module, forms: Sequence[str], input: Any, runtimes: Sequence[str], precisions: Sequence[str],
    eight_bits: EightBits,
) -> Iterator[Deployed]:  # fmt: skip
    """Yield the networks in other precisions and runtimes than float32 under torch."""
    on_cpu = tensors_in(input)[0].device.type == "cpu"
    if "torch" in runtimes and "bf16" in precisions and (has_bfloat16() or not on_cpu):
        yield from in_bfloat16(model, forms, input)
    wanted = [one for one in targets(runtimes, precisions) if not one.missing_packages()]
    if on_cpu and wanted:
        yield from in_runtimes(model, forms, input, wanted, eight_bits)


def targets(runtimes: Sequence[str], precisions: Sequence[str]) -> list[Target]:
    """Return the runtimes and precisions to time, without those that this processor lacks."""
    return [
        one
        for one in _TARGETS
        if one.runtime in runtimes and one.precision in precisions and (one.precision != "bf16" or has_bfloat16())
    ]


def missing_runtimes(runtimes: Sequence[str]) -> list[str]:
    """Return a note for each runtime whose packages are missing."""
    notes = []
    for name in ("onnx", "openvino"):
        if name in runtimes and (missing := Target(name).missing_packages()):
            what = f"{Target(name)} was not timed, because {missing[0]} is not installed"
            notes.append(f"{what}: pip install 'harmconvert[{name}]'")
    return notes


def has_bfloat16() -> bool:
    """Return whether the processor multiplies in bfloat16."""
    supported = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, bool)()) for name in supported)


def in_bfloat16(model: nn.Module, forms: Sequence[str], input: Any) -> Iterator[Deployed]:
    """Yield the forms of a network in bfloat16 under torch: dense, and factored if it has faster layers."""
    half = exchange(model, {}).to(torch.bfloat16)
    halves = images_to_channels_last(map_tensors(lambda t: t.bfloat16() if t.is_floating_point() else t, input))
    if "dense" in forms:
        yield Deployed("torch", "bf16", "dense", kernels_to_channels_last(fuse(half, halves)), halves)
    if "factored" in forms and converted_layers(model):
        chosen = factoring(half, halves)
        if chosen.factored:
            yield Deployed("torch", "bf16", "factored", chosen.model, halves)


def in_runtimes(
    model: nn.Module, forms: Sequence[str], input: Any, wanted: Sequence[Target], eight_bits: EightBits
) -> Iterator[Deployed]:
    """Yield the dense form in each runtime and precision, and the factored form if it has faster layers."""

    @cache
    def dense() -> nn.Module:
        return fuse(model, input).eval()

    @cache
    def graph_of(form: str, target: Target) -> bytes:
        if form == "dense":
            return onnx_bytes(dense(), input)
        chosen = factor_for(target, model, input, lambda what: None)
        return onnx_bytes(chosen.model.eval(), input) if chosen.factored else b""

    for target in wanted:
        for form in ("dense", "factored") if converted_layers(model) else ("dense",):
            if form not in forms:
                continue
            try:
                graph = graph_of(form, Target("onnx") if form == "dense" else target)
                if not graph:  # no layer is faster in factored form
                    continue
                if target.precision == "int8" and form == "dense":
                    graph = eight_bits.of_dense(dense(), graph, target, input)
                elif target.precision == "int8":
                    graph = eight_bits.of_input(graph, target.runtime, input)
                yield Deployed(
                    target.runtime, target.precision, form, target.open(graph, input), input,
                    for_any_batch=partial(target.open, graph),
                )  # fmt: skip
            except Exception as error:  # an operator that a runtime lacks must not end the benchmark
                note = f"does not run ({type(error).__name__}: {first_line(error)})"
                yield Deployed(target.runtime, target.precision, form, None, note=note)
