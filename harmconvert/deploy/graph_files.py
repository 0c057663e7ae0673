"""Write a network for ONNX Runtime or OpenVINO, in the form and the precision that it shall have there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from glob import escape
from math import isfinite
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..calibration import Batch, CalibrationContext
from ..codecs.plain import stored_bytes
from ..errors import Argument, CheckError, InputError, counted
from ..layers.layer_times import LayerInput, layer_key, measured_once
from ..layers.low_rank import fast_form, plain_form, reason_without_fast_form
from ..layers.timing import in_turns
from ..network.comparison import greatest_difference, top1_agreement
from ..network.form_check import comparison_inputs
from ..network.forms import MARGIN, Factoring, factoring, fuse, layer_inputs
from ..network.layers import converted_layers
from ..network.running import call, evaluating, unchanged
from ..network.state import tensors_of
from ..network.values import clone_tensors, tensors_in
from .graphs import Exported, export_and_check, onnx_bytes
from .quantised_graphs import Quantised, calibration_context, measured, quantise_within, to_int8
from .runtimes import Target

MAX_BYTES = 2**31 - 1  # the format (protobuf) does not allow larger ONNX files
# Exported layers in both forms: they are timed in several runtimes and precisions.
_LAYER_GRAPHS: WeakKeyDictionary[nn.Module, dict[LayerInput, list[bytes]]] = WeakKeyDictionary()
# What a user must know of the precision in which OpenVINO computes.
_HINT = "OpenVINO computes in bf16 where the processor can, unless INFERENCE_PRECISION_HINT is f32"
_NOTES = {"bf16": "for bf16 on other processors, compile the model with INFERENCE_PRECISION_HINT=bf16"}


@dataclass(frozen=True)
class PrecisionSettings:
    """How low precision is calibrated and checked.

    ``calibration``: inputs for 8 bits and for the comparison; at most ``inputs`` examples are read. ``max_drop``: the
    largest loss in % (`HeldBack`).
    """

    calibration: Iterable[Any] | None = None
    inputs: int = 256
    max_drop: float = 1.0


@dataclass(frozen=True)
class GraphJob:
    """Which file to write. ``form``: dense or factored. ``force``: replace existing files."""

    path: Path
    target: Target
    form: str = "dense"
    settings: PrecisionSettings = PrecisionSettings()
    force: bool = False
    progress: Callable[[str], None] = field(default=lambda description: None)


@dataclass(frozen=True)
class _Made:
    """A graph for a file. ``within``: its loss is small enough."""

    content: bytes
    exported: Exported
    within: bool = True


def export_graph(model: nn.Module, example_input: Any, job: GraphJob) -> Exported:
    """Write a .onnx file, or the .xml and .bin files of OpenVINO; see `harmconvert.deploy.export.export`."""
    dense = fuse(model, example_input).eval()
    size = sum(stored_bytes(tensor) for tensor in tensors_of(dense).values())
    if size > MAX_BYTES:
        raise InputError(f"{size / 2**30:.1f} GiB of weights do not fit into one ONNX file (2 GiB): use torch-export")
    settings, context = job.settings, None
    if settings.calibration is not None:
        context = calibration_context(model, settings.calibration, settings.inputs)

    def made(network: nn.Module) -> _Made:
        return _made(network, model, example_input, context, job)

    if job.form == "dense":
        result = made(dense)
    else:
        chosen = factor_for(job.target, model, example_input, job.progress)
        result = _faster(chosen, dense, made, job.target, example_input)
    if not result.within:
        raise _too_lossy(result, job)
    job.target.write(result.content, job.path, job.force)
    return result.exported


def _made(
    network: nn.Module, model: nn.Module, example_input: Any, context: CalibrationContext | None, job: GraphJob
) -> _Made:
    """Export one form of a network, compare it with the network, and give it its precision."""
    target, progress, max_drop = job.target, job.progress, job.settings.max_drop
    progress(f"exporting to {Target(target.runtime)}")
    content, exported = export_and_check(target.runtime, network, model, example_input, progress)
    if target.precision == "int8":
        assert context is not None
        quantised, within = quantise_within(
            network, lambda one: onnx_bytes(one, example_input), target, context, max_drop, progress
        )
        return _Made(quantised.content, _lowered(exported, quantised), within)
    run, held_back = target.open(content), None
    if context is not None:
        progress("comparing on calibration inputs")
        held_back = measured(context, run)
    notes = (_HINT,) if target == Target("openvino") else (_NOTES.get(target.precision),)
    if target.precision != "f32":
        exported = replace(exported, **_differences(model, run, example_input))
    exported = replace(exported, held_back=held_back, notes=(*exported.notes, *filter(None, notes)))
    return _Made(content, exported, held_back is None or held_back.drop <= max_drop)


def _differences(model: nn.Module, run: nn.Module, example_input: Any) -> dict[str, Any]:
    """Return the difference and the agreement of `Exported` for a network in a runtime.

    Raises:
        CheckError: the outputs are not finite.
    """
    inputs = comparison_inputs(example_input)
    with evaluating(model), unchanged(model):
        expected, actual = (tensors_in(call(one, clone_tensors(inputs))) for one in (model, run))
    difference = greatest_difference(actual, expected)
    if not isfinite(difference):
        raise CheckError("in this precision the outputs are not finite; nothing was written: take f32")
    return {"difference": difference, "top1_agreement": top1_agreement([*zip(expected, actual, strict=True)], 0.0)}


def _lowered(exported: Exported, quantised: Quantised) -> Exported:
    held_back = quantised.held_back
    return replace(exported, held_back=held_back, notes=(*exported.notes, *held_back.notes))


def _faster(
    chosen: Factoring, dense: nn.Module, made: Callable[[nn.Module], _Made], target: Target, example_input: Any
) -> _Made:
    """Return the factored form if it is faster as a whole, else the dense form."""
    twin = made(dense)
    note = f"in {target}, no layer is faster in factored form on this machine: all layers are dense"
    if chosen.factored:
        result = made(chosen.model.eval())
        inputs = comparison_inputs(example_input)
        before, after = times_of(target, twin.content, result.content, inputs)
        if before >= after and (result.within or not twin.within):
            return replace(result, exported=replace(result.exported, factored=chosen.factored, speedup=before / after))
        note = f"in {target}, the factored form is not faster as a whole: all layers are dense"
    return replace(twin, exported=replace(twin.exported, notes=(*twin.exported.notes, note)))


def _too_lossy(result: _Made, job: GraphJob) -> CheckError:
    """Keep the best attempt beside the output, and return the error that names it."""
    path, target = job.path, job.target
    aside = path.with_name(f"{path.stem}-best{path.suffix}")
    target.write(result.content, aside, force=True)
    held_back = result.exported.held_back
    assert held_back is not None
    kept = f" with {counted(len(held_back.float_layers), 'layer')} in floating point" if held_back.float_layers else ""
    return CheckError(
        f"in {target} the file loses {held_back.drop:.2f} % on {counted(held_back.inputs, 'input')} held back{kept}, "
        "more than ", Argument("max_drop", job.settings.max_drop),
        f"; the best attempt is {aside}, and {path} was not written",
    )  # fmt: skip


def times_of(target: Target, dense: bytes, factored: bytes, inputs: Any) -> tuple[float, float]:
    """Return the seconds of a forward of two graphs in a runtime, timed in turns."""
    networks = {"dense": target.open(dense, inputs), "factored": target.open(factored, inputs)}
    runs = {name: lambda n=network: call(n, inputs) for name, network in networks.items()}
    times = in_turns(runs, 7, 3, 10.0)
    return times["dense"].median, times["factored"].median


def factor_for(target: Target, model: nn.Module, example_input: Any, progress: Callable[[str], None]) -> Factoring:
    """Return the network with the layers factored that are then faster in a runtime on this machine.

    The times of a layer of the same shape, in the same runtime, precision and processor are reused.
    """
    factorable = {n: layer for n, layer in converted_layers(model).items() if not reason_without_fast_form(layer)}
    chosen: dict[str, str] = dict.fromkeys(factorable, "dense")
    inputs_by_name = layer_inputs(model, factorable, example_input)
    for number, (name, layer_input) in enumerate(inputs_by_name.items()):
        layer = factorable[name]
        progress(f"timing {name} in {target} ({number + 1}/{len(inputs_by_name)})")
        key = json.dumps([target.runtime, target.version, target.precision, layer_key(layer, layer_input)])
        dense, factored = measured_once(key, lambda own=layer, its=layer_input: _layer_times(target, own, its))  # type: ignore[misc]
        chosen[name] = "factored" if factored < dense / (1 + MARGIN) else "dense"
    patterns = {escape(name): form for name, form in chosen.items()}
    return factoring(model, example_input, layers=patterns or "dense")


def _layer_times(target: Target, layer: nn.Module, layer_input: LayerInput) -> tuple[float, float]:
    """Return the seconds of one layer in both forms in a runtime."""
    input = torch.randn(layer_input.shape, generator=torch.Generator().manual_seed(0))
    known = _LAYER_GRAPHS.setdefault(layer, {})
    if layer_input not in known:
        known[layer_input] = [onnx_bytes(nn.Sequential(form(layer)).eval(), input) for form in (plain_form, fast_form)]
    graphs = known[layer_input]
    if target.precision == "int8":
        graphs = [to_int8(graph, [Batch(input, tuple(range(len(input))), 0)], target.runtime) for graph in graphs]
    dense, factored = graphs
    return times_of(target, dense, factored, input)
