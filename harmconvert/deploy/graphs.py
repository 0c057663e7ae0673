"""Networks as graphs of standard operators: ONNX, and programs of torch.export. Compared before they are kept."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
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
from ..layers.factored import reason_not_factorable, to_factored
from ..layers.harmonic import to_dense
from ..layers.timing import in_turns
from ..network.comparison import greatest_difference, top1_agreement
from ..network.form_check import compare_outputs, comparison_inputs
from ..network.forms import MARGIN, Factoring, factoring, fuse, layer_inputs
from ..network.layers import harmonic_layers
from ..network.running import call, evaluating, unchanged
from ..network.state import tensors_of
from ..network.values import clone_tensors, tensors_in
from ..plan.axes import kept_by

# Relative to the largest output: what ONNX Runtime's own order of sums comes to, and torch's with itself.
TOLERANCE = {"onnx": 1e-4, "torch-export": 1e-5}
LARGEST = 2**31 - 1  # bytes of one ONNX file, by its encoding
ANY = 2  # examples in the input that a file for any batch size is traced with: torch takes 0 and 1 for fixed

_KNOWN = (list, tuple, dict, OrderedDict, int, float, bool, str, type(None))

ToBytes = Callable[[nn.Module, Any, bool], bytes]  # of a network, an input, and whether its batch size may vary
Run = Callable[[Any], Sequence[Tensor]]


@dataclass(frozen=True)
class Exported:
    """How exact an exported file is: relative difference of outputs and share of the same top-1 (None: no logits).

    ``factored``: names of layers that it holds in factored form; ``speedup``: of that over the dense form in ONNX
    Runtime here (None where not measured); ``notes``: what is not as one would expect.
    """

    difference: float
    top1_agreement: float | None
    factored: tuple[str, ...]
    speedup: float | None = None
    notes: tuple[str, ...] = ()


def check_packages() -> None:
    """Raise OutsideError where a package that ONNX takes is missing."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            import_module(name)
        except ImportError as error:
            raise OutsideError(f"ONNX needs {name}: pip install 'harmconvert[onnx]'") from error


def export_onnx(
    model: nn.Module, path: Path, form: str, example_input: Any, force: bool, progress: Callable[[str], None]
) -> Exported:
    """One .onnx file; see `harmconvert.deploy.export.export`."""
    dense = fuse(model, example_input).eval()
    size = sum(stored_bytes(tensor) for tensor in tensors_of(dense).values())
    if size > LARGEST:
        raise InputError(
            f"{size / 2**30:.1f} GiB of weights are more than one ONNX file holds (2 GiB): use torch-export"
        )
    network, names = dense, tuple[str, ...]()
    if form == "factored":
        chosen = factored_for_onnx(model, example_input, progress)
        network, names = chosen.model.eval(), chosen.factored
    progress("exporting to ONNX")
    found = _kept(_to_onnx, _session_outputs, "onnx", network, model, example_input, progress)
    content, difference, agreement, notes = found
    speedup = None
    if names:
        speedup = _speedup(onnx_bytes(dense, example_input), content, example_input)
    elif form == "factored":
        notes = (*notes, "no layer is faster in factored form in ONNX Runtime here: all are dense")
    write_file(path, lambda staging: _write(staging, content), force)
    return Exported(difference, agreement, names, speedup, notes)


def export_program(
    model: nn.Module, path: Path, form: str, example_input: Any, force: bool, progress: Callable[[str], None]
) -> Exported:
    """One .pt2 file; see `harmconvert.deploy.export.export`."""
    if form == "factored":
        chosen = factoring(model, example_input)
        network, names = chosen.model.eval(), chosen.factored
    else:
        network, names = fuse(model, example_input).eval(), ()
    progress("exporting")
    found = _kept(_to_program, _program_outputs, "torch-export", network, model, example_input, progress)
    content, difference, agreement, notes = found
    write_file(path, lambda staging: _write(staging, content), force)
    return Exported(difference, agreement, names, None, notes)


def onnx_bytes(network: nn.Module, example_input: Any) -> bytes:
    """An ONNX file of a network for any batch size, or for that of the example where there is no such file.

    Raises:
        InputError: the network cannot be exported.
    """
    try:
        return _exported(_to_onnx, network, example_input, ANY)
    except InputError:
        return _exported(_to_onnx, network, example_input, None)


def _to_onnx(network: nn.Module, inputs: Any, dynamic: bool) -> bytes:
    args, kwargs = _arguments(inputs)
    shapes = _dynamic(args, kwargs) if dynamic else None
    program = torch.onnx.export(
        network, args, kwargs=kwargs, input_names=list(_by_name(inputs)), dynamic_shapes=shapes, dynamo=True,
        verbose=False,
    )  # fmt: skip
    assert program is not None
    return bytes(program.model_proto.SerializeToString())


