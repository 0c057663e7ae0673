"""What is done to an image before a network sees it: timm's pre-processing, told by the network unless overridden."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torchvision import transforms

from ..errors import UsageError, counted, first_line
from ..surgery import pretrained_config

Transform = Callable[[Image.Image], Tensor]


def preprocessing(model: nn.Module, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """timm's data config: the network's own pretrained_cfg, with overrides.

    Raises:
        UsageError: the input size is not known, or not that of an image.
    """
    cfg = dict(pretrained_config(model))
    size = overrides.get("input_size") or cfg.get("input_size")
    if size is None:
        raise UsageError("this network does not say what size of image it takes: give --input-size C,H,W")
    if len(size) != 3:
        raise UsageError(
            f"this network takes inputs of {counted(len(size), 'axis')}, not images: give batches of your own in Python"
        )
    given = {key: value for key, value in overrides.items() if value is not None}
    for key in ("mean", "std"):
        if key in given and len(given[key]) not in (1, size[0]):
            raise UsageError(
                f"--{key} has {counted(len(given[key]), 'number')} for {counted(size[0], 'channel')}: "
                "give one, or one for each"
            )
        if key == "std" and key in given and not all(given[key]):
            raise UsageError("--std is divided by: it cannot be zero")
    config = dict(resolve_data_config({**given, "input_size": tuple(size)}, pretrained_cfg=cfg))
    for key in ("mean", "std"):  # timm's defaults have three channels
        if len(config[key]) != size[0]:
            config[key] = (sum(config[key]) / len(config[key]),) * size[0]
    return config


def evaluation_transform(config: Mapping[str, Any]) -> Transform:
    """Resize, central crop, normalise: what the network sees when it is tested; `config` from `preprocessing`."""
    color_mode(config)
    return timm_transform(config, is_training=False)


def timm_transform(config: Mapping[str, Any], **more: Any) -> Transform:
    """timm's transform; raises UsageError where timm knows no such pre-processing."""
    try:
        transform: Transform = create_transform(**config, **more)
    except (KeyError, ValueError, AssertionError, TypeError) as error:
        raise UsageError(f"timm knows no such pre-processing: {first_line(error)}") from error
    return transform


def color_mode(config: Mapping[str, Any]) -> str:
    """Pillow's mode for the channels of a network; raises UsageError where they are not those of an image."""
    channels = config["input_size"][0]
    if channels not in (1, 3):
        raise UsageError(
            f"the network reads {counted(channels, 'channel')}, images have 1 or 3: give batches of your own in Python"
        )
    return "L" if channels == 1 else "RGB"


def padded_crop_transform(config: Mapping[str, Any], padding: int, hflip: float, vflip: float) -> Transform:
    """The augmentation of small images: padded by reflection, cropped at random, flipped, normalised."""
    size = tuple(config["input_size"][1:])
    steps = [
        transforms.Resize(size, transforms.InterpolationMode(config["interpolation"])),
        transforms.RandomCrop(size, padding, padding_mode="reflect"),
        transforms.RandomHorizontalFlip(hflip),
        transforms.RandomVerticalFlip(vflip),
        transforms.ToTensor(),
        transforms.Normalize(config["mean"], config["std"]),
    ]
    composed: Transform = transforms.Compose(steps)
    return composed
