"""Find the convolutions of a network, see how they run, and copy a network with some of them exchanged."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .conv import CONVOLUTIONS, empty_counterpart
from .copying import deep_copy, uncopyable_members
from .errors import HarmconvertError, HarmconvertWarning, InputError, UsageError, first_line, shortened
from .history.declared import input_sizes
from .side_effects import Snapshot, WeightsKept


def convolutions(model: nn.Module) -> dict[str, nn.Module]:
    """Every convolution by its first name, shared ones once, in the network's own order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CONVOLUTIONS)}


def kernel_size(conv: nn.Module) -> tuple[int, ...]:
    """A convolution's kernel size as a tuple of ints."""
    return tuple(cast("tuple[int, ...]", conv.kernel_size))


def state_key(layer: str, tensor: str) -> str:
    """The key of a layer's tensor in the state dict of its network, which may be the layer itself."""
    return f"{layer}.{tensor}" if layer else tensor


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in a nest of lists, tuples, dicts and plain objects; None where there is none."""
    return next(iter(tensors_in(value)), None)


def exchange(
    model: nn.Module,
    fill: Mapping[nn.Module, Callable[[dict[int, Any]], Any]],
    empty: Callable[[nn.Module], Any] = empty_counterpart,
) -> nn.Module:
    """A deep copy of ``model`` in which some convolutions are their counterparts in another form.

    Each key's counterpart is made ``empty`` and handed to deepcopy's memo first, so that every reference to it, in
    containers, under a second name or as the model itself, leads to the one replacement; its weight is never copied.

    Raises:
        InputError: the network cannot be copied.
    """
    memo: dict[int, Any] = {}
    try:
        return _exchanged(model, fill, empty, memo)
    except HarmconvertError:
        raise
    except Exception as error:
        memo.clear()
        members = uncopyable_members(model, memo)
        if not members and isinstance(error, RecursionError):
            raise InputError(
                f"the modules of this {type(model).__name__} are nested too deeply to be copied"
            ) from error
        try:
            copied = _exchanged(model, fill, empty, memo)
        except Exception as failure:
            raise InputError(f"this {type(model).__name__} cannot be copied: {first_line(failure)}") from failure
    convs = tuple(f"{name}." if name else "" for name in convolutions(model))
    if told := [f"{name} ({why})" for name, why in members.items() if not name.startswith(convs)]:
        warnings.warn(
            f"copy.deepcopy refuses {shortened(told, 3)}: the copy of this {type(model).__name__} shares locks, files "
            "and the like with the original, and holds the values of tensors without their gradient history",
            HarmconvertWarning,
            stacklevel=3,
        )
    return copied


def _exchanged(
    model: nn.Module,
    fill: Mapping[nn.Module, Callable[[dict[int, Any]], Any]],
    empty: Callable[[nn.Module], Any],
    memo: dict[int, Any],
) -> nn.Module:
    memo |= {id(conv): empty(conv) for conv in fill}
    # Every module has a dozen empty containers for hooks: making them here halves the time of the copy.
    for value in (value for module in model.modules() for value in vars(module).values()):
        if type(value) in (dict, OrderedDict, set) and not value:
            memo[id(value)] = type(value)()
    for make in fill.values():
        make(memo)
    return deep_copy(model, memo, strict=True)


def in_precision(model: nn.Module, precision: torch.dtype, shared: bool = False) -> nn.Module:
    """A copy that computes in a precision, also where its numbers are complex.

    ``shared``: parameters that have the precision are the network's own; a forward must not change them.

    Raises:
        InputError: the network cannot be copied.
    """

    def cast_one(tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.to(precision.to_complex())
        return tensor.to(precision) if tensor.is_floating_point() else tensor

    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter and parameter.is_floating_point():
            value = parameter.detach().to(precision, copy=not shared)
            memo[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    try:
        return deep_copy(model, memo)._apply(cast_one)
    except RecursionError as error:
        raise InputError(f"the modules of this {type(model).__name__} are nested too deeply to be copied") from error


def in_sixteen_bits(model: nn.Module) -> bool:
    """Whether any parameter or buffer is stored in 16 bits."""
    return any(
        tensor is not None and tensor.dtype in (torch.float16, torch.bfloat16)
        for module in model.modules()
        for tensor in (*module._parameters.values(), *module._buffers.values())
    )


def put_in_place(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Give ``new`` every name that ``old`` has in ``model``, which is changed; gives the model back."""
    if model is old:
        return new
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, name, new)
    return model


def call(model: nn.Module, example_input: Any) -> Any:
    """Call a network on an example input: tuple as arguments, dict as keywords, anything else as the one argument."""
    if isinstance(example_input, tuple):
        return model(*example_input)
    if isinstance(example_input, Mapping):
        return model(**example_input)
    return model(example_input)


