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
from glob import escape
from importlib import import_module
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..codecs.plain import stored_bytes
from ..errors import CheckError, HarmconvertError, InputError, OutsideError, first_line
from ..files import write_file
from ..layers.low_rank import fast_form, plain_form, reason_without_fast_form
from ..layers.timing import in_turns
from ..network.comparison import greatest_difference, top1_agreement
from ..network.form_check import compare_outputs, comparison_inputs
from ..network.forms import MARGIN, Factoring, factoring, fuse, layer_inputs
from ..network.layers import converted_layers
from ..network.running import call, evaluating, unchanged
from ..network.state import tensors_of
from ..network.values import clone_tensors, tensors_in
from ..plan.axes import kept_by

# Relative to the largest output. ONNX Runtime adds in another order than torch; torch.export changes the order little.
TOLERANCE = {"onnx": 1e-4, "torch-export": 1e-5}
MAX_BYTES = 2**31 - 1  # the format (protobuf) does not allow larger ONNX files
# The batch size in the trace of a file for any batch size. torch.export treats sizes 0 and 1 as constants.
TRACED_BATCH = 2

_SUPPORTED = (list, tuple, dict, OrderedDict, int, float, bool, str, type(None))

ToBytes = Callable[[nn.Module, Any, bool], bytes]  # arguments: network, input, whether the batch size is dynamic
Run = Callable[[Any], Sequence[Tensor]]  # runs an exported file on an input


@dataclass(frozen=True)
class Exported:
    """The accuracy of an exported file: relative difference of the outputs, share of the same top-1 (None: no logits).

    ``factored``: names of the layers in factored form. ``speedup``: speed of the file relative to the dense form, in
    ONNX Runtime on this machine (None: not measured). ``notes``: restrictions of the file, for the user.
    """

    difference: float
    top1_agreement: float | None
    factored: tuple[str, ...]
    speedup: float | None = None
    notes: tuple[str, ...] = ()


def check_packages() -> None:
    """Raise OutsideError if a package for ONNX is missing."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            import_module(name)
        except ImportError as error:
            raise OutsideError(f"ONNX needs {name}: pip install 'harmconvert[onnx]'") from error


def export_onnx(
    model: nn.Module, path: Path, form: str, example_input: Any, force: bool, progress: Callable[[str], None]
) -> Exported:
    """Write a .onnx file; see `harmconvert.deploy.export.export`."""
    dense = fuse(model, example_input).eval()
    size = sum(stored_bytes(tensor) for tensor in tensors_of(dense).values())
    if size > MAX_BYTES:
        raise InputError(f"{size / 2**30:.1f} GiB of weights do not fit into one ONNX file (2 GiB): use torch-export")
    network, names = dense, tuple[str, ...]()
    if form == "factored":
        chosen = factor_for_onnx(model, example_input, progress)
        network, names = chosen.model.eval(), chosen.factored
    progress("exporting to ONNX")
    content, exported = _export_and_check("onnx", network, model, example_input, progress)
    if names:
        speedup = _speedup(onnx_bytes(dense, example_input), content, example_input)
        exported = replace(exported, factored=names, speedup=speedup)
    elif form == "factored":
        note = "in ONNX Runtime on this machine, no layer is faster in factored form: all layers are dense"
        exported = replace(exported, notes=(*exported.notes, note))
    _write(path, content, force)
    return exported


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
    content, exported = _export_and_check("torch-export", network, model, example_input, progress)
    _write(path, content, force)
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
    args, kwargs = _arguments(inputs)
    shapes = _dynamic_shapes(args, kwargs) if dynamic else None
    program = torch.onnx.export(
        network, args, kwargs=kwargs, input_names=list(_by_name(inputs)), dynamic_shapes=shapes, dynamo=True,
        verbose=False,
    )  # fmt: skip
    assert program is not None
    return bytes(program.model_proto.SerializeToString())


def _to_program(network: nn.Module, inputs: Any, dynamic: bool) -> bytes:
    args, kwargs = _arguments(inputs)
    shapes = _dynamic_shapes(args, kwargs) if dynamic else None
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(network, args, kwargs, dynamic_shapes=shapes), buffer)
    return buffer.getvalue()


def _program_outputs(content: bytes) -> Run:
    program = torch.export.load(io.BytesIO(content)).module()
    return lambda inputs: tensors_in(call(program, inputs))


def _export(to_bytes: ToBytes, network: nn.Module, example_input: Any, batch: int | None) -> bytes:
    try:
        with evaluating(network), _plain_outputs(network), _quiet():
            return to_bytes(network, comparison_inputs(example_input, batch), batch is not None)
    except Exception as error:
        raise InputError(f"this {type(network).__name__} cannot be exported: {_cause(error)}") from error


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


def _export_and_check(
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
    to_bytes, load = (_to_onnx, _session_outputs) if format == "onnx" else (_to_program, _program_outputs)
    output_notes, other_classes = _output_notes(network, example_input)
    notes: tuple[str, ...] = ()
    for batch, compared in ((TRACED_BATCH, (None, TRACED_BATCH, TRACED_BATCH + 1)), (None, (None,))):
        try:
            content = _export(to_bytes, network, example_input, batch)
            progress("comparing")
            difference, agreement = _compare(format, load(content), network, model, example_input, compared)
            return content, Exported(difference, agreement, (), None, (*notes, *output_notes))
        except Exception as error:
            if batch is None and "ndarray" in other_classes and isinstance(error, InputError):
                raise InputError(f"{error}; its output has NumPy arrays: make it return tensors") from error
            if batch is None:
                raise
            cause = error.__cause__ if isinstance(error, InputError) and error.__cause__ else error
            notes = (f"the batch size is fixed, because an export for any batch size fails: {_cause(cause)}",)
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
        with evaluating(network, model), unchanged(network), unchanged(model), _quiet():
            expected, harmonic = (_cpu(tensors_in(call(each, clone_tensors(inputs)))) for each in (network, model))
            try:
                outputs = _cpu(run(clone_tensors(inputs)))
            except Exception as error:
                raise InputError(f"the exported file does not run: {_cause(error)}") from error
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


def open_session(content: bytes) -> Any:
    """Return ONNX Runtime's session for a file, with the number of threads of torch.

    Raises:
        InputError: ONNX Runtime refuses the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # errors are also raised as exceptions
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the exceptions of ONNX Runtime have no common base class
        raise InputError(f"ONNX Runtime refuses the exported file: {_cause(error)}") from error


