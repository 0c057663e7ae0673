"""Images without labels to calibrate on, from folders, timm's data sets or the samples."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count as count_from
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..errors import InputError, UsageError, first_line, shortened
from ..samples import mnist5k
from .datasets import PACKAGES, open_timm
from .pictures import UNREADABLE, eight_bit, photographs, random_crop
from .preprocessing import color_mode, evaluation_transform, preprocessing

# Data sets have a broken file now and then; more than this share of what was asked for, or three, is a broken data set.
UNREADABLE_SHARE = 0.1


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
    transform, mode = evaluation_transform(config), color_mode(config)
    unreadable: list[str] = []
    found = [
        transform(image.convert(mode))
        for image in islice(_pictures(data, count, data_dir, split, seed, unreadable), count)
    ]
    if not found:
        raise InputError(f"{data} holds no image: give a folder of images, sample:NAME or a timm data set")
    stacked = torch.stack(found)
    return Images(tuple(stacked.split(batch_size)), config, tuple(unreadable))


def _pictures(
    data: str, count: int, data_dir: str | None, split: str, seed: int, unreadable: list[str]
) -> Iterator[Image.Image]:
    generator = np.random.default_rng(seed)
    if data == "sample:mnist5k":
        images = mnist5k()[0].numpy()
        return (Image.fromarray(images[i]) for i in generator.permutation(len(images)))
    if data == "sample:photographs":
        pictures = photographs()
        return (random_crop(pictures, generator) for _ in count_from(0))
    if data.startswith("sample:"):
        raise UsageError(f"there is no sample data set {data!r}: use sample:mnist5k or sample:photographs")
    if Path(data).is_dir():
        return _folder(Path(data), count, generator, unreadable)
    if Path(data).is_file() and not data.endswith(".tar"):
        raise UsageError(f"{data} is a file: give the folder that holds the images")
    if not (Path(data).is_file() or data.startswith(PACKAGES)):
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
                yield eight_bit(image)
        except UNREADABLE as error:
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
    dataset = open_timm(name, root, split=split, num_samples=count, seed=0)
    if isinstance(dataset, IterableDataset):  # a stream: its first images, in the order in which it gives them
        return (item[0] for item in dataset)
    return (dataset[int(i)][0] for i in generator.permutation(len(dataset))[:count])
