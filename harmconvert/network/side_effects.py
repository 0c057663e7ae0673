"""Undo the side effects of forward passes: changed counters, caches, logs of hooks, random states."""

from __future__ import annotations

import pickle
import random
import sys
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from functools import cache, partial
from operator import is_
from types import BuiltinFunctionType, CellType, FunctionType, MappingProxyType, ModuleType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from .copying import direct_references

# Values that cannot change, and values that belong to the process rather than to a network.
_FREQUENT = {type(None), bool, int, float, str, nn.Parameter}  # checked by their exact type, which is fast
_CONTAINERS = {dict, OrderedDict, list, set}
_SKIPPED = (
    type(None), bool, int, float, str, type, complex, bytes, range, Enum, ModuleType, BuiltinFunctionType,
    torch.dtype, torch.device, torch.Size,
)  # fmt: skip
_PROCESS = ("torch", "logging", "threading", "concurrent", "multiprocessing", "asyncio", "queue", "socket", "io", "_io")
_SEQUENCES = (list, set, deque, bytearray, array)
_RANDOM = (random.Random, torch.Generator, np.random.Generator, np.random.RandomState)
# Functions that change a tensor, but not its values.
_NOT_WRITING = {"requires_grad_", "share_memory_", "detach_", "retain_grad", "rename_"}
_PACKAGE = __name__.partition(".")[0]
# Classes of these packages keep no state of a forward pass.
_STATELESS = {*sys.stdlib_module_names, "builtins", "torch", "numpy", _PACKAGE}


