"""The charts of the page as geometry.

Positions are in percent of the plot, so a browser can scale the plot without its text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..arguments import UNITS
from . import grid
from .facts import LayerFacts, Report
from .text import layer_name

# The largest ratio of values on a logarithmic axis; smaller values are drawn at its lower end.
_LARGEST_RATIO = 1e6
BAR_WIDTH = 0.8  # of a bar; the distance between the middles of two bars is 1


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis from ``low`` to ``high``; ``ticks``: the values that are written beside it."""

    label: str
    low: float
    high: float
    log: bool = False
    ticks: tuple[float, ...] = ()

    def place(self, value: float) -> float:
        """Return the position of a value, from 0 to 100; a value outside the axis is moved to the nearer end."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, low))
        return 100 * min(max((value - low) / ((high - low) or 1), 0.0), 1.0)

    def words(self) -> list[tuple[float, str]]:
        """Return the positions of the ticks with their labels; on a linear axis all labels have as many decimals."""
        digits = max((len(f"{tick:.10g}".partition(".")[2]) for tick in self.ticks), default=0)
        return [(self.place(tick), f"{tick:g}" if self.log else f"{tick:.{digits}f}") for tick in self.ticks]


@dataclass(frozen=True)
class Series:
    """Points (x, y, text) under one name.

    ``look``: ``line``, ``bars``, ``levels``, ``dots``, ``rings`` or ``halo``. ``colour``: the name of a colour of the
    page.
    """

    name: str
    look: str
    colour: str
    points: tuple[tuple[float, float, str], ...]


@dataclass(frozen=True)
class Heat:
    """The colours behind a chart, as a grid of cells that fills it.

    ``rows``: from the top; the values of the cells, None if not known. ``label``: what the colours show. ``low``,
    ``high``: the values at the ends of the logarithmic colour scale.
    """

    rows: tuple[tuple[float | None, ...], ...]
    label: str
    low: float
    high: float

    def shares(self) -> list[list[float | None]]:
        """Return the place of each cell on the colour scale, from 0 to 1."""
        scale = Axis(self.label, self.low, self.high, log=True)
        return [[None if value is None else scale.place(value) / 100 for value in row] for row in self.rows]

    @property
    def image(self) -> str:
        """Return a PNG file in base64, with one pixel for each cell."""
        return grid.image([bytes(map(grid.steps, row)) for row in self.shares()])

    @property
    def complete(self) -> bool:
        """Return whether all values are known."""
        return all(value is not None for row in self.rows for value in row)


@dataclass(frozen=True)
class Chart:
    """Series on two axes.

    ``stems``: thin vertical lines (x, y, y) between pairs of points. ``limit``: the x of a vertical line, and its name.
    ``heat``: colours behind the series.
    """

    name: str
    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    stems: tuple[tuple[float, float, float], ...] = ()
    limit: tuple[float, str] | None = None
    heat: Heat | None = None

    def path(self, series: Series) -> str:
        """Return the series as an SVG path in a square of 1000.

        A dot is a very short line, which becomes a dot by its round line cap.
        """
        positions = [(10 * self.x.place(x), 1000 - 10 * self.y.place(y)) for x, y, _ in series.points]
        if series.look == "line":
            return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in positions) if positions else ""
        if series.look == "bars":
            half = 10 * (self.x.place(self.x.low + BAR_WIDTH / 2))
            return "".join(f"M{x - half:.1f} 1000V{y:.1f}H{x + half:.1f}V1000Z" for x, y in positions)
        if series.look == "levels":
            half = 10 * self.x.place(self.x.low + 0.5)
            return "".join(f"M{x - half:.1f} {y:.1f}H{x + half:.1f}" for x, y in positions)
        return "".join(f"M{x:.1f} {y:.1f}h.01" for x, y in positions)

    @property
    def barred(self) -> bool:
        """Return whether the chart has columns, so that pointing anywhere above a number of x shows its text."""
        return any(series.look in ("bars", "levels") for series in self.series)

    def stem_path(self) -> str:
        """Return the stems as an SVG path."""
        lines = (
            (10 * self.x.place(x), 1000 - 10 * self.y.place(a), 1000 - 10 * self.y.place(b)) for x, a, b in self.stems
        )
        return "".join(f"M{x:.1f} {a:.1f}V{b:.1f}" for x, a, b in lines)

    def hover(self) -> list[tuple[float, float, str]]:
        """Return every point that has a text: its position in percent from the left and the top, and the text."""
        return [
            (round(self.x.place(x), 2), round(100 - self.y.place(y), 2), text)
            for series in self.series
            for x, y, text in series.points
            if text
        ]


def axis(label: str, values: Iterable[float], *, log: bool = False, zero: bool = False) -> Axis:
    """Return an axis that contains the values and ends at round numbers.

    ``log``: use a logarithmic axis if the values differ by a factor of more than 8. ``zero``: the axis includes 0.
    """
    values = [value for value in values if math.isfinite(value)]
    positive = [value for value in values if value > max(values) / _LARGEST_RATIO]
    if log and positive and max(positive) / min(positive) > 8:
        least, most = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
        decades = range(least, most + 1, max(1, math.ceil((most - least) / 6)))
        return Axis(label, 10.0**least, 10.0**most, True, tuple(10.0**power for power in decades))
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    low = min(low, 0.0) if zero or log else low
    if high == low:
        low, high = low - (abs(low) / 2 or 1.0), high + (abs(high) / 2 or 1.0)
    step = _round_step((high - low) / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(float(f"{index * step:.10g}") for index in range(first, last + 1))
    return Axis(label, ticks[0], ticks[-1], False, ticks)


def _round_step(step: float) -> float:
    scale = 10.0 ** math.floor(math.log10(step))
    return next(factor * scale for factor in (1, 2, 2.5, 5, 10) if factor * scale >= step * 0.999)


def counted(label: str, count: int) -> Axis:
    """Return an axis for the numbers 1 to ``count``, with whole numbers as ticks and a margin of 0.5 at both ends."""
    step = max(1, int(_round_step(max(count - 1, 1) / 5)))
    ticks = [1, *range(step if step > 1 else 2, count + 1, step)] if count > 1 else [1]
    return Axis(label, 0.5, count + 0.5, False, tuple(map(float, ticks)))


def error_chart(layers: Sequence[LayerFacts], plain: bool) -> Chart | None:
    """Return a chart of the errors of the cut layers, in the order of the network; None if no errors are recorded.

    ``plain``: show the errors of the kernels; else those of the outputs, before and after calibration.
    """
    numbered = [(number, layer) for number, layer in enumerate(layers, 1) if layer.cut]
    x = counted("layer, in the order of the network", len(layers))
    if plain:
        points = [(number, 100 * e, f"{layer_name(layer.name)}\nkernel error {100 * e:.3g} %")
                  for number, layer in numbered if (e := layer.kernel_error) is not None]  # fmt: skip
        if not points:
            return None
        y = axis("relative error of the kernel, %", (value for _, value, _ in points), zero=True)
        return Chart(
            "kernels", "Error of each kernel after the cut", x, y, (Series("plain cut", "dots", "b", tuple(points)),)
        )
    pairs = [
        (number, layer, 100 * layer.output_error_before, 100 * layer.output_error_after)
        for number, layer in numbered
        if layer.output_error_before is not None and layer.output_error_after is not None
    ]
    if not pairs:
        return None
    texts = [
        f"{layer_name(layer.name)}\noutput error {a:.3g} % -> {b:.3g} %\n{layer.decision or ''}"
        for _, layer, a, b in pairs
    ]
    y = axis("relative error of the output, %", [v for _, _, *both in pairs for v in both], zero=True)
    before = tuple((number, a, text) for (number, _, a, _), text in zip(pairs, texts, strict=True))
    after = tuple((number, b, text) for (number, _, _, b), text in zip(pairs, texts, strict=True))
    series = (Series("plain cut", "rings", "b", before), Series("calibrated", "dots", "a", after))
    return Chart(
        "outputs", "Output error of each layer, before and after calibration", x, y, series,
        tuple((number, a, b) for number, _, a, b in pairs),
    )  # fmt: skip


def search_chart(search: Mapping[str, Any] | None) -> Chart | None:
    """Return a chart of the plans of a search (`Search.to_json`): error against size. None without a search."""
    if not search:
        return None
    whole, scored = search["whole"], search["scored_by"]
    front = [(100 * cost / whole, score, f"best by scores\n{100 * cost / whole:.1f} %: {score:.3g}")
             for cost, score in search["frontier"]]  # fmt: skip
    uniform: list[tuple[float, float, str]] = []
    searched: list[tuple[float, float, str]] = []
    taken: list[tuple[float, float, str]] = []
    for number, plan in enumerate(search["tried"]):
        error = plan["measured"] if plan["measured"] is not None else plan["expected"]
        size = 100 * plan["cost"] / whole
        point = (size, error, f"{plan['origin']}\n{size:.1f} %: {error:.3g}")
        (uniform if plan["origin"].startswith("lambda") else searched).append(point)
        if number == search["taken"]:
            taken.append((*point[:2], f"taken: {point[2]}"))
    unit = "KL divergence from the uncut network" if scored == "divergence" else "energy cut, layers summed"
    series = [
        Series("best by the scores of single layers", "line", "grey", tuple(front)),
        Series("uniform and progressive, tried", "dots", "a", tuple(uniform)),
        Series("searched, tried", "dots", "b", tuple(searched)),
        Series("taken", "halo", "b", tuple(taken)),
    ]
    points = [point for one in series for point in one.points]
    limit = 100 * search["limit"] / whole
    size_label = f"{UNITS.get(search['unit'], search['unit'])}, % of the uncut network's"
    x, y = axis(size_label, (limit, *(x for x, _, _ in points))), axis(unit, (y for _, y, _ in points), log=True)
    not_empty = tuple(one for one in series if one.points)
    return Chart("search", "Size and error of the plans", x, y, not_empty, limit=(limit, f"budget {search['budget']}"))


def training_charts(report: Report) -> list[Chart]:
    """Return charts of the loss and top-1 of each epoch, over all runs. Values that were not measured have no line."""
    rows = [row for run in report.training for row in run.get("epochs") or []]
    charts = []
    for name, title, label, keys, scale in (
        ("loss", "Loss by epoch", "loss", ("loss", "test_loss"), 1.0),
        ("top1", "Top-1 by epoch", "top-1, %", ("accuracy", "test_top1"), 100.0),
    ):
        series = []
        for key, images, colour in zip(keys, ("training images", "test images"), ("b", "a"), strict=True):
            points = tuple(
                (
                    number,
                    scale * row[key],
                    f"epoch {number}, {images}\n{label.partition(',')[0]} {scale * row[key]:.4g}",
                )
                for number, row in enumerate(rows, 1)
                if row.get(key) is not None and math.isfinite(row[key])
            )
            if points:
                without_text = tuple((x, y, "") for x, y, _ in points)
                series += [Series("", "line", colour, without_text), Series(images, "dots", colour, points)]
        if series:
            values = [y for one in series for _, y, _ in one.points]
            charts.append(Chart(name, title, counted("epoch", len(rows)), axis(label, values), tuple(series)))
    return charts
