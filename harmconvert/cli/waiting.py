"""The progress of long work: a bar with the remaining time, or a spinner if that time is not known."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from ..errors import printable
from .verbosity import has_verbosity, say, silent

_QUIET_SECONDS = 2.0  # short work prints no message
_MOST_COLUMNS = 60  # of a description, so that it fits on its line


@contextmanager
def progress(what: str = "") -> Iterator[Callable[[int, int, str], None]]:
    """Show a bar on stderr with the remaining time; yield the function that reports a step.

    If stderr is no terminal, print a line for each tenth of the work after the first two seconds. ``what`` describes
    the work before the first step.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, force_terminal=sys.stderr.isatty())  # and not only because of FORCE_COLOR
    if silent():
        yield lambda done, total, what: None
        return
    if not console.is_terminal:
        with _print_if_slow(what):
            yield _print_tenths()
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=printable(what[-40:]))


@contextmanager
def busy(what: str, *, at_once: bool = False, printed: bool = False) -> Iterator[Callable[[str], None]]:
    """Show a spinner on stderr with the elapsed time; yield the function that changes the description.

    If stderr is no terminal, print a line after two seconds, or ``at_once``, unless it was ``printed`` before.
    """
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    stderr = sys.stderr
    console = Console(file=stderr, force_terminal=stderr.isatty())
    if silent():
        yield lambda what: None
        return
    if not console.is_terminal:
        now = at_once or has_verbosity("verbose")
        if now and not printed:
            say(what)
        with _print_if_slow("" if now or printed else what):
            yield say
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, redirect_stderr=False) as spinner:
        task = spinner.add_task(printable(what[-_MOST_COLUMNS:]), total=None)
        sys.stderr = _SpinnerStopper(stderr, spinner.stop)
        try:
            yield lambda what: spinner.update(task, description=printable(what[-_MOST_COLUMNS:]))
        finally:
            sys.stderr = stderr


class _SpinnerStopper:
    """A stream that stops a spinner as soon as other code writes to it, such as the progress bar of a download."""

    def __init__(self, stream: TextIO, stop: Callable[[], None]) -> None:
        self._stream, self._stop = stream, stop

    def write(self, text: str) -> int:
        self._stop()
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _print_if_slow(what: str) -> Iterator[None]:
    """Print the name of the work inside if it takes more than some seconds."""
    timer = threading.Timer(_QUIET_SECONDS, say, [f"  {what}"])
    timer.daemon = True
    if what:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _print_tenths() -> Callable[[int, int, str], None]:
    last, start = -1, time.monotonic()

    def report(done: int, total: int, what: str) -> None:
        nonlocal last
        steps = total if has_verbosity("verbose") else min(10, total)
        late = has_verbosity("verbose") or time.monotonic() - start > _QUIET_SECONDS
        if total and late and done * steps // total > last:
            last = done * steps // total
            say(f"  {done}/{total} {what}")

    return report
