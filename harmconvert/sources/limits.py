"""Build the network that a file names, within a limit of memory that depends on the size of the file."""

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

# Least memory that is counted for a tensor and its module, so that a network of very many small layers is refused, too.
_LEAST_BYTES = 1 << 12
# Arguments of functions that the meta device does not support.
_NOT_FOR_META = ("generator", "pin_memory")


class _TooLargeError(Exception):
    """A network needs more memory than its limit; no builder of networks catches this class."""


def built_within(make: Callable[[], nn.Module], limit: int, what: str) -> nn.Module:
    """Return the network that ``make`` builds, if its tensors need at most ``limit`` bytes.

    Each tensor is counted before its memory is allocated.

    Args:
        what: the source of the network, for messages.

    Raises:
        InputError: the network needs more memory.
    """
    try:
        with _Limit(limit) as counted:
            model = make()
        counted.check()  # the builder may have caught the exception
        return model
    except _TooLargeError as error:
        raise InputError(
            f"{what} is a network of {_size_text(make, limit)}, far more than the file holds: refused; if you trust "
            "the file, build the network yourself and pass it as model="
        ) from error


def _size_text(make: Callable[[], nn.Module], limit: int) -> str:
    """Return the size of a network that is too large to build, for a message."""
    try:
        with _Limit(limit), torch.device("meta"):
            return f"{tensor_bytes(make()):,} bytes"
    except Exception as error:
        log.info("the size of a network is unknown: it cannot be built on the meta device (%s)", first_line(error))
        return f"more than {limit:,} bytes"


class _Limit(TorchDispatchMode):
    """Refuse tensors that need more than ``limit`` bytes in total, before their memory is allocated."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.left = limit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if all(value.alias_info is not None for value in func._schema.returns):  # a view, or a change in place
            return func(*args, **kwargs)
        expected = _result_on_meta(func, args, kwargs)
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
        """Raise `_TooLargeError` if the limit is exceeded."""
        if self.left < 0:
            raise _TooLargeError("the network needs more memory than its limit")


def _result_on_meta(func: Any, args: Any, kwargs: Any) -> Any:
    """Return the tensors that a function makes, on the meta device; None where this is not possible."""
    kwargs = {name: None if name in _NOT_FOR_META else value for name, value in kwargs.items()}
    if any(argument.name == "device" for argument in func._schema.arguments):
        kwargs["device"] = torch.device("meta")
    elif not any(isinstance(value, Tensor) for value in tree_leaves((args, kwargs))):
        return None
    try:
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        return func(*args, **kwargs)
    except Exception:  # the function reads values
        return None


def _is_meta(args: Any, kwargs: Any) -> bool:
    """Return whether a function makes tensors on the meta device, which need no memory."""
    if kwargs.get("device") is not None:
        return bool(torch.device(kwargs["device"]).type == "meta")
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    return bool(tensors) and all(tensor.is_meta for tensor in tensors)
