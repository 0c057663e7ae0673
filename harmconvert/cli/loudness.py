"""The messages of a command, and --quiet and --verbose."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable
from typing import Any

import click

from ..errors import printable
from .advice import adapted

NOTHING_WRITTEN = "no output was written"
_KEPT = "harmconvert.kept"
_LOUDNESS, _START = "harmconvert.loudness", "harmconvert.start"


def loudness(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --quiet and --verbose, for commands whose result is a file or an exit code."""
    for name, letter, text in (
        ("verbose", "-v", "Print the time of each message, and every step if no progress bar is shown."),
        ("quiet", "-q", "Print only errors, failed checks, and the document of --json."),
    ):
        command = click.option(f"--{name}", letter, is_flag=True, expose_value=False, callback=_remember, help=text)(
            command
        )
    return command


def _remember(context: click.Context, option: click.Parameter, given: bool) -> None:
    if given and context.meta.get(_LOUDNESS, option.name) != option.name:
        raise click.UsageError("--quiet and --verbose: give one of them", context)
    if given:
        context.meta[_LOUDNESS] = option.name
        context.meta[_START] = time.monotonic()
        if option.name == "verbose":
            _say_what_is_logged(context)


def _say_what_is_logged(context: click.Context) -> None:
    """Print what the library logs until the command ends: where it uses a second method, and why."""
    log, handler = logging.getLogger("harmconvert"), _Said()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)

    def stop() -> None:
        log.removeHandler(handler)
        log.setLevel(level)

    context.call_on_close(stop)


class _Said(logging.Handler):
    """Print log records as messages of the command."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def keep(what: Callable[[], str]) -> None:
    """Set the text that says what is kept if the command is interrupted from now on."""
    click.get_current_context().meta[_KEPT] = what


def kept(context: click.Context | None) -> str:
    """Return what is kept if the command is interrupted now."""
    what = context.meta.get(_KEPT) if context else None
    return str(what()) if what else NOTHING_WRITTEN


def loud(name: str) -> bool:
    """Return whether the running command has the option ``name``, quiet or verbose."""
    context = click.get_current_context(silent=True)
    return context is not None and context.meta.get(_LOUDNESS) == name


def stamp() -> str:
    """Return the running time of the command."""
    return f"[{time.monotonic() - click.get_current_context().meta[_START]:6.1f} s]"


def silent() -> bool:
    """Return whether this process prints only urgent messages: with --quiet, and in all processes but the first."""
    return os.environ.get("RANK", "0") != "0" or loud("quiet")


def say(message: str, *, urgent: bool = False) -> None:
    """Print a message on stderr, in the first process only; with --quiet, only an ``urgent`` one."""
    if silent() and not (urgent and os.environ.get("RANK", "0") == "0"):
        return
    message = adapted(message)
    if loud("verbose"):
        message = f"{stamp()} {message}"
    if sys.stderr.isatty():  # wrap between words; a long word, such as a path, is not broken
        width = max(shutil.get_terminal_size().columns, 20)
        message = textwrap.fill(message, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    print(printable(message), file=sys.stderr, flush=True)  # click would write into a progress bar
