"""Networks as graphs of standard operators: ONNX, and programs of torch.export. Compared before they are kept."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..comparison import greatest_difference, top1_agreement
from ..conv import HarmonicMixin, to_dense
from ..errors import CheckError, InputError, OutsideError, first_line
from ..factored import reason_not_factorable, to_factored
from ..files import write_file
from ..forms import MARGIN, factor, factoring, fuse, sites_of
from ..precision import in_float32
from ..surgery import call, cloned, evaluating, exchange, fitted, mapped, refusing, tensors_in
from ..tensors import tensors_of
from ..timing import in_turns

# Relative to the largest output: what ONNX Runtime's own order of sums comes to, and torch's with itself.
TOLERANCE = {"onnx": 1e-4, "torch-export": 1e-5}
LARGEST = 2**31 - 1  # bytes of one ONNX file, by its encoding


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
    """One .onnx file; see `harmconvert.export.export`."""
    model = in_float32(exchange(model, {}))  # ONNX Runtime has no 16-bit convolutions on a CPU
    dense = fuse(model).eval()
    names: tuple[str, ...] = ()
    speedup = None
    size = sum(t.numel() * t.element_size() for t in tensors_of(dense).values())
    if size > LARGEST:
        raise InputError(
            f"{size / 2**30:.1f} GiB of weights are more than one ONNX file holds (2 GiB): use torch-export"
        )
    network = dense
    if form == "factored":
        network = factored_for_onnx(model, example_input, progress)
        names = _names_of_factored(network)
    progress("exporting to ONNX")
    content, batches, notes = onnx_bytes(network, example_input)
    progress("comparing in ONNX Runtime")
    difference, agreement = _compared("onnx", _session_outputs(content), dense, example_input, batches)
    if names:
        other, *_ = onnx_bytes(dense, example_input)
        speedup = _speedup(other, content, example_input)
    elif form == "factored":
        notes = (*notes, "no layer is faster in factored form in ONNX Runtime here: all are dense")
    write_file(path, lambda staging: _write(staging, content), force)
    return Exported(difference, agreement, names, speedup, notes)


def export_program(
    model: nn.Module, path: Path, form: str, example_input: Any, force: bool, progress: Callable[[str], None]
) -> Exported:
    """One .pt2 file; see `harmconvert.export.export`."""
    network = (factor(model, example_input) if form == "factored" else fuse(model)).eval()
    names = _names_of_factored(network)
    progress("exporting")

    def exported(inputs: Any, dynamic: bool) -> bytes:
        args, kwargs = _arguments(inputs)
        shapes = _dynamic(args, kwargs) if dynamic else None
        buffer = io.BytesIO()
        torch.export.save(torch.export.export(network, args, kwargs, dynamic_shapes=shapes), buffer)
        return buffer.getvalue()

    content, batches, notes = _with_any_batch(exported, example_input, network)
    progress("comparing")
    program = torch.export.load(io.BytesIO(content)).module()
    difference, agreement = _compared(
        "torch-export", lambda x: tensors_in(call(program, x)), network, example_input, batches
    )
    write_file(path, lambda staging: _write(staging, content), force)
    return Exported(difference, agreement, names, None, notes)


def onnx_bytes(network: nn.Module, example_input: Any) -> tuple[bytes, tuple[int, ...], tuple[str, ...]]:
    """An ONNX file, the batch sizes to compare it at (0: that of the example), and notes.

    Raises:
        InputError: the network cannot be exported.
    """

    def exported(inputs: Any, dynamic: bool) -> bytes:
        args, kwargs = _arguments(inputs)
        names = [f"input_{i}" if len(args) > 1 else "input" for i in range(len(args))] + list(kwargs)
        shapes = _dynamic(args, kwargs) if dynamic else None
        program = torch.onnx.export(
            network, args, kwargs=kwargs, input_names=names, dynamic_shapes=shapes, dynamo=True, verbose=False
        )
        assert program is not None
        return bytes(program.model_proto.SerializeToString())

    return _with_any_batch(exported, example_input, network)


def check_runs(network: nn.Module, example_input: Any) -> None:
    """Raise UsageError unless the network runs on such an input."""
    with refusing(example_input), evaluating(network):
        call(network, fitted(random_batch(example_input, None), network))


def _with_any_batch(
    exported: Callable[[Any, bool], bytes], example_input: Any, network: nn.Module
) -> tuple[bytes, tuple[int, ...], tuple[str, ...]]:
    """The file, the batch sizes to compare it at, and notes; for a fixed batch where the network knows no other."""
    try:
        with evaluating(network), _quiet():
            return exported(random_batch(example_input, 2), True), (2, 3), ()
    except Exception as error:
        why = f"the batch is fixed, because the network does not export with any: {type(error).__name__}"
    try:
        with evaluating(network), _quiet():
            return exported(random_batch(example_input, None), False), (0,), (why,)
    except Exception as error:
        raise InputError(
            f"this {type(network).__name__} cannot be exported: {type(error).__name__}: {first_line(error)}"
        ) from error


def _compared(
    format: str, run: Callable[[Any], Sequence[Tensor]], network: nn.Module, example_input: Any, batches: Sequence[int]
) -> tuple[float, float | None]:
    """Greatest relative difference and least top-1 agreement over those batch sizes.

    Raises:
        CheckError: more than the tolerance, or another top-1.
    """
    worst, agreement = 0.0, None
    for batch in batches:
        inputs = fitted(random_batch(example_input, batch or None, seed=1), network)
        with evaluating(network), _quiet():
            expected = tensors_in(call(network, cloned(inputs)))
            found = run(inputs)
        worst = max(worst, greatest_difference(found, expected))
        if len(found) == len(expected):
            same = top1_agreement(list(zip(expected, found, strict=True)))
            agreement = same if agreement is None or same is None else min(agreement, same)
    if not worst <= TOLERANCE[format] or agreement not in (None, 1.0):
        top1 = "" if agreement is None else f", the same top-1 on {agreement:.0%}"
        raise CheckError(
            f"the exported file does not compute what the network does: outputs differ by {worst:.1e} of the largest, "
            f"tolerance {TOLERANCE[format]:.0e}{top1}; nothing was written"
        )
    return worst, agreement


def session_of(content: bytes) -> Any:
    """ONNX Runtime's session for a file, on as many threads as torch has.

    Raises:
        InputError: it refuses the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base
        raise InputError(f"ONNX Runtime refuses what was exported: {first_line(error)}") from error


