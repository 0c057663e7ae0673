"""harmconvert train"""

from __future__ import annotations

from typing import Any

import click

from . import inputs, next_step, options, training_options, types
from .listening import CommandLine
from .recording import command_words


@click.command(name="train", cls=types.OptionalValues)
@click.argument("source", type=inputs.SourceText())
@click.option(
    "--recipe",
    "recipe_name",
    type=click.Choice(["cifar-wrn", "imagenet-resnet", "finetune"]),
    default="imagenet-resnet",
    show_default=True,
    help="Recipe of the paper; other options change its settings.",
)
@click.option(
    "--harmonic",
    type=click.Choice(["none", "first", "all"]),
    default="all",
    show_default=True,
    help="none: the plain network; first: Harm1, only the input layer is harmonic; all: Harm.",
)
@click.option(
    "--lambda",
    "lam",
    default="full",
    show_default=True,
    metavar="LAMBDA",
    help="With --harmonic all: what the layers after the first keep, as in convert.",
)
@click.option(
    "--no-normalize-first",
    is_flag=True,
    help="Do not normalise the spectrum in the first layer ('no BN' in the paper's Table 1).",
)
@options.basis
@training_options.image_options
@training_options.holdout
@training_options.recipe_options
@click.option("-o", "--output", metavar="FILE", help="Default: NAME-trained.safetensors.")
@options.force
@training_options.run_options
@options.network_options
@options.verbosity
@options.common
def command(
    source: str,
    recipe_name: str,
    harmonic: str,
    lam: str,
    basis: str,
    no_normalize_first: bool,
    output: str | None,
    force: bool,
    as_json: bool,
    **values: Any,
) -> None:
    """Train the network SOURCE from scratch, plain or harmonic.

    Writes a harmonic checkpoint. With --harmonic none, it writes plain weights, which other commands read with
    --checkpoint. Batch sizes count all processes together, as in finetune.

    \b
    Example:
      harmconvert train wrn28_10 --recipe cifar-wrn --harmonic all --lambda 3 --data torch/cifar10 --data-dir cifar/
      harmconvert train resnet50 --recipe imagenet-resnet --harmonic none --data imagenet/ --amp
      harmconvert train sample:resnet_mnist5k --harmonic none --recipe cifar-wrn --data sample:mnist5k --hflip 0
    """
    from ..arguments import check_run_outputs, parse_lambda

    output = output or default_output(source)
    check_run_outputs(output, values["resume"], force)
    parsed_lambda = parse_lambda(lam)
    inputs.check_run(values)
    from ..pipeline.train import train

    result = train(
        options.request(source, values),
        training_options.data_request(values),
        output,
        recipe=recipe_name,
        harmonic=harmonic,
        lam=parsed_lambda,
        basis=basis,
        normalize_first=not no_normalize_first,
        preprocessing=training_options.image_overrides(values),
        force=force,
        command=command_words(leave_out={"recipe_name", *training_options.recipe_fields()}),
        listener=CommandLine(),
        **training_options.run_arguments(values),
        **training_options.changes(values),
    )
    if as_json:
        options.print_json(result.to_json())
        return
    console = options.console()
    console.print(f"{result.evaluation}\nwrote {output}", markup=False)
    next_step.after_training(console, source, output, harmonic == "none", values)


def default_output(source: str) -> str:
    """Return the default output: NAME-trained.safetensors, in the current folder."""
    from ..files import default_name

    return default_name(source, "trained").replace("-harmonic-trained", "-trained")
