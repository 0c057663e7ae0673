"""Options that say which images are read without labels, and how images are preprocessed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import options, types

if TYPE_CHECKING:
    from ..calibration import CalibrationSettings
    from ..data.datasets import DataRequest
    from ..pipeline.convert import Conversion


def preprocessing_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """timm's words for what is done to an image before the network sees it."""
    for option in (
        click.option(
            "--crop-pct",
            type=types.FiniteRange(min=0, min_open=True),
            help="Centre share of each image to take; default: the network's own.",
        ),
        click.option(
            "--interpolation",
            type=click.Choice(["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]),
            help="How images are resized; default: the network's own.",
        ),
        click.option(
            "--std", type=types.Numbers(), help="Channel deviations to divide by; default: the network's own."
        ),
        click.option("--mean", type=types.Numbers(), help="Channel means to subtract; default: network's own."),
        click.option(
            "--preprocess",
            metavar="WAY",
            help="Where the network does not say how images are preprocessed: imagenet, none (whole images, values "
            "from 0 to 1) or FILE.py:FUNCTION, which makes a tensor (C, H, W) of a Pillow image.",
        ),
    ):
        command = option(command)
    return command


def preprocessing_overrides(given: Mapping[str, Any]) -> dict[str, Any]:
    """What `preprocessing_options` say, as `harmconvert.data.preprocessing` takes it."""
    chosen = ("preprocess", "mean", "std", "interpolation", "crop_pct")
    return {**{key: given[key] for key in chosen}, "trust_code": given["trust_code"]}


def calibration_data_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What to calibrate on, and how; beside options that say where data lies and how it is pre-processed."""
    for option in (
        click.option(
            "--calibration-memory",
            type=types.Bytes(),
            help="Memory that one layer's equations may take, such as 2G; default: half of what is free.",
        ),
        click.option(
            "--damping",
            type=types.FiniteRange(min=0),
            help="Pull of each refit towards the plain cut, relative to the layer's mean square response; "
            "default: chosen on images held back.",
        ),
        click.option("--calibration-split", default="train", show_default=True, help="Split of a timm data set."),
        click.option(
            "--calibration-batch-size",
            type=types.Count(min=1),
            default=32,
            show_default=True,
            help="Images in one forward; fewer take less memory.",
        ),
        click.option(
            "--calibration-images",
            type=types.Count(min=1),
            default=256,
            show_default=True,
            help="Images to use; more help layers that lack them.",
        ),
        click.option(
            "--calibrate",
            "data",
            metavar="DATA",
            help="Repair the cut on images, without labels or training: a folder, sample:mnist5k, "
            "sample:photographs, or a timm data set.",
        ),
    ):
        command = option(command)
    return command


def calibration_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say what to calibrate on, for commands without other options for data."""
    for option in (
        preprocessing_options,
        click.option(
            "--allow-fallback",
            is_flag=True,
            help="Exit with 0 where a layer could not be refitted and stays a plain cut.",
        ),
        click.option("--data-dir", metavar="DIR", help="Where a timm data set such as torch/cifar10 lies."),
        click.option(
            "--seed",
            type=types.Count(min=0),
            default=0,
            show_default=True,
            help="Of the choice of images and positions.",
        ),
        calibration_data_options,
    ):
        command = option(command)
    return command


def check_calibration(
    given: dict[str, Any], sizes: Sequence[tuple[int, ...]], own: options.Decorator = calibration_options
) -> None:
    """Refuse options ``own`` of a calibration that cannot be, before torch is imported.

    Raises:
        UsageError: no such images, options without images, or several input sizes.
    """
    from ..arguments import check_unlabelled
    from ..errors import UsageError

    if given["data"] is None:
        options.only_with(own, "--calibrate DATA", but=preprocessing_options)
        return
    if len(sizes) > 1:
        raise UsageError("--calibrate feeds one image; for a network of several inputs use calibration= in Python")
    check_unlabelled(given["data"])


def calibration_request(given: Mapping[str, Any]) -> DataRequest | None:
    """The images that --calibrate names; None without it."""
    from ..data.datasets import DataRequest

    if given["data"] is None:
        return None
    return DataRequest(given["data"], given["data_dir"], given["calibration_split"])


def calibration_settings(given: Mapping[str, Any]) -> CalibrationSettings:
    """The settings that the options of a calibration give."""
    from ..calibration import CalibrationSettings

    memory, count = given["calibration_memory"], given["calibration_images"]
    return CalibrationSettings(given["damping"], memory, seed=given["seed"], inputs=count)


def labelled_request(data: str | None, given: Mapping[str, Any]) -> DataRequest | None:
    """The images that --labelled names; None without it."""
    from ..data.datasets import DataRequest

    if data is None or Path(data).is_dir() or data.endswith(".tar"):
        return None if data is None else DataRequest(data_dir=data, holdout=0.0)
    return DataRequest(data, given["data_dir"], holdout=0.0)


def verdict(conversion: Conversion, output: str, allow_fallback: bool) -> int:
    """Exit code: 1 where a layer could not be calibrated and that was not allowed. The file is written all the same:
    hours of work on the other layers are in it."""
    from ..errors import counted

    failed = conversion.calibration.failed if conversion.calibration else ()
    if not failed:
        return 0
    what = ", ".join(f"{layer.name} ({layer.why})" for layer in failed[:3])
    options.say(
        f"harmconvert: {'note' if allow_fallback else 'check failed'}: {counted(len(failed), 'layer')} of {output} "
        f"could not be calibrated and {'stays' if len(failed) == 1 else 'stay'} a plain cut: {what}"
        + ("" if allow_fallback else "; --allow-fallback accepts that"),
        urgent=True,
    )
    return 0 if allow_fallback else 1
