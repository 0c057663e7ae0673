"""Folders of real digits for tests of data and training."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from harmconvert.samples import mnist5k_held_back_pixels


def digit_folders(folder: Path, each: int, first: int = 0) -> Path:
    """A folder for each digit with ``each`` images of it, held back from the sample network, from the first-th on."""
    images, labels = mnist5k_held_back_pixels()
    for digit in range(10):
        (folder / str(digit)).mkdir(parents=True)
        for number, image in enumerate(images[labels == digit][first : first + each]):
            Image.fromarray(image.numpy()).save(folder / str(digit) / f"{number}.png")
    return folder
