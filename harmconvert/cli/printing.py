"""Output of commands on stdout: tables and lines, or one JSON document."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

import click

from ..documents import json_text
from ..errors import Message, printable
from .advice import adapted
from .verbosity import silent

if TYPE_CHECKING:
    from rich.console import Console


def console(quiet: bool = False) -> Console:
    """Return a console on stdout, which prints nothing with --json and --quiet and in all processes but the first.

    If stdout is no terminal, the console is so wide that each row is one line.
    """
    from rich.console import Console

    class PipeSafeConsole(Console):
        def print(self, *objects: Any, **how: Any) -> None:
            super().print(*(printable(adapted(one)) if isinstance(one, str) else one for one in objects), **how)

        def on_broken_pipe(self) -> None:
            """Continue the work without output: the reader of the pipe has gone."""
            self.quiet = True
            discard_output(sys.stdout)

    terminal = sys.stdout.isatty()
    quiet = quiet or silent()
    return PipeSafeConsole(width=None if terminal else 1000, highlight=False, soft_wrap=not terminal, quiet=quiet)


def print_json(data: Any) -> None:
    """Print one document, as `json_text` writes it. The exit code stays the same if the reader has gone."""
    stream = click.get_current_context().find_root().obj
    if os.environ.get("RANK", "0") != "0":  # only the first process prints
        return
    try:
        click.echo(json_text(_named(data)), file=stream)
    except BrokenPipeError:
        discard_output(stream)


def _named(data: Any) -> Any:
    """Return the same data; its messages name the options of the command line."""
    if isinstance(data, Mapping):
        return {key: _named(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_named(value) for value in data]
    return adapted(data) if isinstance(data, Message) else data


def discard_output(stream: TextIO) -> None:
    """Discard all further output of a stream that nobody reads."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
