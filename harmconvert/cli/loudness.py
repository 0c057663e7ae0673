"""How much a command says: --quiet and --verbose."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import click

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


def loud(name: str) -> bool:
    """Whether --quiet or --verbose (``name``) was given to the command that runs."""
    context = click.get_current_context(silent=True)
    return context is not None and context.meta.get(_LOUDNESS) == name


def stamp() -> str:
    """How long the command has been running."""
    return f"[{time.monotonic() - click.get_current_context().meta[_START]:6.1f} s]"