def feed_of(session: Any, inputs: Any) -> dict[str, Any]:
    """Tensors by the names of a session's inputs."""
    args, kwargs = _arguments(inputs)
    return dict(
        zip([i.name for i in session.get_inputs()], [t.numpy() for t in tensors_in((args, kwargs))], strict=True)
    )


def _session_outputs(content: bytes) -> Callable[[Any], Sequence[Tensor]]:
    session = session_of(content)
    return lambda inputs: [torch.from_numpy(array) for array in session.run(None, feed_of(session, inputs))]


def _speedup(before: bytes, after: bytes, example_input: Any) -> float:
    inputs = random_batch(example_input, None)
    sessions = {"before": session_of(before), "after": session_of(after)}
    feeds = {name: feed_of(session, inputs) for name, session in sessions.items()}
    runs = {name: lambda s=session, f=feeds[name]: s.run(None, f) for name, session in sessions.items()}
    times = in_turns(runs, 7, 3, 10.0)
    return times["before"].median / times["after"].median


def _names_of_factored(network: nn.Module) -> tuple[str, ...]:
    record = factoring(network)
    return record.factored if record else ()


def factored_for_onnx(model: nn.Module, example_input: Any, progress: Callable[[str], None]) -> nn.Module:
    """Factored where ONNX Runtime runs that faster here, layer by layer; one measurement for each shape."""
    open_ones = {
        name: conv
        for name, conv in model.named_modules()
        if isinstance(conv, HarmonicMixin) and not reason_not_factorable(conv)
    }
    chosen: dict[str, str] = dict.fromkeys(open_ones, "dense")
    known: dict[Any, str] = {}
    sites = sites_of(model, open_ones, example_input)
    for number, (name, site) in enumerate(sites.items()):
        conv = open_ones[name]
        key = (site, conv.extra_repr(), conv.frequencies)
        if key not in known:
            progress(f"timing {name} in ONNX Runtime ({number + 1}/{len(sites)})")
            input = torch.zeros(site.shape)
            dense, factored = (
                onnx_bytes(nn.Sequential(form(conv)).eval(), input)[0] for form in (to_dense, to_factored)
            )
            known[key] = "factored" if _speedup(dense, factored, input) > 1 + MARGIN else "dense"
        chosen[name] = known[key]
    return factor(model, layers=chosen or "dense").eval()


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


def random_batch(example_input: Any, batch: int | None, seed: int = 0) -> Any:
    """Seeded random tensors like those of ``example_input``, of so many examples (None: as many as it has)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor) -> Tensor:
        if not tensor.dim():
            shape: tuple[int, ...] = ()
        else:
            shape = (batch or len(tensor), *tensor.shape[1:])
        if tensor.is_floating_point():
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
        return tensor[:1].expand(shape).clone() if tensor.dim() and batch else tensor

    return mapped(draw, example_input)


def _write(staging: Path, content: bytes) -> None:
    staging.write_bytes(content)


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters talk on stdout and to the log of what concerns their makers."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
