"""The page: one HTML file that needs nothing else, runs nothing but its own script, and takes every name for a name."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.cells import cell_len

from ..arguments import templating
from ..documents import json_text
from ..errors import counted, printable
from ..files import write_text
from ..kernels.basis import all_frequencies
from . import grid
from .charts import Chart, error_chart, search_chart, training_charts
from .kernels import level, size_text
from .summary import UNTELLABLE, LayerFacts, Report, untellable
from .tables import megabytes, millions

NAMED_ROWS = 48  # rows of a heat map that are high enough for a name each; more of them share this height


def write_report(report: Report, path: Path, force: bool = False) -> None:
    """Write a report as a page, or its data where the file ends in .json.

    Raises: as `templating` and `harmconvert.files.write_file`.
    """
    text = json_text(report.to_json()) + "\n" if path.suffix.lower() == ".json" else page(report)
    write_text(path, text, force)


def page(report: Report) -> str:
    """The report as HTML.

    Raises:
        OutsideError: jinja2 is not installed. InputError: what the checkpoint says was done to it is unreadable.
    """
    jinja2 = templating()
    try:
        return _rendered(report, jinja2)
    except (*UNTELLABLE, jinja2.TemplateError) as error:
        raise untellable(report.name, error) from error


def _rendered(report: Report, jinja2: ModuleType) -> str:
    folder = files(__package__) / "templates"
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_finalized,
        loader=jinja2.DictLoader({"page": (folder / "page.html.j2").read_text(encoding="utf-8")}),
    )  # fmt: skip
    environment.filters |= {
        "count": millions, "megabytes": megabytes, "size": size_text, "percent": _percent, "short": shortened_name,
        "colour": grid.hexadecimal, "plan_name": lambda name: shortened_name(name, 36),
        "time": _time, "machine": _machine,
    }  # fmt: skip
    charts = [chart for chart in (error_chart(report.layers, True), error_chart(report.layers, False)) if chart]
    maps, search, training = heat_maps(report.layers), search_chart(report.search), training_charts(report)
    every = [*charts, *([search] if search else []), *training]
    return str(
        environment.get_template("page").render(
            r=report,
            style=_raw(jinja2, style),
            script=_raw(jinja2, script),
            script_hash=_hash(script),
            errors=charts,
            search=search,
            training=training,
            maps=maps,
            names_width=max((cell_len(shortened_name(name)) for one in maps for _, name in one.names), default=0),
            data=_data(report, every, maps),
            plan_json=_in_lines(report.plan.to_json()),
        )
    )


@dataclass(frozen=True)
class HeatMap:
    """The spectra of the layers with one kernel size: an image with a row for each, and the line round what is cut."""

    kernel: tuple[int, ...]
    layers: tuple[LayerFacts, ...]
    cells: bytes
    image: str
    cut: str

    @property
    def columns(self) -> int:
        """Number of frequencies."""
        return self.layers[0].total

    @property
    def row(self) -> float:
        """Height of a row in pixels."""
        return 18.0 if len(self.layers) <= NAMED_ROWS else max(1.0, 18.0 * NAMED_ROWS / len(self.layers))

    @property
    def lined(self) -> bool:
        """Whether rows are high enough for a line round what is cut; else that is left blank."""
        return self.row >= 4

    @property
    def names(self) -> list[tuple[float, str]]:
        """Where names stand, in percent from the top, every second or tenth of them where they are many."""
        step = math.ceil(18 / self.row)
        return [
            (100 * (index + 0.5) / len(self.layers), self.layers[index].name or "(root)")
            for index in range(0, len(self.layers), step)
        ]

    @property
    def levels(self) -> list[tuple[int, float, str]]:
        """Of each level the column that it begins at, its middle in percent, and its number where there is room."""
        numbers, found, last = [level(frequency) for frequency in all_frequencies(self.kernel)], [], -100.0
        for at in sorted(set(numbers)):
            first, middle = numbers.index(at), 100 * (numbers.index(at) + numbers.count(at) / 2) / self.columns
            roomy = middle - last >= 9.5 or at == 0
            found.append((first, middle, str(at) if roomy else ""))
            last = middle if roomy else last
        return found


def heat_maps(layers: Sequence[LayerFacts]) -> list[HeatMap]:
    """One for each kernel size of layers whose spectrum is known, in the order in which the sizes come."""
    known = [layer for layer in layers if layer.spectrum is not None]
    maps = []
    for size in dict.fromkeys(layer.kernel for layer in known):
        mine = tuple(layer for layer in known if layer.kernel == size)
        rows = [bytes(map(grid.steps, _shares(layer))) for layer in mine]
        heat = HeatMap(size, mine, b"".join(rows), "", "")
        if heat.lined:
            shown, cut = rows, _joined(grid.edges([layer.keeps for layer in mine]))
        else:
            shown, cut = [_kept_only(row, layer) for row, layer in zip(rows, mine, strict=True)], ""
        maps.append(replace(heat, image=base64.b64encode(grid.png(shown)).decode("ascii"), cut=cut))
    return maps


def _kept_only(row: bytes, layer: LayerFacts) -> bytes:
    return bytes(cell if kept else grid.NOTHING for cell, kept in zip(row, layer.keeps, strict=True))


def _shares(layer: LayerFacts) -> list[float | None]:
    """Of the layer's largest; None where a frequency is cut and nobody saw what it held."""
    values = layer.spectrum or ()
    largest = max(values, default=0.0) or 1.0
    known = (kept or layer.spectrum_uncut for kept in layer.keeps)
    return [value / largest if there else None for value, there in zip(values, known, strict=True)]


