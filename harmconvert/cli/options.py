"""Options and output that commands share."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from . import inputs, types
from .loudness import NOTHING_WRITTEN as NOTHING_WRITTEN
from .loudness import keep as keep
from .loudness import loud as loud
from .loudness import loudness as loudness
from .loudness import say as say
from .printing import console as console
from .printing import print_json as print_json
from .waiting import busy as busy
from .waiting import progress as progress

if TYPE_CHECKING:
    from torch import Tensor

    from ..storage.checkpoint import Network, Source

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """--json and --debug."""
    command = click.option("--debug", is_flag=True, expose_value=False, help="Show a traceback where something fails.")(
        command
    )
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON document on stdout, nothing else there."
    )(command)


def trust_code(command: Callable[..., Any]) -> Callable[..., Any]:
    """What makes the network of a checkpoint that is made by user code: --trust-code and --model."""
    command = click.option(
        "--trust-code", is_flag=True, help="Let a checkpoint run the user code that it names as its source."
    )(command)
    return click.option(
        "--model",
        "code",
        type=inputs.SourceText(),
        metavar="FILE.py:FACTORY",
        help="User code that makes the network of a checkpoint, where the code that it names is not here or not asked.",
    )(command)


def network_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How to get the network of a SOURCE."""
    for option in (
        trust_code,
        click.option(
            "--model-kwargs",
            "arguments",
            type=types.KeyValue(),
            multiple=True,
            help="An argument of the network's maker, such as num_classes=10; repeatable.",
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
            help="Which weights of --checkpoint to take, such as state_dict or ema.module; default: moving averages "
            "(EMA) first, then what fits.",
        ),
        click.option(
            "--strip-prefix",
            metavar="PREFIX",
            help="Take the weights of --checkpoint whose names start so, and drop that; default: a prefix that makes "
            "all names fit, where they do not fit as they are.",
        ),
    ):
        command = option(command)
    return command


def only_with(own: Decorator, what: str, but: Decorator = lambda command: command) -> None:
    """Raise UsageError where one of the options ``own``, and not of ``but``, was given that nothing will heed without
    ``what``."""
    from ..errors import UsageError

    context = click.get_current_context()
    others = {p.name for p in getattr(but(lambda: None), "__click_params__", [])}
    names = [p for p in own(lambda: None).__click_params__ if p.name not in others]  # type: ignore[attr-defined]
    given = [p for p in names if context.get_parameter_source(p.name) is click.core.ParameterSource.COMMANDLINE]
    if given:
        raise UsageError(f"{given[0].opts[0]} is of use only with {what}")


input_size = click.option(
    "--input-size",
    type=types.InputSize(),
    multiple=True,
    help="Size of one input; default: the network's own, where it says one. Repeat it for a network of several inputs.",
)
device = click.option(
    "--device",
    type=inputs.DeviceName(),
    help="Where to run: cpu, cuda, cuda:1; default: a GPU where there is one and images are given.",
)
basis = click.option(
    "--basis",
    type=click.Choice(["dct", "haar", "gaussian", "klt"]),
    default="dct",
    show_default=True,
    help="What kernels are combined of: the DCT, Haar wavelets, derivatives of a Gaussian, or each layer's own "
    "principal components, which are kept in the file.",
)
dtype = click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of the weights in the file; 16 bits halve it, within a tolerance of the outputs (2e-2, bfloat16 1e-1).",
)
force = click.option("--force", is_flag=True, help="Replace the output where it exists.")


def begin(source: str) -> None:
    """Say that a network is being loaded, and import what loads it, which takes seconds."""
    with busy(f"loading {source}", at_once=True):
        import_module("harmconvert.sources.opening")


def opened(text: str, options: dict[str, Any], *, begun: bool = False, intact: bool = False, **more: Any) -> Network:
    """The network of a source string under `network_options` or fewer of them; ``begun``: `begin` was called.

    Raises:
        InputError: it is damaged, and what will be made of it should be ``intact``; and as `open_source`.
    """
    from ..errors import DamageWarning, InputError
    from ..sources.opening import open_source

    with busy(f"loading {text}", said=begun), warnings.catch_warnings():
        if intact:
            warnings.simplefilter("error", DamageWarning)
        try:
            network = open_source(
                text,
                weights=options.get("weights"),
                weights_key=options.get("weights_key"),
                strip_prefix=options.get("strip_prefix"),
                arguments=dict(options.get("arguments", ())),
                trust_code=options["trust_code"],
                code=options.get("code"),
                **more,
            )
        except DamageWarning as warning:
            raise InputError(f"{warning} (in Python, hc.load and hc.save take it as it is)") from warning
    if options.get("weights") and (taken := network.source.weights):
        left_out = f"; left out: {taken['left_out']}" if "left_out" in taken else ""
        say(f"weights: {', '.join(taken[what] for what in ('file', 'key', 'prefix') if what in taken)}{left_out}")
    return network


def place(model: Any, device: str | None, data: str | None) -> None:
    """Move a network to the device asked for; by default to this process's GPU, if there is one and work for it."""
    import torch

    from ..errors import UsageError, first_line

    if device is None:
        gpu = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        device = gpu if data is not None and torch.cuda.is_available() else "cpu"
    if device.startswith("mps"):
        raise UsageError("--device mps has no float64, which projections and fits need: use cpu")
    try:
        if torch.device(device).type == "meta":
            raise UsageError("--device meta holds no values: use cpu or cuda")
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device}: {first_line(error)}") from error


def example_input(sizes: Sequence[tuple[int, ...]], model: Any, batch: int = 1) -> Any:
    """So many zeros of each ``--input-size``, or of the network's own size (None where it names none), in its dtype."""
    import torch

    from ..network.values import default_input, fitted

    if not sizes:
        return default_input(model, batch)
    return _one_or_all([fitted(torch.zeros(batch, *size), model) for size in sizes])


def random_input(sizes: Sequence[tuple[int, ...]], model: Any) -> Any:
    """One seeded random example of each ``--input-size``, or of the network's own size.

    Raises:
        UsageError: no size is given and the network names none.
    """
    import torch

    from ..errors import UsageError
    from ..network.values import fitted, tensors_in

    sizes = sizes or [tuple(t.shape[1:]) for t in tensors_in(example_input((), model))]
    if not sizes:
        raise UsageError("this network does not say what it takes: give --input-size C,H,W")
    generator = torch.Generator().manual_seed(0)
    return _one_or_all([fitted(torch.randn(1, *size, generator=generator), model) for size in sizes])


def verification_inputs(
    sizes: Sequence[tuple[int, ...]], source: Source, images: Sequence[Tensor] = ()
) -> dict[str, Any]:
    """What `verify` compares on: some of the held-back calibration images, images that belong to a sample network, two
    random inputs of each size given, or (without any of these) two random inputs of the network's own size."""
    import torch

    from ..calibration.inputs import HELD_BACK
    from ..samples import SAMPLES

    if images:
        return {"inputs": torch.cat(list(images))[HELD_BACK - 1 :: HELD_BACK][:16]}
    if sizes:
        generator = torch.Generator().manual_seed(0)
        inputs = _one_or_all([torch.randn(2, *size, generator=generator) for size in sizes])
        return {"inputs": inputs, "random_inputs": True}
    return {"inputs": SAMPLES[source.name].images() if source.scheme == "sample" else None}


def _one_or_all(inputs: list[Any]) -> Any:
    return inputs[0] if len(inputs) == 1 else tuple(inputs)
