"""Pillow images: open them, convert them to 8 bits and to a network's channels, crop the sample photographs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
from PIL import Image, TiffImagePlugin

from ..errors import InputError
from ..samples import whole_photographs

# Exceptions that Pillow raises for broken files.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PHOTOMETRIC, _SAMPLES, _EXTRA_SAMPLES = 262, 277, 338
_CMYK = 5


# The kinds of data: pictures with labels or without, with masks, with boxes, with target pictures; files of tensors.
CLASSES, MASKS, BOXES, IMAGES, TENSORS = "classes", "masks", "boxes", "images", "tensors"


class Pictures(ABC):
    """A set of samples of one kind (``task``); each index has an input and its target (None: no target).

    The inputs are Pillow images, or tensors if they come from files of tensors. The targets are labels, masks (H, W) of
    class numbers, dicts of ``boxes`` (N, 4; corners in pixels), ``labels`` (N,) and ``iscrowd`` (N,), or images.
    ``description`` says what was recognised, ``largest_label`` is the largest category of boxes.
    ``prepared``: the inputs are tensors that need no pre-processing.
    """

    task: str = CLASSES
    classes: Sequence[str] | None = None
    labelled: bool = True
    description: str = ""
    largest_label: int = 0
    prepared: bool = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> tuple[Any, Any]:
        """Return the input and its target; raise one of `UNREADABLE` for a broken file."""

    def name(self, index: int) -> str:
        """Return the name of a picture for messages."""
        return f"image {index}"


def open_picture(file: IO[bytes], name: str) -> Image.Image:
    """Return the decoded picture of a file: its first frame, not rotated by its EXIF orientation.

    timm and torchvision ignore the EXIF orientation, too. For a broken file, one of `UNREADABLE` is raised.

    Raises:
        InputError: the file has channels that a picture does not have; Pillow would read only some of the channels.
    """
    _check_channels(file, name)
    image = Image.open(file)
    image.load()
    return image


def _check_channels(file: IO[bytes], name: str) -> None:
    """Raise InputError for a TIFF with other channels than grey or colours and alpha, such as a satellite image."""
    start = file.tell()
    head = file.read(16)
    if head[:4] in _TIFF:
        tags = _tags(file, head)
        samples, extra = tags.get(_SAMPLES, 1), tags.get(_EXTRA_SAMPLES) or ()
        extra = extra if isinstance(extra, tuple) else (extra,)
        colours = 4 if tags.get(_PHOTOMETRIC) == _CMYK else 3
        channels = samples - sum(kind != 0 for kind in extra) if isinstance(samples, int) else 1  # without alpha
        if channels not in (1, colours) or 0 in extra:
            raise InputError(
                f"{name} is a TIFF with {samples} channels, not a grey or colour picture: load it in Python and pass "
                "batches of tensors"
            )
    file.seek(start)


def _tags(file: IO[bytes], head: bytes) -> TiffImagePlugin.ImageFileDirectory_v2:
    """Return the tags of a TIFF; no tags for a broken file."""
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(head if head[2] in b"+" or head[3] in b"+" else head[:8])
        file.seek(tags.next)
        tags.load(file)
        tags.get(_SAMPLES), tags.get(_EXTRA_SAMPLES), tags.get(_PHOTOMETRIC)  # Pillow decodes tags when they are read
    except Exception:  # Pillow reports the fault when it opens the file
        return TiffImagePlugin.ImageFileDirectory_v2()
    return tags


def convert_mode(image: Image.Image, mode: str | None) -> Image.Image:
    """Convert a picture to 8 bits and to a Pillow mode (None: keep its mode), without transparency, as timm does.

    Raises:
        ValueError: Pillow cannot convert the picture.
    """
    image = to_eight_bits(image)
    if mode is None or image.mode == mode:
        return image
    if "transparency" in image.info:  # the conversion drops this colour, and Pillow would warn
        image = image.copy()
        del image.info["transparency"]
    return image.convert(mode)


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Convert an image to 8 bits per channel; scale images with more bits, because Pillow would clip them at 255.

    The range of integers is 65535. The range of floats is the smallest of 1, 255 and 65535 that covers all values.

    Raises:
        ValueError: a value is above 65535, so the range is unknown.
    """
    if image.mode[:1] not in ("I", "F"):
        return image
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    highest = float(values.max(initial=0.0))
    if highest > 65535:
        raise ValueError(f"it has values up to {highest:g}, more than 16 bits hold")
    scales = (65535.0,) if image.mode.startswith("I") else (1.0, 255.0, 65535.0)
    largest = next(scale for scale in scales if highest <= scale)
    return Image.fromarray((values.clip(0, largest) * (255 / largest)).round().astype(np.uint8))


def photographs() -> list[Image.Image]:
    """Return the two sample photographs; raise OutsideError if scikit-learn, which ships them, is not installed."""
    return [Image.fromarray(picture) for picture in whole_photographs()]


def random_crop(pictures: list[Image.Image], generator: np.random.Generator) -> Image.Image:
    """Return a random square of one picture: 30 % to 100 % of its short side, mirrored with probability one half."""
    picture = pictures[generator.integers(len(pictures))]
    side = round(min(picture.size) * float(generator.uniform(0.3, 1.0)))
    left, top = (int(generator.integers(length - side + 1)) for length in picture.size)
    crop = picture.crop((left, top, left + side, top + side))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if generator.random() < 0.5 else crop
