"""Options of the commands that read labelled data, and what they make of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click

from . import images, inputs, options, types

if TYPE_CHECKING:
    from ..data.datasets import DataRequest


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


def recipe_fields() -> set[str]:
    """The settings of a recipe; an option of `recipe_options` has the name of its setting."""
    from ..training.recipe import Recipe

    return {field.name for field in fields(Recipe)}


def changes(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a recipe that the options change."""
    found = {key: given[key] for key in recipe_fields() & given.keys() if given[key] is not None}
    if "decay_milestones" in found:
        found["decay_milestones"] = tuple(round(epoch) for epoch in found["decay_milestones"])
    return found


def run_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Where a training runs, and where its state and figures are kept."""
    from ..pipeline.devices import machine_on

    layout, compiled, shared = not given["no_channels_last"], given["torchcompile"], not given["no_sync_bn"]
    kept = {key: given[key] for key in ("workers", "save_every", "resume", "log")}
    return {"machine": machine_on(given["device"], layout, compiled, shared), **kept}


def data_request(given: Mapping[str, Any]) -> DataRequest:
    """The data that the options name."""
    from ..data.datasets import DataRequest

    splits = given["train_split"], given["val_split"]
    return DataRequest(given["dataset"], given["data_dir"], *splits, given["holdout"], given["seed"] or 0)


def image_overrides(given: Mapping[str, Any]) -> dict[str, Any]:
    """What is done to each image where it is not the network's own, its size included.

    Raises:
        UsageError: --input-size and --img-size both give the size, or --input-size gives several.
    """
    from ..errors import UsageError

    sizes, side = given["input_size"], given["img_size"]
    if len(sizes) > 1:
        raise UsageError("images are one input: give --input-size once")
    if sizes and side:
        raise UsageError("--input-size and --img-size both give the size of the images: give one of them")
    return {**images.preprocessing_overrides(given), "input_size": sizes[0] if sizes else side}