def _joined(lines: Sequence[Sequence[tuple[int, int]]]) -> str:
    """Lines of a grid as an SVG path, those in one another's continuation as one."""
    ends: dict[tuple[int, int, bool], tuple[int, int]] = {}
    for first, last in sorted(((a, b) for a, b in lines), reverse=True):
        across = first[1] == last[1]
        begins, goes_on = (*first, across), (*last, across)
        ends[begins] = ends.pop(goes_on, last)
    return "".join(f"M{x} {y}{f'H{end[0]}' if across else f'V{end[1]}'}" for (x, y, across), end in ends.items())


def _data(report: Report, charts: Sequence[Chart], maps: Sequence[HeatMap]) -> str:
    """What hovering shows, as JSON that no HTML parser can read a tag in."""
    content = {
        "layers": [printable(layer_text(layer)) for layer in report.layers],
        "charts": {chart.name: [(x, y, printable(tip)) for x, y, tip in chart.hover()] for chart in charts},
        "maps": [
            {
                "layers": [printable(layer.name or "(root)") for layer in one.layers],
                "frequencies": [", ".join(map(str, frequency)) for frequency in all_frequencies(one.kernel)],
                "kept": ["".join("01"[kept] for kept in layer.keeps) for layer in one.layers],
                "cells": base64.b64encode(one.cells).decode("ascii"),
            }
            for one in maps
        ],
    }
    text = json.dumps(content, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def layer_text(layer: LayerFacts) -> str:
    """A layer in a few lines."""
    lines = [layer.name or "(root)", f"{layer.kind}, {size_text(layer.kernel)}"]
    if not layer.kept:
        return "\n".join([*lines, f"skipped: {layer.why}"])
    lam = f" (λ = {layer.levels})" if layer.levels and layer.cut else ""
    lines.append(f"keeps {layer.kept} of {counted(layer.total, 'frequency')}{lam}")
    if layer.other_axes:
        lines.append(f"keeps {layer.other_axes}")
    if layer.parameters is not None and layer.kept_parameters is not None:
        lines.append(f"{millions(layer.parameters)} -> {millions(layer.kept_parameters)} parameters")
    if layer.cut and layer.energy is not None:
        lines.append(f"energy kept {layer.energy:.1%}")
    if layer.output_error_before is not None and layer.output_error_after is not None:
        lines.append(f"output error {layer.output_error_before:.1%} -> {layer.output_error_after:.1%}")
    return "\n".join([*lines, *([layer.why] if layer.why else [])])


def shortened_name(name: str, limit: int = 24) -> str:
    """A name that fits where room is scarce: its middle left out.

    >>> shortened_name("stages.3.blocks.26.conv_dw.weight")
    'stages.3.blo…v_dw.weight'
    """
    name = name or "(root)"
    return name if len(name) <= limit else f"{name[: limit // 2]}…{name[-(limit // 2 - 1) :]}"


def _percent(share: float | None, digits: int = 1) -> str:
    return "" if share is None else f"{100 * share:.{digits}f} %"


def _time(seconds: float) -> str:
    """Three digits, never as a power of ten."""
    milliseconds = 1000 * seconds
    return f"{milliseconds:.{max(0, 2 - math.floor(math.log10(max(milliseconds, 0.01))))}f} ms"


def _machine(machine: Mapping[str, Any]) -> str:
    processor = f"{machine.get('processor')} ({machine.get('capability')}, {machine.get('cores')} cores)"
    chip = machine.get("gpu") if str(machine.get("device")).startswith("cuda") else processor
    return f"{chip}, torch {machine.get('torch')}"


def _finalized(value: Any) -> Any:
    """Names come from files: control characters, halves of pairs and turns of direction in them are no letters."""
    return printable(value) if type(value) is str else value


def _in_lines(data: Mapping[str, Any]) -> str:
    """JSON to be read: a line for each layer."""
    parts = []
    for key, value in data.items():
        items = ",\n  ".join(map(json.dumps, value)) if isinstance(value, list) else ""
        parts.append(f" {json.dumps(key)}: " + (f"[\n  {items}\n ]" if items else json.dumps(value)))
    return "{\n" + ",\n".join(parts) + "\n}"


def _raw(jinja2: ModuleType, text: str) -> Any:
    """Our own style and script, which are no data."""
    return import_module("markupsafe").Markup(text)


def _hash(script: str) -> str:
    """The only script that the page allows itself to run."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
