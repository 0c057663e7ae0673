"""The tensors of a network under their true names, their digests, and how they take in other values.

A network may have a `state_dict` of its own that renames tensors, leaves some out, or takes no arguments. What is read
here are the modules' own parameters and buffers, so that a file holds all of them, under names that lead back to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..codecs.digests import tensors_sha256
from ..errors import InputError, first_line

# Modules here read a state dict as torch does, or do no more than reset what they derive from it.
_PLAIN_LOADING = ("torch.nn.modules.module", "torch.nn.modules.batchnorm", "harmconvert.")


def state_of(model: nn.Module) -> dict[str, Any]:
    """Parameters, persistent buffers and extra state of a network, in the order of torch's own state dict.

    Tied tensors stand under each of their names. Values are tensors, except for extra state of another type.

    Raises:
        InputError: a module fails to give its extra state.
    """
    state: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        own = {**module._parameters, **module._buffers}
        for key, tensor in own.items():
            if tensor is not None and key not in module._non_persistent_buffers_set:
                state[prefix + key] = tensor
        try:
            state |= _more_of(module, prefix, own)
        except Exception as error:
            raise InputError(f"{name or '(root)'} does not give its state: {first_line(error)}") from error
    return state


def tensors_of(model: nn.Module, keep_vars: bool = False) -> dict[str, Tensor]:
    """The tensors of `state_of`; detached from any graph, or (``keep_vars``) the network's own objects."""
    tensors = {key: value for key, value in state_of(model).items() if isinstance(value, Tensor)}
    if keep_vars:
        return tensors
    return {key: tensor if is_lazy(tensor) else tensor.detach() for key, tensor in tensors.items()}


def _more_of(module: nn.Module, prefix: str, own: Mapping[str, Tensor | None]) -> dict[str, Any]:
    """What a module writes beside its parameters and buffers: extra state, and the packed weights of quantised ones."""
    more: dict[str, Any] = {}
    kind = type(module)
    if kind._save_to_state_dict is not nn.Module._save_to_state_dict:
        module._save_to_state_dict(more, prefix, True)
        known, names = {id(tensor) for tensor in own.values()}, {prefix + key for key in own}
        more = {key: value for key, value in more.items() if key not in names and id(value) not in known}
    if kind.get_extra_state is not nn.Module.get_extra_state:
        more[f"{prefix}_extra_state"] = module.get_extra_state()
    return more


def loads_by_itself(model: nn.Module) -> bool:
    """Whether a part of the network has its own way to take in a state dict: a method or a hook."""
    return type(model).load_state_dict is not nn.Module.load_state_dict or any(
        module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
        or not type(module)._load_from_state_dict.__module__.startswith(_PLAIN_LOADING)
        or type(module).set_extra_state is not nn.Module.set_extra_state
        for module in model.modules()
    )


@torch.no_grad()
def fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy tensors into those of the same name; names that the network lacks are passed over."""
    take_dtypes(model, state)
    # One after the other: tensors of a file are read as they are copied, and would be a second network in memory.
    for key, tensor in tensors_of(model, keep_vars=True).items():
        if key in state:
            one_value = not is_lazy(tensor) and tensor.dim() == 0  # which older files hold in one dimension
            tensor.copy_(state[key].reshape(()) if one_value else state[key])
    # What modules of this package derive from their tensors is derived anew: the kernels of a fitted basis.
    model._apply(lambda tensor: tensor)


def take_dtypes(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give the network's tensors the dtypes of those that they will take in."""
    for key, tensor in tensors_of(model, keep_vars=True).items():
        if key not in state or is_lazy(tensor):
            continue
        if tensor.dtype != state[key].dtype:
            tensor.data = tensor.data.to(state[key].dtype)
        if 0 in tensor.stride() and tensor.numel() > 1:  # values that are one in memory (expanded) take in no others
            tensor.data = tensor.data.contiguous()
    # Constants such as the DCT basis follow the dtype of the coefficients.
    model._apply(lambda tensor: tensor)


def weights_sha256(model: nn.Module) -> str:
    """sha256 over the network's parameters and persistent buffers: names, dtypes, shapes and bytes, sorted by name."""
    return tensors_sha256({key: tensor for key, tensor in tensors_of(model).items() if not tensor.is_meta})
