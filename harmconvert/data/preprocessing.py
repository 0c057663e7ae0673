"""Pre-process images for a network, with the settings that the network declares or the user gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform, resolve_data_config
from torch import Tensor, nn
from torchvision import transforms

from ..errors import Argument, InputError, UsageError, counted, first_line
from ..network.declared import input_sizes, pretrained_config
from ..network.heads import heads_of
from ..user_code import import_function
from .joint import JointTransform
from .pictures import BOXES, CLASSES, IMAGES, TENSORS

Transform = Callable[[Image.Image], Tensor]

# "imagenet" is timm's pre-processing for ImageNet; "none" resizes the whole image, with values from 0 to 1.
PRESETS: dict[str, dict[str, Any]] = {
    "imagenet": {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD},
    "none": {"mean": (0.0,), "std": (1.0,), "crop_pct": 1.0, "crop_mode": "squash"},
}
# The most pixels on a side after resizing. Pillow does not open larger images, so a larger size is a mistake.
_LARGEST_SIDE = 2**14
_TIMM_KEYS = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


def preprocessing(model: nn.Module, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return timm's data config: the values that the network declares in its ``pretrained_cfg``, with overrides.

    If mean and std are unknown, the config has those of ImageNet and the key ``assumed``; `check_preprocessing` refuses
    such a config.

    Args:
        overrides: timm's ``input_size``, ``mean``, ``std``, ``interpolation`` and ``crop_pct``; ``preprocess``:
            ``imagenet``, ``none`` or ``FILE.py:FUNCTION`` (your function from a Pillow image to a tensor (C, H, W); the
            config names it as ``function``); ``trust_code``: run the function that a checkpoint names.

    Raises:
        UsageError: the input size is unknown or not that of an image, or a checkpoint names a function and
            ``trust_code`` is not set.
    """
    options = {key: value for key, value in overrides.items() if value is not None}
    preset, trusted = options.pop("preprocess", None), options.pop("trust_code", False)
    declared = dict(pretrained_config(model))
    size = _image_size(model, options)
    _check_normalisation(options, size[0])
    function = preset if preset not in PRESETS else None
    if function and ":" not in function:
        raise UsageError(f"unknown preprocessing {function!r}: use {', '.join(PRESETS)} or FILE.py:FUNCTION")
    if preset is None and not {"mean", "std"} <= set(options):
        function = declared.get("function")
        if function and not trusted:
            raise UsageError(
                f"this checkpoint's images are preprocessed by user code ({function}), "
                "which is not run without permission: ",
                Argument("trust_code", True),
                " if you trust the file, or name another preprocessing",
            )
    if function and (refused := [key for key in ("mean", "std", "interpolation", "crop_pct") if key in options]):
        raise UsageError(f"{function} does the whole preprocessing: leave out {refused[0]} or the function")
    base: Mapping[str, Any] = PRESETS.get(preset, declared if preset is None else {})
    base = {
        key: (value,) if isinstance(value, int | float) and key in ("mean", "std") else value
        for key, value in base.items()
    }
    known = bool(function) or all(base.get(key) or key in options for key in ("mean", "std"))
    if known and not (base.get("mean") or base.get("std")):
        base = {"crop_pct": 1.0, **base}  # whether the crop of ImageNet fits is unknown
    config = dict(resolve_data_config({**options, "input_size": size}, pretrained_cfg={"input_size": size, **base}))
    for key in ("mean", "std"):  # timm declares three values, also for a network with another number of channels
        if len(config[key]) != size[0]:
            config[key] = (sum(config[key]) / len(config[key]),) * size[0]
    if not function:
        _check_resize(config)
    return config | ({"function": function} if function else {}) | ({} if known else {"assumed": True})


def task_preprocessing(
    model: nn.Module, overrides: Mapping[str, Any], task: str, channels: int = 3, prepared: bool = False
) -> dict[str, Any]:
    """Return the config for samples of a kind of data, as `preprocessing` does for pictures with labels.

    Pictures with masks or boxes are resized to the network's input size if that is known; pairs of pictures keep their
    size. Detectors of torchvision resize and normalise themselves. Pairs are not normalised if nothing says so. The
    entry ``task`` has the kind, and ``resize`` says whether pictures are resized.

    Args:
        channels: of the network's input, if its size is not known.
        prepared: the inputs are tensors that are used as they are.

    Raises:
        UsageError: see `preprocessing` and `check_preprocessing`; or a function would change pictures without their
            targets.
    """
    if task == TENSORS or prepared:
        return {"task": task, "input_size": (), "resize": False, "prepared": True}
    if task == CLASSES:
        return preprocessing(model, overrides)
    options = {key: value for key, value in overrides.items() if value is not None}
    known = bool(options.get("input_size")) or (len(sizes := input_sizes(model)) == 1 and len(sizes[0]) == 3)
    own = task == BOXES and bool(heads_of(model))
    if not known:
        options["input_size"] = (channels, 32, 32)  # pictures are not resized to it
    declared = pretrained_config(model).get("mean") or pretrained_config(model).get("function")
    if (own or task == IMAGES) and not {"mean", "preprocess"} & set(options) and not declared:
        options["preprocess"] = "none"
    config = preprocessing(model, options)
    if "function" in config:
        raise UsageError(
            f"{config['function']} changes pictures without their targets: give ", Argument("mean"), " and ",
            Argument("std"), ", or ", Argument("preprocess"), " imagenet or none",
        )  # fmt: skip
    check_preprocessing(config)
    return {**config, "task": task, "resize": known and not own and task != IMAGES}


