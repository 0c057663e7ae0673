"""Options and output of several commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from . import inputs, types
from .groups import is_given, main_name
from .printing import console as console
from .printing import print_json as print_json
from .verbosity import NOTHING_WRITTEN as NOTHING_WRITTEN
from .verbosity import has_verbosity as has_verbosity
from .verbosity import say as say
from .verbosity import set_interruption_note as set_interruption_note
from .verbosity import verbosity as verbosity
from .waiting import busy as busy
from .waiting import progress as progress

if TYPE_CHECKING:
    from ..sources.request import SourceRequest
    from ..storage.checkpoint import Network

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --json and --debug."""
    command = click.option("--debug", is_flag=True, expose_value=False, help="Show a traceback if the command fails.")(
        command
    )
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON document on stdout, and nothing else there."
    )(command)


def trust_code(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --trust-code and --model, for checkpoints whose network is made by user code."""
    command = click.option(
        "--trust-code", is_flag=True, help="Allow a checkpoint to run the user code that it names as its source."
    )(command)
    return click.option(
        "--model",
        "code",
        type=inputs.SourceText(),
        metavar="FILE.py:FACTORY",
        help="User code that makes the network of a checkpoint, instead of the code that the checkpoint names.",
    )(command)


def network_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say how to make the network of a SOURCE."""
    for option in (
        trust_code,
        click.option(
            "--model-kwargs",
            "arguments",
            type=types.KeyValue(),
            multiple=True,
            help="An argument of the function that makes the network, such as num_classes=10; repeatable.",
        ),
        click.option(
            "--checkpoint",
            "weights",
            type=inputs.InputFile(),
            help="Weights to use instead of the source's own (.safetensors or .pth).",
        ),
        click.option(
            "--checkpoint-key",
            "weights_key",
            metavar="KEY",
            help="Which weights of --checkpoint to use, such as state_dict or ema.module; default: moving averages "
            "(EMA), if there are any, else the weights that fit.",
        ),
        click.option(
            "--strip-prefix",
            metavar="PREFIX",
            help="Use the weights of --checkpoint whose names start with PREFIX, and remove it; default: if the "
            "names do not fit, a prefix after whose removal all names fit.",
        ),
    ):
        command = option(command)
    return command


def only_with(own: Decorator, what: str, but: Decorator = lambda command: command) -> None:
    """Raise UsageError if an option of ``own``, and not of ``but``, is given: it has no effect without ``what``."""
    from ..errors import UsageError

    context = click.get_current_context()
    others = {p.name for p in getattr(but(lambda: None), "__click_params__", [])}
    names = [p for p in own(lambda: None).__click_params__ if p.name not in others]  # type: ignore[attr-defined]
    typed = [p for p in names if is_given(context, p.name)]
    if typed:
        raise UsageError(f"{main_name(typed[0])} works only with {what}")


input_size = click.option(
    "--input-size",
    type=types.InputSize(),
    multiple=True,
    help="Size of one input; default: what the network declares. Repeat the option for a network with several inputs.",
)
device = click.option(
    "--device",
    type=inputs.DeviceName(),
    help="Device: cpu, cuda, cuda:1; default: a GPU if there is one and images are given.",
)
basis = click.option(
    "--basis",
    type=click.Choice(["dct", "haar", "gaussian", "klt"]),
    default="dct",
    show_default=True,
    help="Basis of the kernels: the DCT, Haar wavelets, derivatives of a Gaussian, or the principal components of each "
    "layer, which are stored in the file.",
)
dtype = click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Type of the weights in the file. 16 bits halve its size; the outputs stay within a tolerance (2e-2, bfloat16 "
    "1e-1).",
)
metric = click.option(
    "--metric",
    metavar="NAME",
    help="What to measure: top1, top5, miou (masks), map (boxes), psnr or ssim (images), kl or agreement (with the "
    "uncut network, without labels); or FILE.py:FUNCTION of (outputs, targets) or of (model, loader). Default: top1.",
)
force = click.option("--force", is_flag=True, help="Replace the output if it exists.")


def begin(source: str) -> None:
    """Print that a network is loading, and import the code that loads it, which takes seconds."""
    with busy(f"loading {source}", at_once=True):
        import_module("harmconvert.pipeline.networks")


def request(source: str, values: Mapping[str, Any]) -> SourceRequest:
    """Return the request for a network from the values of `network_options`, or of a part of them."""
    from ..sources.request import SourceRequest

    return SourceRequest(
        source,
        values.get("weights"),
        values.get("weights_key"),
        values.get("strip_prefix"),
        dict(values.get("arguments", ())),
        values["trust_code"],
        values.get("code"),
    )


def opened(source: str, values: Mapping[str, Any], *, announced: bool = False, **more: Any) -> Network:
    """Return the network of a source, from the values of `network_options` or of a part of them.

    ``announced`` says that `begin` was called before. Raises the errors of `harmconvert.pipeline.networks.opened`.
    """
    from ..pipeline.networks import opened
    from .listening import CommandLine

    return opened(request(source, values), CommandLine(source if announced else ""), **more)
