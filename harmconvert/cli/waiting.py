"""What is seen of work that takes long: a bar with the time left, a spinner where nobody can tell that."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from ..errors import printable
from .loudness import loud, say, silent

_SOON = 2.0  # seconds that need no explanation
_WIDEST = 60  # columns of a description, so that it stays on its line


@contextmanager
def progress(what: str = "") -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr with the time left; where that is no terminal, a line for every tenth of a way of over two
    seconds. ``what`` is done until the first step is told."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, force_terminal=sys.stderr.isatty())  # and not where FORCE_COLOR alone says so
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
    """A spinner on stderr with the time so far; where that is no terminal, a line when two seconds are over, or
    ``at_once``, or none because it was ``said`` before. Yields what to call when something else is done."""
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
    """A terminal on which a spinner turns until somebody else has something to write: a bar of a download, say, which
    knows more."""

    def __init__(self, stream: TextIO, stop: Callable[[], None]) -> None:
        self._stream, self._stop = stream, stop

    def write(self, text: str) -> int:
        self._stop()
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _late(what: str) -> Iterator[None]:
    """Say what is done once it has taken long."""
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
