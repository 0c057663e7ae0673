"""A grid of numbers as a small image: colours that are even to the eye, and the lines round what is cut."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

# Every 15th part of viridis (van der Walt and Smith, CC0): even in lightness, and told apart by people who see fewer
# colours. Between them a straight line is within 7 of 255 of it.
_VIRIDIS = (
    "440154 481a6c 472f7d 414487 39568c 31688e 2a788e 23888e 1f988b 22a884 35b779 54c568 7ad151 a5db36 d2e21b fde725"
)
_ANCHORS = tuple(tuple(bytes.fromhex(colour)) for colour in _VIRIDIS.split())
STEPS = 200  # of a share, in a byte; what is beyond stands for nothing known
NOTHING = 255


def colour(share: float) -> tuple[int, int, int]:
    """The colour of a share from 0 (dark) to 1 (bright).

    >>> colour(0.0), colour(1.0)
    ((68, 1, 84), (253, 231, 37))
    """
    place = min(max(share, 0.0), 1.0) * (len(_ANCHORS) - 1)
    index = min(int(place), len(_ANCHORS) - 2)
    low, high = _ANCHORS[index], _ANCHORS[index + 1]
    red, green, blue = (round(a + (b - a) * (place - index)) for a, b in zip(low, high, strict=True))
    return red, green, blue


def hexadecimal(share: float) -> str:
    """The same as #rrggbb."""
    return "#" + bytes(colour(share)).hex()


def steps(share: float | None) -> int:
    """A share as a byte, `NOTHING` for None."""
    return NOTHING if share is None else round(min(max(share, 0.0), 1.0) * STEPS)


def png(rows: Sequence[bytes]) -> bytes:
    """An image with a pixel for each byte of `steps`, coloured, and clear where that is `NOTHING`."""
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


def edges(kept: Sequence[Sequence[bool]]) -> list[list[tuple[int, int]]]:
    """Lines between the kept and the cut cells of a grid, each cell one wide and one high.

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
