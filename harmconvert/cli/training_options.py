"""Options of the commands that read labelled data, and the values that these commands derive from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click

from . import groups, images, inputs, options, types

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
        "--data",
        "--dataset",
        "dataset",
        cls=groups.Renamed,
        default="",
        show_default=False,
        metavar="DATA",
        help="A folder with one folder of images for each class, directly or in train/ and val/; or with images/ and "
        "masks/, images/ and annotations.json, input/ and target/, or files of tensors. Or sample:mnist5k, a timm data "
        "set (torch/cifar10, hfds/USER/NAME, wds/NAME, tfds/NAME), or FILE.py:FUNCTION, which returns a loader of "
        "(inputs, targets). (Also: --dataset.)",
    ),
    click.option(
        "--data-dir",
        metavar="DIR",
        help="Folder of a timm data set such as torch/cifar10. (Without --data: the same as --data DIR.)",
    ),
    click.option("--train-split", default="train", show_default=True, help="Name of the split to train on."),
    click.option("--val-split", default="validation", show_default=True, help="Name of the split to test on."),
    click.option(
        "--img-size", hidden=True, type=types.Count(min=1), help="Side of the images; default: the network's own."
    ),
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
    help="Share of the images to test on, if the data has only one split.",
)

evaluation_options = _stacked(
    data_options,
    click.option(
        "--holdout",
        type=types.FiniteRange(min=0, max=1, max_open=True),
        default=0.0,
        show_default=True,
        help="If the data has only one split: test on this share of it, as finetune does; 0: on all of it.",
    ),
    click.option(
        "--seed", type=types.Count(min=0), default=0, show_default=True, help="Seed for the choice of images."
    ),
    click.option(
        "--batch-size", "-b", type=types.Count(min=1), default=256, show_default=True, help="Images in a batch."
    ),
)

# Each option is a field of Recipe; if it is missing, the value of the recipe is used.
recipe_options = _stacked(
    click.option("--epochs", type=types.Count(min=1), help="Number of epochs; the recipe's schedule is scaled to it."),
    click.option(
        "--batch-size", "-b", type=types.Count(min=1), help="Images in one step, over all processes together."
    ),
    click.option("--lr", type=types.FiniteRange(min=0), help="Learning rate."),
    click.option("--opt", help="Optimiser, by timm's name: momentum, sgd (Nesterov), adamw, ..."),
    click.option("--momentum", hidden=True, type=types.FiniteRange(), help="Momentum of the optimiser."),
    click.option("--weight-decay", type=types.FiniteRange(min=0), help="Weight decay of every parameter."),
    click.option("--sched", help="Schedule, by timm's name: none (constant), cosine, step, multistep, ..."),
    click.option("--warmup-epochs", type=types.Count(min=0), help="Epochs in which the learning rate rises."),
    click.option(
        "--decay-epochs",
        hidden=True,
        type=types.FiniteRange(min=0, min_open=True),
        help="step: epochs between two decays.",
    ),
    click.option(
        "--decay-milestones",
        hidden=True,
        type=types.Numbers(),
        help="multistep: epochs of the decays, such as 60,120,160.",
    ),
    click.option(
        "--decay-rate", hidden=True, type=types.FiniteRange(min=0), help="step, multistep: factor of one decay."
    ),
    click.option(
        "--min-lr", hidden=True, type=types.FiniteRange(min=0), help="Learning rate at the end of the schedule."
    ),
    click.option(
        "--crop",
        type=click.Choice(["resized", "padded", "none"]),
        help="Augmentation: resized: random area and aspect ratio (ImageNet); padded: pad, then crop (CIFAR); or none.",
    ),
    click.option("--padding", hidden=True, type=types.Count(min=0), help="Pixels of padding for a padded crop."),
    click.option("--scale", type=types.FiniteRange(), nargs=2, help="Smallest and largest area of a resized crop."),
    click.option(
        "--ratio",
        hidden=True,
        type=types.FiniteRange(),
        nargs=2,
        help="Smallest and largest aspect ratio of a resized crop.",
    ),
    click.option("--hflip", type=types.FiniteRange(0, 1), help="Share of images that are mirrored; use 0 for text."),
    click.option(
        "--vflip", hidden=True, type=types.FiniteRange(0, 1), help="Share of images that are turned upside down."
    ),
    click.option(
        "--color-jitter", hidden=True, type=types.FiniteRange(min=0), help="Strength of random changes of colour."
    ),
    click.option("--aa", metavar="POLICY", help="timm's auto-augmentation, such as rand-m9-mstd0.5."),
    click.option("--reprob", type=types.FiniteRange(0, 1), help="Share of images in which a random part is erased."),
    click.option("--mixup", type=types.FiniteRange(min=0), help="Mixup's alpha."),
    click.option("--cutmix", type=types.FiniteRange(min=0), help="CutMix's alpha."),
    click.option("--smoothing", type=types.FiniteRange(0, 1), help="Label smoothing."),
    click.option(
        "--clip-grad",
        type=types.FiniteRange(min=0, min_open=True),
        help="Largest norm of the gradient; finetune limits it for low ranks.",
    ),
    click.option(
        "--model-ema-decay",
        "ema",
        type=types.FiniteRange(0, 1),
        help="Use a moving average of the weights as the result.",
    ),
    click.option(
        "--amp",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        is_flag=False,
        flag_value="bfloat16",
        help="Precision of the forward pass; --amp alone: bfloat16.",
    ),
    click.option(
        "--grad-accum-steps",
        type=types.Count(min=1),
        help="Run the images of a step in this many parts, to save memory.",
    ),
    click.option(
        "--freeze-bn/--no-freeze-bn",
        default=None,
        help="Keep the statistics and weights of batch norms; default: keep them if the loss uses only the uncut "
        "network.",
    ),
    click.option("--seed", type=types.Count(min=0), help="Seed for the order, the augmentation and the hold-out."),
)

# The defaults of finetune, for its help; those of train depend on --recipe.
_FINETUNE = {
    "epochs": "5", "batch_size": "256", "lr": "0.001", "opt": "momentum", "momentum": "0.9", "weight_decay": "0.0001",
    "sched": "none", "warmup_epochs": "0", "decay_epochs": "30", "decay_rate": "0.1", "min_lr": "0", "crop": "resized",
    "padding": "4", "scale": "0.08 1", "ratio": "0.75 1.33", "hflip": "0.5", "vflip": "0", "color_jitter": "0",
    "reprob": "0", "mixup": "0", "cutmix": "0", "smoothing": "0", "ema": "0: no average", "amp": "float32",
    "grad_accum_steps": "1", "seed": "0", "train_only": "all", "temperature": "2",
}  # fmt: skip


def with_shown_defaults(command: click.Command) -> click.Command:
    """Make the help of finetune show the defaults of its recipe."""
    for option in command.params:
        if isinstance(option, click.Option) and option.name in _FINETUNE:
            option.show_default = _FINETUNE[option.name]
    return command


run_options = _stacked(
    options.device,
    click.option(
        "--torchcompile", is_flag=True, help="Compile the network first; training is faster after some minutes."
    ),
    click.option(
        "--no-channels-last", hidden=True, is_flag=True, help="Do not change the memory format of the network."
    ),
    click.option(
        "--no-sync-bn", hidden=True, is_flag=True, help="Each process computes batch norms from its own images only."
    ),
    click.option(
        "--save-every", type=types.Count(min=1), metavar="STEPS", help="Save the state after every STEPS steps, too."
    ),
    click.option(
        "--resume",
        type=inputs.InputFile(),
        metavar="STATE",
        help="Continue from a saved state. Give the same other options as in the first run.",
    ),
    click.option(
        "--log",
        type=click.Choice(["tensorboard"]),
        help="Also write events for TensorBoard (pip install 'harmconvert[tensorboard]').",
    ),
)


def recipe_fields() -> set[str]:
    """Return the names of a recipe's settings; the options of `recipe_options` have the same names."""
    from ..training.recipe import Recipe

    return {field.name for field in fields(Recipe)}


