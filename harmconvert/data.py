"""Images for a network, from folders, timm's data sets or the samples, pre-processed as the network was trained.

The pre-processing is timm's, told by the network's ``pretrained_cfg`` unless overridden.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from .errors import InputError, OutsideError, UsageError, first_line, shortened
from .samples import mnist5k, whole_photographs

# Data sets have a broken file now and then; more than this share of what was asked for, or three, is a broken data set.
UNREADABLE_SHARE = 0.1

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class Images:
    """Pre-processed ``batches`` (N, C, H, W), what was done to them, and the files that could not be read."""

    batches: tuple[Tensor, ...]
    preprocessing: Mapping[str, Any]
    unreadable: tuple[str, ...] = ()

    def __len__(self) -> int:
        return sum(map(len, self.batches))


def calibration_images(
    data: str,
    model: nn.Module,
    count: int = 256,
    batch_size: int = 32,
    *,
    overrides: Mapping[str, Any] | None = None,
    data_dir: str | None = None,
    split: str = "train",
    seed: int = 0,
) -> Images:
    """Up to ``count`` images of a data set, chosen by ``seed``, in the network's own pre-processing; no labels.

    Args:
        data: a folder (searched through; labels and structure do not matter), ``sample:mnist5k``,
            ``sample:photographs`` (random crops of two photographs), or a timm data set (``torch/cifar10``,
            ``hfds/USER/NAME``, ``wds/NAME``, ``tfds/NAME``).
        overrides: of the pre-processing, in timm's words: input_size, mean, std, interpolation, crop_pct.
        data_dir: where a timm data set lies.
        split: of a timm data set.

    Raises:
        UsageError: no such data set, or a network whose input size is not known.
        InputError: no images, or too many that cannot be read.
        OutsideError: the data set has to be downloaded and cannot be, or a package is missing.
    """
    if count < 1 or batch_size < 1:
        raise UsageError(f"{count} calibration images in batches of {batch_size}: both must be at least 1")
    config = preprocessing(model, overrides or {})
    channels = config["input_size"][0]
    if channels not in (1, 3):
        raise UsageError(
            f"the network reads {channels} channels, images have 1 or 3: give batches of your own in Python"
        )
    try:
        transform: Transform = create_transform(**config, is_training=False)
    except (KeyError, ValueError, AssertionError) as error:
        raise UsageError(f"timm knows no such pre-processing: {first_line(error)}") from error
    mode = "L" if channels == 1 else "RGB"
    unreadable: list[str] = []
    found = [
        transform(image.convert(mode))
        for image in islice(_pictures(data, count, data_dir, split, seed, unreadable), count)
    ]
    if not found:
        raise InputError(f"{data} holds no image: give a folder of images, sample:NAME or a timm data set")
    stacked = torch.stack(found)
    return Images(tuple(stacked.split(batch_size)), config, tuple(unreadable))


def preprocessing(model: nn.Module, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """timm's data config: the network's own pretrained_cfg, with overrides.

    Raises:
        UsageError: the input size is not known, or not that of an image.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    cfg = cfg if isinstance(cfg, dict) else getattr(cfg, "__dict__", {})
    size = overrides.get("input_size") or cfg.get("input_size")
    if size is None:
        raise UsageError("this network does not say what size of image it takes: give --input-size C,H,W")
    if len(size) != 3:
        raise UsageError(
            f"this network takes inputs of {len(size)} axes, not images: give batches of your own in Python"
        )
    given = {key: value for key, value in overrides.items() if value is not None}
    for key in ("mean", "std"):
        if key in given and len(given[key]) not in (1, size[0]):
            raise UsageError(f"--{key} has {len(given[key])} numbers for {size[0]} channels: give one, or one for each")
        if key == "std" and key in given and not all(given[key]):
            raise UsageError("--std is divided by: it cannot be zero")
    config = dict(resolve_data_config({**given, "input_size": tuple(size)}, pretrained_cfg=cfg))
    for key in ("mean", "std"):  # timm's defaults have three channels
        if len(config[key]) != size[0]:
            config[key] = (sum(config[key]) / len(config[key]),) * size[0]
    return config