@contextmanager
def refusing(example_input: Any) -> Iterator[None]:
    """Whatever goes wrong in a run on an example input becomes a UsageError that names the input."""
    try:
        yield
    except Exception as error:
        raise UsageError(
            f"the network does not run on an example input of {describe_input(example_input)}: "
            f"{type(error).__name__}: {first_line(error)}; "
            "give an input that it takes (example_input=, --input-size C,H,W)"
        ) from error


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients for the time being; every module's own training flag is put back afterwards."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def unchanged(model: nn.Module, but: Collection[nn.Module] = (), weights: bool = True) -> Iterator[None]:
    """Undo afterwards what forwards change in a network beside its outputs (counters, caches, logs of hooks), except in
    the modules ``but``; see `Snapshot`. Weights that a forward exchanges (``weight.data = ...``) are put back, too, and
    with ``weights`` those that it writes to, for which each call of a function of torch takes longer."""
    before, written = Snapshot(model, but), WeightsKept(model)
    exchanged = [(parameter, parameter.data) for parameter in model.parameters() if not is_lazy(parameter)]
    try:
        with written if weights else nullcontext():
            yield
    finally:
        before.restore()
        for parameter, data in exchanged:
            if _storage(parameter.data) != _storage(data):
                parameter.data = data
        written.restore()


def _storage(tensor: Tensor) -> tuple[Any, ...]:
    """Where the values of a tensor are: two that have them in the same place are one."""
    try:
        return cast(int, tensor.untyped_storage()._cdata), tensor.storage_offset(), tensor.shape
    except (RuntimeError, NotImplementedError):  # sparse tensors, wrappers of other packages
        return ()


def tensors_in(value: Any, arrays: bool = False) -> list[Tensor]:
    """All tensors in nested lists, tuples, dicts and plain objects (such as model outputs), in order.

    ``arrays``: also NumPy arrays of numbers, copied to tensors.
    """
    found: list[Tensor] = []
    seen: dict[int, Any] = {}  # kept alive, lest another be taken for one that is gone
    waiting = [value]
    while waiting:  # no function that calls itself: until the garbage collector came, it would keep what it found
        item = waiting.pop()
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, np.ndarray):
            if arrays and item.dtype.kind in "biufc":
                found.append(torch.tensor(item))
        elif id(item) not in seen and not isinstance(item, type | Enum | nn.Module):
            seen[id(item)] = item
            if isinstance(item, Mapping):
                item = item.values()
            elif not isinstance(item, list | tuple):
                slots = (
                    {part.name: getattr(item, part.name, None) for part in fields(item)} if is_dataclass(item) else {}
                )
                item = getattr(item, "__dict__", slots).values()
            waiting += reversed([*item])
    return found


def mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same nest of lists, tuples and dicts with every tensor changed; other mappings become dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: mapped(change, item) for key, item in value.items()}
    return rebuilt(value, (mapped(change, item) for item in value)) if isinstance(value, list | tuple) else value


def rebuilt(like: Any, items: Iterable[Any]) -> Any:
    """A list or tuple of new items, a named tuple of the same class where ``like`` is one."""
    if isinstance(like, tuple):
        make: Callable[[Iterable[Any]], Any] = getattr(type(like), "_make", tuple)
        return make(items)
    return [*items]


def cloned(value: Any) -> Any:
    """The same nest of lists, tuples and dicts with every tensor cloned."""
    return mapped(Tensor.clone, value)


def channels_last(value: Any) -> Any:
    """The same nest of lists, tuples and dicts with batches of images, tensors of four axes, laid out channels_last."""
    return mapped(lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t, value)


def fitted(inputs: Any, model: nn.Module) -> Any:
    """The same nest of lists, tuples and dicts with every tensor on the device of the network's first floating
    parameter, and floating ones in its dtype."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return mapped(lambda tensor: tensor, inputs)
    device, dtype = parameter.device, parameter.dtype
    return mapped(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype), inputs)


def default_input(model: nn.Module, batch: int = 1) -> Any:
    """Zeros of the size in the model's ``pretrained_cfg``, in its dtype and on its device: a tensor, a tuple where the
    network takes several inputs, None where it names no size."""
    inputs = [fitted(torch.zeros(batch, *size), model) for size in input_sizes(model)]
    if not inputs:
        return None
    return inputs[0] if len(inputs) == 1 else tuple(inputs)


def batch_size(example_input: Any) -> int:
    """Examples in an input: the length of its first tensor, or of a list of single images, as detectors take them."""
    size = _size(example_input)
    return 1 if size is None else size


def _size(value: Any) -> int | None:
    """The same; None where nothing in it has rows."""
    if isinstance(value, Tensor):
        return len(value) if value.dim() > 1 else None
    if isinstance(value, list) and value:
        single = all(isinstance(part, Tensor) and part.dim() == 3 for part in value)
        if single or all(isinstance(part, Mapping) for part in value):
            return len(value)
    if not isinstance(value, list | tuple):
        value = value.values() if isinstance(value, Mapping) else tensors_in(value)
    return next((size for part in value if (size := _size(part)) is not None), None)


def describe_input(example_input: Any) -> str:
    """Shapes in a line, for messages."""
    return ", ".join(f"shape {tuple(t.shape)}" for t in tensors_in(example_input)) or type(example_input).__name__