def changes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a recipe that the options change."""
    changed = {key: values[key] for key in recipe_fields() & values.keys() if values[key] is not None}
    if "decay_milestones" in changed:
        changed["decay_milestones"] = tuple(round(epoch) for epoch in changed["decay_milestones"])
    return changed


def run_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that say where a training runs, and where its state and log are saved."""
    from ..pipeline.devices import machine_on

    channels_last, compiled, sync_bn = not values["no_channels_last"], values["torchcompile"], not values["no_sync_bn"]
    others = {key: values[key] for key in ("workers", "save_every", "resume", "log")}
    return {"machine": machine_on(values["device"], channels_last, compiled, sync_bn), **others}


def data_request(values: Mapping[str, Any]) -> DataRequest:
    """Return the data that the options name."""
    from ..data.datasets import DataRequest

    splits = values["train_split"], values["val_split"]
    return DataRequest(*inputs.named_data(values), *splits, values["holdout"], values["seed"] or 0)


def image_overrides(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the pre-processing and the size of images, if the options override the network's own.

    Raises:
        UsageError: --input-size and --img-size both give the size, or --input-size is repeated.
    """
    from ..errors import UsageError

    sizes, side = values["input_size"], values["img_size"]
    if len(sizes) > 1:
        raise UsageError("images are one input: give --input-size once")
    if sizes and side:
        raise UsageError("--input-size and --img-size both give the size of the images: give one of them")
    return {**images.preprocessing_overrides(values), "input_size": sizes[0] if sizes else side}