def _pictures(
    data: str, count: int, data_dir: str | None, split: str, seed: int, unreadable: list[str]
) -> Iterator[Image.Image]:
    generator = np.random.default_rng(seed)
    if data == "sample:mnist5k":
        images = mnist5k()[0].numpy()
        return (Image.fromarray(images[i]) for i in generator.permutation(len(images)))
    if data == "sample:photographs":
        return _crops(generator)
    if data.startswith("sample:"):
        raise UsageError(f"there is no sample data set {data!r}: use sample:mnist5k or sample:photographs")
    if Path(data).is_dir():
        return _folder(Path(data), count, generator, unreadable)
    if Path(data).is_file() and not data.endswith(".tar"):
        raise UsageError(f"{data} is a file: give the folder that holds the images")
    if not (Path(data).is_file() or data.startswith(("torch/", "hfds/", "hfids/", "wds/", "tfds/"))):
        raise UsageError(
            f"there is no folder {data}: give a folder of images, sample:mnist5k, sample:photographs, "
            "or a timm data set such as torch/cifar10 or hfds/USER/NAME"
        )
    return _timm(data, data_dir, split, count, generator)


def _folder(folder: Path, count: int, generator: np.random.Generator, unreadable: list[str]) -> Iterator[Image.Image]:
    paths = sorted(
        os.path.join(root, name)
        for root, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(IMG_EXTENSIONS)
    )
    bound = max(3, int(UNREADABLE_SHARE * count))
    for index in generator.permutation(len(paths)):
        try:
            with Image.open(paths[index]) as image:
                image.load()
                yield _eight_bit(image)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            unreadable.append(paths[index])
            if len(unreadable) > bound:
                raise InputError(
                    f"{len(unreadable)} images of {folder} cannot be read ({shortened(unreadable, 3)}; the last: "
                    f"{first_line(error)}): mend the folder, or leave them out"
                ) from error


def _timm(
    data: str, data_dir: str | None, split: str, count: int, generator: np.random.Generator
) -> Iterator[Image.Image]:
    name, root = ("", data) if data.endswith(".tar") else (data, data_dir)
    if root is None and data.startswith("torch/"):
        raise UsageError(f"{data}: say where it lies with --data-dir DIR")
    try:
        dataset = create_dataset(name, root=root, split=split, num_samples=count, seed=0)
    except (AssertionError, ValueError, RuntimeError, LookupError, TypeError, FileNotFoundError, ImportError) as error:
        raise UsageError(
            f"timm cannot open {data} (split {split!r}, in {data_dir or 'no folder'}): "
            f"{first_line(error) or type(error).__name__}; see --data-dir and --calibration-split"
        ) from error
    except OSError as error:
        raise OutsideError(f"{data} cannot be fetched: {first_line(error)}; give a folder of images") from error
    if isinstance(dataset, IterableDataset):  # a stream: its first images, in the order in which it gives them
        return (item[0] for item in dataset)
    return (dataset[int(i)][0] for i in generator.permutation(len(dataset))[:count])


def _eight_bit(image: Image.Image) -> Image.Image:
    """Images of more than 8 bits a pixel, scaled to 8: Pillow's own conversion would cut them off at 255."""
    if image.mode[:1] not in ("I", "F"):
        return image
    values = np.asarray(image, dtype=np.float64)
    largest = 65535.0 if image.mode.startswith("I") else max(1.0, float(values.max()))
    return Image.fromarray((values.clip(0, largest) * (255 / largest)).round().astype(np.uint8))


def _crops(generator: np.random.Generator) -> Iterator[Image.Image]:
    """Endless random crops of the two photographs, a twelfth to the whole of each, half of them mirrored."""
    photographs = [Image.fromarray(picture) for picture in whole_photographs()]
    while True:
        picture = photographs[generator.integers(len(photographs))]
        side = round(min(picture.size) * float(generator.uniform(0.3, 1.0)))
        left, top = (int(generator.integers(length - side + 1)) for length in picture.size)
        crop = picture.crop((left, top, left + side, top + side))
        yield crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if generator.random() < 0.5 else crop
