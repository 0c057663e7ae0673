"""Models of the distribution of a tensor's integers: the scale of each row and each column, fitted to the integers.

An integer in row o and column n has a generalised Gaussian distribution whose scale index is the sum of a part for the
row and a part for the column. A step of half the size doubles the integers, so the index of the step is subtracted and
only the difference is stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from .entropy import LAPLACE, PER_OCTAVE, PRECISION, SCALES, SHAPES, TOTAL, ZERO_SCALE, Integers
from .integers import Layout

Costs = npt.NDArray[np.float64]

# The scales of rows that are tried, around that of the column.
_ROW_OFFSETS = np.arange(-12, 13)
# Looking up each integer is slower than a product with the counts of magnitudes, by about this factor.
_FEW = 10
# Rough length of an integer of a part in bits: for the choice of parts whose exact length is not known yet.
_SIDE_BITS = 1.0


@dataclass(frozen=True)
class Parts:
    """An integer for each column (groups, columns) as a sum: base + channel + frequency + rest."""

    base: int
    channels_GI: Integers
    frequencies_F: Integers
    rest_GN: Integers

    @property
    def parts(self) -> tuple[Integers, Integers, Integers]:
        """Return the integers of channels (groups, channels), of frequencies, and of single columns."""
        return self.channels_GI, self.frequencies_F, self.rest_GN

    def sums(self) -> Integers:
        """Return the integer of each column."""
        sums_GIF = self.base + self.channels_GI[..., None] + self.frequencies_F
        return sums_GIF.reshape(self.rest_GN.shape) + self.rest_GN

    @property
    def bits(self) -> float:
        """Return about how many bits the parts need in a stream."""
        return sum(_part_bits(part) for part in self.parts)


def split(values_GN: Integers, layout: Layout) -> Parts:
    """Return integers of columns as the sum of parts that needs the fewest bits."""
    return min(_splits(values_GN.astype(np.int32), layout), key=lambda parts: parts.bits)


def affordable_steps(steps_GN: Integers, layout: Layout) -> Integers:
    """Return the indices of steps, simplified where their description needs more bits than they save.

    A step for each column is a large part of a tensor with few rows, such as the kernels of a depthwise convolution.
    Steps that differ from the best ones by factors r need (log2 mean r^2) / 2 - mean log2 r more bits for the same
    error.
    """
    count = layout.groups * layout.rows * layout.columns
    best, fewest = steps_GN, math.inf
    for parts in _splits(steps_GN.astype(np.int32), layout):
        for without_rest in (False, True):
            used = replace(parts, rest_GN=np.zeros_like(parts.rest_GN)) if without_rest else parts
            off = (used.sums() - steps_GN) / PER_OCTAVE
            lost = float(np.log2(np.mean(4.0**off)) / 2 - off.mean())
            if used.bits + lost * count < fewest:
                best, fewest = used.sums(), used.bits + lost * count
    return best


def _splits(values_GN: Integers, layout: Layout) -> Iterator[Parts]:
    base = int(_median(values_GN.ravel()))
    values_GIF = values_GN.reshape(layout.groups, layout.channels, layout.frequencies) - base
    no_channels, no_frequencies = np.zeros_like(values_GIF[..., 0]), np.zeros_like(values_GIF[0, 0])
    by_channel_GI = _median(values_GIF)
    by_frequency_F = _median(values_GIF.reshape(-1, layout.frequencies).T)
    left_GIF = values_GIF - by_channel_GI[..., None]
    both_F = _median(left_GIF.reshape(-1, layout.frequencies).T)
    for channels_GI, frequencies_F in (
        (no_channels, no_frequencies),
        (by_channel_GI, no_frequencies),
        (no_channels, by_frequency_F),
        (by_channel_GI, both_F),
    ):
        rest_GIF = values_GIF - channels_GI[..., None] - frequencies_F
        yield Parts(base, channels_GI, frequencies_F, rest_GIF.reshape(values_GN.shape).astype(np.int32))


def _median(values: Integers) -> Integers:
    """Return the lower median along the last axis: an integer, and exact for a sum of two parts."""
    return np.sort(values, -1)[..., (values.shape[-1] - 1) // 2].astype(np.int32)


@dataclass(frozen=True)
class ScaleModel:
    """The scale index of the distribution of each integer, from parts for its row and its column.

    ``shape``: of all distributions (`entropy.table`).
    """

    shape: int
    rows_GO: Integers
    columns: Parts

    def scales(self, steps_GN: Integers, row_steps_GO: Integers) -> npt.NDArray[np.uint8]:
        """Return the scale index of each integer (groups, rows, columns); ``steps_GN`` are without their base."""
        return self.scales_of(self.rows_GO - row_steps_GO, self.columns.sums() - steps_GN)

    @staticmethod
    def scales_of(rows_GO: Integers, columns_GN: Integers) -> npt.NDArray[np.uint8]:
        """Return the sums of both parts, limited to the range of an index."""
        return np.clip(rows_GO[:, :, None] + columns_GN[:, None], 0, SCALES - 1).astype(np.uint8)


def fit_scales(q_GON: Integers, steps_GN: Integers, row_steps_GO: Integers, layout: Layout) -> ScaleModel | None:
    """Return the model that codes the integers in the fewest bits; None if their plain counts do so.

    ``steps_GN`` are without their base.
    """
    magnitudes_GON = np.abs(q_GON)
    largest = int(magnitudes_GON.max(initial=0))
    best, fewest = None, _bits_by_counts(q_GON)
    by_column = _Columns.of(magnitudes_GON, -row_steps_GO, largest)
    fits = [(by_column.costs(_code_lengths(shape, largest)).min(-1).sum(), shape) for shape in SHAPES]
    for _, shape in sorted(fits)[:2]:
        costs = _code_lengths(shape, largest)
        rows_GO, with_rows = np.zeros_like(row_steps_GO), by_column
        for attempt in range(2):
            columns, bits = _fit_columns(with_rows.costs(costs), -steps_GN, layout)
            total = bits + columns.bits + _part_bits(rows_GO)
            if total < fewest:
                best, fewest = ScaleModel(shape, rows_GO, columns), total
            if attempt == 0:
                rows_GO = _fit_rows(magnitudes_GON, columns.sums() - steps_GN, row_steps_GO, costs)
                with_rows = _Columns.of(magnitudes_GON, rows_GO - row_steps_GO, largest)
    return best


def _fit_columns(costs_GNS: Costs, shift_GN: Integers, layout: Layout) -> tuple[Parts, float]:
    """Return the parts of the columns' scales, and the bits of all integers with them."""
    # costs of an index before the shift, so that the parts are small
    offsets = np.arange(-SCALES // 2, SCALES + SCALES // 2)
    places = np.clip(offsets + shift_GN[..., None], 0, costs_GNS.shape[-1] - 1)
    shifted = np.take_along_axis(costs_GNS, places, -1).reshape(layout.groups, layout.channels, layout.frequencies, -1)
    none = np.zeros(1, np.int32)

    def parts(channels: Integers, frequencies: Integers, rest: Integers, base: int) -> Parts:
        shape = layout.groups, layout.channels, layout.frequencies
        spread = np.broadcast_to(rest, shape).reshape(layout.groups, layout.columns)
        return Parts(
            int(offsets[0]) + base,
            np.broadcast_to(channels, shape[:2]).astype(np.int32),
            np.broadcast_to(frequencies, shape[2:]).astype(np.int32),
            spread.astype(np.int32),
        )

    base = int(shifted.sum((0, 1, 2)).argmin())
    candidates = [(parts(none, none, none, base), float(shifted.sum((0, 1, 2)).min()))]
    by_frequency = shifted.sum((0, 1))
    frequencies = by_frequency.argmin(-1) - base
    candidates.append((parts(none, frequencies, none, base), float(by_frequency.min(-1).sum())))
    moved = _moved(shifted, frequencies)
    by_channel = moved.sum(2)
    channels = by_channel.argmin(-1) - base
    candidates.append((parts(channels, frequencies, none, base), float(by_channel.min(-1).sum())))
    moved = _moved(moved, channels[..., None])
    distance = np.abs(np.arange(moved.shape[-1]) - base)
    chosen = (moved + _SIDE_BITS * (distance + (distance > 0))).argmin(-1)
    data = float(np.take_along_axis(moved, chosen[..., None], -1).sum())
    candidates.append((parts(channels, frequencies, chosen - base, base), data))
    return min(candidates, key=lambda one: one[0].bits + one[1])


def _moved(costs: Costs, by: npt.NDArray[np.int64]) -> Costs:
    """Return costs[..., s + by], with the index limited to its range."""
    places = np.clip(
        np.arange(costs.shape[-1]) + np.broadcast_to(by, costs.shape[:-1])[..., None], 0, costs.shape[-1] - 1
    )
    return np.take_along_axis(costs, places, -1)


def _fit_rows(magnitudes_GON: Integers, scales_GN: Integers, row_steps_GO: Integers, costs: Costs) -> Integers:
    """Return the part of each row that codes its integers in the fewest bits."""
    lengths = []
    for offset in _ROW_OFFSETS:
        scales_GON = np.clip(scales_GN[:, None] + (offset - row_steps_GO)[..., None], 0, len(costs) - 1)
        distance = abs(int(offset))
        lengths.append(costs[scales_GON, magnitudes_GON].sum(-1) + _SIDE_BITS * (distance + (distance > 0)))
    return _ROW_OFFSETS[np.stack(lengths).argmin(0)].astype(np.int32)


def _counts(magnitudes_GON: Integers, rows_GO: Integers, largest: int) -> dict[int, Costs]:
    """Return how often each column has each magnitude, (groups, columns, magnitudes), by the scale of the row."""
    groups, _, columns = magnitudes_GON.shape
    places_GON = magnitudes_GON + (largest + 1) * np.arange(groups * columns).reshape(groups, 1, columns)
    length = groups * columns * (largest + 1)
    return {
        int(offset): np.bincount(places_GON[rows_GO == offset].ravel(), minlength=length)
        .reshape(groups, columns, largest + 1)
        .astype(np.float64)
        for offset in np.unique(rows_GO)
    }


@dataclass(frozen=True)
class _Columns:
    """The magnitudes of a tensor and the scale of each row, for the cost of each column at each scale."""

    magnitudes_GON: Integers
    rows_GO: Integers
    counts: dict[int, Costs] | None

    @classmethod
    def of(cls, magnitudes_GON: Integers, rows_GO: Integers, largest: int) -> _Columns:
        # With few rows, the counts would be mostly zeros: depthwise layers have one row.
        few = _FEW * magnitudes_GON.shape[1] <= largest
        return cls(magnitudes_GON, rows_GO, None if few else _counts(magnitudes_GON, rows_GO, largest))

    def costs(self, lengths: Costs) -> Costs:
        """Return the bits of each column's integers for each scale index of the column, (groups, columns, scales).

        ``lengths``: of the code of each magnitude, (scales, magnitudes).
        """
        indices = np.arange(len(lengths))
        if self.counts is not None:
            total: Costs = sum(
                (of_rows @ lengths[np.clip(indices + offset, 0, len(lengths) - 1)].T
                 for offset, of_rows in self.counts.items()),
                np.zeros(()),
            )  # fmt: skip
            return total
        groups, rows, columns = self.magnitudes_GON.shape
        by_magnitude = np.ascontiguousarray(lengths.T)
        total = np.zeros((groups, columns, len(lengths)))
        for row in range(rows):
            of_row = by_magnitude[self.magnitudes_GON[:, row]]
            if self.rows_GO[:, row].any():
                places_GS = np.clip(indices + self.rows_GO[:, row, None], 0, len(lengths) - 1)
                of_row = np.take_along_axis(of_row, np.broadcast_to(places_GS[:, None], of_row.shape), -1)
            total += of_row
        return total


def fitted_scale(values: Integers) -> int:
    """Return the scale index of the Laplace distribution that codes integers around zero in the fewest bits."""
    magnitudes = np.abs(values).ravel()
    costs = _code_lengths(LAPLACE, int(magnitudes.max(initial=0)))
    return int((costs @ np.bincount(magnitudes, minlength=costs.shape[1])).argmin())


def _part_bits(part: Integers) -> float:
    if not part.any():
        return 8.0
    magnitudes = np.abs(part).ravel()
    costs = _code_lengths(LAPLACE, int(magnitudes.max()))
    return 24.0 + float((costs @ np.bincount(magnitudes, minlength=costs.shape[1])).min())


def _bits_by_counts(q_GON: Integers) -> float:
    """Return about how many bits the integers need if they are coded by their counts, and the counts themselves."""
    counts = np.unique(q_GON, return_counts=True)[1]
    symbols = 2 * int(np.abs(q_GON).max(initial=0)) + 1
    written = 8 * symbols + 7 * float(np.floor(np.log2(counts) / 7).sum())
    return written + float((counts * -np.log2(counts / counts.sum())).sum())


@lru_cache(maxsize=256)
def _code_lengths(shape: int, largest: int) -> Costs:
    """Return the length of the code of each magnitude for each scale index, in bits, nearly exact."""
    scales = 2.0 ** ((np.arange(SCALES) - ZERO_SCALE) / PER_OCTAVE)
    powers = (np.arange(largest + 1) / scales[:, None]) ** (shape / 4)
    density = np.exp(-np.minimum(powers, 700.0))
    whole = density[:, :1] + 2 * density[:, 1:].sum(1, keepdims=True)
    weights = 1 + np.floor(density / whole * (TOTAL - 2 * largest - 1))
    weights[:, 0] = TOTAL - 2 * weights[:, 1:].sum(1)
    lengths: Costs = PRECISION - np.log2(weights)
    return lengths
