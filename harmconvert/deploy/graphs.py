"""Export networks as graphs of standard operators (ONNX, torch.export); check each file before writing it."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckError, HarmconvertError, InputError, first_line
from ..files import write_file
from ..network.comparison import greatest_difference, top1_agreement
from ..network.form_check import compare_outputs, comparison_inputs
from ..network.forms import factoring, fuse
from ..network.running import call, evaluating, unchanged
from ..network.values import clone_tensors, tensors_in
from .quantised_graphs import HeldBack
from .runtimes import Target, arguments_of, named_tensors, write_bytes

# Relative to the largest output. ONNX Runtime adds in another order than torch; torch.export changes the order little.
TOLERANCE = {"onnx": 1e-4, "openvino": 1e-4, "torch-export": 1e-5}
# The batch size in the trace of a file for any batch size. torch.export treats sizes 0 and 1 as constants.
TRACED_BATCH = 2

_SUPPORTED = (list, tuple, dict, OrderedDict, int, float, bool, str, type(None))

ToBytes = Callable[[nn.Module, Any, bool], bytes]  # arguments: network, input, whether the batch size is dynamic
Run = Callable[[Any], Sequence[Tensor]]  # runs an exported file on an input


@dataclass(frozen=True)
class Exported:
    """The accuracy of an exported file: relative difference of the outputs, share of the same top-1 (None: no logits).

    ``factored``: names of the layers in factored form. ``speedup``: speed of the file relative to the dense form, in
    its runtime on this machine (None: not measured). ``notes``: restrictions of the file, for the user. ``held_back``:
    the comparison on calibration inputs that were held back, if there are calibration inputs.
    """

    difference: float
    top1_agreement: float | None
    factored: tuple[str, ...]
    speedup: float | None = None
    notes: tuple[str, ...] = ()
    held_back: HeldBack | None = None


def export_program(
    model: nn.Module, path: Path, form: str, example_input: Any, force: bool, progress: Callable[[str], None]
) -> Exported:
    """Write a .pt2 file; see `harmconvert.deploy.export.export`."""
    if form == "factored":
        chosen = factoring(model, example_input)
        network, names = chosen.model.eval(), chosen.factored
    else:
        network, names = fuse(model, example_input).eval(), ()
    progress("exporting")
    content, exported = export_and_check("torch-export", network, model, example_input, progress)
    write_file(path, lambda staging: write_bytes(staging, content), force)
    return replace(exported, factored=names)


def onnx_bytes(network: nn.Module, example_input: Any) -> bytes:
    """Return an ONNX file of a network for any batch size; if that is impossible, for the batch size of the example.

    Raises:
        InputError: the network cannot be exported.
    """
    try:
        return _export(_to_onnx, network, example_input, TRACED_BATCH)
    except InputError:
        return _export(_to_onnx, network, example_input, None)


def _to_onnx(network: nn.Module, inputs: Any, dynamic: bool) -> bytes:
    args, kwargs = arguments_of(inputs)
    shapes = _dynamic_shapes(args, kwargs) if dynamic else None
    program = torch.onnx.export(
        network, args, kwargs=kwargs, input_names=list(named_tensors(args, kwargs)), dynamic_shapes=shapes, dynamo=True,
        verbose=False,
    )  # fmt: skip
    assert program is not None
    return bytes(program.model_proto.SerializeToString())


def _to_program(network: nn.Module, inputs: Any, dynamic: bool) -> bytes:
    args, kwargs = arguments_of(inputs)
    shapes = _dynamic_shapes(args, kwargs) if dynamic else None
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(network, args, kwargs, dynamic_shapes=shapes), buffer)
    return buffer.getvalue()


def _program_outputs(content: bytes) -> Run:
    program = torch.export.load(io.BytesIO(content)).module()
    return lambda inputs: tensors_in(call(program, inputs))


# Run a file of each format.
_RUNS: dict[str, Callable[[bytes], Run]] = {
    "onnx": lambda content: _runtime_outputs(Target("onnx").open(content)),
    "openvino": lambda content: _runtime_outputs(Target("openvino").open(content)),
    "torch-export": _program_outputs,
}


def _runtime_outputs(network: nn.Module) -> Run:
    return lambda inputs: tensors_in(call(network, inputs))


def _export(to_bytes: ToBytes, network: nn.Module, example_input: Any, batch: int | None) -> bytes:
    try:
        with evaluating(network), _plain_outputs(network), quiet():
            return to_bytes(network, comparison_inputs(example_input, batch), batch is not None)
    except Exception as error:
        raise InputError(f"this {type(network).__name__} cannot be exported: {cause_of(error)}") from error


@contextmanager
def _plain_outputs(network: nn.Module) -> Iterator[None]:
    """Make a network return a tuple of its tensors if exporters do not support the class of its output.

    Such classes are named tuples, dataclasses and mappings of other packages.
    """

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return tuple(tensors_in(output)) if _unsupported_classes(output) else None

    handle = network.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _unsupported_classes(output: Any) -> list[str]:
    """Return the names of the classes in an output that exporters do not support."""
    parts = [part for part in _parts(output) if not isinstance(part, Tensor)]  # exporters trace with their own tensors
    return sorted({type(part).__name__ for part in parts if type(part) not in _SUPPORTED})


def _output_notes(network: nn.Module, example_input: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return notes for the user about the outputs of a graph, and the classes of outputs that are not tensors.

    Raises:
        InputError: no output is a tensor.
    """
    with evaluating(network), unchanged(network):
        output = call(network, comparison_inputs(example_input, None))
    others = {type(part).__name__ for part in _parts(output) if part is not None and not tensors_in(part)}
    values = tuple(sorted(others - {"list", "tuple", "dict", "OrderedDict"}))
    if not tensors_in(output):
        kind = ", ".join(values) or "None"
        raise InputError(f"this {type(network).__name__} cannot be exported: its output has no tensor, but {kind}")
    notes = [
        f"its outputs are a tuple of tensors, because exporters do not support {name}"
        for name in _unsupported_classes(output)
    ]
    if values:
        notes.append(f"graphs compute only tensors: outputs of {', '.join(values)} are left out, or constant")
    return tuple(notes), values


