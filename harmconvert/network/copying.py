"""Deep copies of networks, including the functions that the networks hold.

`copy.deepcopy` does not copy functions. If a network has an attribute ``lambda x: self.conv(x)``, the attribute of its
copy would still run the layer of the original. `deep_copy` also copies functions: in attributes and hooks of modules,
inside containers at any depth, in bound methods and partials, and in the closures of other functions.
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

_COPIED_ATTRIBUTES = ("__module__", "__qualname__", "__doc__", "__annotations__", "__type_params__")
_ATOMIC = (type(None), bool, int, float, complex, str, bytes, type)
_TORCH_ATTRIBUTES = ("_parameters", "_buffers", "_modules")


def deep_copy(model: Module, memo: dict[int, Any] | None = None, strict: bool = False) -> Module:
    """Return a deep copy of a network. The functions in the copy use the parts of the copy, not those of the network.

    ``memo`` is `copy.deepcopy`'s, and the exceptions are those of `copy.deepcopy`. Objects outside the network that a
    function uses are not copied. Members that cannot be copied are treated as in `uncopyable_members`; with ``strict``,
    they are an error.
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
    if mismatched := _values_that_use_the_network(model):
        _FunctionReplacer(memo, mismatched).replace_in(copied)
    return copied


def uncopyable_members(model: nn.Module, memo: dict[int, Any]) -> dict[str, str]:
    """Return the members of a network's modules that `copy.deepcopy` cannot copy: the name and the reason of each.

    ``memo`` is `copy.deepcopy`'s. The function adds a substitute for each such member to it. The substitute of a tensor
    with a gradient history is a tensor with the same values. The substitute of any other member (a lock, an open file)
    is the member itself, so the network and its copy share it.
    """
    members: dict[str, str] = {}
    registered: dict[int, Any] = {id(module): module for module in model.modules()}
    registered |= {id(tensor): tensor for tensor in model.parameters()}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in ("_parameters", "_modules") and not isinstance(value, _ATOMIC):
                reason = _substitute_uncopyable(value, memo, registered, set())
                if reason is not None:
                    members[f"{name}.{key}" if name else key] = reason
    return members


def uncopyable_member(conv: nn.Module) -> str | None:
    """Describe a member of a single layer that cannot be copied; None if all members can be copied."""
    members = uncopyable_members(conv, {})
    name = next((key for key in members if "." not in key), None)
    return None if name is None else f"its member {name!r} cannot be copied ({members[name]})"


def _substitute_uncopyable(
    value: Any, memo: dict[int, Any], registered: Mapping[int, Any], seen: set[int]
) -> str | None:
    """Add substitutes for a value, or for its parts, to ``memo``; return why it cannot be copied (None: it can)."""
    if id(value) in memo or id(value) in seen or id(value) in registered:
        return None
    seen.add(id(value))
    if isinstance(value, Tensor) and not value.is_leaf:
        memo[id(value)] = value.detach().clone()
        return "it has a gradient history"
    try:
        copy.deepcopy(value, {**registered, **memo})
        return None
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
    for part in _contents(value):
        reason = _substitute_uncopyable(part, memo, registered, seen) or reason
    if not isinstance(value, dict | list | tuple | set | deque):  # a container is copied, with substitutes inside
        try:
            copy.deepcopy(value, {**registered, **memo})
        except Exception:
            memo[id(value)] = value
    return reason


def _contents(value: Any) -> list[Any]:
    """Return the items of a container, and the attributes of an object."""
    try:
        attributes = object.__getattribute__(value, "__dict__")
    except (AttributeError, TypeError):
        attributes = {}
    return [*direct_references(value), *(attributes.values() if isinstance(attributes, dict) else ())]


def _values_that_use_the_network(model: nn.Module) -> dict[int, Any]:
    """Return, by id, the functions, methods, partials, containers and cells that lead to a part of the network.

    The result is empty if there is no function among them, because `copy.deepcopy` copies the others correctly.
    """
    part_ids: set[int] = set()
    todo: list[Any] = []
    for module in model.modules():
        part_ids.add(id(module))
        for key, value in vars(module).items():
            if key in _TORCH_ATTRIBUTES:
                part_ids.update(id(tensor) for tensor in value.values() if isinstance(tensor, Tensor))
            elif not isinstance(value, _ATOMIC):
                todo.append(value)
    seen: dict[int, Any] = {}
    holders: dict[int, list[int]] = {}  # for each value, the values that refer to it
    reached: list[int] = []
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        for part in direct_references(value):
            holders.setdefault(id(part), []).append(id(value))
            if id(part) in part_ids:
                reached.append(id(part))
            elif not isinstance(part, _ATOMIC):
                todo.append(part)
    users: dict[int, Any] = {}
    while reached:
        for holder in holders.get(reached.pop(), ()):
            if holder not in users:
                users[holder] = seen[holder]
                reached.append(holder)
    return users if any(isinstance(value, FunctionType) for value in users.values()) else {}


