"""Copy a network, with some of its layers exchanged for others."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HarmconvertError, HarmconvertWarning, InputError, first_line, shortened
from ..layers.harmonic import empty_counterpart
from .copying import deep_copy, uncopyable_members
from .layers import convolutions


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
