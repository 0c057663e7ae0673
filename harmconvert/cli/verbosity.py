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
_INTERRUPTION_NOTE = "harmconvert.interruption_note"
_VERBOSITY, _START = "harmconvert.verbosity", "harmconvert.start"


def verbosity(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --quiet and --verbose, for commands whose result is a file or an exit code."""
    for name, letter, text in (
        ("verbose", "-v", "Print the time of each message, and every step if no progress bar is shown."),
        ("quiet", "-q", "Print only errors, failed checks, and the document of --json."),
    ):
        command = click.option(
            f"--{name}", letter, is_flag=True, expose_value=False, callback=_set_verbosity, help=text
        )(command)
    return command


def _set_verbosity(context: click.Context, option: click.Parameter, typed: bool) -> None:
    if typed and context.meta.get(_VERBOSITY, option.name) != option.name:
        raise click.UsageError("--quiet and --verbose contradict each other: give only one", context)
    if typed:
        context.meta[_VERBOSITY] = option.name
        context.meta[_START] = time.monotonic()
        if option.name == "verbose":
            _print_log(context)


def _print_log(context: click.Context) -> None:
    """Print the log records of the library until the command ends: they say when and why it uses a second method."""
    log, handler = logging.getLogger("harmconvert"), _LogPrinter()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)

    def stop() -> None:
        log.removeHandler(handler)
        log.setLevel(level)

    context.call_on_close(stop)


class _LogPrinter(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def set_interruption_note(note: Callable[[], str]) -> None:
    """Set the function that returns which files exist if the command is interrupted from now on."""
    click.get_current_context().meta[_INTERRUPTION_NOTE] = note


def interruption_note(context: click.Context | None) -> str:
    """Return which files exist if the command is interrupted now."""
    note = context.meta.get(_INTERRUPTION_NOTE) if context else None
    return str(note()) if note else NOTHING_WRITTEN


def has_verbosity(name: str) -> bool:
    """Return whether the running command has the option ``name``, quiet or verbose."""
    context = click.get_current_context(silent=True)
    return context is not None and context.meta.get(_VERBOSITY) == name


def elapsed() -> str:
    """Return the running time of the command."""
    return f"[{time.monotonic() - click.get_current_context().meta[_START]:6.1f} s]"


def silent() -> bool:
    """Return whether this process prints only urgent messages: with --quiet, and in all processes but the first."""
    return os.environ.get("RANK", "0") != "0" or has_verbosity("quiet")


def say(message: str, *, urgent: bool = False) -> None:
    """Print a message on stderr, in the first process only; with --quiet, only an ``urgent`` one."""
    if silent() and not (urgent and os.environ.get("RANK", "0") == "0"):
        return
    message = adapted(message)
    if has_verbosity("verbose"):
        message = f"{elapsed()} {message}"
    if sys.stderr.isatty():  # wrap between words; a long word, such as a path, is not broken
        width = max(shutil.get_terminal_size().columns, 20)
        message = textwrap.fill(message, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    print(printable(message), file=sys.stderr, flush=True)  # click would write into a progress bar
