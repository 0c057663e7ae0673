"""The byte stream of a quantised tensor: its integers and steps, entropy coded (docs/file-format.md)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .entropy import (
    LAPLACE,
    MOST_MAGNITUDE,
    SCALES,
    SHAPES,
    Decoder,
    Encoder,
    Integers,
    both_signs,
    table,
    table_of_counts,
)
from .integers import MOST_INDEX, Layout, Quantised
from .scales import Parts, ScaleModel, fit_scales, fitted_scale, split

# The largest magnitude of an integer of a part. It also bounds the time that a hostile stream can cost.
MOST_PART = 1023


def too_many_tables(scales: int, largest: int, integers: int) -> bool:
    """Return whether a tensor of so few integers may not have so many tables of this size.

    The weights of a table are slow to compute, so a small file could otherwise cost a reader hours.
    """
    return scales * largest > 64 * integers + 4096


def pack(quantised: Quantised, layout: Layout) -> bytes:
    """Return the stream of a quantised tensor; inverse of `unpack`.

    Raises:
        ValueError: an integer or a step is out of range.
    """
    q_GON, steps_GN = quantised.integers_GON, quantised.column_steps_GN
    row_steps_GO = quantised.row_steps_GO
    if row_steps_GO is None:
        row_steps_GO = np.zeros(q_GON.shape[:2], np.int32)
    largest = int(np.abs(q_GON).max(initial=0))
    if largest > MOST_MAGNITUDE:
        raise ValueError(f"an integer of {largest} is above {MOST_MAGNITUDE}: use larger steps, that is fewer bits")
    if max(np.abs(steps_GN).max(initial=0), np.abs(row_steps_GO).max(initial=0)) > MOST_INDEX:
        raise ValueError("a step is out of range")
    prefix, encoder = bytearray(), Encoder()
    steps = split(steps_GN, layout)
    for number in (largest, _zigzag(steps.base)):
        _append(prefix, number)
    for part in (row_steps_GO, *steps.parts):
        _add_part(part, prefix, encoder)
    model = fit_scales(q_GON, steps_GN - steps.base, row_steps_GO, layout)
    scales_GON = None if model is None else model.scales(steps_GN - steps.base, row_steps_GO)
    if scales_GON is not None and too_many_tables(len(np.unique(scales_GON)), largest, q_GON.size):
        model = None
    _append(prefix, model.shape if model else 0)
    if model and scales_GON is not None:
        _append(prefix, _zigzag(model.columns.base))
        for part in (model.rows_GO, *model.columns.parts):
            _add_part(part, prefix, encoder)
        for scale, places in _by_scale(scales_GON):
            encoder.add(q_GON.ravel()[places], both_signs(table(scale, model.shape, largest)))
    else:
        counts = np.bincount(q_GON.ravel() + largest, minlength=2 * largest + 1)
        for count in counts:
            _append(prefix, int(count))
        encoder.add(q_GON, table_of_counts(counts))
    scales = b"" if quantised.scales_GO is None else quantised.scales_GO.astype("<f4").tobytes()
    _append(prefix, bool(scales))
    return bytes(prefix) + scales + encoder.words()


def unpack(data: bytes, layout: Layout) -> Quantised:
    """Return the quantised tensor of a stream. Memory and time are proportional to the tensor's size.

    Raises:
        ValueError: the data is no such stream.
    """
    groups, rows, columns = layout.groups, layout.rows, layout.columns
    prefix = _Prefix(data)
    largest, base = prefix.number(MOST_MAGNITUDE), prefix.signed(MOST_INDEX)
    step_tables = [prefix.part() for _ in range(4)]
    shape = prefix.number(max(SHAPES))
    scale_tables: list[_Part] = []
    counts: list[int] = []
    scale_base = 0
    if shape:
        if shape not in SHAPES:
            raise ValueError(f"unknown shape {shape} of a distribution")
        scale_base = prefix.signed(MOST_INDEX)
        scale_tables = [prefix.part() for _ in range(4)]
    else:
        counts = [prefix.number(groups * rows * columns) for _ in range(2 * largest + 1)]
    scales_GO = prefix.floats(groups, rows) if prefix.number(1) else None
    decoder = Decoder(prefix.rest())
    row_steps_GO, steps_GN = _take_parts(decoder, step_tables, base, layout)
    if max(np.abs(steps_GN).max(), np.abs(row_steps_GO).max()) > MOST_INDEX:
        raise ValueError("a step is out of range")
    if shape:
        rows_GO, columns_GN = _take_parts(decoder, scale_tables, scale_base, layout)
        scales_GON = ScaleModel.scales_of(rows_GO - row_steps_GO, columns_GN - (steps_GN - base))
        flat = np.empty(groups * rows * columns, np.int32)
        if too_many_tables(len(np.unique(scales_GON)), largest, flat.size):
            raise ValueError("it has more tables than a tensor of its size may have")
        for scale, places in _by_scale(scales_GON):
            flat[places] = decoder.take(len(places), both_signs(table(scale, shape, largest)))
    else:
        if sum(counts) != groups * rows * columns:
            raise ValueError(f"{sum(counts)} integers are counted, the tensor has {groups * rows * columns}")
        flat = decoder.take(groups * rows * columns, table_of_counts(counts))
    decoder.end()
    row_steps = row_steps_GO if row_steps_GO.any() else None
    return Quantised(flat.reshape(groups, rows, columns), steps_GN, row_steps, scales_GO)


def _by_scale(scales_GON: npt.NDArray[np.uint8]) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Yield each scale index that occurs, in ascending order, and the flat positions that have it."""
    flat = scales_GON.ravel()
    order = np.argsort(flat, kind="stable")  # a radix sort
    ends = np.bincount(flat, minlength=SCALES).cumsum()
    for scale in np.unique(flat):
        start = ends[scale - 1] if scale else 0
        yield int(scale), order[start : ends[scale]]


