"""Options in messages: a message names only options of the running command, or names the command of the option, too.

The library's messages name arguments (`harmconvert.errors.Argument`). This file replaces each argument by the option
that most commands have for it. Commands differ: --input-size of convert is --img-size of train, and only some commands
read weights from --checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set

import click

from ..errors import Argument, Message
from .groups import Renamed, main_name

# The option for an argument, if its name is not that of the argument.
OPTION_NAMES = {
    "arguments": "--model-kwargs",
    "code": "--model",
    "compare_weights": "--compare-checkpoint",
    "example_input": "--input-size C,H,W",
    "inputs": "--input-size C,H,W",
    "kind": "--figure",
    "lam": "--lambda",
    "output": "output with -o",
    "settings.inputs": "--calibration-images",
    "settings.memory": "--calibration-memory",
    "tested": "--data",
    "the size of a batch": "--calibration-batch-size",
    "weights": "--checkpoint",
    "weights_key": "--checkpoint-key",
}

# Name the second option if a command does not have the first one.
INSTEAD = {"--input-size C,H,W": "--img-size SIZE", "--input-size": "--img-size"}
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")


def options_of(command: click.Command) -> set[str]:
    """Return all options of a command, as the user types them."""
    return {text for parameter in command.params for text in (*parameter.opts, *parameter.secondary_opts)}


def present_names(command: click.Command | None) -> dict[str, str]:
    """Return the present name of each option of a command that has an earlier one, by the earlier name."""
    options = [one for one in command.params if isinstance(one, Renamed)] if command is not None else []
    return {earlier: main_name(option) for option in options for earlier in option.earlier_names}


def fitting(text: str, command: str, options: Mapping[str, Set[str]]) -> str:
    """Return a message for the user of ``command``; ``options`` are the options of all commands, by name.

    >>> options = {"convert": {"--checkpoint"}, "compare": {"--json"}}
    >>> fitting("give the weights with --checkpoint FILE", "compare", options)
    'give the weights with convert --checkpoint FILE'
    """
    own = options[command]
    for option, other in INSTEAD.items():
        if option.split()[0] not in own and other.split()[0] in own:
            text = text.replace(option, other)

    def named(match: re.Match[str]) -> str:
        before = text[: match.start()]
        if match[0] in own or re.search(r"\bharmconvert \w+ ", before) or before.rstrip().split(" ")[-1] in options:
            return match[0]
        owner = next((name for name, theirs in options.items() if match[0] in theirs), None)
        return f"{owner} {match[0]}" if owner else match[0]

    return OPTION.sub(named, text)


def option_of(argument: Argument) -> str:
    """Return the option that most commands have for an argument.

    >>> option_of(Argument("force", True)), option_of(Argument("batch_size", 2)), option_of(Argument("output"))
    ('--force', '--batch-size 2', 'output with -o')
    """
    words, value = OPTION_NAMES.get(argument.name) or "--" + argument.name.replace("_", "-"), argument.value
    if isinstance(value, Mapping):
        return f"{words} {' '.join(f'{key}={one}' for key, one in value.items())}"
    return words if value is None or value is True else f"{words} {value}"


def adapted(text: str, command: str | None = None) -> str:
    """Return a text or a library message for the user of ``command`` (default: the running one).

    A text that names no option is not changed.
    """
    from . import COMMANDS, main

    text = text.naming(option_of) if isinstance(text, Message) else text
    context = click.get_current_context(silent=True)
    name = command or (context.command.name if context else None)
    if name not in COMMANDS or not OPTION.search(text):
        return text
    commands = {other: main.get_command(click.Context(main), other) for other in COMMANDS}
    present = present_names(commands[name])
    text = OPTION.sub(lambda match: present.get(match[0], match[0]), text)
    return fitting(text, name, {other: options_of(one) for other, one in commands.items() if one is not None})
