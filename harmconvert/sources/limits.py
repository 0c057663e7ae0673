"""Build a network that a file names, in no more memory than a file of its size may take."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..codecs.plain import stored_bytes
from ..errors import InputError, first_line
from ..plan.cost import tensor_bytes

log = logging.getLogger(__name__)

# What a tensor takes in memory at least, with the module that holds it: a network may also be too deep.
_LEAST_BYTES = 1 << 12
# Arguments that make tensors of a size elsewhere than on the meta device.
_NOT_FOR_META = ("generator", "pin_memory")


class _TooLargeError(Exception):
    """A network takes more memory than it may: no error that a maker of networks would take for one of its own."""


def built_within(make: Callable[[], nn.Module], limit: int, what: str) -> nn.Module:
    """Build a network whose tensors take at most ``limit`` bytes. Every tensor is counted before it is made.

    Args:
        what: the source of the network, for messages.

    Raises:
        InputError: the network takes more memory.
    """
    try:
        with _Limit(limit) as counted:
            model = make()
        counted.check()  # the maker may have gone on after a refusal
        return model
    except _TooLargeError as error:
        raise InputError(
            f"{what} is a network of {_size(make, limit)}, far more than the file holds: refused; if you trust the "
            "file, build the network yourself and pass it as model="
        ) from error


def _size(make: Callable[[], nn.Module], limit: int) -> str:
    """The size of a network that is too large to be built, for a message."""
    try:
        with _Limit(limit), torch.device("meta"):
            return f"{tensor_bytes(make()):,} bytes"
    except Exception as error:
        log.info("the size of a network is not known: it cannot be made without memory (%s)", first_line(error))
        return f"more than {limit:,} bytes"


class _Limit(TorchDispatchMode):
    """Refuse to make tensors that take more than ``limit`` bytes together, before memory is set aside for them."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.left = limit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if all(value.alias_info is not None for value in func._schema.returns):  # a view, or a change in place
            return func(*args, **kwargs)
        expected = _on_meta(func, args, kwargs)
        if expected is not None:
            self._count(expected, on_meta=_is_meta(args, kwargs))
        result = func(*args, **kwargs)
        if expected is None:
            self._count(result, on_meta=False)
        return result

    def _count(self, tensors: Any, on_meta: bool) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                self.left -= max(_LEAST_BYTES, 0 if on_meta else stored_bytes(tensor))
        self.check()

    def check(self) -> None:
        """Raise `_TooLargeError` where the limit is passed."""
        if self.left < 0:
            raise _TooLargeError("it takes more memory than it may")


def _on_meta(func: Any, args: Any, kwargs: Any) -> Any:
    """The tensors that a function makes, without their values; None where they are not known before."""
    kwargs = {name: None if name in _NOT_FOR_META else value for name, value in kwargs.items()}
    makes_anew = any(argument.name == "device" for argument in func._schema.arguments)
    if makes_anew:
        kwargs["device"] = torch.device("meta")
    elif not any(isinstance(value, Tensor) for value in tree_leaves((args, kwargs))):
        return None
    try:
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        return func(*args, **kwargs)
    except Exception:  # it reads values
        return None


def _is_meta(args: Any, kwargs: Any) -> bool:
    """Whether a function makes tensors without values."""
    if kwargs.get("device") is not None:
        return bool(torch.device(kwargs["device"]).type == "meta")
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    return bool(tensors) and all(tensor.is_meta for tensor in tensors)
