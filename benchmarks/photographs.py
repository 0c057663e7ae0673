"""Crops of the photographs that scikit-learn and scikit-image ship: some for calibration, others for tests.

No photograph is in both parts. Crops are random: from 35 to 100 % of the area, with a mirror image in half of them.
Calibration holds back every fourth input, so every fourth calibration crop is of a photograph of its own group: the
choices that calibration makes must hold on photographs that the fit has not seen.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

FIT = (
    "china", "astronaut.png", "brick.png", "cell.png", "coins.png", "hubble_deep_field.jpg", "ihc.png",
    "motorcycle_left.png", "page.png",
)  # fmt: skip
HELD_BACK = ("chelsea.png", "camera.png", "gravel.png", "retina.jpg")
TEST = ("flower", "coffee.png", "rocket.jpg", "grass.png", "moon.png", "microaneurysms.png", "clock_motion.png")


@cache
def photograph(name: str) -> Tensor:
    """Return a photograph (3, H, W) with values from 0 to 1."""
    if "." not in name:
        from sklearn.datasets import load_sample_image

        pixels = load_sample_image(f"{name}.jpg")
    else:
        import skimage.data
        from PIL import Image

        pixels = np.asarray(Image.open(Path(skimage.data.__file__).parent / name).convert("RGB"))
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 255


def calibration_crops(count: int, size: int, seed: int, mean: float = 0.5, std: float = 0.5) -> Tensor:
    """Return crops for a calibration, every fourth of a photograph that the fit does not see."""
    fit, held = (crops(names, count, size, seed + part, mean, std) for part, names in ((0, FIT), (1, HELD_BACK)))
    every_fourth = torch.arange(count) % 4 == 3
    return torch.where(every_fourth[:, None, None, None], held, fit)


def crops(names: tuple[str, ...], count: int, size: int, seed: int, mean: float = 0.5, std: float = 0.5) -> Tensor:
    """Return random crops (count, 3, size, size), normalised; the photographs take turns."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    made = []
    for number in range(count):
        image = photograph(names[number % len(names)])
        side = int(min(image.shape[1:]) * math.sqrt(uniform(0.35, 1)))
        top, left = (int(uniform(0, length - side + 1)) for length in image.shape[1:])
        crop = image[None, :, top : top + side, left : left + side]
        crop = nn.functional.interpolate(crop, (size, size), mode="bicubic", antialias=True, align_corners=False)
        made.append(crop.flip(3) if uniform(0, 1) < 0.5 else crop)
    return (torch.cat(made).clamp(0, 1) - mean) / std
