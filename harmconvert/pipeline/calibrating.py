"""Inputs without labels for a flow to calibrate on: named images, or batches that the caller gave."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..calibration import CalibrationSettings
from ..data.calibration import CalibrationImages, calibration_images
from ..data.datasets import DataRequest
from ..data.preprocessing import describe_preprocessing
from ..data.variety import uniform_output_warning
from ..errors import Argument, UsageError, counted, shortened
from .inputs import Sizes
from .listener import Listener

# What a flow takes to calibrate on.
Calibrating = str | Path | DataRequest | Iterable[Any]


def calibration_batches(
    data: Calibrating | None,
    model: nn.Module,
    settings: CalibrationSettings,
    *,
    batch_size: int,
    sizes: Sizes,
    preprocessing: Mapping[str, Any],
    listener: Listener,
) -> Iterable[Any] | None:
    """The batches to calibrate on: read from named images, or as they were given (None where nothing was).

    Args:
        data: a folder, ``sample:NAME`` or a timm data set, its ``train_split``; or an iterable of batches.
        settings: how many images to read, and the seed that chooses them.
        sizes: of the network's inputs, where they were given.

    Raises:
        UsageError: no such images, or a network of several inputs; InputError, OutsideError: as `calibration_images`.
    """
    if not isinstance(data, str | Path | DataRequest):
        return data
    if len(sizes) > 1:
        raise UsageError(
            Argument("calibrate", data), " feeds one image; for a network of several inputs give batches of your own"
        )
    request = DataRequest.parse(data)
    name = request.name
    with listener.busy(f"reading images of {name}"):
        images = calibration_images(
            request,
            model,
            settings.inputs,
            batch_size,
            overrides={"input_size": sizes[0] if sizes else None, **preprocessing},
            seed=settings.seed,
        )
    _tell(name, images, model, listener)
    return images.batches


def _tell(name: str, images: CalibrationImages, model: nn.Module, listener: Listener) -> None:
    """Say what was read, and what may be wrong with it."""
    listener.say(
        f"calibrating on {counted(len(images), 'image')} of {name}, {describe_preprocessing(images.preprocessing)}"
    )
    warn_of(uniform_output_warning(model, images.batches), listener)
    if images.unreadable:
        names = shortened(list(images.unreadable), 3)
        listener.say(f"note: {counted(len(images.unreadable), 'image')} could not be read: {names}")


def warn_of(remark: str | None, listener: Listener) -> None:
    """Say that the outputs of a network hardly vary, where they do not."""
    if remark:
        listener.say(f"warning: {remark}", urgent=True)
