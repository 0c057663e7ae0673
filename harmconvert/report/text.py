"""Names and numbers as short texts."""

from __future__ import annotations

import math
from collections.abc import Sequence


def layer_name(name: str) -> str:
    """Return the name of a layer, or ``(root)`` if the network itself is the layer."""
    return name or "(root)"


def shortened_name(name: str, limit: int = 24) -> str:
    """Return the name of a layer; the middle of a long name is replaced by an ellipsis.

    >>> shortened_name("stages.3.blocks.26.conv_dw.weight")
    'stages.3.blo…v_dw.weight'
    """
    name = layer_name(name)
    return name if len(name) <= limit else f"{name[: limit // 2]}…{name[-(limit // 2 - 1) :]}"


def size_text(size: Sequence[int]) -> str:
    """Return a kernel size as text.

    >>> size_text((3, 3)), size_text((64,))
    ('3x3', '64')
    """
    return "x".join(map(str, size))


def millions(count: int | None) -> str:
    """Return a count with a unit.

    >>> millions(19_660_000), millions(4_090_000_000)
    ('19.66M', '4.09G')
    """
    count = count or 0
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return str(count)


def megabytes(count: int) -> str:
    """Return a number of bytes in megabytes (10^6 bytes), or a small one as `bytes_text` writes it.

    >>> megabytes(1_094_000), megabytes(4_328)
    ('1.09 MB', '4.33 kB')
    """
    return f"{count / 1e6:.2f} MB" if count >= 5000 or not count else bytes_text(count)


def bytes_text(count: int) -> str:
    """Return a number of bytes with three significant digits.

    >>> bytes_text(1_088_000), bytes_text(112_345), bytes_text(84)
    ('1.09 MB', '112 kB', '84 bytes')
    """
    size, unit = byte_unit(count)
    return f"{count / size:.3g} {unit}"


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share in percent; an empty text for None.

    >>> percent(0.345), percent(0.9876, 2)
    ('34.5 %', '98.76 %')
    """
    return "" if share is None else f"{100 * share:.{digits}f} %"


def milliseconds(seconds: float) -> str:
    """Return milliseconds with three significant digits, without a power of ten.

    >>> milliseconds(0.02), milliseconds(1.2345)
    ('20.0 ms', '1234 ms')
    """
    count = 1000 * seconds
    return f"{count:.{max(0, 2 - math.floor(math.log10(max(count, 0.01))))}f} ms"


def byte_unit(count: int) -> tuple[float, str]:
    """Return the unit in which a number of bytes is written: its size and its name.

    >>> byte_unit(70_000)
    (1000.0, 'kB')
    """
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))
    return next(unit for unit in units if count >= unit[0] or unit[0] == 1)
