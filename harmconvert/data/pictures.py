"""Pillow images: open them, convert them to 8 bits and to a network's channels, crop the sample photographs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import IO

import numpy as np
from PIL import Image, TiffImagePlugin

from ..errors import InputError
from ..samples import whole_photographs

# Exceptions that Pillow raises for broken files.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PHOTOMETRIC, _SAMPLES, _EXTRA_SAMPLES = 262, 277, 338
_CMYK = 5


class Pictures(ABC):
    """A set of pictures: by index, a Pillow image and its label (None where there are no labels)."""

    classes: Sequence[str] | None = None
    labelled: bool = True

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> tuple[Image.Image, int | None]:
        """Return the picture and its label; for a broken file, raise one of `UNREADABLE`."""

    def name(self, index: int) -> str:
        """Return the name of a picture for messages."""
        return f"image {index}"


def open_picture(file: IO[bytes], name: str) -> Image.Image:
    """Return the decoded picture of a file: its first frame, not rotated by its EXIF orientation.

    timm and torchvision ignore the EXIF orientation, too. For a broken file, one of `UNREADABLE` is raised.

    Raises:
        InputError: the file has other channels than a picture; Pillow would read only some of them.
    """
    _check_channels(file, name)
    image = Image.open(file)
    image.load()
    return image


def _check_channels(file: IO[bytes], name: str) -> None:
    """Raise InputError for a TIFF whose channels are not grey, colours and alpha, such as a satellite image."""
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
                f"{name} is a TIFF of {samples} channels, not a grey or colour picture: pass batches of your own in "
                "Python"
            )
    file.seek(start)


def _tags(file: IO[bytes], head: bytes) -> TiffImagePlugin.ImageFileDirectory_v2:
    """Return the tags of a TIFF; none for a broken file."""
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(head if head[2] in b"+" or head[3] in b"+" else head[:8])
        file.seek(tags.next)
        tags.load(file)
        tags.get(_SAMPLES), tags.get(_EXTRA_SAMPLES), tags.get(_PHOTOMETRIC)  # Pillow decodes tags when they are read
    except Exception:  # Pillow reports the fault when it opens the file
        return TiffImagePlugin.ImageFileDirectory_v2()
    return tags


def in_mode(image: Image.Image, mode: str | None) -> Image.Image:
    """Return a picture in a Pillow mode (None: its own), scaled to 8 bits, without transparency as in timm.

    Raises:
        ValueError: Pillow cannot convert the picture.
    """
    image = eight_bit(image)
    if mode is None or image.mode == mode:
        return image
    if "transparency" in image.info:  # the conversion drops this colour anyway, and Pillow would warn
        image = image.copy()
        del image.info["transparency"]
    return image.convert(mode)


def eight_bit(image: Image.Image) -> Image.Image:
    """Return an image with 8 bits a channel; deeper ones are scaled, because Pillow would clip them at 255.

    Integers have the range of 16 bits. Floats have the range 1, 255 or 65535: the smallest one that holds all values.

    Raises:
        ValueError: a value is beyond 16 bits, so its range is unknown.
    """
    if image.mode[:1] not in ("I", "F"):
        return image
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    highest = float(values.max(initial=0.0))
    if highest > 65535:
        raise ValueError(f"its values go up to {highest:g}, beyond 16 bits")
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
