"""Find the state dict in the file of a training script, and the prefix under which its names fit the network.

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

# Keys under which training scripts keep a network, by priority.
KNOWN_KEYS = (
    "state_dict", "model_state_dict", "model", "params", "net", "network", "network_weights", "weights",
    "net_state_dict", "network_state_dict", "model_state", "model_weights", "state", "generator", "netG", "net_g", "G",
    "teacher", "student", "module", "backbone", "encoder", "encoder_q", "base_encoder", "online_encoder",
    "online_network",
)  # fmt: skip
# Parts of names that wrappers of a network add, at any place.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Counters that do not change a network's result: those of batch norms, of thop and of AveragedModel.
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
        """Return the keys, joined by dots; empty if the file itself is the state dict."""
        return ".".join(self.path)

    @property
    def ema(self) -> bool:
        """Return whether the state dict is an exponential moving average of the weights."""
        return any(_EMA.search(part) for part in self.path)

    @property
    def rank(self) -> int:
        """Return the priority of its keys in `KNOWN_KEYS`; 0 is the highest."""
        known = [KNOWN_KEYS.index(part) for part in self.path if part in KNOWN_KEYS]
        return 0 if not self.path else min(known, default=len(KNOWN_KEYS))


def state_dicts(content: Any) -> list[StateDict]:
    """Return the state dicts in the content of a file: moving averages first, then in the order of `KNOWN_KEYS`."""
    if isinstance(content, Mapping) and content and all(isinstance(value, Tensor) for value in content.values()):
        return [StateDict((), content)]
    states = list(_state_dicts_below(content, ()))
    return sorted(states, key=lambda state: (not state.ema, state.rank, len(state.path)))


def _state_dicts_below(content: Any, path: tuple[str, ...]) -> Iterator[StateDict]:
    if isinstance(content, list | tuple):  # such as (state dict of the network, state dict of the optimizer)
        content = {str(place): value for place, value in enumerate(content) if isinstance(value, Mapping)}
    if not isinstance(content, Mapping) or len(path) > _DEPTH or _is_no_network(content=content):
        return
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    others = [value for key, value in content.items() if not (isinstance(value, Tensor) or _is_no_network(key, value))]
    flat = all(value is None or isinstance(value, str | bool | int | float) for value in others)
    if tensors and flat and all(isinstance(key, str) for key in content):
        if any(value.dim() for value in tensors.values()):
            yield StateDict(path, tensors)
        return
    for key, value in content.items():
        if isinstance(value, Mapping | list | tuple) and not _is_no_network(key, value):
            yield from _state_dicts_below(value, (*path, str(key)))


def _is_no_network(key: Any = "", content: Any = None) -> bool:
    """Return whether a part of a file is something else than a network, such as an optimizer."""
    return bool(_NOT_A_NETWORK.search(str(key))) or (isinstance(content, Mapping) and "param_groups" in content)


def with_key(states: list[StateDict], key: str, where: str) -> list[StateDict]:
    """Return the state dicts under a key, or under keys joined by dots.

    Raises:
        InputError: there is none; the message lists the keys.
    """
    chosen = [state for state in states if f"{state.key}.".startswith(f"{key}.")]
    if not chosen:
        keys = shortened([state.key for state in states]) if any(state.path for state in states) else "none"
        raise InputError(f"{where} has no state dict under the key {key!r}; keys of state dicts in it: {keys}")
    return chosen


@dataclass(frozen=True)
class Names:
    """The mapping from a network's tensor names to the names in a file.

    ``missing`` are the network's names that the file lacks, ``unexpected`` the file's names under the prefix that the
    network lacks, and ``beside`` the file's names outside the prefix; counters are left out of all three.
    ``alternatives`` are other prefixes that fit equally well. ``uncertain`` are prefixes that fit, but that no known
    training script uses.
    """

    prefix: str
    file_names: Mapping[str, str]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    alternatives: tuple[str, ...] = field(default=(), compare=False)
    uncertain: tuple[str, ...] = field(default=(), compare=False)

    @property
    def complete(self) -> bool:
        """Return whether the file has all of the network's tensors, and nothing else under the prefix."""
        return not self.missing and not self.unexpected


