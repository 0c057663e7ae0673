"""SIGINT and SIGTERM in training: finish the step, save the state, explain how to resume, exit."""

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


class StopRequest:
    """The number of the signal that arrived; 0 before any signal."""

    signal: int = 0


@contextmanager
def watch_signals() -> Iterator[StopRequest]:
    """Record the first signal inside; a second signal is handled by the previous handler."""
    request = StopRequest()
    previous: dict[signal.Signals, object] = {}

    def record(number: int, frame: FrameType | None) -> None:
        request.signal = number
        restore()

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    try:
        for number in SIGNALS:
            previous[number] = signal.signal(number, record)
    except ValueError:  # only the main thread can set handlers: in another thread, the caller handles signals
        pass
    try:
        yield request
    finally:
        restore()
