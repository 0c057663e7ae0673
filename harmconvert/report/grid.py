"""A grid of numbers as a small image, and the lines between kept and cut cells."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence

# 16 colours of viridis (van der Walt and Smith, CC0), at equal distances. Its lightness increases evenly, and people
# with colour vision deficiency can distinguish its colours. Linear interpolation between these 16 colours differs from
# viridis by at most 7 of 255.
_VIRIDIS = (
    "440154 481a6c 472f7d 414487 39568c 31688e 2a788e 23888e 1f988b 22a884 35b779 54c568 7ad151 a5db36 d2e21b fde725"
)
_ANCHORS = tuple(tuple(bytes.fromhex(colour)) for colour in _VIRIDIS.split())
STEPS = 200  # the byte for the share 1
NOTHING = 255  # the byte for a share that is not known


def colour(share: float) -> tuple[int, int, int]:
    """Return the colour (red, green, blue) of a share from 0 (dark) to 1 (bright).

    >>> colour(0.0), colour(1.0)
    ((68, 1, 84), (253, 231, 37))
    """
    position = min(max(share, 0.0), 1.0) * (len(_ANCHORS) - 1)
    index = min(int(position), len(_ANCHORS) - 2)
    low, high = _ANCHORS[index], _ANCHORS[index + 1]
    red, green, blue = (round(a + (b - a) * (position - index)) for a, b in zip(low, high, strict=True))
    return red, green, blue


def hexadecimal(share: float) -> str:
    """Return the colour of a share as #rrggbb."""
    return "#" + bytes(colour(share)).hex()


def steps(share: float | None) -> int:
    """Return a share as a byte; `NOTHING` for None."""
    return NOTHING if share is None else round(min(max(share, 0.0), 1.0) * STEPS)


def png(rows: Sequence[bytes]) -> bytes:
    """Return a PNG image with a coloured pixel for each byte of `steps`; pixels for `NOTHING` are transparent."""
    palette = bytes(value for step in range(NOTHING) for value in colour(step / STEPS)) + b"\0\0\0"
    size = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 3, 0, 0, 0)
    parts = (
        (b"IHDR", size),
        (b"PLTE", palette),
        (b"tRNS", b"\xff" * NOTHING + b"\0"),
        (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows), 9)),
        (b"IEND", b""),
    )
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def image(rows: Sequence[bytes]) -> str:
    """Return the image of `png` in base64, for a page."""
    return base64.b64encode(png(rows)).decode("ascii")


def edges(kept: Sequence[Sequence[bool]]) -> list[list[tuple[int, int]]]:
    """Return the lines between the kept and the cut cells of a grid, in which each cell has width and height 1.

    >>> edges([[True, False]])
    [[(1, 0), (1, 1)]]
    """
    lines = []
    for row, cells in enumerate(kept):
        for column, cell in enumerate(cells):
            if column and cell != cells[column - 1]:
                lines.append([(column, row), (column, row + 1)])
            if row and cell != kept[row - 1][column]:
                lines.append([(column, row), (column + 1, row)])
    return lines
