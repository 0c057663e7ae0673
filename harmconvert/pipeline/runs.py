"""Shared code of the flows that train: the recipe, the saved state, and the metrics beside the output."""

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
from .finetuning import TrainingSetup
from .listener import Listener

Rows = Sequence[Mapping[str, Any]]


def recipe_for(recipe: str | Recipe, changes: Mapping[str, Any], resume: str | Path | None) -> Recipe:
    """Return a recipe with changes (None: no change); for a resumed run, the recipe of the first run.

    Raises:
        UsageError: the recipe or a setting is unknown, or a change differs from the recipe of the first run.
    """
    changes = {key: value for key, value in changes.items() if value is not None}
    if unknown := [key for key in changes if key not in Recipe.__dataclass_fields__]:
        raise UsageError(f"a recipe has no setting {unknown[0]!r}: use {', '.join(Recipe.__dataclass_fields__)}")
    if resume is None:
        return replace(recipe, **changes) if isinstance(recipe, Recipe) else recipe_named(recipe, **changes)
    first = Recipe.from_json(read_identity(resume).get("recipe"))
    for key, value in changes.items():
        if getattr(first, key) != value:
            raise UsageError(f"the run of {resume} started with {key}={getattr(first, key)}, not {value}: leave it out")
    return first


def data_identity(data: Data, dataset: str, preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must not change in the data and its pre-processing when a run is resumed, as JSON values."""
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
    """Return the state_file that saves the state of a run beside its output; without an output it saves nothing.

    Raises:
        UsageError: a new run would replace the state of an interrupted run.
    """
    path = Path(resume) if resume is not None else state_path(output) if output is not None else None
    if path is not None:
        if any_rank(resume is None and not force and path.exists()):
            raise interrupted(path)
        check_output(path, force=True)
    return StateFile(path, every, identity, resume=resume is not None, say=listener.say)


@contextmanager
def resume_hint(state_file: StateFile) -> Iterator[None]:
    """Add to errors inside that the run can be resumed from its saved state."""
    try:
        yield
    except HarmconvertError as error:
        if state_file.path is None:
            raise
        resume = Argument("resume", state_file.path)
        raise type(error)(error.message, "; the state of the run is saved: go on with ", resume) from error


@contextmanager
def reporting(
    setup: TrainingSetup, epochs: int, output: str | None, log: str | None, listener: Listener
) -> Iterator[TrainingSetup]:
    """Yield a setup that reports progress to the listener and writes the metrics of each epoch beside the output."""
    record = _metrics_writer(output, log)
    with listener.training(epochs) as progress:

        def after_epoch(rows: Rows) -> None:
            record(rows)
            progress.epoch(rows[-1])

        yield replace(setup, on_step=progress.step, on_test_batch=progress.tested, epoch_done=after_epoch)


def _metrics_writer(output: str | None, log: str | None) -> Callable[[Rows], None]:
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
