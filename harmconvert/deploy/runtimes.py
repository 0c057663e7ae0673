"""Run exported graphs in ONNX Runtime and OpenVINO, as networks that can be called like the original.

What belongs here: opening a graph in a runtime, in a precision, and running it. What does not: making graphs (`graphs`)
and choosing which layers have 8 bits (`int8`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, OutsideError, first_line
from ..network.values import tensors_in

# The packages that a runtime needs, and the extra that installs them.
_PACKAGES = {
    "onnx": (("onnx", "onnxscript", "onnxruntime"), "onnx"),
    "openvino": (("onnx", "onnxscript", "openvino"), "openvino"),
    "openvino int8": (("onnx", "onnxscript", "openvino", "nncf"), "openvino"),
}
# What OpenVINO computes in, for each precision of a file; float16 is a format of the weights.
COMPUTED_IN = {"f32": "f32", "f16": "f32", "bf16": "bf16", "int8": "f32"}


def missing_packages(runtime: str) -> tuple[str, ...]:
    """Return the packages that are missing for a runtime: ``onnx``, ``openvino`` or ``openvino int8``."""
    missing = []
    for name in _PACKAGES[runtime][0]:
        try:
            import_module(name)
        except ImportError:
            missing.append(name)
    return tuple(missing)


def check_packages(runtime: str) -> None:
    """Raise OutsideError if a package for a runtime is missing."""
    if missing := missing_packages(runtime):
        what = "ONNX" if runtime == "onnx" else "OpenVINO"
        raise OutsideError(f"{what} needs {missing[0]}: pip install 'harmconvert[{_PACKAGES[runtime][1]}]'")


class InRuntime(nn.Module):
    """A graph in a runtime, called with the arguments of the network from which it was made.

    Args:
        run: a function from the arrays of the inputs by name to the outputs.
    """

    def __init__(self, run: Callable[[dict[str, Any]], Sequence[Any]]) -> None:
        super().__init__()
        self._run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in named_tensors(args, kwargs).items()}
        outputs = [torch.from_numpy(array) for array in self._run(arrays)]
        return outputs[0] if len(outputs) == 1 else outputs


def named_tensors(args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of inputs by their names in a graph: input or input_0, input_1, ..., and keywords."""
    tensors = tensors_in(tuple(args))
    named = {f"input_{i}" if len(tensors) > 1 else "input": tensor for i, tensor in enumerate(tensors)}
    for key, value in kwargs.items():
        tensors = tensors_in(value)
        named |= {f"{key}_{i}" if len(tensors) > 1 else key: tensor for i, tensor in enumerate(tensors)}
    return named


def in_onnx_runtime(content: bytes) -> InRuntime:
    """Return a network for a .onnx file in ONNX Runtime, with the number of threads of torch.

    Raises:
        InputError: ONNX Runtime refuses the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # errors are also raised as exceptions
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the exceptions of ONNX Runtime have no common base class
        raise InputError(f"ONNX Runtime refuses the exported file: {first_line(error)}") from error
    names = [node.name for node in session.get_inputs()]
    return InRuntime(lambda arrays: session.run(None, {name: arrays[name] for name in names}))


def in_openvino(model: Any, precision: str) -> InRuntime:
    """Return a network for a model of OpenVINO, with the number of threads of torch.

    Args:
        model: an ``openvino.Model``.
        precision: ``f32``, ``f16``, ``bf16`` or ``int8``; else the processor's fastest would be taken.

    Raises:
        InputError: OpenVINO refuses the model.
    """
    import openvino

    config = {
        "INFERENCE_PRECISION_HINT": COMPUTED_IN[precision],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    try:
        compiled = openvino.Core().compile_model(model, "CPU", config)
    except Exception as error:
        raise InputError(f"OpenVINO refuses the exported model: {first_line(error)}") from error
    ports = [(port, port.get_names()) for port in compiled.inputs]

    def run(arrays: dict[str, Any]) -> list[Any]:
        feeds = {port: next(arrays[name] for name in names if name in arrays) for port, names in ports}
        results = compiled(feeds)
        return [results[port].copy() for port in compiled.outputs]

    return InRuntime(run)
