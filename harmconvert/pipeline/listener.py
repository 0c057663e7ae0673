"""The interface that receives the messages and the progress of a flow. The library itself prints nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..training.loop import StepProgress


def _ignore(*_: Any) -> None:
    return


class TrainingProgress(NamedTuple):
    """Functions that a training calls.

    ``step`` receives the running means of the epoch, ``epoch`` the row of metrics of an epoch, ``tested`` the number of
    tested batches and the number of all batches (None for a stream).
    """

    step: Callable[[StepProgress], None] = _ignore
    epoch: Callable[[Mapping[str, Any]], None] = _ignore
    tested: Callable[[int, int | None], None] = _ignore


class Listener(Protocol):
    """Receive the messages of a flow while it works. A subclass overrides the methods that it needs.

    >>> class Printing(Listener):
    ...     def say(self, message, *, urgent=False):
    ...         print(message)
    >>> Printing().say("verifying")
    verifying
    """

    def say(self, message: str, *, urgent: bool = False) -> None:
        """Receive a message; an ``urgent`` one is a warning."""
        return

    def busy(self, what: str) -> AbstractContextManager[Callable[[str], None]]:
        """Surround work of unknown length; yield a function that receives the name of the next step."""
        return nullcontext(lambda what: None)

    def progress(self, what: str = "") -> AbstractContextManager[Callable[[int, int, str], None]]:
        """Surround work of known length; yield a function that receives (steps done, steps, name of the step)."""
        return nullcontext(lambda done, total, what: None)

    def training(self, epochs: int) -> AbstractContextManager[TrainingProgress]:
        """Surround a training; yield the functions that receive its progress."""
        return nullcontext(TrainingProgress())

    def result(self, result: object) -> None:
        """Receive an intermediate result, such as a `Conversion` before it is verified."""
        return

    def wrote(self, path: str | Path) -> None:
        """Receive the path of a file that was written."""
        return


class Silent(Listener):
    """Ignore all messages."""


SILENT = Silent()
