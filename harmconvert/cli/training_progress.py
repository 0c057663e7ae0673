"""The progress of a training run: bars on a terminal, else lines."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from . import options

if TYPE_CHECKING:
    from ..pipeline.listener import TrainingProgress
    from ..training import StepProgress


@contextmanager
def progress(epochs: int) -> Iterator[TrainingProgress]:
    """Show the progress of a training; yield the functions that report a step, an epoch and a test."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from ..pipeline.listener import TrainingProgress
    from ..pipeline.showing import epoch_line

    console = Console(stderr=True, force_terminal=sys.stderr.isatty())
    if os.environ.get("RANK", "0") != "0" or options.has_verbosity("quiet"):
        yield TrainingProgress()
        return
    if not console.is_terminal:
        yield TrainingProgress(_print_now_and_then(epochs), lambda row: options.say(epoch_line(row, epochs)))
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("training")

        def step_done(at: StepProgress) -> None:
            steps = at.steps or at.step
            right = "" if at.accuracy is None else f"  {at.accuracy:.1%}"
            text = f"{at.epoch + 1}/{epochs}  loss {at.loss:.3f}{right}  {at.images_per_second:,.0f} img/s"
            bar.update(task, completed=at.epoch * steps + at.step, total=epochs * steps, description=text)

        testing = bar.add_task("testing", visible=False)

        def tested(done: int, steps: int | None) -> None:
            if done == 1:
                bar.reset(testing, total=steps)
            bar.update(testing, completed=done, visible=steps is None or done < steps)

        def epoch_done(row: Mapping[str, Any]) -> None:
            bar.console.print(epoch_line(row, epochs), markup=False, highlight=False)

        yield TrainingProgress(step_done, epoch_done, tested)


def _print_now_and_then(epochs: int) -> Callable[[StepProgress], None]:
    last = time.monotonic()

    def step_done(at: StepProgress) -> None:
        nonlocal last
        if time.monotonic() - last > 30:
            last = time.monotonic()
            options.say(
                f"  epoch {at.epoch + 1}/{epochs}, step {at.step}/{at.steps or '?'}: loss {at.loss:.4f}, "
                f"{at.images_per_second:,.0f} images/s"
            )

    return step_done
