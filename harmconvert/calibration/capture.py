"""Run a network up to one layer, and see each of its convolutions as torch was asked for it."""

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
from ..network.side_effects import seeded_sources
from ..network.values import clone_tensors, describe_input, match_dtype

_PLAIN = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_SIGNATURES: dict[str, tuple[str, ...]] = {f"conv{axes}d": _PLAIN for axes in (1, 2, 3)}
_SIGNATURES |= {f"conv_transpose{axes}d": _TRANSPOSED for axes in (1, 2, 3)}


@dataclass(frozen=True)
class ConvCall:
    """One call of torch's convolution: what the module handed it, after padding of its own and with the kernel that it
    made, so that every class of convolution looks alike here.

    ``input`` (N, I, *size), ``output`` (N, O, *size); ``padding`` is a string for 'same' and 'valid'.
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
        """The same convolution of another input with another kernel."""
        axes = self.input.dim() - 2
        if self.transposed:
            transpose: Callable[..., Tensor] = getattr(nn.functional, f"conv_transpose{axes}d")
            return transpose(
                input, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
            )
        plain: Callable[..., Tensor] = getattr(nn.functional, f"conv{axes}d")
        return plain(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


# Is shown a layer's name and its call; None where it convolves otherwise than once in a forward.
See = Callable[[str, ConvCall | None], None]


class Reached(BaseException):
    """The layer has run; the rest of the forward is not needed. No Exception, so that no model swallows it."""


def watch_convolutions(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    input: Any,
    see: See,
    stop_after: int | None = None,
) -> None:
    """Run ``model`` on one batch and show each call of ``layers`` to ``see`` as it happens; stop after so many calls.

    ``see`` gets the layer's name and the call, None where the layer convolves otherwise than once in a forward. What it
    wants to keep of the maps it must copy: the network may change them in place next.

    Raises:
        UsageError: the network does not run on that input. Whatever ``see`` raises.
    """
    recorder = Recorder()
    seen = 0
    failure: list[Exception] = []

    def after(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            nonlocal seen
            found = recorder.stop()
            seen += 1
            if failure or (stop_after is not None and seen > stop_after):
                raise Reached  # again: the network has caught the first one
            try:
                with _precise(found):
                    see(name, found[0] if len(found) == 1 else None)
            except Exception as error:
                failure.append(error)
            if failure or seen == stop_after:
                raise Reached

        return hook

    handles = [layer.register_forward_pre_hook(recorder.start) for layer in layers.values()]
    handles += [layer.register_forward_hook(after(name)) for name, layer in layers.items()]
    try:
        forward(model, input, recorder, undo=True)
    except Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if failure:
        raise failure[0]


def _precise(calls: list[ConvCall]) -> AbstractContextManager[Any]:
    """Without the autocast that the network may be under here: what is seen is summed in the precision that it has."""
    for seen in calls[:1]:
        if torch.amp.is_autocast_available(seen.input.device.type):
            return torch.autocast(seen.input.device.type, enabled=False)
    return nullcontext()


def forward(model: nn.Module, input: Any, mode: TorchFunctionMode | None = None, undo: bool = False) -> Any:
    """The network's output on one calibration batch, in eval mode, without gradients and from the same random state.

    Args:
        undo: restore what the run changes in the network (`unchanged`), also when it is interrupted, so that the next
            run begins where this one began.

    Raises:
        UsageError: the network does not run on that input.
    """
    input = match_dtype(clone_tensors(input), model)  # a forward may normalise its input in place
    try:
        with unchanged(model) if undo else nullcontext(), evaluating(model), seeded_sources():
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


def explained(error: Exception) -> str:
    """What went wrong in a run, in one line, and where memory ran out what to do."""
    text = first_line(error) or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "memory" in text:
        memory, inputs = Argument("settings.memory"), Argument("settings.inputs")
        return Message(f"out of memory ({text}): lower ", memory, ", ", Argument("the size of a batch"), " or ", inputs)
    return text


class Recorder(TorchFunctionMode):
    """Notes the convolutions that torch is asked for between `start` and `stop`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[ConvCall] | None = None

    def start(self, *_: Any) -> None:
        self.found = []

    def stop(self) -> list[ConvCall]:
        found, self.found = self.found or [], None
        return found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if self.found is not None and name in _SIGNATURES:
            values = {**dict(zip(_SIGNATURES[name], args, strict=False)), **(kwargs or {})}
            with suppress(Exception):  # arguments of another kind: it counts as a call that cannot be read
                self.found.append(_conv_call(values, output, "transpose" in name))
        return output


def _conv_call(values: dict[str, Any], output: Tensor, transposed: bool) -> ConvCall:
    input, weight = values["input"], values["weight"]
    axes = weight.dim() - 2
    if input.dim() == axes + 1:  # torch takes a single example without its batch dimension
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


def _per_axis(value: int | tuple[int, ...], axes: int) -> tuple[int, ...]:
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * axes if len(numbers) == 1 else numbers
