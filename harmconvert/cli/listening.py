"""The messages and the progress of library functions, on the command line."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from . import options, training_progress

if TYPE_CHECKING:
    from ..pipeline.listener import TrainingProgress


class CommandLine:
    """A `harmconvert.Listener` that prints on stderr what a function does.

    The message that ``source`` is loading is left out, because `options.begin` printed it.
    """

    def __init__(self, source: str = "") -> None:
        self.loading_message = f"loading {source}"

    def say(self, message: str, *, urgent: bool = False) -> None:
        options.say(message, urgent=urgent)

    def busy(self, what: str) -> AbstractContextManager[Callable[[str], None]]:
        return options.busy(what, printed=what == self.loading_message)

    def progress(self, what: str = "") -> AbstractContextManager[Callable[[int, int, str], None]]:
        return options.progress(what)

    def training(self, epochs: int) -> AbstractContextManager[TrainingProgress]:
        return training_progress.progress(epochs)

    def result(self, result: object) -> None:
        """Print nothing for an intermediate result."""

    def wrote(self, path: str | Path) -> None:
        """Print nothing: the command prints at its end what it wrote."""
