"""Undo what forwards change in a network beside its outputs: counters, caches, logs that hooks keep, random sources."""

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
from functools import partial
from operator import is_
from types import BuiltinFunctionType, CellType, FunctionType, MappingProxyType, ModuleType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from .copying import parts_of

# Values that cannot change, and values that belong to the process rather than to a network.
_FREQUENT = {type(None), bool, int, float, str, nn.Parameter}  # told by their type alone, which is fast
_CONTAINERS = {dict, OrderedDict, list, set}
_SKIPPED = (
    type(None), bool, int, float, str, type, complex, bytes, range, Enum, ModuleType, BuiltinFunctionType,
    torch.dtype, torch.device, torch.Size,
)  # fmt: skip
_PROCESS = ("torch", "logging", "threading", "concurrent", "multiprocessing", "asyncio", "queue", "socket", "io", "_io")
_SEQUENCES = (list, set, deque, bytearray, array)
_RANDOM = (random.Random, torch.Generator, np.random.Generator, np.random.RandomState)
# Names of functions that change a tensor, but not its values.
_NOT_WRITING = {"requires_grad_", "share_memory_", "detach_", "retain_grad", "rename_"}
_PACKAGE = __name__.partition(".")[0]
# Classes of these packages keep nothing of a forward.
_STATELESS = {*sys.stdlib_module_names, "builtins", "torch", "numpy", _PACKAGE}


class Snapshot:
    """The state of a network, apart from its parameters, to which `restore` brings it back after forwards.

    State is: attributes and buffers of all modules, and whatever these and the modules' hooks refer to at any depth,
    through containers, objects with attributes, closures, default arguments and attributes of the modules' classes.
    Containers and tensors keep their identity; their contents are restored in place. Values of parameters, and globals
    of Python modules, are not part of it.

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
        but: modules whose attributes and buffers are left as they are.
    """

    def __init__(self, model: nn.Module, but: Collection[nn.Module] = ()) -> None:
        self._empty: list[Any] = []
        self._mappings: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._sequences: list[tuple[Any, list[Any]]] = []
        self._others: list[tuple[Callable[[], bool], Callable[[], None]]] = []  # whether it is intact; its restoration
        self._of_parameters = {_memory(parameter) for parameter in model.parameters()} - {None}
        left = {id(module) for module in but}
        self._seen: dict[int, Any] = {}  # kept alive, so that no identity is used again
        waiting: list[Any] = [model]
        while waiting:
            value = waiting.pop()
            if type(value) in _CONTAINERS and not value:  # most of what modules have: dicts for hooks
                self._empty.append(value)
                continue
            if type(value) in _FREQUENT or id(value) in self._seen or id(value) in left:
                continue
            self._seen[id(value)] = value
            waiting += self._noted(value)

    @property
    def intact(self) -> bool:
        """Whether nothing has changed since; an object that was replaced by an equal one counts as a change."""
        return (
            not any(self._empty)
            and all(_same_items(live, saved) for live, saved in self._mappings)
            and all(_same_contents(live, saved) for live, saved in self._sequences)
            and all(intact() for intact, _ in self._others)
        )

    def restore(self) -> None:
        """Bring back everything that has changed since."""
        for container in self._empty:
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

    def _noted(self, value: Any) -> Collection[Any]:
        """Save what one value holds; returns what it refers to."""
        if type(value) in (dict, OrderedDict):  # no attributes to look for
            self._mappings.append((value, {**value}))
            return value.values()
        if type(value) in (list, set):
            self._sequences.append((value, [*value]))
            return value
        if isinstance(value, _SKIPPED) or _is_ours(value):
            return ()
        if isinstance(value, Tensor):
            self._note_tensor(value)
            return ()
        if isinstance(value, dict):
            self._mappings.append((value, {**value}))
        elif isinstance(value, _SEQUENCES):
            self._sequences.append((value, [*value]))
            if isinstance(value, bytearray | array):
                return ()
        elif isinstance(value, np.ndarray):
            self._note_array(value)
            return ()
        elif isinstance(value, _RANDOM):
            self._note_random(value)
        elif isinstance(value, CellType):
            self._note_cell(value)
        attributes = self._attributes(value)
        if isinstance(value, Mapping) and not isinstance(value, dict | MappingProxyType):
            return attributes  # its contents may be computed
        return [*attributes, *parts_of(value)]

    def _attributes(self, value: Any) -> list[Any]:
        """Save what an object holds by name; returns that."""
        kind = type(value)
        parts: list[Any] = []
        if not isinstance(value, nn.Module):
            if kind.__module__.partition(".")[0] in _PROCESS:
                return parts
        elif not isinstance(value._buffers, dict):  # those of TorchScript are out of reach
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
                parts += self._class_attributes(base)
            slots = vars(base).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                mangled = name.startswith("__") and not name.endswith("__")
                parts += self._note_slot(value, f"_{base.__name__.lstrip('_')}{name}" if mangled else name)
        return parts

    def _class_attributes(self, kind: type) -> list[Any]:
        def now() -> dict[str, Any]:
            return {key: value for key, value in vars(kind).items() if not key.startswith("__")}

        before = now()

        def restore() -> None:
            for key in now().keys() - before.keys():
                delattr(kind, key)
            for key, value in before.items():
                if vars(kind).get(key) is not value:
                    setattr(kind, key, value)

        self._others.append((lambda: _same_items(now(), before), restore))
        return [*vars(kind).values()]

    def _note_slot(self, value: Any, name: str) -> list[Any]:
        missing = object()
        held = getattr(value, name, missing)
        if held is missing or name in ("__dict__", "__weakref__"):
            return []

        def restore() -> None:
            object.__setattr__(value, name, held)

        self._others.append((lambda: getattr(value, name, missing) is held, restore))
        return [held]

    def _note_cell(self, cell: CellType) -> None:
        try:
            contents = cell.cell_contents
        except ValueError:  # nothing is in it yet
            return

        def restore() -> None:
            cell.cell_contents = contents

        self._others.append((lambda: cell.cell_contents is contents, restore))

    def _note_array(self, values: np.ndarray[Any, Any]) -> None:
        if values.flags.writeable:
            before = values.copy()
            self._others.append((lambda: values.tobytes() == before.tobytes(), partial(np.copyto, values, before)))

    def _note_random(self, source: Any) -> None:
        get, put = _state_of(source)
        before = get()
        kept = pickle.dumps(before)
        self._others.append((lambda: pickle.dumps(get()) == kept, partial(put, before)))

    def _note_tensor(self, tensor: Tensor) -> None:
        if isinstance(tensor, nn.Parameter):
            return
        if not tensor.is_meta and not is_lazy(tensor) and _memory(tensor) not in self._of_parameters:
            with torch.no_grad():
                value = tensor.detach().clone()
            self._others.append((partial(_same_values, tensor, value), partial(_write, tensor, value)))


