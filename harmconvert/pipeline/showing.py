"""What Python users see of a flow: log records, and progress bars in an interactive session."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..calibration import Progress
from ..errors import counted
from ..training.loop import StepProgress
from .listener import SILENT, Listener, TrainingProgress

if TYPE_CHECKING:
    from tqdm.auto import tqdm

log = logging.getLogger("harmconvert")
_MOST_COLUMNS = 40  # of a description, so that the bar fits on its line


def listener_for(listener: Listener | None, progress: bool | None) -> Listener:
    """Return the listener of a flow: the caller's, or one that logs the stages and shows bars if ``progress`` says so.

    ``progress`` None: in an interactive session (a Python prompt, IPython, a notebook). Only the first process reports.
    """
    if listener is not None:
        return listener
    if os.environ.get("RANK", "0") != "0":
        return SILENT
    return Shown(_interactive() if progress is None else progress)


@contextmanager
def reported(progress: Progress | bool | None, what: str) -> Iterator[Progress]:
    """Yield the caller's function for the progress of a flow, or one that logs the stages and shows a bar."""
    if callable(progress):
        yield progress
    else:
        with listener_for(None, progress).progress(what) as report:
            yield report


def _interactive() -> bool:
    return hasattr(sys, "ps1")  # Python's own prompt sets it, and so does IPython, also in a notebook


class Shown(Listener):
    """Log each message and each stage at level INFO, warnings at WARNING; show bars on stderr if ``bars`` is set."""

    def __init__(self, bars: bool) -> None:
        self.bars = bars

    def say(self, message: str, *, urgent: bool = False) -> None:
        log.log(logging.WARNING if urgent else logging.INFO, "%s", message.removeprefix("warning: "))

    @contextmanager
    def busy(self, what: str) -> Iterator[Callable[[str], None]]:
        log.info("%s", what)
        with self._bar(what) as bar:
            yield lambda step: bar.set_description_str(step[-_MOST_COLUMNS:])

    @contextmanager
    def progress(self, what: str = "") -> Iterator[Callable[[int, int, str], None]]:
        stage = 0  # the number of steps of the last stage

        with self._bar(what) as bar:

            def report(done: int, total: int, step: str) -> None:
                nonlocal stage
                if total != stage:
                    stage = total
                    log.info("%s", ", ".join(filter(None, (what, counted(total, "step"), step))))
                _move(bar, done, total, step)

            yield report

    @contextmanager
    def training(self, epochs: int) -> Iterator[TrainingProgress]:
        with self._bar("training") as bar:

            def step_done(at: StepProgress) -> None:
                steps = at.steps or at.step
                _move(bar, at.epoch * steps + at.step, epochs * steps, f"epoch {at.epoch + 1}, loss {at.loss:.3f}")

            def epoch_done(row: Mapping[str, Any]) -> None:
                log.info("%s", epoch_line(row, epochs))

            yield TrainingProgress(step_done, epoch_done)

    def wrote(self, path: str | Path) -> None:
        log.info("wrote %s", path)

    def _bar(self, what: str) -> AbstractContextManager[tqdm[Any]]:
        from tqdm.auto import tqdm

        return tqdm(desc=what[-_MOST_COLUMNS:], leave=False, disable=not self.bars)


def _move(bar: tqdm[Any], done: int, total: int, step: str) -> None:
    """Set the position of a bar; a stage with another number of steps starts the bar again."""
    if bar.total != total or done < bar.n:
        bar.reset(total)
    bar.set_description_str(step[-_MOST_COLUMNS:], refresh=False)
    bar.update(done - bar.n)


def epoch_line(row: Mapping[str, Any], epochs: int) -> str:
    """Return one line with the results of an epoch."""
    tested = ""
    known = ("test_top1", "test_top5", "test_loss", "test_agreement", "test_divergence")
    metric = next((key for key in row if key.startswith("test_") and key not in known), None)
    if metric is not None:
        tested = f", test {metric.removeprefix('test_')} {row[metric]:.4g}"
    elif row.get("test_top1") is not None:
        tested = f", test top-1 {row['test_top1']:.2%}"
    elif row.get("test_agreement") is not None:
        tested = f", test agreement {row['test_agreement']:.2%}"
    speed = row["images"] / max(row["seconds"], 1e-9)
    return f"epoch {row['epoch']}/{epochs}: loss {row['loss']:.4f}{tested}, lr {row['lr']:.3g}, {speed:,.0f} images/s"
