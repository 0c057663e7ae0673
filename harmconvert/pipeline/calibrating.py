"""Inputs for the calibration of a flow: images that a name stands for, or batches of the caller."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..calibration import CalibrationSettings
from ..data.calibration import CalibrationImages, calibration_images
from ..data.datasets import DataRequest, user_loader
from ..data.preprocessing import describe_preprocessing
from ..data.variety import uniform_output_warning
from ..errors import Argument, UsageError, counted, shortened
from .inputs import Sizes, input_channels
from .listener import Listener

# The data on which a flow calibrates.
CalibrationData = str | Path | DataRequest | Iterable[Any]


def calibration_batches(
    data: CalibrationData | None,
    model: nn.Module,
    settings: CalibrationSettings,
    *,
    batch_size: int,
    sizes: Sizes,
    preprocessing: Mapping[str, Any],
    listener: Listener,
    training_part: bool = False,
) -> Iterable[Any] | None:
    """Return the batches for a calibration: read from the images that ``data`` names, else ``data`` itself.

    Args:
        data: a folder, ``sample:NAME`` or a timm data set (its ``train_split``); or an iterable of batches; or None.
        settings: the number of images, and the seed that selects them.
        sizes: the sizes of the network's inputs, if the caller gives them.
        training_part: of a folder or file, use only the part that is not for testing.

    Raises:
        UsageError: the images do not exist, or the network has several inputs.
        InputError, OutsideError: see `calibration_images`.
    """
    if not isinstance(data, str | Path | DataRequest):
        return data
    if len(sizes) > 1:
        raise UsageError(
            Argument("calibrate", data),
            " names images, which are one input: for a network with several inputs, give batches of your own",
        )
    request = DataRequest.parse(data)
    name = request.name
    if (loader := user_loader(request, "train")) is not None:
        return loader
    with listener.busy(f"reading images of {name}"):
        images = calibration_images(
            request,
            model,
            settings.inputs,
            batch_size,
            overrides={"input_size": sizes[0] if sizes else None, **preprocessing},
            channels=input_channels(model),
            seed=settings.seed,
            training_part=training_part,
        )
    _report_images(images, model, listener)
    return images.batches


def _report_images(images: CalibrationImages, model: nn.Module, listener: Listener) -> None:
    how = describe_preprocessing(images.preprocessing)
    what = "sample" if "task" in images.preprocessing else "image"
    listener.say(f"calibrating on {counted(len(images), what)} of {images.origin}, {how}")
    warn(uniform_output_warning(model, images.batches), listener)
    if images.unreadable:
        names = shortened(list(images.unreadable), 3)
        listener.say(f"note: {counted(len(images.unreadable), 'image')} could not be read: {names}")


def warn(remark: str | None, listener: Listener) -> None:
    """Send a remark to the listener as a warning, if there is one."""
    if remark:
        listener.say(f"warning: {remark}", urgent=True)
