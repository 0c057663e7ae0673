"""--recipe FILE.yaml: the options of a command from a file."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

import click

from . import inputs, types

# Options that only make sense where a command is typed.
_NOT_IN_A_FILE = ("recipe_file", "debug", "help")


def recipe(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --recipe, which is read before all other options."""
    return click.option(
        "--recipe",
        "recipe_file",
        type=inputs.InputFile(),
        metavar="FILE.yaml",
        is_eager=True,
        expose_value=False,
        callback=_read,
        help="Read options from a YAML file. Its keys are the long names without dashes, such as 'data: photographs/', "
        "and source. Options on the command line replace those of the file.",
    )(command)


def _read(context: click.Context, option: click.Parameter, path: str | None) -> None:
    """Make the options in a file the defaults of the running command."""
    if path is not None:
        inputs.InputFile().check(path)
        context.default_map = {
            parameter.name: value for parameter, value in _options_in(path, context).items() if parameter.name
        }


def _options_in(path: str, context: click.Context) -> dict[click.Parameter, Any]:
    """Return the value of each option that a file names.

    Raises:
        InputError: the file is not a YAML mapping. UsageError: the command has no such option, or its value is wrong.
    """
    from ..errors import InputError, UsageError

    content = _content(path)
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"{path} has no options: write one in each line, such as 'data: photographs/'")
    known, found = _known(context.command), dict[click.Parameter, Any]()
    for key, value in content.items():
        name = str(key).replace("_", "-")
        if (parameter := known.get(name)) is None:
            near = difflib.get_close_matches(name, known, 1)
            hint = f": did you mean {near[0]}?" if near else f" (see harmconvert {context.command.name} --help)"
            raise UsageError(f"{path}: {context.command.name} has no option {key!r}{hint}")
        try:
            found[parameter] = _words(parameter, value)
            parameter.type_cast_value(context, found[parameter])
        except (click.BadParameter, ValueError) as error:
            message = error.message if isinstance(error, click.BadParameter) else str(error)
            raise UsageError(f"{path}: {key}: {message}") from None
    return found


def _known(command: click.Command) -> dict[str, click.Parameter]:
    """Return the options and arguments that a file may have, by name."""
    return {
        name.removeprefix("--"): parameter
        for parameter in command.params
        if parameter.name not in _NOT_IN_A_FILE
        for name in ([parameter.name or ""] if isinstance(parameter, click.Argument) else parameter.opts)
        if name.startswith("--") or isinstance(parameter, click.Argument)
    }


def _content(path: str) -> Any:
    import yaml

    from ..errors import InputError, first_line
    from ..files import outside_error

    try:
        with open(path, encoding="utf-8") as file:
            return yaml.safe_load(file)
    except OSError as error:
        raise outside_error(error, f"cannot read {path}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{where}: not YAML: {getattr(error, 'problem', None) or first_line(error)}") from None


def _words(parameter: click.Parameter, value: Any) -> Any:
    """Return a value of a file as it would be typed.

    Raises:
        ValueError: the option has no such values.
    """
    option = parameter if isinstance(parameter, click.Option) else None
    if option is not None and option.is_flag:
        if not isinstance(value, bool):
            raise ValueError(f"{value!r} is not true or false")
        return value
    if isinstance(value, bool) and value and types.value_is_optional(parameter):
        return str(option.flag_value) if option is not None else value
    if isinstance(value, Mapping):
        pairs = [f"{key}={_text(one)}" for key, one in value.items()]
        return pairs if parameter.multiple else ",".join(pairs)
    if not isinstance(value, list):
        return [_text(value)] if parameter.multiple else _text(value)
    texts = [_text(one) for one in value]
    one_size = isinstance(parameter.type, types.InputSize) and all(isinstance(one, int) for one in value)
    if one_size or not (parameter.multiple or parameter.nargs > 1):
        return [",".join(texts)] if parameter.multiple else ",".join(texts)
    return texts


def _text(value: Any) -> str:
    if isinstance(value, bool | list | Mapping) or value is None:
        raise ValueError(f"{'no value' if value is None else repr(value)} is not a number or a text")
    return str(value)
