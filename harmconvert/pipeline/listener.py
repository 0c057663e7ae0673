"""How a flow tells its caller what it does: the library prints nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path


class Listener:
    """Receives what a flow says while it works. This one is silent; a subclass overrides what it wants to hear.

    >>> class Printing(Listener):
    ...     def say(self, message, *, urgent=False):
    ...         print(message)
    >>> Printing().say("verifying")
    verifying
    """

    def say(self, message: str, *, urgent: bool = False) -> None:
        """Receive a note; an ``urgent`` one is a warning."""

    def busy(self, what: str) -> AbstractContextManager[Callable[[str], None]]:
        """Surround work of unknown length; gives a function to call with the name of the next step."""
        return nullcontext(lambda what: None)

    def progress(self, what: str = "") -> AbstractContextManager[Callable[[int, int, str], None]]:
        """Surround work of known length; gives a function to call with (steps done, steps, name of the step)."""
        return nullcontext(lambda done, total, what: None)

    def result(self, result: object) -> None:
        """Receive an intermediate result, such as a `Conversion` before it is verified."""

    def wrote(self, path: str | Path) -> None:
        """Receive the path of a file that was written."""


SILENT = Listener()
