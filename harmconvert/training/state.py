"""The state of a run on disk: whole at every moment, continued bit for bit on a CPU."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..documents import check, count, json_value, number
from ..errors import HarmconvertError, InputError, OutsideError, UsageError, counted, first_line, shortened
from ..files import locked, write_file
from ..files import state_path as state_path
from ..network.distributed import all_or_none, any_rank, gathered, rank, world_size
from ..storage.unpickling import UNREADABLE, unpickled, why_no_values, why_not_read
from ..storage.weights import why_unreadable

STATE_VERSION = 1
_SHAPE = {
    "version": count,
    "identity": {...: json_value},
    "record": {...: json_value},
    "position": {"epoch": count, "step": count, "sums": [number], "rows": [{...: json_value}]},
    "random": [dict],
    "model": {},
}


@dataclass(frozen=True)
class Position:
    """How far a run has come: steps of the current epoch that are done, their sums, a row for each epoch before."""

    epoch: int = 0
    step: int = 0
    sums: tuple[float, ...] = (0.0, 0.0, 0.0)  # loss x images, right ones, images
    rows: tuple[Mapping[str, Any], ...] = ()


@dataclass
class Keeper:
    """Keeps a run's state in ``path`` (None: nowhere), every epoch and every ``every`` steps, and a record with it.

    ``identity`` is what must be the same for a run to go on: recipe, plan, data. The state before the newest is kept
    beside it as ``PATH.previous``, for the case that a disk spoils the newest.
    """

    path: Path | None = None
    every: int | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    say: Callable[[str], None] = lambda message: None
    _spoilt: bool = field(default=False, init=False)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let no other run keep its state in the same place meanwhile. Every process must enter it.

        Raises:
            OutsideError: another run does (in every process).
        """
        with ExitStack() as held:
            if (path := self.path) is not None:
                lock = locked(path.with_name(f".{path.name}.lock"), f"training with {path}")
                refused = OutsideError(f"another run is training with {path}: wait for it, or name another output")
                all_or_none(lambda: held.enter_context(lock) if rank() == 0 else None, refused)
            yield

    def due(self, step: int) -> bool:
        """Whether to save after so many steps of an epoch."""
        return self.path is not None and self.every is not None and step % self.every == 0

    def save(self, position: Position, content: Callable[[], Mapping[str, Any]]) -> None:
        """Write the state; the old one stays where that fails. Every process must call it.

        Raises:
            OutsideError: the disk is full, permission is missing (in every process).
        """
        if self.path is None:
            return
        random_states = gathered(_random_state())
        problem: HarmconvertError | None = None
        if rank() == 0:
            whole = {
                "version": STATE_VERSION,
                "identity": dict(self.identity),
                "record": dict(self.record),
                "position": asdict(position),
                "random": random_states,
                **content(),
            }
            try:
                if not self._spoilt:  # else it would take the place of the one that can be read
                    _keep_previous(self.path)
                write_file(self.path, lambda staging: _save(whole, staging), force=True)
                self._spoilt = False
            except HarmconvertError as error:
                problem = error
        if any_rank(problem is not None):
            raise problem or OutsideError(f"the first process could not write {self.path}")

    def load(self, path: Path) -> tuple[Position, Mapping[str, Any]]:
        """The position and content of a state, and this process's random numbers as they were.

        Raises:
            InputError: neither it nor the one before can be read. UsageError: it is the state of another run.
        """
        whole, self._spoilt = _read_either(path, self.say)
        for key, value in self.identity.items():
            if (found := whole["identity"].get(key)) != value:
                raise UsageError(f"{path} is the state of another run: {_difference(key, found, value)}")
        if rank() < len(whole["random"]):
            try:
                _set_random_state(whole["random"][rank()])
            except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
                raise InputError(f"{path} holds random numbers that are none: {first_line(error)}") from error
        if len(whole["random"]) != world_size():
            self.say(f"note: {path} is of {counted(len(whole['random']), 'process')}, so random numbers will differ")
        position = Position(**whole["position"])
        return replace(position, sums=tuple(position.sums), rows=tuple(position.rows)), whole

    def remove(self) -> None:
        """The run is over: its state is of no more use."""
        if self.path is not None and rank() == 0:
            for path in (self.path, _previous(self.path)):
                with suppress(OSError):
                    path.unlink(missing_ok=True)


