"""Images without labels to calibrate on, from folders, timm's data sets or the samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from itertools import count as count_from
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..arguments import STREAMS, check_unlabelled
from ..errors import HarmconvertError, InputError, UsageError, counted, first_line, shortened
from ..network.distributed import gathered, world_size
from ..samples import mnist5k
from .datasets import Stream, open_timm, pictures_of
from .folders import Files
from .pictures import UNREADABLE, Pictures, in_mode, photographs, random_crop
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
        overrides: of the pre-processing, as `preprocessing` takes them.
        data_dir: where a timm data set lies.
        split: of a timm data set.

    Raises:
        UsageError: no such data set, or a network whose input size or pre-processing is not known.
        InputError: no images, or too many that cannot be read.
        OutsideError: the data set has to be downloaded and cannot be, or a package is missing.
    """
    if count < 1 or batch_size < 1:
        raise UsageError(f"{counted(count, 'calibration image')} in batches of {batch_size}: both must be at least 1")
    config = preprocessing(model, overrides or {})
    transform, mode = evaluation_transform(config), color_mode(config)
    unreadable: list[str] = []
    stream = data.startswith(STREAMS)  # which gives every process a part of its own
    wanted = -(-count // world_size()) if stream else count
    found = [
        transform(image) for image in islice(_pictures(data, count, data_dir, split, seed, mode, unreadable), wanted)
    ]
    if stream:
        found = list(chain.from_iterable(gathered(found)))[:count]
    if not found:
        raise InputError(f"{data} holds no image: give a folder of images, sample:NAME or a timm data set")
    stacked = torch.stack(found)
    return Images(tuple(stacked.split(batch_size)), config, tuple(unreadable))


def _pictures(
    data: str, count: int, data_dir: str | None, split: str, seed: int, mode: str | None, unreadable: list[str]
) -> Iterator[Image.Image]:
    check_unlabelled(data)
    generator = np.random.default_rng(seed)
    if data == "sample:mnist5k":
        images = mnist5k()[0].numpy()
        return (in_mode(Image.fromarray(images[i]), mode) for i in generator.permutation(len(images)))
    if data == "sample:photographs":
        pictures = photographs()
        return (in_mode(random_crop(pictures, generator), mode) for _ in count_from(0))
    if Path(data).is_dir():
        return _readable(Files(Path(data)), data, count, generator, mode, unreadable)
    name, root = ("", data) if data.endswith(".tar") else (data, data_dir)
    found = pictures_of(open_timm(name, root, split=split, seed=0))
    if isinstance(found, Stream):  # its first images, in the order in which it gives them
        return (in_mode(item[0], mode) for item in found.dataset)
    return _readable(found, data, count, generator, mode, unreadable)


def _readable(
    pictures: Pictures, data: str, count: int, generator: np.random.Generator, mode: str | None, unreadable: list[str]
) -> Iterator[Image.Image]:
    """The pictures in an order by chance, those that cannot be read passed over and named, up to a bound."""
    bound = max(3, int(UNREADABLE_SHARE * count))
    for index in generator.permutation(len(pictures)):
        try:
            yield in_mode(pictures.read(int(index))[0], mode)
        except HarmconvertError:
            raise
        except UNREADABLE as error:
            unreadable.append(pictures.name(int(index)))
            if len(unreadable) > bound:
                raise InputError(
                    f"{counted(len(unreadable), 'image')} of {data} cannot be read "
                    f"({shortened(unreadable, 3)}; the last: "
                    f"{first_line(error)}): mend the data, or leave them out"
                ) from error
