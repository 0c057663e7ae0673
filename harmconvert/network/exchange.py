"""Copy a network and replace some of its layers."""

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
    """Return a deep copy of ``model`` in which some convolutions are replaced by their counterparts in another form.

    The counterpart of each key of ``fill`` is created without state by ``empty`` and put into deepcopy's memo first. So
    every reference to the convolution (in a container, under a second name, or the model itself) becomes a reference to
    the one replacement, and its weight is never copied.

    Args:
        fill: functions that fill the counterparts of convolutions, given deepcopy's memo.
        empty: creates the counterpart of a convolution without state.

    Raises:
        InputError: the network cannot be copied.
    """
    memo: dict[int, Any] = {}
    try:
        return _copy_with_replacements(model, fill, empty, memo)
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
            copied = _copy_with_replacements(model, fill, empty, memo)
        except Exception as failure:
            raise InputError(f"this {type(model).__name__} cannot be copied: {first_line(failure)}") from failure
    convs = tuple(f"{name}." if name else "" for name in convolutions(model))
    if shared := [f"{name} ({why})" for name, why in members.items() if not name.startswith(convs)]:
        warnings.warn(
            f"copy.deepcopy refuses {shortened(shared, 3)}: the copy of this {type(model).__name__} shares objects "
            "such as locks and files with the original, and its tensors have no gradient history",
            HarmconvertWarning,
            stacklevel=3,
        )
    return copied


def _copy_with_replacements(
    model: nn.Module,
    fill: Mapping[nn.Module, Callable[[dict[int, Any]], Any]],
    empty: Callable[[nn.Module], Any],
    memo: dict[int, Any],
) -> nn.Module:
    memo |= {id(conv): empty(conv) for conv in fill}
    # Every module has a dozen empty containers for hooks: creating them here halves the time of the copy.
    for value in (value for module in model.modules() for value in vars(module).values()):
        if type(value) in (dict, OrderedDict, set) and not value:
            memo[id(value)] = type(value)()
    for make in fill.values():
        make(memo)
    return deep_copy(model, memo, strict=True)


def in_precision(model: nn.Module, precision: torch.dtype, shared: bool = False) -> nn.Module:
    """Return a copy of a network whose floating-point and complex tensors have the given precision.

    Args:
        shared: parameters that have this precision already are shared with ``model`` and not copied. Then no forward
            may change them.

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
    """Return whether any parameter or buffer is stored in 16 bits."""
    return any(
        tensor is not None and tensor.dtype in (torch.float16, torch.bfloat16)
        for module in model.modules()
        for tensor in (*module._parameters.values(), *module._buffers.values())
    )


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Replace ``old`` by ``new`` under all its names in ``model``, in place, and return the model.

    If ``old`` is the model itself, return ``new``.
    """
    if model is old:
        return new
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, name, new)
    return model
