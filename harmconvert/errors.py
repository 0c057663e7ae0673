"""Errors that a user can act on. Each class has the exit code of the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Argument:
    """An argument that a message names: by its Python name here, by its option on the command line.

    >>> str(Argument("force", True)), str(Argument("example_input"))
    ('force=True', 'example_input')
    """

    name: str
    value: object = None

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name}={self.value}"


class Message(str):
    """A text made of parts. Some parts are arguments, which the command line names by their options.

    >>> message = Message("a.safetensors exists: use ", Argument("force", True), " to replace it")
    >>> message
    'a.safetensors exists: use force=True to replace it'
    >>> message.naming(lambda argument: f"/{argument.name}")
    'a.safetensors exists: use /force to replace it'
    """

    parts: tuple[str | Argument, ...]

    def __new__(cls, *parts: str | Argument) -> Message:
        message = super().__new__(cls, "".join(map(str, parts)))
        message.parts = tuple(
            inner for part in parts for inner in (part.parts if isinstance(part, Message) else (part,))
        )
        return message

    def naming(self, name: Callable[[Argument], str]) -> str:
        """Return the text with the name that ``name`` returns for each argument."""
        return "".join(name(part) if isinstance(part, Argument) else part for part in self.parts)


class HarmconvertError(Exception):
    """Base class of all errors that this package raises on purpose.

    The message says what is wrong, where, and what to do. It is one line.

    Args:
        parts: the message, as `Message` takes it.
    """

    exit_code = 3

    def __init__(self, *parts: str | Argument) -> None:
        super().__init__(Message(*parts))

    def __str__(self) -> str:
        return one_line(self.message)

    @property
    def message(self) -> Message:
        """The message with its parts."""
        message: Message = self.args[0]
        return message


class CheckError(HarmconvertError):
    """A verification failed or a tolerance was exceeded (exit code 1)."""

    exit_code = 1


class UsageError(HarmconvertError, ValueError):
    """The request is wrong: an unknown lambda, an existing output, a pattern without a match (exit code 2)."""

    exit_code = 2


class InputError(HarmconvertError, ValueError):
    """The network or file is unusable: damaged, wrong keys, NaN, nothing to convert (exit code 3)."""

    exit_code = 3


class UserCodeError(InputError):
    """A hook of the network, or its forward, has a bug (exit code 3): no other input would help."""


class OutsideError(HarmconvertError):
    """The system refused: no internet, disk full, no permission, a lock held by another process (exit code 4)."""

    exit_code = 4


class HarmconvertWarning(UserWarning):
    """A warning about something that may be correct but that the user should know. The message is one line."""


class DamageWarning(HarmconvertWarning):
    """A checkpoint was damaged after it was written."""


def shortened(names: list[str], limit: int = 10) -> str:
    """Join the first ``limit`` names for a one-line message and say how many more there are.

    >>> shortened(["a", "b", "c"], limit=2)
    'a, b and 1 more'
    """
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def counted(number: int, what: str) -> str:
    """Return a number with its noun in the singular or plural, for a message.

    >>> counted(1, "image"), counted(2_000, "class"), counted(3, "frequency"), counted(2, "axis")
    ('1 image', '2,000 classes', '3 frequencies', '2 axes')
    """
    if number == 1:
        return f"1 {what}"
    plural = {"axis": "axes", "frequency": "frequencies"}.get(what, f"{what}es" if what.endswith("ss") else f"{what}s")
    return f"{number:,} {plural}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 200 characters of it."""
    return (str(error).strip().splitlines() or [""])[0][:200]


def printable(text: str) -> str:
    r"""Escape control characters, so that a name from a file cannot control the terminal; line breaks stay.

    >>> printable("layer\x1b[31m")
    'layer\\x1b[31m'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    r"""Escape control characters and line breaks, so that a message is one line whatever names it contains.

    >>> one_line("two\nlines")
    'two\\nlines'
    """
    return printable(text).replace("\n", "\\n")
