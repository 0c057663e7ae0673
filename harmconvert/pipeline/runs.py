"""What flows that train share: the recipe, the state that is kept, the figures beside the output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..arguments import interrupted
from ..data.datasets import Data
from ..errors import Argument, HarmconvertError, UsageError
from ..files import beside, check_output, metrics_path, state_path
from ..network.distributed import any_rank, rank
from ..training import metrics
from ..training.recipe import Recipe, recipe_named
from ..training.state import StateFile, read_identity
from .finetuning import Setting
from .listener import Listener

Rows = Sequence[Mapping[str, Any]]


def recipe_for(recipe: str | Recipe, changes: Mapping[str, Any], resume: str | Path | None) -> Recipe:
    """A recipe with changes (None changes nothing); of a run that is resumed the one that it was begun with.

    Raises:
        UsageError: no such recipe or setting, or changes that differ from the run that is resumed.
    """
    changes = {key: value for key, value in changes.items() if value is not None}
    if unknown := [key for key in changes if key not in Recipe.__dataclass_fields__]:
        raise UsageError(f"a recipe has no setting {unknown[0]!r}: use {', '.join(Recipe.__dataclass_fields__)}")
    if resume is None:
        return replace(recipe, **changes) if isinstance(recipe, Recipe) else recipe_named(recipe, **changes)
    found = Recipe.from_json(read_identity(resume).get("recipe"))
    for key, value in changes.items():
        if getattr(found, key) != value:
            raise UsageError(
                f"the run of {resume} was begun with {key}={getattr(found, key)}, not {value}: leave it out"
            )
    return found


def data_identity(data: Data, dataset: str, preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """What of the data, and of what is done to it, must be the same for a run to go on; JSON-able."""
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in preprocessing.items()}
    return {**data.identity(), "dataset": dataset, "preprocessing": plain}


def state_file_for(
    output: str | None,
    resume: str | Path | None,
    every: int | None,
    identity: Mapping[str, Any],
    force: bool,
    listener: Listener,
) -> StateFile:
    """Where and when the state of the run that makes ``output`` is saved: beside it, or nowhere without an output.

    Raises:
        UsageError: a new run would replace the state of one that was interrupted.
    """
    path = Path(resume) if resume is not None else state_path(output) if output is not None else None
    if path is not None:
        if any_rank(resume is None and not force and path.exists()):
            raise interrupted(path)
        check_output(path, force=True)
    return StateFile(path, every, identity, resume=resume is not None, say=listener.say)


@contextmanager
def kept(state_file: StateFile) -> Iterator[None]:
    """Errors while the result of a run is written say how to get it all the same."""
    try:
        yield
    except HarmconvertError as error:
        if state_file.path is None:
            raise
        how = Argument("resume", state_file.path)
        raise type(error)(error.message, "; the run is kept: go on with ", how) from error


@contextmanager
def told(setting: Setting, epochs: int, output: str | None, log: str | None, listener: Listener) -> Iterator[Setting]:
    """A setting that tells the listener how a run goes on, and keeps its figures beside the output."""
    record = _recorder(output, log)
    with listener.training(epochs) as progress:

        def after_epoch(rows: Rows) -> None:
            record(rows)
            progress.epoch(rows[-1])

        yield replace(setting, told=progress.step, tested=progress.tested, epoch_done=after_epoch)


def _recorder(output: str | None, log: str | None) -> Callable[[Rows], None]:
    if output is None or rank() > 0:
        return lambda rows: None
    path, events = metrics_path(output), None
    if log == "tensorboard":
        events = metrics.TensorBoardEvents(beside(output, ".tensorboard"))

    def record(rows: Rows) -> None:
        metrics.write_metrics(path, rows)
        if events is not None:
            events.write(rows[-1])

    return record
