"""Work with nested inputs and outputs of networks: find, copy and convert their tensors; make default inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import Argument, UsageError
from .declared import input_sizes


def first_tensor(value: Any) -> Tensor | None:
    """Return the first tensor in nested lists, tuples, dicts and plain objects, or None."""
    return next(iter(tensors_in(value)), None)


def tensors_in(value: Any, arrays: bool = False) -> list[Tensor]:
    """Return all tensors in nested lists, tuples, dicts and plain objects (such as model outputs), in order.

    ``arrays``: also return NumPy arrays of numbers, as tensors.
    """
    tensors: list[Tensor] = []
    seen: dict[int, Any] = {}  # holds the objects themselves, so that no new object can get the id of a deleted one
    waiting = [value]
    # A loop instead of recursion: a recursive inner function is a reference cycle, which would keep the tensors in
    # memory until the garbage collector runs.
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            tensors.append(item)
        elif isinstance(item, np.ndarray):
            if arrays and item.dtype.kind in "biufc":
                tensors.append(torch.tensor(item))
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
    return tensors


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return nested lists, tuples and dicts with ``change`` applied to every tensor; other mappings become dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(change, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return rebuild_sequence(value, (map_tensors(change, item) for item in value))
    return value


def rebuild_sequence(like: Any, items: Iterable[Any]) -> Any:
    """Return new items as a list or tuple; if ``like`` is a named tuple, as one of the same class."""
    if isinstance(like, tuple):
        make: Callable[[Iterable[Any]], Any] = getattr(type(like), "_make", tuple)
        return make(items)
    return [*items]


def clone_tensors(value: Any) -> Any:
    """Return nested lists, tuples and dicts with every tensor cloned."""
    return map_tensors(Tensor.clone, value)


def images_to_channels_last(value: Any) -> Any:
    """Return nested lists, tuples and dicts with every tensor of four axes (a batch of images) in channels_last."""
    return map_tensors(lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t, value)


def match_dtype(inputs: Any, model: nn.Module) -> Any:
    """Move the tensors of an input to the network's device and the floating-point ones to its dtype.

    The device and the dtype are those of the network's first floating-point parameter.
    """
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return map_tensors(lambda tensor: tensor, inputs)
    device, dtype = parameter.device, parameter.dtype
    return map_tensors(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype), inputs)


def default_input(model: nn.Module, batch: int = 1) -> Any:
    """Return zeros of the size in the network's ``pretrained_cfg``, in its dtype and on its device.

    The result is a tensor, a tuple if the network has several inputs, or None if the network does not name a size.
    """
    inputs = [match_dtype(torch.zeros(batch, *size), model) for size in input_sizes(model)]
    if not inputs:
        return None
    return inputs[0] if len(inputs) == 1 else tuple(inputs)


def batch_size(example_input: Any) -> int:
    """Return the number of examples in an input.

    This is the length of its first tensor with a batch axis, or the length of a list of single images, as detectors
    take it; 1 if there is neither.
    """
    size = _batch_size_or_none(example_input)
    return 1 if size is None else size


def _batch_size_or_none(value: Any) -> int | None:
    """Return the number of examples in an input; None if nothing in it has a batch axis."""
    if isinstance(value, Tensor):
        return len(value) if value.dim() > 1 else None
    if isinstance(value, list) and value:
        single = all(isinstance(part, Tensor) and part.dim() == 3 for part in value)
        if single or all(isinstance(part, Mapping) for part in value):
            return len(value)
    if not isinstance(value, list | tuple):
        value = value.values() if isinstance(value, Mapping) else tensors_in(value)
    return next((size for part in value if (size := _batch_size_or_none(part)) is not None), None)


def describe_input(example_input: Any) -> str:
    """Return the shapes of an input's tensors, for messages."""
    return ", ".join(f"shape {tuple(t.shape)}" for t in tensors_in(example_input)) or type(example_input).__name__


def seeded_inputs(*models: nn.Module) -> Any:
    """Return two seeded random examples, of the size that the first network with a known input size names.

    Raises:
        UsageError: none of the networks names an input size.
    """
    zero_input = next((zeros for model in models if (zeros := default_input(model, batch=2)) is not None), None)
    if zero_input is None:
        raise UsageError("no input size is known for this network: give ", Argument("inputs"))
    generator = torch.Generator().manual_seed(0)
    return map_tensors(lambda zeros: torch.randn(zeros.shape, generator=generator), zero_input)
