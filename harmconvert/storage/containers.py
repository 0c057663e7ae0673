"""Which state dict of a training script's file is meant, and under which prefix its names are the network's.

>>> import torch
>>> file = {"epoch": 3, "model": {"module.weight": torch.zeros(1)}, "ema": {"module": {"weight": torch.ones(1)}}}
>>> [state.key for state in state_dicts(file)]
['ema.module', 'model']
>>> names_in({"weight": torch.zeros(1)}, file["model"]).prefix
'module.'
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, shortened

# Keys under which training scripts keep a network, those that are taken first before the others.
KNOWN_KEYS = (
    "state_dict", "model_state_dict", "model", "params", "net", "network", "network_weights", "weights",
    "net_state_dict", "network_state_dict", "model_state", "model_weights", "state", "generator", "netG", "net_g", "G",
    "teacher", "student", "module", "backbone", "encoder", "encoder_q", "base_encoder", "online_encoder",
    "online_network",
)  # fmt: skip
# What wrappers of a network put in front of the names of its parts, wherever they stand.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Counters that a network may lack or have without another result: batch norms', thop's, AveragedModel's.
_COUNTERS = ("num_batches_tracked", "total_ops", "total_params", "n_averaged")
_NOT_A_NETWORK = re.compile(r"optim|sched|scaler|loss|criterion|metric|hyper|config|args|rng|loops", re.IGNORECASE)
_EMA = re.compile(r"(?:^|[^a-z])ema(?:[^a-z]|$)|EMA")
_DEPTH = 5


@dataclass(frozen=True)
class StateDict:
    """A state dict of a file: the keys that lead to it, and its tensors."""

    path: tuple[str, ...]
    tensors: Mapping[str, Tensor]

    @property
    def key(self) -> str:
        """The keys as one text; empty where the file is the state dict."""
        return ".".join(self.path)

    @property
    def ema(self) -> bool:
        """Whether it is an exponential moving average of the weights."""
        return any(_EMA.search(part) for part in self.path)

    @property
    def rank(self) -> int:
        """Its place among the known keys."""
        known = [KNOWN_KEYS.index(part) for part in self.path if part in KNOWN_KEYS]
        return 0 if not self.path else min(known, default=len(KNOWN_KEYS))


def state_dicts(content: Any) -> list[StateDict]:
    """The state dicts in what a file holds: moving averages first, then in the order of `KNOWN_KEYS`."""
    if isinstance(content, Mapping) and content and all(isinstance(value, Tensor) for value in content.values()):
        return [StateDict((), content)]
    found = list(_found_in(content, ()))
    return sorted(found, key=lambda state: (not state.ema, state.rank, len(state.path)))


def _found_in(content: Any, path: tuple[str, ...]) -> Iterator[StateDict]:
    if isinstance(content, list | tuple):  # such as (state dict of the network, state dict of the optimizer)
        content = {str(place): value for place, value in enumerate(content) if isinstance(value, Mapping)}
    if not isinstance(content, Mapping) or len(path) > _DEPTH or _no_network(content=content):
        return
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    others = [value for key, value in content.items() if not (isinstance(value, Tensor) or _no_network(key, value))]
    flat = all(value is None or isinstance(value, str | bool | int | float) for value in others)
    if tensors and flat and all(isinstance(key, str) for key in content):
        if any(value.dim() for value in tensors.values()):
            yield StateDict(path, tensors)
        return
    for key, value in content.items():
        if isinstance(value, Mapping | list | tuple) and not _no_network(key, value):
            yield from _found_in(value, (*path, str(key)))


def _no_network(key: Any = "", content: Any = None) -> bool:
    """Whether a part of a file is what training scripts keep beside a network, such as an optimizer."""
    return bool(_NOT_A_NETWORK.search(str(key))) or (isinstance(content, Mapping) and "param_groups" in content)


def with_key(states: list[StateDict], key: str, where: str) -> list[StateDict]:
    """Those state dicts that a key, or keys joined by dots, leads to.

    Raises:
        InputError: none; the keys that there are are named.
    """
    chosen = [state for state in states if f"{state.key}.".startswith(f"{key}.")]
    if not chosen:
        there = shortened([state.key for state in states]) if any(state.path for state in states) else "none"
        raise InputError(f"{where} has no state dict under the key {key!r}; keys of state dicts in it: {there}")
    return chosen


@dataclass(frozen=True)
class Names:
    """How the names in a state dict lead to a network's: the prefix, the file's name of each of the network's tensors,
    and what is left over (counters apart), under the prefix and beside it.

    ``rivals`` are other prefixes that fit as well; ``possible`` are those that fit, but may not be meant."""

    prefix: str
    of: Mapping[str, str]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    rivals: tuple[str, ...] = field(default=(), compare=False)
    possible: tuple[str, ...] = field(default=(), compare=False)

    @property
    def complete(self) -> bool:
        """Whether all of the network's tensors are there, and nothing else under their prefix."""
        return not self.missing and not self.unexpected


