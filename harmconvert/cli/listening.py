"""What the flows of the library say, told on the command line."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from ..pipeline.listener import Listener
from . import options


class CommandLine(Listener):
    """Says on stderr what a flow does; that it loads ``source`` was said already (`options.begin`)."""

    def __init__(self, source: str = "") -> None:
        self.said = f"loading {source}"

    def say(self, message: str, *, urgent: bool = False) -> None:
        options.say(message, urgent=urgent)

    def busy(self, what: str) -> AbstractContextManager[Callable[[str], None]]:
        return options.busy(what, said=what == self.said)

    def progress(self, what: str = "") -> AbstractContextManager[Callable[[int, int, str], None]]:
        return options.progress(what)