def sample_transform(config: Mapping[str, Any]) -> Transform | JointTransform:
    """Return the transform for testing on the kind of data that the config is for."""
    if config.get("prepared"):
        return _unchanged
    return JointTransform(config) if "task" in config else evaluation_transform(config)


def _unchanged(sample: Any) -> Tensor:
    tensor: Tensor = sample
    return tensor


def _image_size(model: nn.Module, options: Mapping[str, Any]) -> tuple[int, ...]:
    sizes = [tuple(options["input_size"])] if options.get("input_size") else input_sizes(model)
    if not sizes:
        size = Argument("input_size", "C,H,W")
        raise UsageError("this network does not declare its input size: give ", size)
    if len(sizes) > 1:
        raise UsageError(f"this network takes {len(sizes)} inputs, not one image: pass batches of tensors in Python")
    if len(sizes[0]) != 3:
        raise UsageError(
            f"this network takes inputs of {counted(len(sizes[0]), 'axis')}, not images: pass batches of tensors in "
            "Python"
        )
    return sizes[0]


def _check_normalisation(options: Mapping[str, Any], channels: int) -> None:
    for key in ("mean", "std"):
        if key in options and len(options[key]) not in (1, channels):
            problem = f" has {counted(len(options[key]), 'number')} for {counted(channels, 'channel')}"
            raise UsageError(Argument(key), problem, ": give one number, or one for each channel")
    if not all(number > 0 for number in options.get("std", ())):
        raise UsageError(Argument("std"), " is a divisor: give numbers above 0")


def _check_resize(config: Mapping[str, Any]) -> None:
    """Raise UsageError if images would be resized to too few or too many pixels."""
    (height, width), share = config["input_size"][1:], config["crop_pct"]
    if max(height, width) > _LARGEST_SIDE:
        raise UsageError(f"images of {height}x{width} are too large: at most {_LARGEST_SIDE:,} pixels on a side")
    least, most = max(height, width) / _LARGEST_SIDE, min(height, width)
    if not least <= share <= most:
        problem = f" resizes images to too {'many' if share < least else 'few'} pixels for an input of {height}x{width}"
        remedy = f"give a share from {least:.2g} to {most}; 1 keeps the whole image"
        raise UsageError(Argument("crop_pct", f"{share:g}"), f"{problem}: {remedy}")


def check_preprocessing(config: Mapping[str, Any]) -> None:
    """Raise UsageError if the pre-processing is unknown, or if the network's channels are not those of an image."""
    color_mode(config)
    if config.get("assumed"):
        raise UsageError(
            "this network does not declare its preprocessing, and wrong preprocessing would reduce its accuracy: give ",
            Argument("mean"),
            " and ",
            Argument("std"),
            ", or ",
            Argument("preprocess"),
            " imagenet, none or FILE.py:FUNCTION",
        )