def direct_references(value: Any) -> Iterator[Any]:
    """Yield the objects to which a function or a container refers directly."""
    if isinstance(value, FunctionType):
        yield from value.__closure__ or ()
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
        yield from vars(value).values()
    elif isinstance(value, CellType):
        try:
            yield value.cell_contents
        except ValueError:  # the cell is empty
            return
    elif isinstance(value, partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield from value


class _FunctionReplacer:
    """Replaces the functions in a copy that use the original network by functions that use the copy.

    Args:
        memo: the copies of the original's parts, by the id of the original part.
        mismatched: the values that lead to the original, by id; see `_values_that_use_the_network`.
    """

    def __init__(self, memo: dict[int, Any], mismatched: Mapping[int, Any]) -> None:
        self.memo, self.mismatched = memo, mismatched
        self.counterparts: dict[int, Any] = {}  # the new values, by the id of the original value
        self.unfilled: list[FunctionType | CellType] = []  # originals whose counterparts do not have their contents yet

    def replace_in(self, copied: nn.Module) -> None:
        """Replace the functions in the attributes of all modules of the copy."""
        seen: set[int] = set()
        for module in copied.modules():
            for key, value in list(vars(module).items()):
                if key not in _TORCH_ATTRIBUTES and (new := self._replace(value, seen)) is not value:
                    vars(module)[key] = new
        while self.unfilled:
            self._fill(self.unfilled.pop())

    def _replace(self, value: Any, seen: set[int]) -> Any:
        """Return a value of the copy with its functions replaced; change lists and dicts in place."""
        if isinstance(value, FunctionType | MethodType | partial):
            return self._counterpart(value, of_the_copy=True)
        if id(value) in seen:
            return value
        seen.add(id(value))
        if isinstance(value, dict):
            for key, item in list(value.items()):
                if (new := self._replace(item, seen)) is not item:
                    value[key] = new
        elif isinstance(value, list):
            value[:] = [self._replace(item, seen) for item in value]
        elif type(value) is tuple:
            items = tuple(self._replace(item, seen) for item in value)
            return value if all(a is b for a, b in zip(items, value, strict=True)) else items
        return value

    def _counterpart(self, value: Any, of_the_copy: bool = False) -> Any:
        """Return the value that the copy has instead of ``value``; ``value`` itself if it does not use the network.

        ``of_the_copy``: `copy.deepcopy` has already made a new partial or method, but with the original's function.
        """
        if id(value) in self.counterparts:
            return self.counterparts[id(value)]
        if of_the_copy and isinstance(value, MethodType) and id(value.__func__) in self.mismatched:
            return MethodType(self._counterpart(value.__func__), value.__self__)
        if of_the_copy and isinstance(value, partial) and id(value.func) in self.mismatched:
            return partial(self._counterpart(value.func), *value.args, **value.keywords)
        if id(value) not in self.mismatched:
            return self.memo.get(id(value), value) if isinstance(value, nn.Module | Tensor) else value
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, CellType):
            self.unfilled.append(value)
            return self.counterparts.setdefault(id(value), CellType())
        if not isinstance(value, MethodType | partial):
            return self._container(value)
        new: Any
        if isinstance(value, MethodType):
            new = MethodType(self._counterpart(value.__func__), self._counterpart(value.__self__))
        else:
            keywords = {key: self._counterpart(item) for key, item in value.keywords.items()}
            new = partial(self._counterpart(value.func), *map(self._counterpart, value.args), **keywords)
        self.counterparts[id(value)] = new
        return new

    def _function(self, function: FunctionType) -> FunctionType:
        cells = tuple(map(self._counterpart, function.__closure__ or ()))
        new = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells or None)
        for name in _COPIED_ATTRIBUTES:
            if hasattr(function, name):
                setattr(new, name, getattr(function, name))
        self.counterparts[id(function)] = new
        self.unfilled.append(function)
        return new

    def _fill(self, value: FunctionType | CellType) -> None:
        """Give the counterpart of a value its contents. This is a separate step because contents can be cyclic."""
        new = self.counterparts[id(value)]
        if isinstance(value, CellType):
            new.cell_contents = self._counterpart(value.cell_contents)
            return
        new.__defaults__ = None if value.__defaults__ is None else tuple(map(self._counterpart, value.__defaults__))
        keyword_defaults = {key: self._counterpart(item) for key, item in (value.__kwdefaults__ or {}).items()}
        new.__kwdefaults__ = keyword_defaults or None
        vars(new).update({key: self._counterpart(item) for key, item in vars(value).items()})

    def _container(self, value: Any) -> Any:
        """Return the counterpart of a container; containers of other classes than Python's stay the same."""
        new: Any
        if type(value) in (list, set, deque):
            self.counterparts[id(value)] = new = type(value)()
            (new.update if isinstance(new, set) else new.extend)(map(self._counterpart, value))
            return new
        if isinstance(value, dict):
            self.counterparts[id(value)] = new = copy.copy(value)
            new.update({key: self._counterpart(item) for key, item in value.items()})
            return new
        if type(value) in (tuple, frozenset):
            self.counterparts[id(value)] = new = type(value)(map(self._counterpart, value))
            return new
        return value
