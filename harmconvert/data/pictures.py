"""Pictures as Pillow has them: deep ones scaled to 8 bits, crops of the sample photographs."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..samples import whole_photographs

# What Pillow raises for files that are broken.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def eight_bit(image: Image.Image) -> Image.Image:
    """Images of more than 8 bits a pixel, scaled to 8: Pillow's own conversion would cut them off at 255."""
    if image.mode[:1] not in ("I", "F"):
        return image
    values = np.asarray(image, dtype=np.float64)
    largest = 65535.0 if image.mode.startswith("I") else max(1.0, float(values.max()))
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
