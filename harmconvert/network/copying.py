"""Deep copies of networks, the functions that they keep included.

`copy.deepcopy` gives a function back as it is, and what it closed over with it: the copy of a network that keeps
``lambda x: self.conv(x)`` would go on running the original's layer. Followed are functions in attributes and hooks of
modules, at any depth of containers, bound methods, partials and what other functions close over.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar

from torch import Tensor, nn

from ..errors import first_line

Module = TypeVar("Module", bound=nn.Module)

_CARRIED = ("__module__", "__qualname__", "__doc__", "__annotations__", "__type_params__")
_NOTHING = (type(None), bool, int, float, complex, str, bytes, type)
_OWN = ("_parameters", "_buffers", "_modules")


def deep_copy(model: Module, memo: dict[int, Any] | None = None, strict: bool = False) -> Module:
    """A deep copy of a network, whose functions work on the copy where the network's own work on the network.

    ``memo`` is `copy.deepcopy`'s, and raises what that does. What a function reaches beside the network stays what it
    is. Members that cannot be copied are treated as `uncopyable_members` says, unless ``strict``.
    """
    memo = {} if memo is None else memo
    before = dict(memo)
    try:
        copied = copy.deepcopy(model, memo)
    except Exception:
        memo.clear()
        memo |= before
        if strict or not uncopyable_members(model, memo):
            raise
        copied = copy.deepcopy(model, memo)
    if astray := _reaching(model):
        _Following(memo, astray).follow(copied)
    return copied


def uncopyable_members(model: nn.Module, memo: dict[int, Any]) -> dict[str, str]:
    """Find the members of a network's modules that `copy.deepcopy` refuses: their names, and why each is refused.

    ``memo`` is `copy.deepcopy`'s. It gets what a copy of the network holds instead: of a tensor with a gradient history
    the values, without the history; of anything else (a lock, an open file) the member itself, which both share.
    """
    found: dict[str, str] = {}
    inner: dict[int, Any] = {id(module): module for module in model.modules()}
    inner |= {id(tensor): tensor for tensor in model.parameters()}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in ("_parameters", "_modules") and not isinstance(value, _NOTHING):
                why = _settled(value, memo, inner, set())
                if why is not None:
                    found[f"{name}.{key}" if name else key] = why
    return found


def uncopyable_member(conv: nn.Module) -> str | None:
    """Say which member of a single layer cannot be copied and why; None where all of them can."""
    members = uncopyable_members(conv, {})
    name = next((key for key in members if "." not in key), None)
    return None if name is None else f"its member {name!r} cannot be copied ({members[name]})"


def _settled(value: Any, memo: dict[int, Any], inner: Mapping[int, Any], seen: set[int]) -> str | None:
    """Why a value cannot be copied, None where it can; ``memo`` gets what stands for it, or for parts of it."""
    if id(value) in memo or id(value) in seen or id(value) in inner:
        return None
    seen.add(id(value))
    if isinstance(value, Tensor) and not value.is_leaf:
        memo[id(value)] = value.detach().clone()
        return "it has a gradient history"
    try:
        copy.deepcopy(value, {**inner, **memo})
        return None
    except Exception as error:
        why = f"{type(error).__name__}: {first_line(error)}"
    for part in _members(value):
        why = _settled(part, memo, inner, seen) or why
    if not isinstance(value, dict | list | tuple | set | deque):  # of a container the copy has its own
        try:
            copy.deepcopy(value, {**inner, **memo})
        except Exception:
            memo[id(value)] = value
    return why


def _members(value: Any) -> list[Any]:
    """What a container or a plain object holds."""
    try:
        own = object.__getattribute__(value, "__dict__")
    except (AttributeError, TypeError):
        own = {}
    return [*parts_of(value), *(own.values() if isinstance(own, dict) else ())]


def _reaching(model: nn.Module) -> dict[int, Any]:
    """Functions, methods, partials, containers and cells, by identity, from which a part of the network can be come to;
    empty where no function can."""
    own: set[int] = set()
    todo: list[Any] = []
    for module in model.modules():
        own.add(id(module))
        for key, value in vars(module).items():
            if key in _OWN:
                own.update(id(tensor) for tensor in value.values() if isinstance(tensor, Tensor))
            elif not isinstance(value, _NOTHING):
                todo.append(value)
    seen: dict[int, Any] = {}
    comes_from: dict[int, list[int]] = {}
    reached: list[int] = []
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        for part in parts_of(value):
            comes_from.setdefault(id(part), []).append(id(value))
            if id(part) in own:
                reached.append(id(part))
            elif not isinstance(part, _NOTHING):
                todo.append(part)
    found: dict[int, Any] = {}
    while reached:
        for holder in comes_from.get(reached.pop(), ()):
            if holder not in found:
                found[holder] = seen[holder]
                reached.append(holder)
    return found if any(isinstance(value, FunctionType) for value in found.values()) else {}


def parts_of(value: Any) -> Iterator[Any]:
    """What a function or a container refers to directly."""
    if isinstance(value, FunctionType):
        yield from value.__closure__ or ()
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
        yield from vars(value).values()
    elif isinstance(value, CellType):
        try:
            yield value.cell_contents
        except ValueError:  # nothing is in it yet
            return
    elif isinstance(value, partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield from value


class _Following:
    """Puts functions that reach the copy in the place of those that reach the network that it was copied from.

    ``memo`` has the copies of that network's parts, ``astray`` what reaches them, both by identity.
    """

    def __init__(self, memo: dict[int, Any], astray: Mapping[int, Any]) -> None:
        self.memo, self.astray = memo, astray
        self.made: dict[int, Any] = {}
        self.todo: list[FunctionType | CellType] = []  # made, and yet to be filled

    def follow(self, copied: nn.Module) -> None:
        """Exchange them wherever a module of the copy holds one."""
        seen: set[int] = set()
        for module in copied.modules():
            for key, value in list(vars(module).items()):
                if key not in _OWN and (new := self._in_place(value, seen)) is not value:
                    vars(module)[key] = new
        while self.todo:
            self._fill(self.todo.pop())

    def _in_place(self, value: Any, seen: set[int]) -> Any:
        """A value of the copy's with its functions exchanged; its containers, which are copies, stay themselves."""
        if isinstance(value, FunctionType | MethodType | partial):
            return self._like(value, of_the_copy=True)
        if id(value) in seen:
            return value
        seen.add(id(value))
        if isinstance(value, dict):
            for key, item in list(value.items()):
                if (new := self._in_place(item, seen)) is not item:
                    value[key] = new
        elif isinstance(value, list):
            value[:] = [self._in_place(item, seen) for item in value]
        elif type(value) is tuple:
            items = tuple(self._in_place(item, seen) for item in value)
            return value if all(a is b for a, b in zip(items, value, strict=True)) else items
        return value

    def _like(self, value: Any, of_the_copy: bool = False) -> Any:
        """What stands for a value in the copy: its copy, another function, or itself where it does not reach the
        network. deepcopy has made new partials and methods already (``of_the_copy``), of the old functions."""
        if id(value) in self.made:
            return self.made[id(value)]
        if of_the_copy and isinstance(value, MethodType) and id(value.__func__) in self.astray:
            return MethodType(self._like(value.__func__), value.__self__)
        if of_the_copy and isinstance(value, partial) and id(value.func) in self.astray:
            return partial(self._like(value.func), *value.args, **value.keywords)
        if id(value) not in self.astray:
            return self.memo.get(id(value), value) if isinstance(value, nn.Module | Tensor) else value
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, CellType):
            self.todo.append(value)
            return self.made.setdefault(id(value), CellType())
        if not isinstance(value, MethodType | partial):
            return self._container(value)
        new: Any
        if isinstance(value, MethodType):
            new = MethodType(self._like(value.__func__), self._like(value.__self__))
        else:
            keywords = {key: self._like(item) for key, item in value.keywords.items()}
            new = partial(self._like(value.func), *map(self._like, value.args), **keywords)
        self.made[id(value)] = new
        return new

    def _function(self, function: FunctionType) -> FunctionType:
        cells = tuple(map(self._like, function.__closure__ or ()))
        new = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells or None)
        for name in _CARRIED:
            if hasattr(function, name):
                setattr(new, name, getattr(function, name))
        self.made[id(function)] = new
        self.todo.append(function)
        return new

    def _fill(self, value: FunctionType | CellType) -> None:
        """Give what was made for it its contents, which may lead back to it, or deep down."""
        new = self.made[id(value)]
        if isinstance(value, CellType):
            new.cell_contents = self._like(value.cell_contents)
            return
        new.__defaults__ = None if value.__defaults__ is None else tuple(map(self._like, value.__defaults__))
        new.__kwdefaults__ = {key: self._like(item) for key, item in (value.__kwdefaults__ or {}).items()} or None
        vars(new).update({key: self._like(item) for key, item in vars(value).items()})

    def _container(self, value: Any) -> Any:
        """A container that reaches the network, its other items the same; one of a class of its own is left."""
        if type(value) in (list, set, deque):
            self.made[id(value)] = new = type(value)()
            (new.update if isinstance(new, set) else new.extend)(map(self._like, value))
            return new
        if isinstance(value, dict):
            self.made[id(value)] = new = copy.copy(value)
            new.update({key: self._like(item) for key, item in value.items()})
            return new
        if type(value) in (tuple, frozenset):
            self.made[id(value)] = new = type(value)(map(self._like, value))
            return new
        return value