def _to_program(network: nn.Module, inputs: Any, dynamic: bool) -> bytes:
    args, kwargs = _arguments(inputs)
    shapes = _dynamic(args, kwargs) if dynamic else None
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(network, args, kwargs, dynamic_shapes=shapes), buffer)
    return buffer.getvalue()


def _program_outputs(content: bytes) -> Run:
    program = torch.export.load(io.BytesIO(content)).module()
    return lambda inputs: tensors_in(call(program, inputs))


def _exported(to_bytes: ToBytes, network: nn.Module, example_input: Any, batch: int | None) -> bytes:
    try:
        with evaluating(network), _plain_outputs(network), _quiet():
            return to_bytes(network, comparison_inputs(example_input, batch), batch is not None)
    except Exception as error:
        raise InputError(f"this {type(network).__name__} cannot be exported: {_cause(error)}") from error


@contextmanager
def _plain_outputs(network: nn.Module) -> Iterator[None]:
    """Let a network return a tuple of its tensors instead of records of classes that exporters do not know (named
    tuples, dataclasses, mappings of other classes)."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return tuple(tensors_in(output)) if _unknown(output) else None

    handle = network.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _unknown(output: Any) -> list[str]:
    """Names of the classes in an output that exporters do not know."""
    parts = [part for part in _parts(output) if not isinstance(part, Tensor)]  # exporters trace with their own tensors
    return sorted({type(part).__name__ for part in parts if type(part) not in _KNOWN})


def _remarks(network: nn.Module, example_input: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a user should know of the outputs of a graph, and the classes of those outputs that are no tensors.

    Raises:
        InputError: no output is a tensor.
    """
    with evaluating(network), unchanged(network):
        output = call(network, comparison_inputs(example_input, None))
    others = {type(part).__name__ for part in _parts(output) if part is not None and not tensors_in(part)}
    values = tuple(sorted(others - {"list", "tuple", "dict", "OrderedDict"}))
    if not tensors_in(output):
        raise InputError(
            f"this {type(network).__name__} cannot be exported: its output is no tensor but {', '.join(values) or None}"
        )
    notes = [f"its outputs are a tuple of tensors, because exporters do not know {kind}" for kind in _unknown(output)]
    if values:
        notes.append(f"graphs compute tensors only: outputs of {', '.join(values)} are left out, or constant")
    return tuple(notes), values


def _parts(output: Any) -> Iterator[Any]:
    """A nest of lists, tuples and dicts: itself, and all that it holds."""
    yield output
    held = output.values() if type(output) in (dict, OrderedDict) else output if type(output) in (list, tuple) else ()
    for part in held:
        yield from _parts(part)


def _kept(
    to_bytes: ToBytes, opened: Callable[[bytes], Run], format: str, network: nn.Module, model: nn.Module,
    example_input: Any, progress: Callable[[str], None],
) -> tuple[bytes, float, float | None, tuple[str, ...]]:  # fmt: skip
    """A file of ``network`` that computes what ``model`` does, how exactly, its top-1 agreement, and notes: for any
    batch size, or for that of the example where anything goes wrong with another.

    Raises:
        InputError: the network cannot be exported, or the file does not run.
        CheckError: the file computes something else.
    """
    returned, values = _remarks(network, example_input)
    notes: tuple[str, ...] = ()
    for batch, compared in ((ANY, (None, ANY, ANY + 1)), (None, (None,))):
        try:
            content = _exported(to_bytes, network, example_input, batch)
            progress("comparing")
            difference, agreement = _compared(format, opened(content), network, model, example_input, compared)
            return content, difference, agreement, (*notes, *returned)
        except Exception as error:
            if batch is None and "ndarray" in values and isinstance(error, InputError):
                raise InputError(f"{error}; its output holds NumPy arrays: let it return tensors") from error
            if batch is None:
                raise
            why = error.__cause__ if isinstance(error, InputError) and error.__cause__ else error
            notes = (f"the batch is fixed, because with another one something goes wrong: {_cause(why)}",)
    raise AssertionError("the last attempt returns or raises")


