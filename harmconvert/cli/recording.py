"""The options of a command. A checkpoint records them, and a report prints them as a command that can be run again."""

from __future__ import annotations

import ast
from collections.abc import Collection
from typing import Any

import click

from ..arguments import is_data_path
from .groups import is_given, main_name

# Options for the place of the output, the messages and the machine: they do not change the result.
_NOT_RECORDED = (
    *("output", "report", "force", "as_json", "quiet", "verbose", "debug", "save_plan", "search_figure", "probes"),
    *("recipe_file", "device", "workers", "resume", "save_every", "log", "calibration_memory"),
)


def command_words(leave_out: Collection[str] = ()) -> dict[str, Any]:
    """Return the name and the options of the running command, as `harmconvert.storage.history` checks them."""
    context = click.get_current_context()
    words: list[str] = []
    for parameter in context.command.params:
        name = parameter.name or ""
        if isinstance(parameter, click.Option) and is_given(context, name) and name not in (*_NOT_RECORDED, *leave_out):
            words += _words(parameter, context.params[name])
    return {"name": context.command.name, "words": words}


def _words(option: click.Option, value: Any) -> list[str]:
    name = main_name(option)
    if "--dataset" in option.opts:  # a model card looks for the data of a training under these names
        name = "--data-dir" if is_data_path(value) else "--dataset"
    if option.is_flag and option.is_bool_flag:
        return [name if value else option.secondary_opts[0]]
    if option.multiple:
        return [word for one in value for word in (name, _text(option, one))]
    if option.nargs > 1:
        return [name, *(str(part) for part in value)]
    return [name, _text(option, value)]


def _text(option: click.Option, value: Any) -> str:
    if option.type.name == "KEY=VALUE":
        return f"{value[0]}={_literal(value[1])}"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _literal(value: Any) -> str:
    """Return the text that is read as this value: a string without quotes, unless it would be read as another type."""
    if not isinstance(value, str):
        return repr(value)
    try:
        ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
    return repr(value)
