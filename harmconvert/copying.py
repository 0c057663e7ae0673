"""Deep copies of networks, the functions that they keep included.

`copy.deepcopy` gives a function back as it is, and what it closed over with it: the copy of a network that keeps
``lambda x: self.conv(x)`` would go on running the original's layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def deep_copy(model: Module, memo: dict[int, Any] | None = None) -> Module:
    """A deep copy of a network, its functions with it; ``memo`` is `copy.deepcopy`'s, and raises what that does."""
    memo = {} if memo is None else memo
    with functions_follow(model, memo):
        return copy.deepcopy(model, memo)


@contextmanager
def functions_follow(model: nn.Module, memo: dict[int, Any]) -> Iterator[None]:
    """While a network is copied with ``memo``: its functions (attributes, hooks) that reach a part of it, through what
    they close over or their defaults, are copied, too, and reach the copy's."""
    own = {id(thing) for module in model.modules() for thing in (module, *module._parameters.values())}
    held = (value for module in model.modules() for value in vars(module).values())
    found = {id(function): function for value in held for function in _functions_in(value, set())}
    bound = {key: function for key, function in found.items() if _reaches(function, own, set())}
    memo.update((key, _like(function)) for key, function in bound.items())
    yield

    def follow(value: Any) -> Any:
        return copy.deepcopy(value, memo) if _reaches(value, own, set()) else value

    for key, function in bound.items():
        new = memo[key]
        for old, cell in zip(function.__closure__ or (), new.__closure__ or (), strict=True):
            for content in _content(old):
                cell.cell_contents = follow(content)
        new.__defaults__ = None if function.__defaults__ is None else tuple(map(follow, function.__defaults__))
        new.__kwdefaults__ = {name: follow(value) for name, value in (function.__kwdefaults__ or {}).items()} or None


def _like(function: FunctionType) -> FunctionType:
    """The same function with nothing in its cells yet."""
    cells = tuple(CellType() for _ in function.__closure__ or ())
    new = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells or None)
    new.__dict__.update(function.__dict__)
    new.__qualname__, new.__doc__, new.__module__ = function.__qualname__, function.__doc__, function.__module__
    return new


def _functions_in(value: Any, seen: set[int]) -> Iterator[FunctionType]:
    """Functions at any depth of containers, partials and what functions close over; modules are not gone into."""
    if id(value) in seen or isinstance(value, nn.Module):
        return
    seen.add(id(value))
    if isinstance(value, FunctionType):
        yield value
    for part in _parts(value):
        yield from _functions_in(part, seen)


def _reaches(value: Any, own: set[int], seen: set[int]) -> bool:
    """Whether a network's own modules or parameters, by identity, can be come to from a value."""
    if id(value) in own:
        return True
    if id(value) in seen or isinstance(value, nn.Module):
        return False
    seen.add(id(value))
    return any(_reaches(part, own, seen) for part in _parts(value))


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            yield from _content(cell)
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
    elif isinstance(value, partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        yield from value


def _content(cell: CellType) -> tuple[Any, ...]:
    """What is in a cell, if anything is yet."""
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()
