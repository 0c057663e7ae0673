"""The state of a training run in a file, written atomically. On a CPU, a resumed run is equal bit for bit."""

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
from ..storage.unpickling import UNREADABLE, read_pickle, why_pickle_unreadable, why_tensor_refused
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
    """The position of a run: finished epochs and steps, sums over these steps, a row of metrics for each epoch."""

    epoch: int = 0
    step: int = 0
    sums: tuple[float, ...] = (0.0, 0.0, 0.0)  # loss x images, correct images, images
    rows: tuple[Mapping[str, Any], ...] = ()


@dataclass
class StateFile:
    """The file with a run's state: ``path`` (None: nothing is saved), written every epoch and every ``every`` steps.

    ``resume``: the run continues from the state in the file. ``identity`` (recipe, plan, data) must be the same when a
    run is resumed. ``record`` is stored in the file, too. The state before the newest one is kept as ``PATH.previous``,
    in case the disk corrupts the newest.
    """

    path: Path | None = None
    every: int | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    resume: bool = False
    say: Callable[[str], None] = lambda message: None
    _corrupt: bool = field(default=False, init=False)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the file against other runs inside. Every process must enter this context.

        Raises:
            OutsideError: another run has the lock (raised in every process).
        """
        with ExitStack() as stack:
            if (path := self.path) is not None:
                lock = locked(path.with_name(f".{path.name}.lock"), f"training with {path}")
                refused = OutsideError(f"another run is training with {path}: wait for it, or name another output")
                all_or_none(lambda: stack.enter_context(lock) if rank() == 0 else None, refused)
            yield

    def is_due(self, step: int) -> bool:
        """Return whether to save after this step of an epoch."""
        return self.path is not None and self.every is not None and step % self.every == 0

    def save(self, position: Position, state_dict: Callable[[], Mapping[str, Any]]) -> None:
        """Write the state; if writing fails, the old state stays. Every process must call this method.

        Raises:
            OutsideError: the disk is full or permission is missing (raised in every process).
        """
        if self.path is None:
            return
        random_states = gathered(_random_state())
        problem: HarmconvertError | None = None
        if rank() == 0:
            state = {
                "version": STATE_VERSION,
                "identity": dict(self.identity),
                "record": dict(self.record),
                "position": asdict(position),
                "random": random_states,
                **state_dict(),
            }
            try:
                if not self._corrupt:  # a corrupt state must not replace the readable previous one
                    _keep_previous(self.path)
                write_file(self.path, lambda staging: _save(state, staging), force=True)
                self._corrupt = False
            except HarmconvertError as error:
                problem = error
        if any_rank(problem is not None):
            raise problem or OutsideError(f"the first process could not write {self.path}")

    def load(self) -> tuple[Position, Mapping[str, Any]]:
        """Return the position and the saved state of a run, and restore this process's random numbers.

        Raises:
            InputError: neither the newest nor the previous state can be read.
            UsageError: the file has the state of another run.
        """
        path = self.path
        assert path is not None
        state, self._corrupt = _read_or_previous(path, self.say)
        for key, value in self.identity.items():
            if (stored := state["identity"].get(key)) != value:
                raise UsageError(f"{path} is the state of another run: {_difference(key, stored, value)}")
        if rank() < len(state["random"]):
            try:
                _set_random_state(state["random"][rank()])
            except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
                raise InputError(f"{path} holds invalid random states: {first_line(error)}") from error
        if len(state["random"]) != world_size():
            self.say(
                f"note: {path} was written by {counted(len(state['random']), 'process')}, so random numbers will differ"
            )
        position = Position(**state["position"])
        return replace(position, sums=tuple(position.sums), rows=tuple(position.rows)), state

    def remove(self) -> None:
        """Delete the newest and the previous state, at the end of a run."""
        if self.path is not None and rank() == 0:
            for path in (self.path, _previous(self.path), _linking(self.path)):
                with suppress(OSError):
                    path.unlink(missing_ok=True)


def read_identity(path: str | Path) -> Mapping[str, Any]:
    """Return the identity (recipe, plan, data) in a state file; raise InputError if the file cannot be read."""
    return dict(_read_or_previous(Path(path))[0]["identity"])


def read_record(path: str | Path) -> Mapping[str, Any]:
    """Return the record in a state file; raise InputError if the file cannot be read."""
    return dict(_read_or_previous(Path(path))[0]["record"])


def _read_or_previous(path: Path, say: Callable[[str], None] = lambda message: None) -> tuple[Any, bool]:
    """Return the newest state that can be read, and whether the newest one is corrupt."""
    previous = _previous(path)
    try:
        return _read(path), False
    except InputError as error:
        if not previous.exists():
            raise
        say(f"warning: {error}; resuming from the previous state, {previous}")
        return _read(previous), True


def _difference(key: str, stored: Any, value: Any) -> str:
    """Describe which entry of an identity differs."""
    if isinstance(stored, Mapping) and isinstance(value, Mapping):
        differing = [name for name in {**stored, **value} if stored.get(name) != value.get(name)]
        first = stored.get(differing[0])
        if len(differing) == 1 and (isinstance(first, Mapping) or len(str(first)) < 60):
            return _difference(f"{key}'s {differing[0]}", first, value.get(differing[0]))
        return f"its {key} differs in {shortened(differing, 5)}"
    return f"its {key} was {stored}, here it is {value}"


def _save(state: Mapping[str, Any], staging: Path) -> None:
    try:
        torch.save(dict(state), staging)
    except RuntimeError as error:  # torch's zip writer raises it if the disk is full
        raise OutsideError(
            f"cannot save the training state: {first_line(error)}; free some space (the last saved state is unchanged)"
        ) from error


def _read(path: Path) -> Any:
    if reason := why_unreadable(path):
        raise InputError(f"{path} {reason}")
    try:
        state = read_pickle(path)
    except UNREADABLE as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not a readable training state: {why_pickle_unreadable(path, error)}") from error
    try:
        check(state, _SHAPE, "it")
        _check_tensors(state, "it")
        if missing := [key for key in _SHAPE if key not in state]:
            raise ValueError(f"it has no {missing[0]}")
        if state["version"] != STATE_VERSION:
            raise InputError(f"{path} has version {state['version']!r}, this harmconvert reads version {STATE_VERSION}")
        if len(Position(**state["position"]).sums) != len(Position.sums):
            raise ValueError("it does not have three sums")
    except InputError:
        raise
    except UNREADABLE as error:
        raise InputError(
            f"{path} is not a readable training state: {first_line(error) or type(error).__name__}"
        ) from error
    return state


def _check_tensors(value: Any, where: str) -> None:
    """Raise ValueError if a tensor at any depth is of a kind that a training state does not have."""
    if isinstance(value, torch.Tensor) and (reason := why_tensor_refused(value)):
        raise ValueError(f"{where} {reason}")
    if isinstance(value, Mapping | list | tuple):
        for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            _check_tensors(part, f"{where}: {key!s:.80}")


def _previous(path: Path) -> Path:
    return path.with_name(path.name + ".previous")


def _linking(path: Path) -> Path:
    """Return the name that the previous state has for a moment; a process that is killed then leaves it behind."""
    return _previous(path).with_suffix(".linking")


def _keep_previous(path: Path) -> None:
    if not path.exists():
        return
    with suppress(OSError):  # a file system without hard links keeps only the newest state
        staging = _linking(path)
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