class Snapshot:
    """The state of a network without its parameters; `restore` restores it after forward passes.

    The state is the attributes and buffers of all modules, and all objects to which these and the modules' hooks refer
    at any depth: through containers, objects with attributes, closures, default arguments and attributes of the
    modules' classes. Containers and tensors keep their identity; their contents are restored in place. Values of
    parameters and globals of Python modules are not part of the state.

    >>> network = nn.Conv2d(3, 8, 3)
    >>> network.seen = []
    >>> before = Snapshot(network)
    >>> network.seen.append(1)
    >>> before.intact
    False
    >>> before.restore()
    >>> network.seen
    []

    Args:
        excluded: modules whose attributes and buffers are not restored.
    """

    def __init__(self, model: nn.Module, excluded: Collection[nn.Module] = ()) -> None:
        self._empty_containers: list[Any] = []
        self._mappings: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._sequences: list[tuple[Any, list[Any]]] = []
        self._others: list[tuple[Callable[[], bool], Callable[[], None]]] = []  # functions: is it intact; restore it
        self._parameter_memory = {_memory(parameter) for parameter in model.parameters()} - {None}
        excluded_ids = {id(module) for module in excluded}
        self._seen: dict[int, Any] = {}  # keeps the objects alive, so that no id is used twice
        todo: list[Any] = [model]
        while todo:
            value = todo.pop()
            if type(value) in _CONTAINERS and not value:  # the most frequent case: the dicts of hooks
                self._empty_containers.append(value)
                continue
            if type(value) in _FREQUENT or id(value) in self._seen or id(value) in excluded_ids:
                continue
            self._seen[id(value)] = value
            todo += self._save(value)

    @property
    def intact(self) -> bool:
        """Return whether the state has not changed; replacing an object by an equal object counts as a change."""
        return (
            not any(self._empty_containers)
            and all(_same_items(live, saved) for live, saved in self._mappings)
            and all(_same_contents(live, saved) for live, saved in self._sequences)
            and all(intact() for intact, _ in self._others)
        )

    def restore(self) -> None:
        """Restore everything that has changed since the snapshot."""
        for container in self._empty_containers:
            if container:
                container.clear()
        for live, saved in self._mappings:
            if not _same_items(live, saved):
                _refill(live, saved)
        for sequence, contents in self._sequences:
            if not _same_contents(sequence, contents):
                _replace_contents(sequence, contents)
        for intact, restore in self._others:
            if not intact():
                restore()

    def _save(self, value: Any) -> Collection[Any]:
        """Save the contents of one value; return the objects to which it refers."""
        if type(value) in (dict, OrderedDict):  # these have no attributes
            self._mappings.append((value, {**value}))
            return value.values()
        if type(value) in (list, set):
            self._sequences.append((value, [*value]))
            return value
        if isinstance(value, _SKIPPED) or _belongs_to_this_package(value):
            return ()
        if isinstance(value, Tensor):
            self._save_tensor(value)
            return ()
        if isinstance(value, dict):
            self._mappings.append((value, {**value}))
        elif isinstance(value, _SEQUENCES):
            self._sequences.append((value, [*value]))
            if isinstance(value, bytearray | array):
                return ()
        elif isinstance(value, np.ndarray):
            self._save_array(value)
            return ()
        elif isinstance(value, _RANDOM):
            self._save_random_source(value)
        elif isinstance(value, CellType):
            self._save_cell(value)
        attributes = self._save_attributes(value)
        if isinstance(value, Mapping) and not isinstance(value, dict | MappingProxyType):
            return attributes  # the contents of such a mapping may be computed
        return [*attributes, *direct_references(value)]

    def _save_attributes(self, value: Any) -> list[Any]:
        """Save the attributes, slots and class attributes of an object; return their values."""
        kind = type(value)
        parts: list[Any] = []
        if not isinstance(value, nn.Module):
            if kind.__module__.partition(".")[0] in _PROCESS:
                return parts
        elif not isinstance(value._buffers, dict):  # TorchScript does not give access to its own dict
            parts += value.buffers(recurse=False)
        attributes = getattr(value, "__dict__", None)
        if type(attributes) is dict:
            self._mappings.append((attributes, dict(attributes)))
            parts += attributes.values()
        for base in kind.__mro__:
            if base.__module__.partition(".")[0] in _STATELESS:
                continue
            if id(base) not in self._seen:
                self._seen[id(base)] = base
                parts += self._save_class_attributes(base)
            slots = vars(base).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                mangled = name.startswith("__") and not name.endswith("__")
                parts += self._save_slot(value, f"_{base.__name__.lstrip('_')}{name}" if mangled else name)
        return parts

    def _save_class_attributes(self, kind: type) -> list[Any]:
        def current() -> dict[str, Any]:
            return {key: value for key, value in vars(kind).items() if not key.startswith("__")}

        before = current()

        def restore() -> None:
            for key in current().keys() - before.keys():
                delattr(kind, key)
            for key, value in before.items():
                if vars(kind).get(key) is not value:
                    setattr(kind, key, value)

        self._others.append((lambda: _same_items(current(), before), restore))
        return [*vars(kind).values()]

    def _save_slot(self, value: Any, name: str) -> list[Any]:
        missing = object()
        before = getattr(value, name, missing)
        if before is missing or name in ("__dict__", "__weakref__"):
            return []

        def restore() -> None:
            object.__setattr__(value, name, before)

        self._others.append((lambda: getattr(value, name, missing) is before, restore))
        return [before]

    def _save_cell(self, cell: CellType) -> None:
        try:
            contents = cell.cell_contents
        except ValueError:  # the cell is empty
            return

        def restore() -> None:
            cell.cell_contents = contents

        self._others.append((lambda: cell.cell_contents is contents, restore))

    def _save_array(self, values: np.ndarray[Any, Any]) -> None:
        if values.flags.writeable:
            before = values.copy()
            self._others.append((lambda: values.tobytes() == before.tobytes(), partial(np.copyto, values, before)))

    def _save_random_source(self, source: Any) -> None:
        get_state, set_state = _state_functions(source)
        before = get_state()
        pickled = pickle.dumps(before)
        self._others.append((lambda: pickle.dumps(get_state()) == pickled, partial(set_state, before)))

    def _save_tensor(self, tensor: Tensor) -> None:
        if isinstance(tensor, nn.Parameter):
            return
        if not tensor.is_meta and not is_lazy(tensor) and _memory(tensor) not in self._parameter_memory:
            with torch.no_grad():
                value = tensor.detach().clone()
            self._others.append((partial(_same_values, tensor, value), partial(_write, tensor, value)))


