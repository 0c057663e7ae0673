"""Find out whether an error in a run comes from a hook of the user's, or from a bug in a forward."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from traceback import walk_tb
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from ..errors import UserCodeError, first_line

# No input can cause these: a name or a module is missing in the code.
_BUGS = (NameError, ImportError)
_OTHERS_CODE = (Path(torch.__file__).parent, Path(__file__).parents[1])  # hooks of torch, and our own


def user_code_error(error: BaseException) -> UserCodeError | None:
    """Return an error that names the hook, or the line of a forward, in which ``error`` was raised; None for any other
    error, which the input may have caused."""
    frames = list(walk_tb(error.__traceback__))
    what = f"{type(error).__name__}: {first_line(error)}"
    calls = [(_running_layer(frame), frame) for frame, _ in frames]
    for index in reversed(range(len(frames) - 1)):
        layer, (called, line) = calls[index][0], frames[index + 1]
        if layer is not None and (hook := _hook_with(called.f_code, layer)):
            root = next(layer for layer, _ in calls if layer is not None)
            where = f"{Path(called.f_code.co_filename).name}, line {line}"
            named = f"{hook} of {_name_in(root, layer)}"
            return UserCodeError(f"{named} fails with {what} ({where}): repair the hook, or remove it")
    if isinstance(error, _BUGS) and frames:
        frame, line = frames[-1]
        where = f"{Path(frame.f_code.co_filename).name}, line {line}"
        return UserCodeError(f"the network's own code fails with {what} ({where}): repair it")
    return None


def _running_layer(frame: FrameType) -> nn.Module | None:
    """Return the layer whose hooks and forward a frame of torch's ``Module.__call__`` runs; None for other frames."""
    layer = frame.f_locals.get("self") if frame.f_code.co_filename == torch_module.__file__ else None
    return layer if isinstance(layer, nn.Module) else None


def _hook_with(code: CodeType, layer: nn.Module) -> str | None:
    """Return kind and name of the user's hook of a layer that has this code; None if there is no such hook."""
    if any(folder in Path(code.co_filename).parents for folder in _OTHERS_CODE):
        return None
    for kind, hooks in _hooks_of(layer):
        for hook in hooks.values():
            if _code_of(hook) is code:
                return f"the {kind} {getattr(hook, '__qualname__', type(hook).__name__)}"
    return None


def _hooks_of(layer: nn.Module) -> Iterator[tuple[str, Mapping[int, Any]]]:
    yield "forward pre-hook", layer._forward_pre_hooks
    yield "forward hook", layer._forward_hooks
    yield "global forward pre-hook", torch_module._global_forward_pre_hooks
    yield "global forward hook", torch_module._global_forward_hooks


def _code_of(hook: Any) -> CodeType | None:
    """Return the code that runs when a hook is called; None for a hook that is not written in Python."""
    if isinstance(hook, partial):
        return _code_of(hook.func)
    function = hook if inspect.isroutine(hook) else type(hook).__call__
    return getattr(inspect.unwrap(function, stop=lambda f: hasattr(f, "__code__")), "__code__", None)


def _name_in(root: nn.Module, layer: nn.Module) -> str:
    """Return the name of a layer in the network whose run failed."""
    name = next((name for name, module in root.named_modules() if module is layer), "")
    return f"layer {name}" if name else f"this {type(layer).__name__}"
