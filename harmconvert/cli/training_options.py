"""Options of the commands that read labelled data, and what they make of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import images, inputs, options, types

if TYPE_CHECKING:
    from ..data.datasets import Data
    from ..data.loading import Loading
    from ..training import Keeper, Machine, Recipe


def _stacked(*stack: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(stack):
            command = option(command)
        return command

    return decorate


data_options = _stacked(
    click.option(
        "--data-dir",
        metavar="DIR",
        help="Folder of images, one folder for each class, in train/ and val/ or in one; or where --dataset lies.",
    ),
    click.option(
        "--dataset",
        default="",
        metavar="NAME",
        help="sample:mnist5k, or a timm data set: torch/cifar10, hfds/USER/NAME, wds/NAME, tfds/NAME.",
    ),
    click.option("--train-split", default="train", show_default=True, help="Name of the split to train on."),
    click.option("--val-split", default="validation", show_default=True, help="Name of the split to test on."),
    click.option("--img-size", type=types.Count(min=1), help="Side of the images; default: the network's own."),
    click.option(
        "--workers", "-j", type=types.Count(min=0), help="Processes that load images; default: one for each core."
    ),
    images.preprocessing_options,
)
image_options = _stacked(data_options, options.input_size)

holdout = click.option(
    "--holdout",
    type=types.FiniteRange(min=0, max=1, max_open=True),
    default=0.1,
    show_default=True,
    help="Share to test on, where the data has one split only.",
)

evaluation_options = _stacked(
    data_options,
    click.option(
        "--holdout",
        type=types.FiniteRange(min=0, max=1, max_open=True),
        default=0.0,
        show_default=True,
        help="Where the data has one split only: test on this share of it, as finetune does; 0: on all of it.",
    ),
    click.option("--seed", type=types.Count(min=0), default=0, show_default=True, help="Of the choice of images."),
    click.option("--batch-size", "-b", type=types.Count(min=1), default=256, show_default=True, help="Images at once."),
)

# Each is a field of Recipe; not given means the recipe's own.
recipe_options = _stacked(
    click.option("--epochs", type=types.Count(min=1), help="Epochs; the recipe's schedule stretches with them."),
    click.option(
        "--batch-size", "-b", type=types.Count(min=1), help="Images of one step, over all processes together."
    ),
    click.option("--lr", type=types.FiniteRange(min=0), help="Learning rate."),
    click.option("--opt", help="Optimiser, by timm's name: momentum, sgd (Nesterov), adamw, ..."),
    click.option("--momentum", type=types.FiniteRange(), help="Of the optimiser."),
    click.option("--weight-decay", type=types.FiniteRange(min=0), help="Of every parameter."),
    click.option("--sched", help="Schedule, by timm's name: none (constant), cosine, step, multistep, ..."),
    click.option("--warmup-epochs", type=types.Count(min=0), help="Epochs in which the learning rate rises."),
    click.option("--decay-epochs", type=types.FiniteRange(min=0, min_open=True), help="step: epochs between two cuts."),
    click.option("--decay-milestones", type=types.Numbers(), help="multistep: epochs of the cuts, such as 60,120,160."),
    click.option("--decay-rate", type=types.FiniteRange(min=0), help="step, multistep: what a cut multiplies by."),
    click.option("--min-lr", type=types.FiniteRange(min=0), help="Where a schedule ends."),
    click.option(
        "--crop",
        type=click.Choice(["resized", "padded", "none"]),
        help="Augmentation: random area and aspect (ImageNet), padded and cropped (CIFAR), or none.",
    ),
    click.option("--padding", type=types.Count(min=0), help="Pixels of a padded crop."),
    click.option("--scale", type=types.FiniteRange(), nargs=2, help="Smallest and largest area of a resized crop."),
    click.option("--ratio", type=types.FiniteRange(), nargs=2, help="Least and greatest aspect of a resized crop."),
    click.option("--hflip", type=types.FiniteRange(0, 1), help="Share of images that are mirrored; 0 for writing."),
    click.option("--vflip", type=types.FiniteRange(0, 1), help="Share of images that are turned upside down."),
    click.option("--color-jitter", type=types.FiniteRange(min=0), help="Strength of random colours."),
    click.option("--aa", metavar="POLICY", help="timm's auto-augmentation, such as rand-m9-mstd0.5."),
    click.option("--reprob", type=types.FiniteRange(0, 1), help="Share of images with a random part erased."),
    click.option("--mixup", type=types.FiniteRange(min=0), help="Mixup's alpha."),
    click.option("--cutmix", type=types.FiniteRange(min=0), help="CutMix's alpha."),
    click.option("--smoothing", type=types.FiniteRange(0, 1), help="Label smoothing."),
    click.option("--clip-grad", type=types.FiniteRange(min=0, min_open=True), help="Largest norm of the gradient."),
    click.option("--model-ema-decay", "ema", type=types.FiniteRange(0, 1), help="Deliver a moving average of weights."),
    click.option(
        "--amp",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        is_flag=False,
        flag_value="bfloat16",
        help="Precision of the forward; --amp alone: bfloat16.",
    ),
    click.option(
        "--grad-accum-steps", type=types.Count(min=1), help="Run a step's images in so many parts: less memory."
    ),
    click.option(
        "--freeze-bn/--no-freeze-bn",
        default=None,
        help="Batch norms keep statistics and weights; so they do where the uncut network alone teaches.",
    ),
    click.option("--seed", type=types.Count(min=0), help="Of the order, the augmentation and the hold-out."),
)

run_options = _stacked(
    options.device,
    click.option("--torchcompile", is_flag=True, help="Compile the network first: faster after some minutes."),
    click.option("--no-channels-last", is_flag=True, help="Keep the memory format that the network has."),
    click.option("--no-sync-bn", is_flag=True, help="Batch norms look at each process's own images only."),
    click.option("--save-every", type=types.Count(min=1), metavar="STEPS", help="Save the state more often."),
    click.option(
        "--resume",
        type=inputs.InputFile(),
        metavar="STATE",
        help="Go on from a saved state; the other options as when the run was begun.",
    ),
    click.option(
        "--log", type=click.Choice(["tensorboard"]), help="Write events, too (pip install 'harmconvert[tensorboard]')."
    ),
)

_CHANGEABLE = (
    *("epochs", "batch_size", "lr", "opt", "momentum", "weight_decay", "sched", "warmup_epochs", "min_lr", "crop"),
    *("decay_epochs", "decay_milestones", "decay_rate", "padding"),
    *("scale", "ratio", "hflip", "vflip", "color_jitter", "aa", "reprob", "mixup", "cutmix", "smoothing", "clip_grad"),
    *("ema", "amp", "grad_accum_steps", "freeze_bn", "seed"),
)


def recipe_from(name: str, given: Mapping[str, Any], **more: Any) -> Recipe:
    """The recipe of that name as the options change it; with --resume the one that the run was begun with.

    Raises:
        UsageError: options that differ from those of the run that is resumed.
    """
    from ..errors import UsageError
    from ..training import Recipe, recipe_named
    from ..training.state import identity_of

    changes = {key: given[key] for key in _CHANGEABLE if given[key] is not None} | more
    if "decay_milestones" in changes:
        changes["decay_milestones"] = tuple(round(epoch) for epoch in changes["decay_milestones"])
    if not given["resume"]:
        return recipe_named(name, **changes)
    recipe = Recipe.from_json(identity_of(given["resume"]).get("recipe"))
    for key, value in changes.items():
        if value is not None and getattr(recipe, key) != value:
            raise UsageError(
                f"the run of {given['resume']} was begun with {key}={getattr(recipe, key)}, not {value}: leave it out"
            )
    return recipe


def seed_from(given: Mapping[str, Any]) -> int:
    """The seed: of the run that is resumed, the one given, or 0."""
    from ..training import Recipe
    from ..training.state import identity_of

    if given["resume"]:
        return Recipe.from_json(identity_of(given["resume"]).get("recipe")).seed
    return int(given["seed"] or 0)


def data_from(given: Mapping[str, Any], seed: int, parts: tuple[str, ...]) -> Data:
    """The data that the options name; what a user should know about it is said."""
    from ..data.datasets import DataRequest, open_data

    request = DataRequest(
        given["dataset"], given["data_dir"], given["train_split"], given["val_split"], given["holdout"], seed
    )
    data = open_data(request, parts)
    for note in data.notes:
        options.say(f"note: {note}")
    return data


def evaluation_loading(given: Mapping[str, Any], model: Any, machine: Machine) -> tuple[Loading, dict[str, Any]]:
    """The images to test a network on under `evaluation_options`, and how they are pre-processed."""
    from ..data.loading import evaluation_batches
    from ..data.preprocessing import color_mode, evaluation_transform
    from ..pipeline.finetuning import check_classes

    data = data_from(given, given["seed"], ("test",))
    assert data.test is not None
    if data.labelled:
        check_classes(data, model, "evaluate a network of these classes")
    config = preprocessing_from(given, model)
    loading = evaluation_batches(
        data.test,
        evaluation_transform(config),
        color_mode(config),
        given["batch_size"],
        workers=workers_from(given),
        pin_memory=machine.device.type == "cuda",
    )
    return loading, config


def preprocessing_from(given: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """The network's pre-processing as the options change it, said in a line.

    Raises: as `harmconvert.pipeline.inputs.image_config`; UsageError also where two options give the size.
    """
    from ..pipeline.inputs import image_config
    from .listening import CommandLine

    return image_config(model, images.preprocessing_overrides(given), CommandLine(), image_size(given, model))


def image_size(given: Mapping[str, Any], model: Any) -> tuple[int, ...] | None:
    """The input size that --input-size or --img-size gives; None where neither does.

    Raises:
        UsageError: both do, or --input-size gives several.
    """
    from ..errors import UsageError

    sizes, side = given["input_size"], given["img_size"]
    if len(sizes) > 1:
        raise UsageError("images are one input: give --input-size once")
    if sizes and side:
        raise UsageError("--input-size and --img-size both give the size of the images: give one of them")
    return sizes[0] if sizes else (_input_channels(model), side, side) if side else None


def _input_channels(model: Any) -> int:
    """What the network's first convolution reads, else what its configuration says, else 3."""
    from ..layers.block import HarmonicBlock2d
    from ..layers.harmonic import CONVOLUTIONS
    from ..network.declared import pretrained_config

    size = pretrained_config(model).get("input_size")
    first = next((module for module in model.modules() if isinstance(module, (HarmonicBlock2d, *CONVOLUTIONS))), None)
    return int(getattr(first, "in_channels", size[0] if size else 3))