def _parts(output: Any) -> Iterator[Any]:
    """Yield an output and, if it is a list, tuple or dict, all values in it at any depth."""
    yield output
    items = output.values() if type(output) in (dict, OrderedDict) else output if type(output) in (list, tuple) else ()
    for item in items:
        yield from _parts(item)


def export_and_check(
    format: str, network: nn.Module, model: nn.Module, example_input: Any, progress: Callable[[str], None]
) -> tuple[bytes, Exported]:
    """Export ``network`` for any batch size; if that fails, for the batch size of the example.

    Args:
        network: the dense or factored form of ``model``.
        model: the harmonic network with which the file is compared.

    Raises:
        InputError: the network cannot be exported, or the file does not run.
        CheckError: the outputs of the file differ from those of the network.
    """
    to_bytes = _to_program if format == "torch-export" else _to_onnx
    output_notes, other_classes = _output_notes(network, example_input)
    notes: tuple[str, ...] = ()
    for batch, compared in ((TRACED_BATCH, (None, TRACED_BATCH, TRACED_BATCH + 1)), (None, (None,))):
        try:
            content = _export(to_bytes, network, example_input, batch)
            progress("comparing")
            difference, agreement = _compare(format, _RUNS[format](content), network, model, example_input, compared)
            return content, Exported(difference, agreement, (), None, (*notes, *output_notes))
        except Exception as error:
            if batch is None and "ndarray" in other_classes and isinstance(error, InputError):
                raise InputError(f"{error}; its output has NumPy arrays: make it return tensors") from error
            if batch is None:
                raise
            cause = error.__cause__ if isinstance(error, InputError) and error.__cause__ else error
            notes = (f"the batch size is fixed, because an export for any batch size fails: {cause_of(cause)}",)
    raise AssertionError("the last attempt returns or raises")


def _compare(
    format: str, run: Run, network: nn.Module, model: nn.Module, example_input: Any, batches: Sequence[int | None]
) -> tuple[float, float | None]:
    """Return the largest difference from the harmonic network and the lowest top-1 agreement, over the batch sizes.

    Raises:
        InputError: the file does not run.
        CheckError: the outputs of the file differ from those of ``network`` or ``model`` by more than the tolerance, or
            have another top-1.
    """
    largest, agreement, tolerance = 0.0, None, TOLERANCE[format]
    for batch in batches:
        inputs = comparison_inputs(example_input, batch)
        with evaluating(network, model), unchanged(network), unchanged(model), quiet():
            expected, harmonic = (_cpu(tensors_in(call(each, clone_tensors(inputs)))) for each in (network, model))
            try:
                outputs = _cpu(run(clone_tensors(inputs)))
            except Exception as error:
                raise InputError(f"the exported file does not run: {cause_of(error)}") from error
        export_error, difference = greatest_difference(outputs, expected), greatest_difference(outputs, harmonic)
        same = top1_agreement(list(zip(harmonic, outputs, strict=True)), tolerance) if export_error < inf else None
        # Two forms of a network may differ by rounding: compare_outputs decides in float64 whether they do.
        problem = None if difference <= tolerance else compare_outputs(model, network, inputs).problem
        if not export_error <= tolerance or problem or same not in (None, 1.0):
            top1 = "" if same is None else f", the same top-1 on {same:.0%}"
            raise CheckError(
                "the outputs of the exported file differ from those of the network by "
                f"{max(export_error, difference):.1e} of the largest, tolerance {tolerance:.0e}{top1}; "
                "nothing was written"
            )
        largest = max(largest, difference)
        agreement = same if agreement is None or same is None else min(agreement, same)
    return largest, agreement


def _cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().cpu() for tensor in tensors]


def _dynamic_shapes(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the dynamic shapes for torch.export: the first axis of every input is the batch."""
    batch = torch.export.Dim("batch")

    def shape(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {0: batch} if value.dim() else {}
        if isinstance(value, dict):
            return {key: shape(item) for key, item in value.items()}
        return type(value)(shape(item) for item in value) if type(value) in (list, tuple) else None

    return {key: shape(value) for key, value in kwargs.items()} if kwargs else shape(args)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the reports that exporters write to stdout, stderr and the log; only their developers need them."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def cause_of(error: BaseException) -> str:
    """Return the innermost cause of an exporter's error, in one line without terminal colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", first_line(error)).strip()
    return text if isinstance(error, HarmconvertError) else f"{type(error).__name__}: {text}".rstrip(": ")
