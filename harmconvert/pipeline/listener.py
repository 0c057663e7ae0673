"""How a flow tells its caller what it does: the library prints nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..training.loop import StepProgress


def _nothing(*_: Any) -> None:
    return


class TrainingProgress(NamedTuple):
    """What a training calls.

    ``step``: with running means of the epoch, after a look at the losses; ``epoch``: with the epoch's row of figures;
    ``tested``: with (batches tested, batches), the latter None of a stream.
    """

    step: Callable[[StepProgress], None] = _nothing
    epoch: Callable[[Mapping[str, Any]], None] = _nothing
    tested: Callable[[int, int | None], None] = _nothing


class Listener(Protocol):
    """Receives what a flow says while it works. A subclass overrides what it wants to hear; the rest stays silent.

    >>> class Printing(Listener):
    ...     def say(self, message, *, urgent=False):
    ...         print(message)
    >>> Printing().say("verifying")
    verifying
    """

    def say(self, message: str, *, urgent: bool = False) -> None:
        """Receive a note; an ``urgent`` one is a warning."""
        return

    def busy(self, what: str) -> AbstractContextManager[Callable[[str], None]]:
        """Surround work of unknown length; gives a function to call with the name of the next step."""
        return nullcontext(lambda what: None)

    def progress(self, what: str = "") -> AbstractContextManager[Callable[[int, int, str], None]]:
        """Surround work of known length; gives a function to call with (steps done, steps, name of the step)."""
        return nullcontext(lambda done, total, what: None)

    def training(self, epochs: int) -> AbstractContextManager[TrainingProgress]:
        """Surround a training; gives the functions to call while it goes on."""
        return nullcontext(TrainingProgress())

    def result(self, result: object) -> None:
        """Receive an intermediate result, such as a `Conversion` before it is verified."""
        return

    def wrote(self, path: str | Path) -> None:
        """Receive the path of a file that was written."""
        return


class Silent(Listener):
    """Hears nothing."""


SILENT = Silent()
