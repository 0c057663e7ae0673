"""SIGINT and SIGTERM in training: finish the step, save the state, say how to resume, exit."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ..errors import HarmconvertError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class SignalError(HarmconvertError):
    """A signal ended the training; the state is saved (exit code 130 or 143)."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class Request:
    """The number of the signal that arrived, or 0."""

    signal: int = 0


@contextmanager
def asked_to_stop() -> Iterator[Request]:
    """Record the first signal inside; a second one is handled as it was before."""
    request = Request()
    before: dict[signal.Signals, object] = {}

    def note(number: int, frame: FrameType | None) -> None:
        request.signal = number
        restore()

    def restore() -> None:
        for which, handler in before.items():
            signal.signal(which, handler)  # type: ignore[arg-type]

    try:
        for which in SIGNALS:
            before[which] = signal.signal(which, note)
    except ValueError:  # not the main thread: the caller handles signals
        pass
    try:
        yield request
    finally:
        restore()
