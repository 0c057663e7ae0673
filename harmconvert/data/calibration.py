"""Images without labels for calibration, from folders, timm's data sets or the samples."""

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

# A data set may have a few broken files: three, or this share of the requested images. More are an error.
UNREADABLE_SHARE = 0.1


@dataclass(frozen=True)
class Images:
    """Pre-processed ``batches`` (N, C, H, W), their pre-processing config, and the files that could not be read."""

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
    """Return up to ``count`` images of a data set, chosen by ``seed``, with the network's own pre-processing.

    Args:
        data: a folder (all images below it are used; labels and structure do not matter), ``sample:mnist5k``,
            ``sample:photographs`` (random crops of two photographs), or a timm data set (``torch/cifar10``,
            ``hfds/USER/NAME``, ``wds/NAME``, ``tfds/NAME``).
        overrides: changes to the pre-processing, see `preprocessing`.
        data_dir: folder of a timm data set.
        split: split of a timm data set.

    Raises:
        UsageError: the data set does not exist, or the network's input size or pre-processing is unknown.
        InputError: there are no images, or too many cannot be read.
        OutsideError: the download of the data set failed, or a package is missing.
    """
    if count < 1 or batch_size < 1:
        raise UsageError(f"{counted(count, 'calibration image')} in batches of {batch_size}: both must be at least 1")
    config = preprocessing(model, overrides or {})
    transform, mode = evaluation_transform(config), color_mode(config)
    unreadable: list[str] = []
    stream = data.startswith(STREAMS)  # a stream gives each process its own part
    share = -(-count // world_size()) if stream else count
    pictures = islice(_pictures(data, count, data_dir, split, seed, mode, unreadable), share)
    images = [transform(picture) for picture in pictures]
    if stream:
        images = list(chain.from_iterable(gathered(images)))[:count]
    if not images:
        raise InputError(f"{data} holds no image: give a folder of images, sample:NAME or a timm data set")
    stacked = torch.stack(images)
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
        return _readable_pictures(Files(Path(data)), data, count, generator, mode, unreadable)
    name, root = ("", data) if data.endswith(".tar") else (data, data_dir)
    opened = pictures_of(open_timm(name, root, split=split, seed=0))
    if isinstance(opened, Stream):  # a stream has no random access: use its first images
        return (in_mode(item[0], mode) for item in opened.dataset)
    return _readable_pictures(opened, data, count, generator, mode, unreadable)


def _readable_pictures(
    pictures: Pictures, data: str, count: int, generator: np.random.Generator, mode: str | None, unreadable: list[str]
) -> Iterator[Image.Image]:
    """Yield the pictures in random order; skip broken ones and add their names to ``unreadable``, up to a bound."""
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
                    f"{first_line(error)}): repair or remove these images"
                ) from error
