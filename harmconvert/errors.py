"""Errors that a user can act on, each kind with the exit code of the command line."""

from __future__ import annotations


class HarmconvertError(Exception):
    """Base of everything this package raises on purpose; the message says what, where and what to do."""

    exit_code = 3

    def __str__(self) -> str:
        return one_line(super().__str__())


class CheckError(HarmconvertError):
    """A verification or a tolerance was missed (exit code 1)."""

    exit_code = 1


class UsageError(HarmconvertError, ValueError):
    """The request itself cannot be carried out: unknown lambda, existing output, no match (exit code 2)."""

    exit_code = 2


class InputError(HarmconvertError, ValueError):
    """The network or file given is unusable: corrupt, wrong keys, NaN, nothing to convert (exit code 3)."""

    exit_code = 3


class OutsideError(HarmconvertError):
    """The world outside refused: no network, disk full, no permission, lock held (exit code 4)."""

    exit_code = 4


class HarmconvertWarning(UserWarning):
    """Something that may be all right, and that a user should know of; one line, as errors are."""


class DamageWarning(HarmconvertWarning):
    """A checkpoint is not as it was written."""


def shortened(names: list[str], limit: int = 10) -> str:
    """Join names for a one-line message, the first ``limit`` in full.

    >>> shortened(["a", "b", "c"], limit=2)
    'a, b and 1 more'
    """
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def counted(number: int, what: str) -> str:
    """A number of things, in words for a message.

    >>> counted(1, "image"), counted(2_000, "class"), counted(3, "frequency"), counted(2, "axis")
    ('1 image', '2,000 classes', '3 frequencies', '2 axes')
    """
    if number == 1:
        return f"1 {what}"
    plural = {"axis": "axes", "frequency": "frequencies"}.get(what, f"{what}es" if what.endswith("ss") else f"{what}s")
    return f"{number:,} {plural}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 200 characters."""
    return (str(error).strip().splitlines() or [""])[0][:200]


def printable(text: str) -> str:
    r"""A text for a terminal: names come from files, and no control character in one may do anything there.

    >>> printable("layer\x1b[31m")
    'layer\\x1b[31m'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    r"""The same with line breaks escaped, too: what a message is, whatever the names in it.

    >>> one_line("two\nlines")
    'two\\nlines'
    """
    return printable(text).replace("\n", "\\n")