class ParameterBackup(TorchFunctionMode):
    """Copies each parameter of a network before the code inside changes it; `restore` restores the copied values.

    Parameters that the code does not change are not copied.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._parameters = {
            memory: parameter
            for parameter in model.parameters()
            if not is_lazy(parameter) and not parameter.is_meta and (memory := _memory(parameter)) is not None
        }
        self._before: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args and changes_first_argument(getattr(func, "__name__", ""), func) else kwargs.get("out")
        if isinstance(target, Tensor):
            memory = _memory(target)
            if memory in self._parameters and memory not in self._before:
                self._before[memory] = self._parameters[memory].detach().clone()
        return func(*args, **kwargs)

    def restore(self) -> None:
        """Restore the values of the parameters that have changed."""
        for memory, value in self._before.items():
            _write(self._parameters[memory].detach(), value)


def changes_first_argument(name: str, func: Any) -> bool:
    """Return whether a function of torch changes its first argument."""
    if name == "__set__":
        setter: Callable[..., Any] = Tensor.data.__set__  # type: ignore[attr-defined]
        return func == setter
    return _is_in_place(name)


@cache
def _is_in_place(name: str) -> bool:
    if name.startswith("__i") and name.endswith("__"):
        return name not in ("__index__", "__int__", "__invert__")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__") and name not in _NOT_WRITING)


@dataclass(frozen=True)
class RandomStates:
    """The states of the random sources of the process: those of torch, Python and NumPy."""

    torch: Tensor
    python: Any
    numpy: Any

    @classmethod
    def current(cls) -> RandomStates:
        """Return the current states."""
        return cls(torch.get_rng_state(), random.getstate(), np.random.get_state())

    def restore(self) -> None:
        """Set the random sources to these states."""
        torch.set_rng_state(self.torch)
        random.setstate(self.python)
        np.random.set_state(self.numpy)


@contextmanager
def fixed_random_seed(seed: int = 0) -> Iterator[None]:
    """Seed torch, Python and NumPy, so that a network with random numbers gives the same outputs each time.

    Afterwards, the random states are restored.
    """
    with preserve_random_states():
        if torch.accelerator.is_available():
            torch.manual_seed(seed)
        else:  # much faster: `torch.manual_seed` formats a traceback for each kind of device that is not there
            torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        yield


@contextmanager
def preserve_random_states() -> Iterator[None]:
    """Restore the caller's random states afterwards."""
    before = RandomStates.current()
    try:
        yield
    finally:
        before.restore()


def _belongs_to_this_package(value: Any) -> bool:
    """Return whether a hook of this package uses the value to record the network: the records must not be undone."""
    code = value if isinstance(value, FunctionType) else type(value)
    return str(code.__module__).partition(".")[0] == _PACKAGE and not isinstance(value, nn.Module)


def _same_items(live: dict[Any, Any], saved: dict[Any, Any]) -> bool:
    """Return whether both dicts have the same objects, in the same order."""
    return len(live) == len(saved) and all(map(is_, live.values(), saved.values())) and all(map(is_, live, saved))


def _same_contents(live: Any, saved: list[Any]) -> bool:
    if isinstance(live, bytearray | array):
        return [*live] == saved
    return len(live) == len(saved) and all(map(is_, live, saved))


def _refill(live: dict[Any, Any], saved: dict[Any, Any]) -> None:
    kind: Any = OrderedDict if isinstance(live, OrderedDict) else dict  # a subclass may override these methods
    for key in [key for key in live if key not in saved]:
        kind.__delitem__(live, key)
    if not all(map(is_, live, saved)):  # the order differs, or a key is missing
        kind.clear(live)
    for key, value in saved.items():
        kind.__setitem__(live, key, value)


def _replace_contents(live: Any, saved: list[Any]) -> None:
    if isinstance(live, set):
        set.clear(live)
        set.update(live, saved)
    elif isinstance(live, deque):
        deque.clear(live)
        deque.extend(live, saved)
    elif isinstance(live, array):
        live[:] = array(live.typecode, saved)
    else:
        kind: Any = list if isinstance(live, list) else bytearray
        kind.__setitem__(live, slice(None), saved)


def _state_functions(source: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """Return the functions that get and set the state of a random source."""
    if isinstance(source, random.Random):
        return source.getstate, source.setstate
    if isinstance(source, np.random.Generator):
        return lambda: source.bit_generator.state, lambda state: setattr(source.bit_generator, "state", state)
    return source.get_state, source.set_state


def _memory(tensor: Tensor) -> int | None:
    """Return a number that identifies the storage of a tensor; None if the tensor has no storage."""
    with suppress(RuntimeError, NotImplementedError, ValueError):
        return cast(int, tensor.untyped_storage()._cdata)
    return None


def _same_values(tensor: Tensor, value: Tensor) -> bool:
    # The tensor's version counter would be faster, but it does not count changes through ``data`` or NumPy.
    try:
        if torch.equal(tensor, value):
            return True
        if tensor.shape != value.shape or not tensor.is_floating_point():
            return False
        return bool(((tensor == value) | (tensor.isnan() & value.isnan())).all())
    except (RuntimeError, NotImplementedError):  # torch does not compare this kind of tensor
        return False


def _write(tensor: Tensor, value: Tensor) -> None:
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        if tensor.shape != value.shape:
            tensor.resize_(value.shape)
        with suppress(RuntimeError):  # a view with overlapping memory: its base tensor is restored, too
            tensor.copy_(value)
