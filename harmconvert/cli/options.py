"""Options and output that commands share."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from ..checkpoint import Source
    from ..sources import Network


class InputSize(click.ParamType):
    """C,H,W (or C,T,H,W, or C,L): one example's size."""

    name = "C,H,W"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = str(value).replace("x", ",").split(",")
        if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            self.fail(f"{value!r} is not a size such as 3,224,224", param, ctx)
        return tuple(int(part) for part in parts)


class KeyValue(click.ParamType):
    """KEY=VALUE, the value read as Python where it can be (timm's --model-kwargs)."""

    name = "KEY=VALUE"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, Any]:
        import ast

        if isinstance(value, tuple):
            return value
        key, equals, text = str(value).partition("=")
        if not equals or not key.isidentifier():
            self.fail(f"{value!r} is not KEY=VALUE", param, ctx)
        try:
            return key, ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return key, text


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """--json and --debug."""
    command = click.option("--debug", is_flag=True, expose_value=False, help="Show a traceback where something fails.")(
        command
    )
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON document on stdout, nothing else there."
    )(command)


def network_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How to get the network of a SOURCE."""
    for option in (
        click.option(
            "--trust-code", is_flag=True, help="Let a checkpoint run the user code that it names as its source."
        ),
        click.option(
            "--model-kwargs",
            "arguments",
            type=KeyValue(),
            multiple=True,
            help="An argument of the network's maker, such as num_classes=10; repeatable.",
        ),
        click.option(
            "--checkpoint",
            "weights",
            metavar="FILE",
            help="Weights to use instead of the source's own (.safetensors or .pth).",
        ),
    ):
        command = option(command)
    return command


input_size = click.option(
    "--input-size",
    type=InputSize(),
    multiple=True,
    help="Size of one input; default: the network's own, where it says one. Repeat it for a network of several inputs.",
)
force = click.option("--force", is_flag=True, help="Replace the output where it exists.")


def opened(text: str, options: dict[str, Any], **more: Any) -> Network:
    """The network of a source string under `network_options`."""
    from ..sources import open_source

    return open_source(
        text,
        weights=options["weights"],
        arguments=dict(options["arguments"]),
        trust_code=options["trust_code"],
        **more,
    )


def example_input(sizes: Sequence[tuple[int, ...]], model: Any) -> Any:
    """Zeros of each ``--input-size``, or of the network's own size (None where it names none), in its dtype."""
    import torch

    from ..convert import default_input
    from ..surgery import fitted

    if not sizes:
        return default_input(model)
    return _one_or_all([fitted(torch.zeros(1, *size), model) for size in sizes])


def verification_inputs(sizes: Sequence[tuple[int, ...]], source: Source) -> Any:
    """Two seeded random inputs of each size given, else images that belong to a sample network, else None."""
    import torch

    from ..samples import SAMPLES

    generator = torch.Generator().manual_seed(0)
    if sizes:
        return _one_or_all([torch.randn(2, *size, generator=generator) for size in sizes])
    return SAMPLES[source.name].images() if source.scheme == "sample" else None


def _one_or_all(inputs: list[Any]) -> Any:
    return inputs[0] if len(inputs) == 1 else tuple(inputs)


def console(quiet: bool = False) -> Console:
    """A console on stdout; where that is no terminal, wide enough that nothing is cut. Silent under --json."""
    from rich.console import Console

    class Patient(Console):
        def on_broken_pipe(self) -> None:
            """Whoever read our table has gone: the work goes on without an audience."""
            self.quiet = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    terminal = sys.stdout.isatty()
    return Patient(width=None if terminal else 200, highlight=False, soft_wrap=not terminal, quiet=quiet)


def say(message: str) -> None:
    """Progress and messages go to stderr."""
    click.echo(message, err=True)


def print_json(data: Any) -> None:
    """One document; NaN and infinity as null, because JSON has no word for them."""
    click.echo(json.dumps(_finite(data), indent=1, allow_nan=False, default=str))


def _finite(data: Any) -> Any:
    if isinstance(data, float) and (data != data or abs(data) == float("inf")):
        return None
    if isinstance(data, dict):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return data