def _compared(
    format: str, run: Run, network: nn.Module, model: nn.Module, example_input: Any, batches: Sequence[int | None]
) -> tuple[float, float | None]:
    """Greatest relative difference from the harmonic network and least top-1 agreement over those batch sizes.

    Raises:
        InputError: the file does not run.
        CheckError: it differs from the network that was exported, or that from the harmonic one, by more than the
            tolerance, or has another top-1.
    """
    worst, agreement, tolerance = 0.0, None, TOLERANCE[format]
    for batch in batches:
        inputs = comparison_inputs(example_input, batch)
        with evaluating(network, model), unchanged(network), unchanged(model), _quiet():
            expected, harmonic = (_cpu(tensors_in(call(each, clone_tensors(inputs)))) for each in (network, model))
            try:
                found = _cpu(run(clone_tensors(inputs)))
            except Exception as error:
                raise InputError(f"what was exported does not run: {_cause(error)}") from error
        off, difference = greatest_difference(found, expected), greatest_difference(found, harmonic)
        same = top1_agreement(list(zip(harmonic, found, strict=True)), tolerance) if off < inf else None
        # Between two forms of a network float64 decides what is rounding.
        problem = None if difference <= tolerance else compare_outputs(model, network, inputs).problem
        if not off <= tolerance or problem or same not in (None, 1.0):
            top1 = "" if same is None else f", the same top-1 on {same:.0%}"
            raise CheckError(
                "the exported file does not compute what the network does: outputs differ by "
                f"{max(off, difference):.1e} of the largest, tolerance {tolerance:.0e}{top1}; nothing was written"
            )
        worst = max(worst, difference)
        agreement = same if agreement is None or same is None else min(agreement, same)
    return worst, agreement


def _cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().cpu() for tensor in tensors]


def session_of(content: bytes) -> Any:
    """ONNX Runtime's session for a file, on as many threads as torch has.

    Raises:
        InputError: it refuses the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what goes wrong is raised, too
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base
        raise InputError(f"ONNX Runtime refuses what was exported: {_cause(error)}") from error


def feed_of(session: Any, inputs: Any) -> dict[str, Any]:
    """Arrays by the names of a session's inputs."""
    named = _by_name(inputs)
    return {one.name: named[one.name].detach().cpu().numpy() for one in session.get_inputs()}


def _by_name(inputs: Any) -> dict[str, Tensor]:
    """The tensors of an input by the names that they have in a graph: input or input_0, input_1, ..., and keywords."""
    args, kwargs = _arguments(inputs)
    tensors = tensors_in(args)
    named = {f"input_{i}" if len(tensors) > 1 else "input": tensor for i, tensor in enumerate(tensors)}
    for key, value in kwargs.items():
        several = tensors_in(value)
        named |= {f"{key}_{i}" if len(several) > 1 else key: tensor for i, tensor in enumerate(several)}
    return named


def _session_outputs(content: bytes) -> Run:
    session = session_of(content)
    return lambda inputs: [torch.from_numpy(array) for array in session.run(None, feed_of(session, inputs))]


def _speedup(before: bytes, after: bytes, example_input: Any) -> float:
    inputs = comparison_inputs(example_input)
    sessions = {"before": session_of(before), "after": session_of(after)}
    feeds = {name: feed_of(session, inputs) for name, session in sessions.items()}
    runs = {name: lambda s=session, f=feeds[name]: s.run(None, f) for name, session in sessions.items()}
    times = in_turns(runs, 7, 3, 10.0)
    return times["before"].median / times["after"].median


def factored_for_onnx(model: nn.Module, example_input: Any, progress: Callable[[str], None]) -> Factoring:
    """Factored where ONNX Runtime runs that faster here, layer by layer; one measurement for each shape."""
    open_ones = {name: conv for name, conv in harmonic_layers(model).items() if not reason_not_factorable(conv)}
    chosen: dict[str, str] = dict.fromkeys(open_ones, "dense")
    known: dict[Any, str] = {}
    inputs_by_name = layer_inputs(model, open_ones, example_input)
    for number, (name, layer_input) in enumerate(inputs_by_name.items()):
        conv = open_ones[name]
        key = (layer_input, conv.extra_repr(), kept_by(conv))
        if key not in known:
            progress(f"timing {name} in ONNX Runtime ({number + 1}/{len(inputs_by_name)})")
            input = torch.zeros(layer_input.shape)
            dense, factored = (onnx_bytes(nn.Sequential(form(conv)).eval(), input) for form in (to_dense, to_factored))
            known[key] = "factored" if _speedup(dense, factored, input) > 1 + MARGIN else "dense"
        chosen[name] = known[key]
    patterns = {escape(name): form for name, form in chosen.items()}
    return factoring(model, example_input, layers=patterns or "dense")


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def _dynamic(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The first axis of every input is the batch."""
    batch = torch.export.Dim("batch")

    def shape(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {0: batch} if value.dim() else {}
        if isinstance(value, dict):
            return {key: shape(item) for key, item in value.items()}
        return type(value)(shape(item) for item in value) if type(value) in (list, tuple) else None

    return {key: shape(value) for key, value in kwargs.items()} if kwargs else shape(args)


def _write(staging: Path, content: bytes) -> None:
    staging.write_bytes(content)


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters write reports for their makers to stdout, stderr and the log."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _cause(error: BaseException) -> str:
    """The innermost reason of an exporter's error, in one line without the colours of a terminal."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", first_line(error)).strip()
    return text if isinstance(error, HarmconvertError) else f"{type(error).__name__}: {text}".rstrip(": ")
