"""Run exported graphs in ONNX Runtime and OpenVINO, as networks that can be called like the original.

What belongs here: opening a graph in a runtime, in a precision, and running it. What does not: making graphs (`graphs`)
and choosing which layers have 8 bits (`int8`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, OutsideError, first_line
from ..files import write_file
from ..network.values import tensors_in

_NAMES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}
# ONNX Runtime quantises graphs for both runtimes.
_PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "onnxruntime", "openvino"),
}
# What OpenVINO computes in, for each precision of a file: float16 is a format of weights.
_COMPUTED_IN = {"f32": "f32", "f16": "f32", "bf16": "bf16", "int8": "f32"}


@dataclass(frozen=True)
class Target:
    """A runtime (``onnx`` or ``openvino``), and the precision of a file for it."""

    runtime: str
    precision: str = "f32"

    def __str__(self) -> str:
        return _NAMES[self.runtime] + ("" if self.precision == "f32" else f" with {self.precision}")

    def missing_packages(self) -> tuple[str, ...]:
        """Return the packages that are missing."""
        return tuple(name for name in _PACKAGES[self.runtime] if not _can_import(name))

    def check_packages(self) -> None:
        """Raise OutsideError if a package is missing."""
        if missing := self.missing_packages():
            name = "ONNX" if self.runtime == "onnx" else "OpenVINO"
            raise OutsideError(f"{name} needs {missing[0]}: pip install 'harmconvert[{self.runtime}]'")

    @property
    def version(self) -> str:
        """Return the version of the runtime."""
        module = import_module("onnxruntime" if self.runtime == "onnx" else "openvino")
        return str(module.__version__)

    def open(self, graph: bytes, inputs: Any = None) -> InRuntime:
        """Return a network for an ONNX graph in the runtime, with the number of threads of torch.

        Args:
            inputs: the network will only have inputs of these shapes, for which OpenVINO is faster; None: of any batch.

        Raises:
            InputError: the runtime refuses the graph.
        """
        if self.runtime == "onnx":
            return _in_onnx_runtime(graph)
        return _in_openvino(graph, self.precision, inputs)

    def write(self, graph: bytes, path: Path, force: bool) -> None:
        """Write an ONNX graph as a .onnx file, or as a .xml and a .bin file of OpenVINO."""
        if self.runtime == "onnx":
            write_file(path, lambda staging: write_bytes(staging, graph), force)
        else:
            _write_openvino(graph, path, self.precision in ("f16", "bf16"), force)


def write_bytes(path: Path, content: bytes) -> None:
    """Write the content of a file."""
    path.write_bytes(content)


def arguments_of(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the keyword arguments that an input stands for."""
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def arrays_of(inputs: Any) -> dict[str, Any]:
    """Return the arrays of an input by their names in a graph."""
    return _arrays(named_tensors(*arguments_of(inputs)))


def _arrays(tensors: dict[str, Tensor]) -> dict[str, Any]:
    # OpenVINO reads arrays that are not contiguous, such as those of channels_last, more slowly.
    return {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in tensors.items()}


def _can_import(name: str) -> bool:
    try:
        import_module(name)
    except ImportError:
        return False
    return True


class InRuntime(nn.Module):
    """A graph in a runtime, called with the arguments of the network from which it was made.

    Args:
        run: a function from the arrays of the inputs by name to the outputs.
    """

    def __init__(self, run: Callable[[dict[str, Any]], Sequence[Any]]) -> None:
        super().__init__()
        self._run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = [torch.from_numpy(array) for array in self._run(_arrays(named_tensors(args, kwargs)))]
        return outputs[0] if len(outputs) == 1 else outputs


def named_tensors(args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of inputs by their names in a graph: input or input_0, input_1, ..., and keywords."""
    tensors = tensors_in(tuple(args))
    named = {f"input_{i}" if len(tensors) > 1 else "input": tensor for i, tensor in enumerate(tensors)}
    for key, value in kwargs.items():
        tensors = tensors_in(value)
        named |= {f"{key}_{i}" if len(tensors) > 1 else key: tensor for i, tensor in enumerate(tensors)}
    return named


def _in_onnx_runtime(graph: bytes) -> InRuntime:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # errors are also raised as exceptions
    try:
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the exceptions of ONNX Runtime have no common base class
        raise InputError(f"ONNX Runtime refuses the exported file: {first_line(error)}") from error
    names = [node.name for node in session.get_inputs()]
    return InRuntime(lambda arrays: session.run(None, {name: arrays[name] for name in names}))


@cache
def openvino_core() -> Any:
    """Return the only OpenVINO Core of this process; it is never freed.

    On processors with AMX each Core changes the stack on which the main thread handles signals, and restores the
    previous one when it is freed. Of two Cores the second can so restore the memory that the first has freed, and the
    next signal, such as Ctrl-C, then ends the process with a segmentation fault.
    """
    import openvino

    return openvino.Core()


def _read_openvino(graph: bytes) -> Any:
    try:
        return openvino_core().read_model(graph)
    except Exception as error:
        raise InputError(f"OpenVINO cannot read the exported graph: {first_line(error)}") from error


def _in_openvino(graph: bytes, precision: str, inputs: Any = None) -> InRuntime:
    import openvino

    model = _read_openvino(graph)
    if inputs is not None:
        shapes = {name: array.shape for name, array in arrays_of(inputs).items()}
        model.reshape({port: shapes[_name_of(port, shapes)] for port in model.inputs})
    # Without a hint, OpenVINO takes the fastest precision of the processor.
    config = {
        "INFERENCE_PRECISION_HINT": _COMPUTED_IN[precision], "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }  # fmt: skip
    try:
        if precision in ("f16", "bf16"):  # the weights have 16 bits in the file, so they are rounded here, too
            with tempfile.TemporaryDirectory() as folder:
                openvino.save_model(model, f"{folder}/model.xml", compress_to_fp16=True)
                compiled = openvino_core().compile_model(f"{folder}/model.xml", "CPU", config)
        else:
            compiled = openvino_core().compile_model(model, "CPU", config)
    except Exception as error:
        raise InputError(f"OpenVINO refuses the exported graph: {first_line(error)}") from error

    outputs = range(len(compiled.outputs))
    names: list[str] = []  # of the inputs, found once: it takes longer than a small network

    def run(arrays: dict[str, Any]) -> list[Any]:
        names.extend(_name_of(port, arrays) for port in (() if names else compiled.inputs))
        results = compiled([arrays[name] for name in names])
        return [results[index].copy() for index in outputs]

    return InRuntime(run)


def _name_of(port: Any, known: Collection[str]) -> str:
    """Return the name of an input of OpenVINO that is known; the input may have several names."""
    return next(name for name in port.get_names() if name in known)


def _write_openvino(graph: bytes, path: Path, compress: bool, force: bool) -> None:
    import openvino

    model = _read_openvino(graph)

    def fill(staging: Path) -> None:
        # Both files are complete before one of them gets its name.
        written = staging.with_name("model.xml")
        openvino.save_model(model, str(written), compress_to_fp16=compress)
        written.with_suffix(".bin").replace(staging)
        write_file(path, lambda inner: write_bytes(inner, written.read_bytes()), force)

    write_file(path.with_suffix(".bin"), fill, force)