def data_identity(given: Mapping[str, Any], data: Data, preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """What of the data and of what is done to them must be the same for a run to go on, JSON-able."""
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in preprocessing.items()}
    return {**data.identity(), "dataset": given["dataset"], "preprocessing": plain}


def workers_from(given: Mapping[str, Any]) -> int:
    """Processes that load images for this one."""
    from ..network.distributed import local_world_size

    if given["workers"] is not None:
        return int(given["workers"])
    if given["dataset"].startswith("sample:"):
        return 0  # a few thousand small arrays: handing them over would cost more than making them
    return max(1, min(8, len(os.sched_getaffinity(0)) // local_world_size()))


def machine_from(given: Mapping[str, Any]) -> Machine:
    """Where and how to run."""
    import torch

    from ..errors import UsageError, first_line
    from ..training import Machine

    name = given["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":  # each process of a machine has a GPU of its own
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {first_line(error)}") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: use cpu or cuda")
    return Machine(device, not given["no_channels_last"], given["torchcompile"], not given["no_sync_bn"])


def keeper_from(given: Mapping[str, Any], output: str, identity: Mapping[str, Any], force: bool) -> Keeper:
    """Where and when the state of the run that makes ``output`` is saved.

    Raises:
        UsageError: a new run would replace the state of one that was interrupted.
    """
    from ..files import check_output, state_path
    from ..network.distributed import any_rank
    from ..training import Keeper

    path = Path(given["resume"]) if given["resume"] else state_path(output)
    if any_rank(not given["resume"] and not force and path.exists()):
        raise inputs.interrupted(path)
    check_output(path, force=True)
    return Keeper(path, given["save_every"], identity, say=options.say)


@contextmanager
def kept(keeper: Keeper) -> Iterator[None]:
    """Errors while what came of a run is written say how to have it all the same."""
    from ..errors import HarmconvertError

    try:
        yield
    except HarmconvertError as error:
        raise type(error)(f"{error}; the run is kept: go on with --resume {keeper.path}") from error


def recorder(output: str, log: str | None) -> Callable[[Sequence[Mapping[str, Any]]], None]:
    """What keeps the figures of a run beside its output."""
    from ..files import beside
    from ..training.metrics import Events, metrics_path, write_metrics

    if os.environ.get("RANK", "0") != "0":
        return lambda rows: None
    events = Events(beside(output, ".tensorboard")) if log == "tensorboard" else None

    def record(rows: Sequence[Mapping[str, Any]]) -> None:
        write_metrics(metrics_path(output), rows)
        if events is not None:
            events.write(rows[-1])

    return record
