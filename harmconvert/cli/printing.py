"""What commands print on stdout: tables and lines, or one JSON document."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

import click

from ..documents import json_text
from ..errors import Message, printable
from .advice import adapted
from .loudness import silent

if TYPE_CHECKING:
    from rich.console import Console


def console(quiet: bool = False) -> Console:
    """A console on stdout; where that is no terminal, so wide that a row is a line. Silent under --json and
    --quiet, and in all processes but the first."""
    from rich.console import Console

    class Patient(Console):
        def print(self, *objects: Any, **how: Any) -> None:
            super().print(*(printable(adapted(one)) if isinstance(one, str) else one for one in objects), **how)

        def on_broken_pipe(self) -> None:
            """Whoever read our table has gone: the work goes on without an audience."""
            self.quiet = True
            nobody_reads(sys.stdout)

    terminal = sys.stdout.isatty()
    quiet = quiet or silent()
    return Patient(width=None if terminal else 1000, highlight=False, soft_wrap=not terminal, quiet=quiet)


def print_json(data: Any) -> None:
    """One document, as `json_text` writes it; what the command comes to is not changed by nobody reading it."""
    stream = click.get_current_context().find_root().obj
    if os.environ.get("RANK", "0") != "0":  # the first process speaks for all
        return
    try:
        click.echo(json_text(_named(data)), file=stream)
    except BrokenPipeError:
        nobody_reads(stream)


def _named(data: Any) -> Any:
    """The same data, its messages with the options of the command line."""
    if isinstance(data, Mapping):
        return {key: _named(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_named(value) for value in data]
    return adapted(data) if isinstance(data, Message) else data


def nobody_reads(stream: TextIO) -> None:
    """Let go on what writes to a stream whose reader has gone, without an audience."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