def preprocessing_record(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a config that a checkpoint records, for the argument of `harmconvert.save`."""
    if not config.get("resize", True):  # the input size is not known
        return {key: config[key] for key in ("mean", "std") if key in config}
    recorded = ("function",) if "function" in config else ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    return {"input_sizes": [config["input_size"]], **{key: config[key] for key in recorded if key in config}}


def describe_preprocessing(config: Mapping[str, Any]) -> str:
    """Describe a config in one line of text.

    >>> describe_preprocessing(preprocessing(nn.Conv2d(1, 2, 3), {"input_size": (1, 28, 28), "preprocess": "none"}))
    '1x28x28, mean 0, std 1, bicubic, squashed'
    """
    if config.get("prepared"):
        return "used as they are"
    size = "x".join(map(str, config["input_size"]))
    if not config.get("resize", True):
        size = "own size"
    if "function" in config:
        return f"{size}, by {config['function']}"
    mean, std = (",".join(f"{number:.4g}" for number in config[key]) for key in ("mean", "std"))
    if "task" in config:
        resized = f", {config['interpolation']}, squashed" if config["resize"] else ""
        return f"{size}, mean {mean}, std {std}{resized}"
    squashed = config.get("crop_mode") == "squash"
    crop = "squashed" if squashed and config["crop_pct"] == 1 else f"crop {config['crop_pct']:.3g}"
    return f"{size}, mean {mean}, std {std}, {config['interpolation']}, {crop}"


def evaluation_transform(config: Mapping[str, Any]) -> Transform:
    """Return the transform for testing: resize, central crop, normalise.

    Args:
        config: a config from `preprocessing`.

    Raises:
        UsageError: see `check_preprocessing`.
        InputError: the user's function fails on a black image.
    """
    check_preprocessing(config)
    if "function" in config:
        return _user_function(config)
    return _timm_transform(config, is_training=False)


def training_transform(config: Mapping[str, Any], **options: Any) -> Transform:
    """Return the transform for training: timm's augmentation, then the network's pre-processing.

    Args:
        config: a config from `preprocessing`.
        options: arguments of `timm.data.create_transform`.

    Raises:
        UsageError: see `check_preprocessing`; or timm does not have the augmentation.
        InputError: the user's function fails on a black image.
    """
    check_preprocessing(config)
    if "function" not in config:
        return _timm_transform(config, is_training=True, **options)
    function = _user_function(config)
    if options.get("no_aug"):
        return function
    first, second, final = cast(Any, _timm_transform(config, is_training=True, separate=True, **options))
    # The first two of the final transforms are timm's conversion and normalisation; random erasing follows.
    composed: Transform = transforms.Compose([first, second, function, *final.transforms[2:]])
    return composed


def padded_crop_transform(config: Mapping[str, Any], padding: int, hflip: float, vflip: float) -> Transform:
    """Return the augmentation for small images (reflection padding, random crop, flips), then the pre-processing."""
    check_preprocessing(config)
    size = tuple(config["input_size"][1:])
    steps = [
        transforms.Resize(size, transforms.InterpolationMode(config["interpolation"])),
        transforms.RandomCrop(size, padding, padding_mode="reflect"),
        transforms.RandomHorizontalFlip(hflip),
        transforms.RandomVerticalFlip(vflip),
    ]
    if "function" in config:
        steps.append(_user_function(config))
    else:
        steps += [transforms.ToTensor(), transforms.Normalize(config["mean"], config["std"])]
    composed: Transform = transforms.Compose(steps)
    return composed


def _timm_transform(config: Mapping[str, Any], **options: Any) -> Transform:
    try:
        transform: Transform = create_transform(**{key: config[key] for key in _TIMM_KEYS if key in config}, **options)
    except (KeyError, ValueError, AssertionError, TypeError) as error:
        raise UsageError(f"timm does not have this pre-processing: {first_line(error)}") from error
    return transform


def color_mode(config: Mapping[str, Any]) -> str | None:
    """Return Pillow's mode for a network's channels; None if the user's function makes other channels.

    Raises:
        UsageError: the channels are not those of an image.
    """
    if config.get("prepared"):
        return None
    channels = config["input_size"][0]
    if channels not in (1, 3) and "function" in config:
        return None
    if channels not in (1, 3):
        raise UsageError(
            f"the network reads {counted(channels, 'channel')}, images have 1 or 3: pass batches of tensors in Python"
        )
    return "L" if channels == 1 else "RGB"


@dataclass(frozen=True)
class _UserFunction:
    """The user's function from a Pillow image to a tensor (C, H, W); each process imports it again."""

    name: str
    size: tuple[int, ...]

    @cached_property
    def function(self) -> Callable[[Image.Image], Any]:
        return import_function(self.name)

    def __call__(self, image: Image.Image) -> Tensor:
        function = self.function
        try:
            result = function(image)
        except Exception as error:
            raise InputError(f"{self.name} fails: {type(error).__name__}: {first_line(error)}") from error
        if not isinstance(result, Tensor) or not result.is_floating_point():
            kind = f"a tensor of {result.dtype}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
            raise InputError(f"{self.name} returns {kind}: it should return a tensor of floats (C, H, W)")
        if tuple(result.shape) != self.size:
            returned, expected = ("x".join(map(str, size)) for size in (result.shape, self.size))
            raise InputError(f"{self.name} returns a tensor of {returned}, but the network's input size is {expected}")
        return result


def _user_function(config: Mapping[str, Any]) -> _UserFunction:
    """Return the function that a config names, after a test on a black image, so that errors appear early."""
    function = _UserFunction(config["function"], tuple(config["input_size"]))
    height, width = function.size[1:]
    function(Image.new(color_mode(config) or "RGB", (width, height)))
    return function
