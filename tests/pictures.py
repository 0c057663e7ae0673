"""Folders of handwritten digits for tests of data and training."""

from __future__ import annotations

import struct
from pathlib import Path

from PIL import Image

from harmconvert.samples import mnist5k_held_back_pixels


def digit_folders(folder: Path, each: int, first: int = 0) -> Path:
    """Write a folder for each digit, with ``each`` of its held-back images, starting with image ``first``."""
    images, labels = mnist5k_held_back_pixels()
    for digit in range(10):
        (folder / str(digit)).mkdir(parents=True)
        for number, image in enumerate(images[labels == digit][first : first + each]):
            Image.fromarray(image.numpy()).save(folder / str(digit) / f"{number}.png")
    return folder


def tiff(path: Path, channels: int, extra: tuple[int, ...] = (), photometric: int = 1, bits: int = 8) -> Path:
    """Write a TIFF of 4 x 4 black pixels with ``channels`` channels; the last ones are extra samples of these kinds."""
    shorts = {258: [bits] * channels, 338: list(extra)}
    values = {256: 4, 257: 4, 259: 1, 262: photometric, 273: 0, 277: channels, 278: 4, 279: 2 * channels * bits, 284: 1}
    tags = sorted({*values, *(tag for tag, listed in shorts.items() if listed)})
    lists, start = b"", 8 + 2 + 12 * len(tags) + 4
    entries = []
    for tag in tags:
        listed = shorts.get(tag, [values.get(tag, 0)])
        content = struct.pack(f"<{len(listed)}H", *listed)
        if len(content) > 4:
            content, lists = struct.pack("<I", start + len(lists)), lists + content
        entries.append((tag, len(listed), content.ljust(4, b"\0")))
    data = struct.pack("<I", start + len(lists))
    body = b"".join(
        struct.pack("<HHI", tag, 4 if tag == 273 else 3, count) + (data if tag == 273 else content)
        for tag, count, content in entries
    )
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    path.write_bytes(head + body + bytes(4) + lists + bytes(2 * channels * bits))
    return path
