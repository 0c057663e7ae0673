"""Find the convolutions of a network, see how they run, and copy a network with some of them exchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UsageError
from .declared import input_sizes


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in a nest of lists, tuples, dicts and plain objects; None where there is none."""
    return next(iter(tensors_in(value)), None)


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


def seeded_inputs(*models: nn.Module) -> Any:
    """Two seeded random examples of the size that the first of the networks names which names any.

    Raises:
        UsageError: none does.
    """
    size = next((found for model in models if (found := default_input(model, batch=2)) is not None), None)
    if size is None:
        raise UsageError("no input size is known for this network: give inputs (inputs=, --input-size C,H,W)")
    generator = torch.Generator().manual_seed(0)
    return mapped(lambda zeros: torch.randn(zeros.shape, generator=generator), size)