def names_in(own: Mapping[str, Tensor], state: Collection[str], prefix: str | None = None) -> Names:
    """Find the names of a network's tensors in a state dict.

    A prefix is dropped only where the names do not fit as they are, and all of them fit without it.

    Args:
        own: the network's tensors.
        state: names in the file, or its state dict, where the shapes count, too.
        prefix: the one to drop, instead of one that fits.
    """
    if prefix is not None:
        return _under(prefix, own, state, {name: name for name in state})
    as_they_are = {name: name for name in state}
    plain = _under("", own, state, as_they_are)
    if plain.complete:
        return plain
    unwrapped = {_unwrapped(name): name for name in state}
    ways = [(own, as_they_are)]
    if len(unwrapped) == len(as_they_are) and len({_unwrapped(name) for name in own}) == len(own):
        ways.append(({_unwrapped(name): tensor for name, tensor in own.items()}, unwrapped))
    possible: list[str] = []
    for names, called in ways:
        fitting = [_under(one, names, state, called) for one in _prefixes(names, called)]
        fitting = [found for found in fitting if not found.missing and _shapes_fit(names, state, found)]
        if called is as_they_are:
            possible = [found.prefix for found in fitting if found.prefix and found.complete]
        fitting = [found for found in fitting if _may_be_meant(found)]
        if not fitting:
            continue
        averaged = [found for found in fitting if _EMA.search(found.prefix)]
        averaged = averaged or [found for found in fitting if "teacher" in found.prefix.split(".")]
        best, *others = sorted(averaged or fitting, key=lambda found: len(found.prefix))
        rivals = tuple(o.prefix for o in others if not _same(state, best, o))
        back = dict(zip(names, own, strict=True))
        of = {back[name]: theirs for name, theirs in best.of.items()}
        return Names(best.prefix, of, best.missing, best.unexpected, best.beside, rivals)
    return replace(plain, possible=tuple(possible))


def _under(prefix: str, own: Mapping[str, Tensor], state: Collection[str], called: Mapping[str, str]) -> Names:
    """The names under a prefix; ``called`` leads from the names that are compared to those in the file."""
    under = {name[len(prefix) :]: theirs for name, theirs in called.items() if name.startswith(prefix)}
    of = {name: under[name] for name in own if name in under}
    missing = _but_counters(name for name in own if name not in under)
    unexpected = _but_counters(theirs for name, theirs in under.items() if name not in own)
    beside = _but_counters(theirs for name, theirs in called.items() if not name.startswith(prefix))
    return Names(prefix, of, missing, unexpected, beside)


def _prefixes(own: Mapping[str, Tensor], called: Mapping[str, str]) -> list[str]:
    """Prefixes under which a name that the network certainly has is found in the file."""
    needed = [name for name in own if not _is_counter(name)]
    if not needed:
        return []
    sought = max(needed, key=len)
    starts = [name[: -len(sought)] for name in called if name.endswith(sought)]
    return [start for start in starts if not start or start.endswith(".")]


def _may_be_meant(found: Names) -> bool:
    """Whether a prefix is a network's; where the file has names beside it, all its parts must be called so."""
    parts = found.prefix.split(".")[:-1]
    common = all(part in _WRAPPERS or part in KNOWN_KEYS or _EMA.search(part) for part in parts)
    return common or not found.beside


def _shapes_fit(own: Mapping[str, Tensor], state: Collection[str], found: Names) -> bool:
    if not isinstance(state, Mapping):
        return True
    return all(state[theirs].shape == own[name].shape for name, theirs in found.of.items() if not _is_counter(name))


def _same(state: Collection[str], one: Names, other: Names) -> bool:
    if not isinstance(state, Mapping):
        return False
    pairs = ((state[theirs], state[other.of[name]]) for name, theirs in one.of.items() if name in other.of)
    return all(a is b or torch.equal(a, b) for a, b in pairs)


def _unwrapped(name: str) -> str:
    """A name without the wrappers in it.

    >>> _unwrapped("features.module.0.weight")
    'features.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def without_wrapper(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the prefixes of wrappers that all of its names have.

    >>> list(without_wrapper({"module._orig_mod.weight": torch.zeros(1)}))
    ['weight']
    """
    names = list(state)
    while names and len(starts := {name.partition(".")[0] for name in names}) == 1 and starts <= _WRAPPERS:
        if any("." not in name for name in names):
            break
        names = [name.partition(".")[2] for name in names]
    return dict(zip(names, state.values(), strict=True))


def _but_counters(names: Iterable[str]) -> tuple[str, ...]:
    """The names; none where they are counters alone."""
    found = tuple(names)
    return () if all(map(_is_counter, found)) else found


def _is_counter(name: str) -> bool:
    return name.rpartition(".")[2] in _COUNTERS
