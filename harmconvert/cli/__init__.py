"""The command line: one file for each command. A command parses its arguments, calls one function, and prints.

Torch is imported when a command runs.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import traceback
import warnings
from functools import partial
from typing import Any

import click

from .. import __version__
from ..errors import HarmconvertError, HarmconvertWarning, one_line, printable
from .verbosity import NOTHING_WRITTEN, interruption_note

COMMANDS = (
    "convert", "finetune", "evaluate", "train", "verify", "inspect", "report", "compare", "benchmark", "export", "push",
    "demo",
)  # fmt: skip


# Parts of the RuntimeError of torch and CUDA when memory is short.
_NO_MEMORY = ("not enough memory", "out of memory", "can't allocate memory", "Cannot allocate memory")
_INTERRUPTED = "harmconvert.interrupted"


class StopError(Exception):
    """The user ended the command; the message says which files exist."""


class Program(click.Group):
    """Load the file of a command when the command is named; turn every error into one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f".{name}", __name__).command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:  # click would write an empty line first
            raise StopError(interruption_note(ctx)) from stop
        except Exception as error:
            if ctx.meta.get(_INTERRUPTED):  # a library that was being imported raised its own error
                raise StopError(interruption_note(ctx)) from error
            raise

    def main(self, args: Any = None, *rest: Any, **extra: Any) -> Any:
        extra["standalone_mode"] = False
        for name in ("stdin", "stdout", "stderr"):
            if getattr(sys, name) is None:  # the calling program closed it
                setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115  to the end
        arguments = list(sys.argv[1:] if args is None else args)
        extra["obj"] = sys.stdout  # --json prints its document here; all other output goes to stderr
        debug = "--debug" in arguments
        # Warnings of torch are for developers, not for the user.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        with contextlib.suppress(ValueError):  # not the main thread: the calling program handles signals
            signal.signal(signal.SIGTERM, _terminate)
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nohup ignores it
                signal.signal(signal.SIGINT, _interrupt)
        try:
            aside = contextlib.redirect_stdout(sys.stderr) if "--json" in arguments else contextlib.nullcontext()
            with aside, warnings.catch_warnings():
                warnings.simplefilter("always", HarmconvertWarning)
                warnings.showwarning = partial(_warn, warnings.showwarning)
                result = super().main(arguments, *rest, **extra)
            sys.exit(result if isinstance(result, int) else 0)
        except click.exceptions.Exit as stop:
            sys.exit(stop.exit_code)
        except click.ClickException as error:
            if not arguments:  # the message is the complete help
                click.echo(error.format_message(), err=True)
            else:
                _say(error.format_message() + _hint(error))
            sys.exit(error.exit_code)
        except (click.Abort, KeyboardInterrupt, StopError) as stop:
            _say(f"interrupted; {stop if isinstance(stop, StopError) else NOTHING_WRITTEN}")
            sys.exit(130)
        except BrokenPipeError:
            sys.stderr.close()
            sys.exit(0)
        except Exception as error:
            if debug:
                traceback.print_exc()
            message, code = _explain(error, arguments[0] if arguments else None)
            _say(message)
            sys.exit(code)


def _explain(error: Exception, command: str | None) -> tuple[str, int]:
    if isinstance(error, HarmconvertError):
        from .advice import adapted

        return one_line(adapted(error.message, command)), error.exit_code
    text = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    if isinstance(error, MemoryError) or any(sign in text for sign in _NO_MEMORY):
        return f"out of memory ({text}): use a smaller input or a machine with more", 4
    if isinstance(error, OSError):
        return text, 4
    return f"unexpected {text}; run again with --debug to see where, and please report it", 3


def _hint(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return f" (see {context.command_path} --help)" if context else ""


def _say(message: str) -> None:
    click.echo("harmconvert: error: " + printable(" ".join(message.split())), err=True)


def _warn(show_other: Any, message: Any, category: type[Warning], *place: Any) -> None:
    if issubclass(category, HarmconvertWarning):
        from .options import say

        say(f"warning: {message}", urgent=True)
    else:
        show_other(message, category, *place)


def _interrupt(number: int, frame: Any) -> None:
    if context := click.get_current_context(silent=True):
        context.meta[_INTERRUPTED] = True
    raise KeyboardInterrupt


def _terminate(number: int, frame: Any) -> None:
    _say(f"terminated; {interruption_note(click.get_current_context(silent=True))}")
    sys.exit(143)


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__)
def main() -> None:
    """Make pretrained CNNs smaller: fewer DCT frequencies, lower ranks, fewer bits; then verify and export them.

    \b
    Example:
      harmconvert inspect resnet50
      harmconvert convert resnet50 --lambda progressive
      harmconvert export resnet50-harmonic-progressive.safetensors -o resnet50.safetensors
    """