def _take_parts(decoder: Decoder, tables: list[_Part], base: int, layout: Layout) -> tuple[Integers, Integers]:
    """Return the integers of rows (groups, rows), and the sums of the parts of columns (groups, columns)."""
    groups, frequencies = layout.groups, layout.frequencies
    shapes = [(groups, layout.rows), (groups, layout.channels), (frequencies,), (groups, layout.columns)]
    rows, *parts = [table.take(decoder, shape) for table, shape in zip(tables, shapes, strict=True)]
    return rows, Parts(base, parts[0], parts[1], parts[2]).sums()


# --- the prefix: numbers of seven bits in a byte, the lowest first; the highest bit says that another byte follows ---


def _add_part(part: Integers, prefix: bytearray, encoder: Encoder) -> None:
    """Add integers around zero: 0 if all are zero, else 1 + the index of their scale, and the largest magnitude."""
    if not part.any():
        _append(prefix, 0)
        return
    largest, scale = int(np.abs(part).max()), fitted_scale(part)
    if largest > MOST_PART:
        raise ValueError("its steps differ too much: a step is out of range")
    _append(prefix, scale + 1)
    _append(prefix, largest)
    encoder.add(part, both_signs(table(scale, LAPLACE, largest)))


def _append(prefix: bytearray, number: int) -> None:
    while number > 127:
        prefix.append(number & 127 | 128)
        number >>= 7
    prefix.append(number)


def _zigzag(number: int) -> int:
    """Return 0, 1, 2, 3, 4 for 0, -1, 1, -2, 2."""
    return 2 * number if number >= 0 else -2 * number - 1


@dataclass(frozen=True)
class _Part:
    """The scale index (None: all integers are zero) and the largest magnitude of the integers of a part."""

    scale: int | None
    largest: int = 0

    def take(self, decoder: Decoder, shape: tuple[int, ...]) -> Integers:
        if self.scale is None:
            return np.zeros(shape, np.int32)
        values = decoder.take(int(np.prod(shape)), both_signs(table(self.scale, LAPLACE, self.largest)))
        return values.reshape(shape)


class _Prefix:
    """Reads the numbers at the beginning of a stream."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def number(self, most: int) -> int:
        """Return the next number; raise ValueError if it is above ``most``."""
        number = shift = 0
        while True:
            if self._at >= len(self._data) or shift > 63:
                raise ValueError("the stream ends in its prefix")
            byte = self._data[self._at]
            self._at += 1
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        if number > most:
            raise ValueError(f"{number} is out of range (at most {most})")
        return number

    def signed(self, most: int) -> int:
        number = self.number(2 * most)
        return number // 2 if number % 2 == 0 else -(number + 1) // 2

    def part(self) -> _Part:
        scale = self.number(SCALES)
        return _Part(scale - 1, self.number(MOST_PART)) if scale else _Part(None)

    def floats(self, groups: int, rows: int) -> npt.NDArray[np.float32]:
        end = self._at + 4 * groups * rows
        if end > len(self._data):
            raise ValueError("the stream ends in its scales")
        scales = np.frombuffer(self._data[self._at : end], "<f4").astype(np.float32)
        self._at = end
        if not np.isfinite(scales).all():
            raise ValueError("a scale is NaN or infinite")
        return scales.reshape(groups, rows)

    def rest(self) -> bytes:
        return self._data[self._at :]
