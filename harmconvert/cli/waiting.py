"""The progress of long work: a bar with the remaining time, or a spinner if that time is not known."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from ..errors import printable
from .loudness import loud, say, silent

_SOON = 2.0  # seconds without a message
_WIDEST = 60  # columns of a description, so that it fits on its line


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
        with _late(what):
            yield _in_tenths()
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=printable(what[-40:]))


@contextmanager
def busy(what: str, *, at_once: bool = False, said: bool = False) -> Iterator[Callable[[str], None]]:
    """Show a spinner on stderr with the elapsed time; yield the function that changes the description.

    If stderr is no terminal, print a line after two seconds, or ``at_once``. Print no line if it was ``said`` before.
    """
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    stderr = sys.stderr
    console = Console(file=stderr, force_terminal=stderr.isatty())
    if silent():
        yield lambda what: None
        return
    if not console.is_terminal:
        now = at_once or loud("verbose")
        if now and not said:
            say(what)
        with _late("" if now or said else what):
            yield say
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, redirect_stderr=False) as spinner:
        task = spinner.add_task(printable(what[-_WIDEST:]), total=None)
        sys.stderr = _StepsAside(stderr, spinner.stop)
        try:
            yield lambda what: spinner.update(task, description=printable(what[-_WIDEST:]))
        finally:
            sys.stderr = stderr


class _StepsAside:
    """A stream that stops a spinner as soon as other code writes to it, such as the progress bar of a download."""

    def __init__(self, stream: TextIO, stop: Callable[[], None]) -> None:
        self._stream, self._stop = stream, stop

    def write(self, text: str) -> int:
        self._stop()
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _late(what: str) -> Iterator[None]:
    """Print what is done after it has taken some seconds."""
    timer = threading.Timer(_SOON, say, [f"  {what}"])
    timer.daemon = True
    if what:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _in_tenths() -> Callable[[int, int, str], None]:
    told, start = -1, time.monotonic()

    def tell(done: int, total: int, what: str) -> None:
        nonlocal told
        steps = total if loud("verbose") else min(10, total)
        late = loud("verbose") or time.monotonic() - start > _SOON
        if total and late and done * steps // total > told:
            told = done * steps // total
            say(f"  {done}/{total} {what}")

    return tell