def identity_of(path: str | Path) -> Mapping[str, Any]:
    """The identity (recipe and more) of the run whose state this is; raises InputError where it cannot be read."""
    return dict(_read_either(Path(path))[0]["identity"])


def record_of(path: str | Path) -> Mapping[str, Any]:
    """The record kept with the state; raises InputError where it cannot be read."""
    return dict(_read_either(Path(path))[0]["record"])


def _read_either(path: Path, say: Callable[[str], None] = lambda message: None) -> tuple[Any, bool]:
    """A state, and whether it is the one before the newest, because that is spoilt."""
    previous = _previous(path)
    try:
        return _read(path), False
    except InputError as error:
        if not previous.exists():
            raise
        say(f"warning: {error}; going on from the one before it, {previous}")
        return _read(previous), True


def _difference(key: str, found: Any, value: Any) -> str:
    """What of an identity is not the same, in a few words."""
    if isinstance(found, Mapping) and isinstance(value, Mapping):
        differing = [name for name in {**found, **value} if found.get(name) != value.get(name)]
        first = found.get(differing[0])
        if len(differing) == 1 and (isinstance(first, Mapping) or len(str(first)) < 60):
            return _difference(f"{key}'s {differing[0]}", first, value.get(differing[0]))
        return f"its {key} differs in {shortened(differing, 5)}"
    return f"its {key} was {found}, here it is {value}"


def _save(whole: Mapping[str, Any], staging: Path) -> None:
    try:
        torch.save(dict(whole), staging)
    except RuntimeError as error:  # what torch's zip writer makes of a full disk
        raise OutsideError(
            f"cannot save the training state: {first_line(error)}; free some space, the state before is as it was"
        ) from error


def _read(path: Path) -> Any:
    if reason := why_unreadable(path):
        raise InputError(f"{path} {reason}")
    try:
        whole = unpickled(path)
    except UNREADABLE as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no readable training state: {why_not_read(path, error)}") from error
    try:
        check(whole, _SHAPE, "it")
        _check_tensors(whole, "it")
        if missing := [key for key in _SHAPE if key not in whole]:
            raise ValueError(f"it has no {missing[0]}")
        if whole["version"] != STATE_VERSION:
            raise InputError(f"{path} has version {whole['version']!r}, this harmconvert reads version {STATE_VERSION}")
        if len(Position(**whole["position"]).sums) != len(Position.sums):
            raise ValueError("its sums are not three")
    except InputError:
        raise
    except UNREADABLE as error:
        raise InputError(
            f"{path} is no readable training state: {first_line(error) or type(error).__name__}"
        ) from error
    return whole


def _check_tensors(value: Any, where: str) -> None:
    """Raise ValueError where a tensor, at any depth, is none that a run keeps."""
    if isinstance(value, torch.Tensor) and (reason := why_no_values(value)):
        raise ValueError(f"{where} {reason}")
    if isinstance(value, Mapping | list | tuple):
        for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            _check_tensors(part, f"{where}: {key!s:.80}")


def _previous(path: Path) -> Path:
    return path.with_name(path.name + ".previous")


def _keep_previous(path: Path) -> None:
    if not path.exists():
        return
    with suppress(OSError):  # no hard links here: then there is one state only
        staging = _previous(path).with_suffix(".linking")
        staging.unlink(missing_ok=True)
        os.link(path, staging)
        staging.replace(_previous(path))


def _random_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    numpy = [str(name), torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest]
    return {"torch": torch.get_rng_state(), "cuda": cuda, "numpy": numpy, "python": random.getstate()}


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, numbers, extra = state["python"]
    random.setstate((version, tuple(numbers), extra))
