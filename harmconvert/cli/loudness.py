"""How much a command says: --quiet and --verbose, and its messages."""

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
    """--quiet and --verbose, for commands whose work is a file or an exit code."""
    for name, letter, text in (
        ("verbose", "-v", "Say when each thing was done, and every step of the way where no bar is shown."),
        ("quiet", "-q", "Print nothing but errors, failed checks, and what --json asks for."),
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
    """Until the command ends, say what the library logs: where it falls back on another way, and why."""
    log, handler = logging.getLogger("harmconvert"), _Said()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)

    def stop() -> None:
        log.removeHandler(handler)
        log.setLevel(level)

    context.call_on_close(stop)


class _Said(logging.Handler):
    """Records as messages of the command."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def keep(what: Callable[[], str]) -> None:
    """From now on ``what`` says what is kept where the command is interrupted."""
    click.get_current_context().meta[_KEPT] = what


def kept(context: click.Context | None) -> str:
    """What is kept of the work of a command that is interrupted now."""
    what = context.meta.get(_KEPT) if context else None
    return str(what()) if what else NOTHING_WRITTEN


def loud(name: str) -> bool:
    """Whether --quiet or --verbose (``name``) was given to the command that runs."""
    context = click.get_current_context(silent=True)
    return context is not None and context.meta.get(_LOUDNESS) == name


def stamp() -> str:
    """How long the command has been running."""
    return f"[{time.monotonic() - click.get_current_context().meta[_START]:6.1f} s]"


def silent() -> bool:
    """Whether this process has nothing to say but what is urgent: under --quiet, and all of several but the first."""
    return os.environ.get("RANK", "0") != "0" or loud("quiet")


def say(message: str, *, urgent: bool = False) -> None:
    """Messages go to stderr; of several processes the first one speaks, and under --quiet only where ``urgent``."""
    if silent() and not (urgent and os.environ.get("RANK", "0") == "0"):
        return
    message = adapted(message)
    if loud("verbose"):
        message = f"{stamp()} {message}"
    if sys.stderr.isatty():  # between words; what is one word, as a path, stays one
        width = max(shutil.get_terminal_size().columns, 20)
        message = textwrap.fill(message, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    print(printable(message), file=sys.stderr, flush=True)  # click would write past a bar that is shown, and through it