def names_in(own: Mapping[str, Tensor], state: Collection[str], prefix: str | None = None) -> Names:
    """Find the names of a network's tensors in a state dict.

    A prefix is dropped only if the names do not fit with it and all of them fit without it.

    Args:
        own: the network's tensors.
        state: the names in the file, or its state dict (then the shapes must fit, too).
        prefix: the prefix to drop; None: find one that fits.
    """
    unchanged = {name: name for name in state}
    if prefix is not None:
        return _names_under(prefix, own, unchanged)
    plain = _names_under("", own, unchanged)
    if plain.complete:
        return plain
    unwrapped = {_unwrapped(name): name for name in state}
    attempts = [(own, unchanged)]
    if len(unwrapped) == len(unchanged) and len({_unwrapped(name) for name in own}) == len(own):
        attempts.append(({_unwrapped(name): tensor for name, tensor in own.items()}, unwrapped))
    uncertain: list[str] = []
    for tensors, original in attempts:
        fitting = [_names_under(start, tensors, original) for start in _prefixes(tensors, original)]
        fitting = [names for names in fitting if not names.missing and _shapes_fit(tensors, state, names)]
        if original is unchanged:
            uncertain = [names.prefix for names in fitting if names.prefix and names.complete]
        fitting = [names for names in fitting if _is_plausible(names)]
        if not fitting:
            continue
        averaged = [names for names in fitting if _EMA.search(names.prefix)]
        averaged = averaged or [names for names in fitting if "teacher" in names.prefix.split(".")]
        best, *others = sorted(averaged or fitting, key=lambda names: len(names.prefix))
        alternatives = tuple(other.prefix for other in others if not _same_tensors(state, best, other))
        own_names = dict(zip(tensors, own, strict=True))
        file_names = {own_names[name]: in_file for name, in_file in best.file_names.items()}
        return Names(best.prefix, file_names, best.missing, best.unexpected, best.beside, alternatives)
    return replace(plain, uncertain=tuple(uncertain))


def _names_under(prefix: str, own: Mapping[str, Tensor], original: Mapping[str, str]) -> Names:
    """Compare the names under a prefix; ``original`` maps the (unwrapped) names to those in the file."""
    under = {name[len(prefix) :]: in_file for name, in_file in original.items() if name.startswith(prefix)}
    file_names = {name: under[name] for name in own if name in under}
    missing = _without_counters(name for name in own if name not in under)
    unexpected = _without_counters(in_file for name, in_file in under.items() if name not in own)
    beside = _without_counters(in_file for name, in_file in original.items() if not name.startswith(prefix))
    return Names(prefix, file_names, missing, unexpected, beside)


def _prefixes(own: Mapping[str, Tensor], original: Mapping[str, str]) -> list[str]:
    """Return the prefixes of the network's longest name in the file."""
    needed = [name for name in own if not _is_counter(name)]
    if not needed:
        return []
    longest = max(needed, key=len)
    starts = [name[: -len(longest)] for name in original if name.endswith(longest)]
    return [start for start in starts if not start or start.endswith(".")]


def _is_plausible(names: Names) -> bool:
    """Return whether a prefix belongs to a network: the file has no other names, or training scripts use the prefix."""
    parts = names.prefix.split(".")[:-1]
    common = all(part in _WRAPPERS or part in KNOWN_KEYS or _EMA.search(part) for part in parts)
    return common or not names.beside


def _shapes_fit(own: Mapping[str, Tensor], state: Collection[str], names: Names) -> bool:
    if not isinstance(state, Mapping):
        return True
    pairs = names.file_names.items()
    return all(state[in_file].shape == own[name].shape for name, in_file in pairs if not _is_counter(name))


def _same_tensors(state: Collection[str], one: Names, other: Names) -> bool:
    if not isinstance(state, Mapping):
        return False
    common = [name for name in one.file_names if name in other.file_names]
    pairs = ((state[one.file_names[name]], state[other.file_names[name]]) for name in common)
    return all(a is b or torch.equal(a, b) for a, b in pairs)


def _unwrapped(name: str) -> str:
    """Return a name without the wrappers in it.

    >>> _unwrapped("features.module.0.weight")
    'features.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def without_wrapper(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without the prefixes of wrappers, where all of its names have them.

    >>> list(without_wrapper({"module._orig_mod.weight": torch.zeros(1)}))
    ['weight']
    """
    names = list(state)
    while names and len(starts := {name.partition(".")[0] for name in names}) == 1 and starts <= _WRAPPERS:
        if any("." not in name for name in names):
            break
        names = [name.partition(".")[2] for name in names]
    return dict(zip(names, state.values(), strict=True))


def _without_counters(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names, or none of them if all are counters."""
    listed = tuple(names)
    return () if all(map(_is_counter, listed)) else listed


def _is_counter(name: str) -> bool:
    return name.rpartition(".")[2] in _COUNTERS
