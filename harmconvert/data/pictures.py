"""Pictures as Pillow has them: opened, brought to 8 bits and a network's channels; crops of the sample photographs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import IO

import numpy as np
from PIL import Image, TiffImagePlugin

from ..errors import InputError
from ..samples import whole_photographs

# What Pillow raises for files that are broken.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PHOTOMETRIC, _SAMPLES, _EXTRA_SAMPLES = 262, 277, 338
_CMYK = 5


class Pictures(ABC):
    """Pictures by index: a Pillow image and its label, or None where there are no labels."""

    classes: Sequence[str] | None = None
    labelled: bool = True

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> tuple[Image.Image, int | None]:
        """The picture and its label; raises what Pillow raises where the file is broken."""

    def name(self, index: int) -> str:
        """What to call a picture in a message."""
        return f"image {index}"


def open_picture(file: IO[bytes], name: str) -> Image.Image:
    """The picture of a file, decoded; of several frames the first, and as it lies whatever its EXIF orientation, as
    timm and torchvision have it.

    Raises:
        InputError: it has other channels than a picture, of which Pillow would read some or none; what Pillow raises
            where it is broken.
    """
    _check_channels(file, name)
    image = Image.open(file)
    image.load()
    return image


def _check_channels(file: IO[bytes], name: str) -> None:
    """Raise InputError for a TIFF of channels that are neither grey, colours nor alpha, such as a satellite's."""
    start = file.tell()
    head = file.read(16)
    if head[:4] in _TIFF:
        tags = _tags(file, head)
        samples, extra = tags.get(_SAMPLES, 1), tags.get(_EXTRA_SAMPLES) or ()
        extra = extra if isinstance(extra, tuple) else (extra,)
        plain = 4 if tags.get(_PHOTOMETRIC) == _CMYK else 3
        channels = samples - sum(kind != 0 for kind in extra) if isinstance(samples, int) else 1  # without alpha
        if channels not in (1, plain) or 0 in extra:
            raise InputError(
                f"{name} is a TIFF of {samples} channels, not a picture of grey or three colours: give batches of your "
                "own in Python"
            )
    file.seek(start)


def _tags(file: IO[bytes], head: bytes) -> TiffImagePlugin.ImageFileDirectory_v2:
    """The tags of a TIFF, none of one that is broken."""
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(head if head[2] in b"+" or head[3] in b"+" else head[:8])
        file.seek(tags.next)
        tags.load(file)
        tags.get(_SAMPLES), tags.get(_EXTRA_SAMPLES), tags.get(_PHOTOMETRIC)  # decoded here
    except Exception:  # Pillow says what is wrong when it opens it
        return TiffImagePlugin.ImageFileDirectory_v2()
    return tags


def in_mode(image: Image.Image, mode: str | None) -> Image.Image:
    """A picture in a Pillow mode (None: as it is), deep ones scaled to 8 bits, transparency left out as timm does.

    Raises:
        ValueError: Pillow cannot convert it.
    """
    image = eight_bit(image)
    if mode is None or image.mode == mode:
        return image
    if "transparency" in image.info:  # a colour that is dropped all the same, and of which Pillow warns
        image = image.copy()
        del image.info["transparency"]
    return image.convert(mode)


def eight_bit(image: Image.Image) -> Image.Image:
    """Images of more than 8 bits a pixel, scaled to 8: Pillow's own conversion would cut them off at 255.

    Whole numbers are of 16 bits; floats are shares of 1, 8 bits or 16 bits, the least of these that holds them all.

    Raises:
        ValueError: values beyond 16 bits, of which nobody knows the scale.
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
    """The two sample photographs; raises OutsideError where scikit-learn, which ships them, is not installed."""
    return [Image.fromarray(picture) for picture in whole_photographs()]


def random_crop(pictures: list[Image.Image], generator: np.random.Generator) -> Image.Image:
    """A square of one of the pictures, a third to the whole of its short side, mirrored half of the time."""
    picture = pictures[generator.integers(len(pictures))]
    side = round(min(picture.size) * float(generator.uniform(0.3, 1.0)))
    left, top = (int(generator.integers(length - side + 1)) for length in picture.size)
    crop = picture.crop((left, top, left + side, top + side))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if generator.random() < 0.5 else crop