class WeightsKept(TorchFunctionMode):
    """Inside it, parameters of a network may be written to; `restore` brings back the values that they had before.

    A copy is made of a parameter when it is first written to, and of no other.
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
        target = args[0] if args and writes(getattr(func, "__name__", ""), func) else kwargs.get("out")
        if isinstance(target, Tensor) and (memory := _memory(target)) in self._parameters.keys() - self._before.keys():
            self._before[memory] = self._parameters[memory].detach().clone()
        return func(*args, **kwargs)

    def restore(self) -> None:
        """Write back what the parameters held."""
        for memory, value in self._before.items():
            _write(self._parameters[memory].detach(), value)


def writes(name: str, func: Any) -> bool:
    """Whether a function changes its first argument."""
    if name.startswith("__i") and name.endswith("__"):
        return name not in ("__index__", "__int__", "__invert__")
    in_place = name.endswith("_") and not name.endswith("__") and name not in _NOT_WRITING
    setter: Callable[..., Any] = Tensor.data.__set__  # type: ignore[attr-defined]
    return in_place or name == "__setitem__" or func == setter


@dataclass(frozen=True)
class RandomStates:
    """The states of the random sources of the process that a forward may draw from."""

    torch: Tensor
    python: Any
    numpy: Any

    @classmethod
    def now(cls) -> RandomStates:
        """As they are."""
        return cls(torch.get_rng_state(), random.getstate(), np.random.get_state())

    def set(self) -> None:
        """Make them so."""
        torch.set_rng_state(self.torch)
        random.setstate(self.python)
        np.random.set_state(self.numpy)


@contextmanager
def seeded_sources(seed: int = 0) -> Iterator[None]:
    """Torch, Python and NumPy draw from a seed, so that a network that draws in its forward draws the same each time;
    afterwards they draw on as before."""
    with random_states_kept():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        yield


@contextmanager
def random_states_kept() -> Iterator[None]:
    """The caller's random states are afterwards what they were."""
    before = RandomStates.now()
    try:
        yield
    finally:
        before.set()


def _is_ours(value: Any) -> bool:
    """Whether this package watches the network with it: what it has seen must stay."""
    where = value if isinstance(value, FunctionType) else type(value)
    return str(where.__module__).partition(".")[0] == _PACKAGE and not isinstance(value, nn.Module)


def _same_items(live: dict[Any, Any], saved: dict[Any, Any]) -> bool:
    """Whether both have the same objects, in the same order."""
    return len(live) == len(saved) and all(map(is_, live.values(), saved.values())) and all(map(is_, live, saved))


def _same_contents(live: Any, saved: list[Any]) -> bool:
    if isinstance(live, bytearray | array):
        return [*live] == saved
    return len(live) == len(saved) and all(map(is_, live, saved))


def _refill(live: dict[Any, Any], saved: dict[Any, Any]) -> None:
    kind: Any = OrderedDict if isinstance(live, OrderedDict) else dict  # past methods that a subclass overrides
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


def _state_of(source: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """How to get and how to set the state of a random source."""
    if isinstance(source, random.Random):
        return source.getstate, source.setstate
    if isinstance(source, np.random.Generator):
        return lambda: source.bit_generator.state, lambda state: setattr(source.bit_generator, "state", state)
    return source.get_state, source.set_state


def _memory(tensor: Tensor) -> int | None:
    """Identifies the storage of a tensor; None where it has none."""
    with suppress(RuntimeError, NotImplementedError, ValueError):
        return cast(int, tensor.untyped_storage()._cdata)
    return None


def _same_values(tensor: Tensor, value: Tensor) -> bool:
    """Not told by the tensor's version, which a write through ``data`` or NumPy does not count."""
    try:
        if torch.equal(tensor, value):
            return True
        if tensor.shape != value.shape or not tensor.is_floating_point():
            return False
        return bool(((tensor == value) | (tensor.isnan() & value.isnan())).all())
    except (RuntimeError, NotImplementedError):  # not implemented for this kind of tensor
        return False


def _write(tensor: Tensor, value: Tensor) -> None:
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        if tensor.shape != value.shape:
            tensor.resize_(value.shape)
        with suppress(RuntimeError):  # a view of overlapping memory: its base is restored, too
            tensor.copy_(value)
