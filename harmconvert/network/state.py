"""Read, hash and fill the tensors of a network by the names of the modules that hold them.

A network may override `state_dict` and rename tensors, leave some out or take other arguments. These functions read the
parameters and buffers of the modules themselves, so that a file holds all of them under names that can be found again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..codecs.digests import tensors_sha256
from ..errors import InputError, first_line

# `_load_from_state_dict` of these packages is torch's, or only recomputes values that depend on the state.
_PLAIN_LOADING = ("torch.nn.modules.module", "torch.nn.modules.batchnorm", "harmconvert.")


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return parameters, persistent buffers and extra state of a network, in the order of torch's state dict.

    Tied tensors appear under each of their names. Values are tensors, except for extra state of another type.

    Raises:
        InputError: a module raises an error when it returns its extra state.
    """
    state: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        own = {**module._parameters, **module._buffers}
        for key, tensor in own.items():
            if tensor is not None and key not in module._non_persistent_buffers_set:
                state[prefix + key] = tensor
        try:
            state |= _extra_state(module, prefix, own)
        except Exception as error:
            raise InputError(f"the state of {name or '(root)'} cannot be read: {first_line(error)}") from error
    return state


def tensors_of(model: nn.Module, keep_vars: bool = False) -> dict[str, Tensor]:
    """Return the tensors of `state_of`, detached; with ``keep_vars`` the network's own tensor objects."""
    tensors = {key: value for key, value in state_of(model).items() if isinstance(value, Tensor)}
    if keep_vars:
        return tensors
    return {key: tensor if is_lazy(tensor) else tensor.detach() for key, tensor in tensors.items()}


def _extra_state(module: nn.Module, prefix: str, own: Mapping[str, Tensor | None]) -> dict[str, Any]:
    """Return the state of a module besides its parameters and buffers: extra state, packed weights if quantised."""
    extra: dict[str, Any] = {}
    kind = type(module)
    if kind._save_to_state_dict is not nn.Module._save_to_state_dict:
        module._save_to_state_dict(extra, prefix, True)
        own_ids, own_names = {id(tensor) for tensor in own.values()}, {prefix + key for key in own}
        extra = {key: value for key, value in extra.items() if key not in own_names and id(value) not in own_ids}
    if kind.get_extra_state is not nn.Module.get_extra_state:
        extra[f"{prefix}_extra_state"] = module.get_extra_state()
    return extra


def loads_by_itself(model: nn.Module) -> bool:
    """Return whether any module of the network has a method or hook of its own that loads a state dict."""
    return type(model).load_state_dict is not nn.Module.load_state_dict or any(
        module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
        or not type(module)._load_from_state_dict.__module__.startswith(_PLAIN_LOADING)
        or type(module).set_extra_state is not nn.Module.set_extra_state
        for module in model.modules()
    )


@torch.no_grad()
def fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy tensors into the network's tensors of the same name; names that the network does not have are ignored."""
    take_dtypes(model, state)
    # One tensor at a time: a tensor of a file is read when it is copied, and all of them would need twice the memory.
    for key, tensor in tensors_of(model, keep_vars=True).items():
        if key in state:
            scalar = not is_lazy(tensor) and tensor.dim() == 0  # older files store it with one dimension
            tensor.copy_(state[key].reshape(()) if scalar else state[key])
    # Recompute what modules of this package derive from their tensors, such as the kernels of a fitted basis.
    model._apply(lambda tensor: tensor)


def take_dtypes(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Convert the network's tensors to the dtypes of the tensors that will be copied into them."""
    for key, tensor in tensors_of(model, keep_vars=True).items():
        if key not in state or is_lazy(tensor):
            continue
        if tensor.dtype != state[key].dtype:
            tensor.data = tensor.data.to(state[key].dtype)
        if 0 in tensor.stride() and tensor.numel() > 1:  # an expanded tensor has one value in memory: copy_ would fail
            tensor.data = tensor.data.contiguous()
    # Update constants whose dtype depends on that of the coefficients, such as the DCT basis.
    model._apply(lambda tensor: tensor)


def weights_sha256(model: nn.Module) -> str:
    """Return the sha256 of the parameters and persistent buffers: names, dtypes, shapes and bytes, sorted by name."""
    return tensors_sha256({key: tensor for key, tensor in tensors_of(model).items() if not tensor.is_meta})