def session_inputs(session: Any, inputs: Any) -> dict[str, Any]:
    """Return the arrays of an input by the names of a session's inputs."""
    tensors = _by_name(inputs)
    return {node.name: tensors[node.name].detach().cpu().numpy() for node in session.get_inputs()}


def _by_name(inputs: Any) -> dict[str, Tensor]:
    """Return the tensors of an input by their names in a graph: input or input_0, input_1, ..., and keywords."""
    args, kwargs = _arguments(inputs)
    tensors = tensors_in(args)
    named = {f"input_{i}" if len(tensors) > 1 else "input": tensor for i, tensor in enumerate(tensors)}
    for key, value in kwargs.items():
        tensors = tensors_in(value)
        named |= {f"{key}_{i}" if len(tensors) > 1 else key: tensor for i, tensor in enumerate(tensors)}
    return named


def _session_outputs(content: bytes) -> Run:
    session = open_session(content)
    return lambda inputs: [torch.from_numpy(array) for array in session.run(None, session_inputs(session, inputs))]


def _speedup(before: bytes, after: bytes, example_input: Any) -> float:
    inputs = comparison_inputs(example_input)
    sessions = {"before": open_session(before), "after": open_session(after)}
    feeds = {name: session_inputs(session, inputs) for name, session in sessions.items()}
    runs = {name: lambda s=session, f=feeds[name]: s.run(None, f) for name, session in sessions.items()}
    times = in_turns(runs, 7, 3, 10.0)
    return times["before"].median / times["after"].median


def factor_for_onnx(model: nn.Module, example_input: Any, progress: Callable[[str], None]) -> Factoring:
    """Return the network with the layers factored that are then faster in ONNX Runtime on this machine.

    Layers of the same shape are timed once.
    """
    factorable = {n: layer for n, layer in converted_layers(model).items() if not reason_without_fast_form(layer)}
    chosen: dict[str, str] = dict.fromkeys(factorable, "dense")
    known: dict[Any, str] = {}
    inputs_by_name = layer_inputs(model, factorable, example_input)
    for number, (name, layer_input) in enumerate(inputs_by_name.items()):
        conv = factorable[name]
        key = (layer_input, conv.extra_repr(), kept_by(conv))
        if key not in known:
            progress(f"timing {name} in ONNX Runtime ({number + 1}/{len(inputs_by_name)})")
            input = torch.zeros(layer_input.shape)
            dense, factored = (onnx_bytes(nn.Sequential(form(conv)).eval(), input) for form in (plain_form, fast_form))
            known[key] = "factored" if _speedup(dense, factored, input) > 1 + MARGIN else "dense"
        chosen[name] = known[key]
    patterns = {escape(name): form for name, form in chosen.items()}
    return factoring(model, example_input, layers=patterns or "dense")


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


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


def _write(path: Path, content: bytes, force: bool) -> None:
    def fill(staging: Path) -> None:
        staging.write_bytes(content)

    write_file(path, fill, force)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the reports that exporters write to stdout, stderr and the log; only their developers need them."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _cause(error: BaseException) -> str:
    """Return the innermost cause of an exporter's error, in one line without terminal colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", first_line(error)).strip()
    return text if isinstance(error, HarmconvertError) else f"{type(error).__name__}: {text}".rstrip(": ")
