"""harmconvert train"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import inputs, options, training_options, training_progress, types
from .recording import record_of_command

if TYPE_CHECKING:
    from torch import nn

    from ..storage.checkpoint import Network


@click.command(name="train", cls=types.OptionalValues)
@click.argument("source", type=inputs.SourceText())
@click.option(
    "--recipe",
    "recipe_name",
    type=click.Choice(["cifar-wrn", "imagenet-resnet", "finetune"]),
    default="imagenet-resnet",
    show_default=True,
    help="The paper's recipes; other options change them.",
)
@click.option(
    "--harmonic",
    type=click.Choice(["none", "first", "all"]),
    default="all",
    show_default=True,
    help="none: the plain network; first: Harm1, its input layer alone; all: Harm.",
)
@click.option(
    "--lambda",
    "lam",
    default="full",
    show_default=True,
    metavar="LAMBDA",
    help="What the layers behind the first keep (with --harmonic all), as in convert.",
)
@click.option(
    "--no-normalize-first",
    is_flag=True,
    help="Leave the spectrum normalisation of the first layer out ('no BN' in the paper's Table 1).",
)
@options.basis
@training_options.image_options
@training_options.holdout
@training_options.recipe_options
@click.option("-o", "--output", metavar="FILE", help="Default: NAME-trained.safetensors.")
@options.force
@training_options.run_options
@options.network_options
@options.loudness
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
    **given: Any,
) -> None:
    """Train the network SOURCE from scratch, plain or harmonic.

    Writes a harmonic checkpoint; with --harmonic none plain weights, for --checkpoint of the other commands. Batches
    are of all processes together, as in finetune.

    \b
    Example:
      harmconvert train wrn28_10 --recipe cifar-wrn --harmonic all --lambda 3 --dataset torch/cifar10 --data-dir cifar/
      harmconvert train resnet50 --recipe imagenet-resnet --harmonic none --data-dir imagenet/ --amp
      harmconvert train sample:resnet_mnist5k --harmonic none --recipe cifar-wrn --dataset sample:mnist5k --hflip 0
    """
    output = output or default_output(source)
    inputs.check_outputs(output, given, force)
    inputs.check_run(given, lam)
    from contextlib import ExitStack
    from dataclasses import replace

    from ..data.preprocessing import record_of
    from ..network.distributed import joined, rank
    from ..pipeline.finetuning import Setting, check_classes, evaluator, train_loading
    from ..training import train

    with joined(), ExitStack() as held:
        network, model = untrained(source, given, harmonic, lam, basis, not no_normalize_first)
        data = training_options.data_from(given, training_options.seed_from(given), ("train", "test"))
        check_classes(data, model, f"make the network with --model-kwargs num_classes={data.classes}")
        recipe = training_options.recipe_from(recipe_name, given)
        options.say(str(recipe))
        config = training_options.preprocessing_from(given, model)
        identity = {
            "recipe": recipe.to_json(),
            "data": training_options.data_identity(given, data, config),
            "network": [source, harmonic, lam, basis, no_normalize_first],
            "arguments": dict(network.source.arguments),
        }
        keeper = training_options.keeper_from(given, output, identity, force)
        held.enter_context(keeper.alone())
        machine, workers = training_options.machine_from(given), training_options.workers_from(given)
        setting = Setting(config, machine, workers)
        record = training_options.recorder(output, given["log"])
        with training_progress.progress(recipe.epochs) as (told, epoch_done, tested):
            worth = evaluator(data, recipe, replace(setting, tested=tested))

            def after_epoch(rows: Any) -> None:
                record(rows)
                epoch_done(rows[-1])

            rows = train(
                model,
                train_loading(data, recipe, setting),
                recipe,
                test=worth,
                machine=setting.machine,
                keeper=keeper,
                resume=Path(given["resume"]) if given["resume"] else None,
                progress=told,
                epoch_done=after_epoch,
            )
            found = worth(model)
        if rank() > 0:
            return
        command = record_of_command(str(network.source), {"recipe_name", *recipe.to_json()})
        run = {"recipe": recipe.to_json(), "epochs": [dict(row) for row in rows], "evaluation": found.to_json()}
        with training_options.kept(keeper):
            write(model, network, output, harmonic, {**run, "command": command}, force, record_of(config))
        keeper.remove()
    if as_json:
        options.print_json({"output": output, **run})
        return
    options.console().print(f"{found}\nwrote {output}", markup=False)


def untrained(
    source: str, given: dict[str, Any], harmonic: str, lam: str, basis: str, normalize_first: bool
) -> tuple[Network, nn.Module]:
    """The network of a source with weights from the seed, and the form of it that is to be trained."""
    import torch

    from ..arguments import parse_lambda
    from ..training.harmonize import harmonize

    torch.manual_seed(training_options.seed_from(given))
    network = options.opened(source, given, pretrained=False)
    if harmonic == "none":
        return network, network.model
    size = training_options.image_size(given, network.model)
    example = zeros_of([size] if size else [], network.model)
    model = harmonize(
        network.model,
        harmonic,
        parse_lambda(lam),
        normalize_first=normalize_first,
        basis=basis,
        example_input=example,
    )
    return network, model


def write(
    model: nn.Module,
    network: Network,
    output: str,
    harmonic: str,
    run: dict[str, Any],
    force: bool,
    preprocessing: dict[str, Any],
) -> None:
    """A harmonic checkpoint, or the plain weights."""
    from dataclasses import replace

    from ..pipeline.saving import save
    from ..storage.weights import untied_state, write_tensors

    if harmonic == "none":
        # The epochs are in the .metrics.csv beside it.
        kept = {"recipe": run["recipe"], "evaluation": run["evaluation"]}
        metadata = {"format": "pt", "harmconvert_training": json.dumps(kept, separators=(",", ":"))}
        write_tensors(untied_state(model)[0], output, metadata, force)
    else:
        source = replace(network.source, sha256=None)  # it was not converted from weights
        save(model, output, source=source, history={"training": [run]}, preprocessing=preprocessing, force=force)


def default_output(source: str) -> str:
    """Where the trained network goes unless told: NAME-trained.safetensors, here."""
    from ..files import default_name

    return default_name(source, "trained").replace("-harmonic-trained", "-trained")
