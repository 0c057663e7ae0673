"""What the flows of the library say, told on the command line."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from . import options, training_progress

if TYPE_CHECKING:
    from ..pipeline.listener import TrainingProgress


class CommandLine:
    """A `harmconvert.Listener` that says on stderr what a flow does; that it loads ``source`` was said already
    (`options.begin`)."""

    def __init__(self, source: str = "") -> None:
        self.said = f"loading {source}"

    def say(self, message: str, *, urgent: bool = False) -> None:
        options.say(message, urgent=urgent)

    def busy(self, what: str) -> AbstractContextManager[Callable[[str], None]]:
        return options.busy(what, said=what == self.said)

    def progress(self, what: str = "") -> AbstractContextManager[Callable[[int, int, str], None]]:
        return options.progress(what)

    def training(self, epochs: int) -> AbstractContextManager[TrainingProgress]:
        return training_progress.progress(epochs)

    def result(self, result: object) -> None:
        """Nothing is shown of an intermediate result."""

    def wrote(self, path: str | Path) -> None:
        """The command says what was written when all is done."""
