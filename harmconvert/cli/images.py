"""Options for images that are read without labels, and for their pre-processing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from . import groups, inputs, options, types
from .advice import adapted

if TYPE_CHECKING:
    from ..calibration import CalibrationSettings
    from ..data.datasets import DataRequest
    from ..pipeline.convert import Conversion


def preprocessing_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options for the pre-processing of images, with the names that timm uses."""
    for option in (
        click.option(
            "--crop-pct",
            type=types.FiniteRange(min=0, min_open=True),
            help="Share of each image to keep, at its centre; default: the network's own.",
        ),
        click.option(
            "--interpolation",
            type=click.Choice(["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]),
            help="How images are resized; default: the network's own.",
        ),
        click.option(
            "--std", type=types.Numbers(), help="Channel deviations to divide by; default: the network's own."
        ),
        click.option("--mean", type=types.Numbers(), help="Channel means to subtract; default: the network's own."),
        click.option(
            "--preprocess",
            metavar="WAY",
            help="Pre-processing of images, if the network does not declare it: imagenet, none (whole images, values "
            "from 0 to 1) or FILE.py:FUNCTION, which converts a Pillow image to a tensor (C, H, W).",
        ),
    ):
        command = option(command)
    return command


def preprocessing_overrides(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of `preprocessing_options`, as `harmconvert.data.preprocessing` expects them."""
    chosen = ("preprocess", "mean", "std", "interpolation", "crop_pct")
    return {**{key: values[key] for key in chosen}, "trust_code": values["trust_code"]}


_DATA_DIR = click.option("--data-dir", metavar="DIR", help="Folder of a timm data set such as torch/cifar10.")
_SPLIT = click.option("--calibration-split", default="train", show_default=True, help="Split of a timm data set.")


def calibration_data_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a calibration, without those for the place of the data and its pre-processing."""
    for option in (
        click.option(
            "--calibration-memory",
            hidden=True,
            type=types.Bytes(),
            help="Largest memory for the equations of one layer, such as 2G; default: half of the free memory.",
        ),
        click.option(
            "--damping",
            hidden=True,
            type=types.FiniteRange(min=0),
            help="Strength with which each refit stays near the plain cut, relative to the layer's mean square "
            "response; default: chosen on the held-back images.",
        ),
        _SPLIT,
        click.option(
            "--calibration-batch-size",
            type=types.Count(min=1),
            default=32,
            show_default=True,
            help="Images in one forward pass; fewer need less memory.",
        ),
        click.option(
            "--calibration-images",
            type=types.Count(min=1),
            default=256,
            show_default=True,
            help="Number of images; more images improve layers with large kernels.",
        ),
    ):
        command = option(command)
    return command


calibrate_option = click.option(
    "--calibrate",
    "data",
    metavar="DATA",
    help="Images for calibration, which reduces the error of the cut without labels or training: a folder, "
    "sample:mnist5k, sample:photographs, or a timm data set.",
)


def calibration_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add all options of a calibration, for commands that have no other options for data."""
    for option in (
        preprocessing_options,
        click.option(
            "--allow-fallback",
            is_flag=True,
            help="Exit with 0 if a layer cannot be refitted and keeps the plain cut.",
        ),
        _DATA_DIR,
        click.option(
            "--seed",
            type=types.Count(min=0),
            default=0,
            show_default=True,
            help="Seed for the choice of images and positions.",
        ),
        calibration_data_options,
        click.option(
            "--data",
            "--calibrate",
            "data",
            cls=groups.Renamed,
            metavar="DATA",
            help="Data for calibration, which reduces the error of the cut without labels or training: a folder of "
            "images or of another kind of data, sample:mnist5k, sample:photographs, a timm data set, or "
            "FILE.py:FUNCTION. With --max-drop, the data has labels, and measures the loss, too: its training part "
            "calibrates, its test part measures; data without parts is divided in half. (Also: --calibrate.)",
        ),
    ):
        command = option(command)
    return command


def comparison_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options for images on which low precision is calibrated and compared."""
    for option in (
        preprocessing_options,
        _DATA_DIR,
        _SPLIT,
        click.option(
            "--seed", type=types.Count(min=0), default=0, show_default=True, help="Seed for the choice of images."
        ),
        click.option(
            "--calibration-images",
            type=types.Count(min=2),
            default=256,
            show_default=True,
            help="Number of images; every fourth is held back for the comparison.",
        ),
        click.option(
            "--data",
            "--calibrate",
            "data",
            cls=groups.Renamed,
            metavar="DATA",
            help="Images without labels, for int8 and for the comparison of low precision: a folder, sample:mnist5k, "
            "sample:photographs, or a timm data set. (Also: --calibrate.)",
        ),
    ):
        command = option(command)
    return command


def check_calibration(
    values: dict[str, Any],
    sizes: Sequence[tuple[int, ...]],
    own: options.Decorator = calibration_options,
    name: str = "--data",
) -> None:
    """Check the options ``own`` of a calibration on the data of the option ``name``, before torch is imported.

    Raises:
        UsageError: the images do not exist, options need images, or there are several input sizes.
    """
    from ..arguments import check_unlabelled
    from ..errors import UsageError

    if values["data"] is None:
        options.only_with(own, f"{name} DATA", but=preprocessing_options)
        return
    if len(sizes) > 1:
        raise UsageError(
            f"{name} names images, which are one input: for a network with several inputs, use calibration= in Python"
        )
    check_unlabelled(values["data"])


def calibration_request(values: Mapping[str, Any]) -> DataRequest | None:
    """Return the images for calibration; None without any."""
    from ..data.datasets import DataRequest

    if values["data"] is None:
        return None
    return DataRequest(values["data"], values["data_dir"], values["calibration_split"])


def calibration_settings(values: Mapping[str, Any]) -> CalibrationSettings:
    """Return the settings from the options of a calibration."""
    from ..calibration import CalibrationSettings

    memory, count = values["calibration_memory"], values["calibration_images"]
    return CalibrationSettings(values["damping"], memory, seed=values["seed"], inputs=count)


def labelled_request(data: str | None, values: Mapping[str, Any]) -> DataRequest | None:
    """Return the data with labels that an option names; None without it."""
    from ..data.datasets import DataRequest

    if data is None:
        return None
    return DataRequest(*inputs.named_data({"dataset": data, "data_dir": values["data_dir"]}), holdout=0.0)


def conversion_requests(
    values: Mapping[str, Any], labelled: str | None, measured: bool
) -> tuple[DataRequest | None, DataRequest | None]:
    """Return the data on which a conversion calibrates, and the data on which it is ``measured``.

    If one option names both, they are the same request: the library divides the data.
    """
    from ..data.datasets import DIVIDED, DataRequest

    if not measured or labelled is not None:
        return calibration_request(values), labelled_request(labelled, values)
    named = inputs.named_data({"dataset": values["data"], "data_dir": values["data_dir"]})
    both = DataRequest(*named, values["calibration_split"], holdout=DIVIDED, seed=values["seed"])
    return both, both


def verdict(conversion: Conversion, output: str, allow_fallback: bool) -> int:
    """Return the exit code: 1 if a layer could not be calibrated, unless this is allowed.

    The file is written in both cases, because the work on the other layers can take hours.
    """
    from ..errors import counted

    failed = conversion.calibration.failed if conversion.calibration else ()
    if not failed:
        return 0
    what = ", ".join(f"{layer.name} ({adapted(layer.why or '')})" for layer in failed[:3])
    options.say(
        f"harmconvert: {'note' if allow_fallback else 'check failed'}: {counted(len(failed), 'layer')} of {output} "
        f"could not be calibrated and {'stays' if len(failed) == 1 else 'stay'} a plain cut: {what}"
        + ("" if allow_fallback else "; --allow-fallback accepts that"),
        urgent=True,
    )
    return 0 if allow_fallback else 1
