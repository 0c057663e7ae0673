"""The heat maps of the page: how strongly the layers use each frequency."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import printable
from ...kernels.basis import all_frequencies
from .. import grid
from ..facts import LayerFacts
from ..text import layer_name
from .kernels import level

# A row has the height of a name, unless there are more rows than this; then the rows are lower.
NAMED_ROWS = 48


@dataclass(frozen=True)
class HeatMap:
    """The spectra of the layers with one kernel size, as an image with a row for each layer.

    ``cells``: the image as one byte for each cell, see `grid.steps`. ``image``: as a PNG file in base64. ``cut``: the
    line around the cut frequencies, as an SVG path.
    """

    kernel: tuple[int, ...]
    layers: tuple[LayerFacts, ...]
    cells: bytes
    image: str
    cut: str

    @property
    def columns(self) -> int:
        """Return the number of frequencies."""
        return self.layers[0].total

    @property
    def row(self) -> float:
        """Return the height of a row in pixels."""
        return 18.0 if len(self.layers) <= NAMED_ROWS else max(1.0, 18.0 * NAMED_ROWS / len(self.layers))

    @property
    def lined(self) -> bool:
        """Return whether the rows are high enough for a line around the cut frequencies; else their cells are blank."""
        return self.row >= 4

    @property
    def names(self) -> list[tuple[float, str]]:
        """Return the names and their distances from the top in percent. Low rows leave no room for every name."""
        step = math.ceil(18 / self.row)
        return [
            (100 * (index + 0.5) / len(self.layers), layer_name(self.layers[index].name))
            for index in range(0, len(self.layers), step)
        ]

    @property
    def levels(self) -> list[tuple[int, float, str]]:
        """Return for each level its first column, its middle in percent, and its number ("" if there is no room)."""
        numbers, levels, last = [level(frequency) for frequency in all_frequencies(self.kernel)], [], -100.0
        for number in sorted(set(numbers)):
            first = numbers.index(number)
            middle = 100 * (first + numbers.count(number) / 2) / self.columns
            has_room = middle - last >= 9.5 or number == 0
            levels.append((first, middle, str(number) if has_room else ""))
            last = middle if has_room else last
        return levels

    def hover(self) -> dict[str, Any]:
        """Return the data from which the page's script makes the text for each cell."""
        return {
            "layers": [printable(layer_name(layer.name)) for layer in self.layers],
            "frequencies": [", ".join(map(str, frequency)) for frequency in all_frequencies(self.kernel)],
            "kept": ["".join("01"[kept] for kept in layer.keeps) for layer in self.layers],
            "cells": base64.b64encode(self.cells).decode("ascii"),
        }


def heat_maps(layers: Sequence[LayerFacts]) -> list[HeatMap]:
    """Return a heat map for each kernel size, of the layers whose spectrum is known."""
    known = [layer for layer in layers if layer.spectrum is not None]
    maps = []
    for size in dict.fromkeys(layer.kernel for layer in known):
        same_size = tuple(layer for layer in known if layer.kernel == size)
        rows = [bytes(map(grid.steps, _relative(layer))) for layer in same_size]
        heat = HeatMap(size, same_size, b"".join(rows), "", "")
        if heat.lined:
            cut = _svg_path(grid.edges([layer.keeps for layer in same_size]))
        else:
            rows, cut = [_without_cut_cells(row, layer) for row, layer in zip(rows, same_size, strict=True)], ""
        maps.append(replace(heat, image=grid.image(rows), cut=cut))
    return maps


def _relative(layer: LayerFacts) -> list[float | None]:
    """Return the spectrum divided by its largest value; None for cut frequencies whose coefficients are not known."""
    values = layer.spectrum or ()
    largest = max(values, default=0.0) or 1.0
    return [
        value / largest if kept or layer.spectrum_uncut else None
        for value, kept in zip(values, layer.keeps, strict=True)
    ]


def _without_cut_cells(row: bytes, layer: LayerFacts) -> bytes:
    return bytes(cell if kept else grid.NOTHING for cell, kept in zip(row, layer.keeps, strict=True))


def _svg_path(lines: Sequence[Sequence[tuple[int, int]]]) -> str:
    """Return the lines of a grid as an SVG path; lines that continue each other are joined."""
    ends: dict[tuple[int, int, bool], tuple[int, int]] = {}
    for first, last in sorted(((a, b) for a, b in lines), reverse=True):
        horizontal = first[1] == last[1]
        begin, continuation = (*first, horizontal), (*last, horizontal)
        ends[begin] = ends.pop(continuation, last)
    return "".join(
        f"M{x} {y}{f'H{end[0]}' if horizontal else f'V{end[1]}'}" for (x, y, horizontal), end in ends.items()
    )
