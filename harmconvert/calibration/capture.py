"""Run a network up to one layer, and record the arguments of each convolution as torch receives them.

A linear layer is a convolution of kernel size 1 here: all axes of its input but the first and the last are positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import Argument, Message, UsageError, first_line
from ..network.faults import user_code_error
from ..network.running import call, evaluating, unchanged
from ..network.side_effects import fixed_random_seed
from ..network.values import clone_tensors, describe_input, match_dtype

_PLAIN = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_SIGNATURES: dict[str, tuple[str, ...]] = {f"conv{axes}d": _PLAIN for axes in (1, 2, 3)}
_SIGNATURES |= {f"conv_transpose{axes}d": _TRANSPOSED for axes in (1, 2, 3)}
_SIGNATURES["linear"] = ("input", "weight", "bias")


@dataclass(frozen=True)
class ConvCall:
    """The arguments and the output of one call of a torch convolution function.

    The arguments are those after the module's own padding and with the kernel that it computed. So all classes of
    convolutions look the same here. ``input`` (N, I, *size), ``output`` (N, O, *size); ``padding`` may be a string
    ('same' or 'valid').
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    output_padding: tuple[int, ...]
    transposed: bool
    output: Tensor

    def apply(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the same convolution of another input with another kernel."""
        axes = self.input.dim() - 2
        if self.transposed:
            transpose: Callable[..., Tensor] = getattr(nn.functional, f"conv_transpose{axes}d")
            return transpose(
                input, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
            )
        plain: Callable[..., Tensor] = getattr(nn.functional, f"conv{axes}d")
        return plain(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


NOT_ONE_CONVOLUTION = "its forward is not exactly one convolution"
# Receives a layer's name and its convolution call; None if the layer's forward is not exactly one convolution.
OnCall = Callable[[str, ConvCall | None], None]


class LayerReached(BaseException):
    """Ends a forward after the layer has run. Not a subclass of Exception, which a network may catch."""


def watch_convolutions(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    input: Any,
    on_call: OnCall,
    stop_after: int | None = None,
) -> None:
    """Run ``model`` on one batch and pass each call of ``layers`` to ``on_call`` when it has been computed.

    Args:
        on_call: gets the layer's name and the call, or None if the layer's forward is not exactly one convolution. It
            must copy the tensors that it needs later, because the network may change them in place.
        stop_after: end the forward after this number of calls; None runs it to the end.

    Raises:
        UsageError: the network does not run on this input.
        Exception: an error of ``on_call``.
    """
    recorder = Recorder()
    count = 0
    failure: list[Exception] = []

    def after(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            nonlocal count
            calls = recorder.stop()
            count += 1
            if failure or (stop_after is not None and count > stop_after):
                raise LayerReached  # a second time: the network has caught the first one
            try:
                with _without_autocast(calls):
                    on_call(name, calls[0] if len(calls) == 1 else None)
            except Exception as error:
                failure.append(error)
            if failure or count == stop_after:
                raise LayerReached

        return hook

    handles = [layer.register_forward_pre_hook(recorder.start) for layer in layers.values()]
    handles += [layer.register_forward_hook(after(name)) for name, layer in layers.items()]
    try:
        forward(model, input, recorder, undo=True)
    except LayerReached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if failure:
        raise failure[0]


def _without_autocast(calls: list[ConvCall]) -> AbstractContextManager[Any]:
    """Switch off the network's autocast, so that sums over the recorded tensors are computed in full precision."""
    device = calls[0].input.device.type if calls else None
    if device is not None and torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def forward(model: nn.Module, input: Any, mode: TorchFunctionMode | None = None, undo: bool = False) -> Any:
    """Return the network's output on one calibration batch, in eval mode, without gradients, from a fixed random state.

    Args:
        undo: restore everything that the run changes in the network (`unchanged`), also if the run is interrupted.

    Raises:
        UsageError: the network does not run on this input.
    """
    input = match_dtype(clone_tensors(input), model)  # a forward may normalise its input in place
    try:
        with unchanged(model) if undo else nullcontext(), evaluating(model), fixed_random_seed():
            if mode is None:
                return call(model, input)
            with mode:
                return call(model, input)
    except (UsageError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise user_code_error(error) or UsageError(
            f"the network does not run on calibration= inputs of {describe_input(input)}: {type(error).__name__}: "
            f"{first_line(error)}; calibration= yields tensors, (input, target) pairs, or for a network of several "
            "inputs dicts of keywords or ((first, second), target) pairs"
        ) from error


def explain_error(error: Exception) -> str:
    """Return the error of a run in one line, with a remedy if there was not enough memory."""
    text = first_line(error) or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "memory" in text:
        memory, inputs = Argument("settings.memory"), Argument("settings.inputs")
        return Message(f"out of memory ({text}): lower ", memory, ", ", Argument("the size of a batch"), " or ", inputs)
    return text


class Recorder(TorchFunctionMode):
    """Records the calls of convolution functions, or of ``linear`` by a linear layer, between `start` and `stop`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[ConvCall] | None = None
        self._linear = False

    def start(self, layer: nn.Module, *_: Any) -> None:
        self.calls, self._linear = [], isinstance(layer, nn.Linear)

    def stop(self) -> list[ConvCall]:
        calls, self.calls = self.calls or [], None
        return calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if self.calls is not None and name in _SIGNATURES and (name != "linear" or self._linear):
            values = {**dict(zip(_SIGNATURES[name], args, strict=False)), **(kwargs or {})}
            with suppress(Exception):  # unusual arguments: the call is not recorded, and the layer is not refitted
                linear = name == "linear"
                self.calls.append(
                    _linear_call(values, output) if linear else _conv_call(values, output, "transpose" in name)
                )
        return output


def _conv_call(values: dict[str, Any], output: Tensor, transposed: bool) -> ConvCall:
    input, weight = values["input"], values["weight"]
    axes = weight.dim() - 2
    if input.dim() == axes + 1:  # torch accepts a single example without the batch axis
        input, output = input[None], output[None]
    padding = values.get("padding", 0)
    return ConvCall(
        input.detach(),
        weight.detach(),
        None if values.get("bias") is None else values["bias"].detach(),
        _per_axis(values.get("stride", 1), axes),
        padding if isinstance(padding, str) else _per_axis(padding, axes),
        _per_axis(values.get("dilation", 1), axes),
        values.get("groups", 1),
        _per_axis(values.get("output_padding", 0), axes),
        transposed,
        output.detach(),
    )


def _linear_call(values: dict[str, Any], output: Tensor) -> ConvCall:
    bias = None if values.get("bias") is None else values["bias"].detach()
    input, output = (_as_map(tensor.detach()) for tensor in (values["input"], output))
    weight_OI1 = values["weight"].detach()[..., None]
    return ConvCall(input, weight_OI1, bias, (1,), (0,), (1,), 1, (0,), False, output)


def _as_map(features: Tensor) -> Tensor:
    """Return features (N, ..., C) as a map (N, C, P)."""
    rows = len(features) if features.dim() > 1 else 1
    return features.reshape(rows, -1, features.shape[-1]).transpose(1, 2)


def _per_axis(value: int | tuple[int, ...], axes: int) -> tuple[int, ...]:
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * axes if len(numbers) == 1 else numbers
