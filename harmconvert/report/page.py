"""The page: one HTML file without external resources. It runs only its own script, and names cannot act as markup."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.cells import cell_len

from ..arguments import templating
from ..documents import json_text
from ..errors import printable
from ..files import write_text
from . import grid
from .charts import Chart, error_chart, search_chart, training_charts
from .coding import bits_charts
from .facts import LayerFacts, Report
from .ranks import power_text, rank_chart
from .space import HeatMap, heat_maps, kept_text
from .summary import HISTORY_ERRORS, invalid_history
from .text import layer_name, megabytes, millions, shortened_name, size_text


def write_report(report: Report, path: Path, force: bool = False) -> None:
    """Write a report: its data if the suffix of ``path`` is .json, else the page.

    Raises: the errors of `templating` and `harmconvert.files.write_file`.
    """
    text = json_text(report.to_json()) + "\n" if path.suffix.lower() == ".json" else page(report)
    write_text(path, text, force)


def page(report: Report) -> str:
    """Return the report as HTML.

    Raises:
        OutsideError: jinja2 is not installed. InputError: the history of the checkpoint is invalid.
    """
    jinja2 = templating()
    try:
        return _rendered(report, jinja2)
    except (*HISTORY_ERRORS, jinja2.TemplateError) as error:
        raise invalid_history(report.name, error) from error


def _rendered(report: Report, jinja2: ModuleType) -> str:
    folder = files(__package__) / "templates"
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=_without_control_characters,
        loader=jinja2.DictLoader({"page": (folder / "page.html.j2").read_text(encoding="utf-8")}),
    )  # fmt: skip
    environment.filters |= {
        "count": millions, "megabytes": megabytes, "size": size_text, "percent": _percent, "short": shortened_name,
        "layer_name": layer_name, "colour": grid.hexadecimal, "plan_name": lambda name: shortened_name(name, 36),
        "time": _time, "machine": _machine, "power": power_text,
    }  # fmt: skip
    errors = [chart for chart in (error_chart(report.layers, True), error_chart(report.layers, False)) if chart]
    maps, search, training = heat_maps(report.layers), search_chart(report.search), training_charts(report)
    bits, ranks = bits_charts(report.coding), rank_chart(report.ranks)
    charts = [*errors, *([ranks] if ranks else []), *bits, *([search] if search else []), *training]
    return str(
        environment.get_template("page").render(
            r=report,
            style=_trusted(style),
            script=_trusted(script),
            script_hash=_script_hash(script),
            errors=errors,
            bits=bits,
            ranks=ranks,
            search=search,
            training=training,
            maps=maps,
            names_width=max((cell_len(shortened_name(name)) for one in maps for _, name in one.names), default=0),
            data=_hover_data(report, charts, maps),
            plan_json=_one_line_per_item(report.plan.to_json()),
        )
    )


def _hover_data(report: Report, charts: Sequence[Chart], maps: Sequence[HeatMap]) -> str:
    """Return the texts that appear when the pointer hovers, as JSON without characters that HTML could interpret."""
    content = {
        "layers": [printable(layer_text(layer)) for layer in report.layers],
        "charts": {chart.name: [(x, y, printable(text)) for x, y, text in chart.hover()] for chart in charts},
        "maps": [one.hover() for one in maps],
    }
    text = json.dumps(content, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def layer_text(layer: LayerFacts) -> str:
    """Describe a layer in a few lines."""
    lines = [layer_name(layer.name), f"{layer.kind}, {size_text(layer.kernel)}"]
    if not layer.kept:
        return "\n".join([*lines, f"skipped: {layer.why}"])
    lines.append(kept_text(layer))
    if layer.other_axes:
        lines.append(f"keeps {layer.other_axes}")
    if layer.parameters is not None and layer.kept_parameters is not None:
        lines.append(f"{millions(layer.parameters)} -> {millions(layer.kept_parameters)} parameters")
    if layer.cut and layer.energy is not None:
        lines.append(f"energy kept {layer.energy:.1%}")
    if layer.output_error_before is not None and layer.output_error_after is not None:
        lines.append(f"output error {layer.output_error_before:.1%} -> {layer.output_error_after:.1%}")
    return "\n".join([*lines, *([layer.why] if layer.why else [])])


def _percent(share: float | None, digits: int = 1) -> str:
    return "" if share is None else f"{100 * share:.{digits}f} %"


def _time(seconds: float) -> str:
    """Return milliseconds with three significant digits, without a power of ten."""
    milliseconds = 1000 * seconds
    return f"{milliseconds:.{max(0, 2 - math.floor(math.log10(max(milliseconds, 0.01))))}f} ms"


def _machine(machine: Mapping[str, Any]) -> str:
    processor = f"{machine.get('processor')} ({machine.get('capability')}, {machine.get('cores')} cores)"
    chip = machine.get("gpu") if str(machine.get("device")).startswith("cuda") else processor
    return f"{chip}, torch {machine.get('torch')}"


def _without_control_characters(value: Any) -> Any:
    """Escape control characters, surrogates and changes of the text direction: texts from files may contain them."""
    return printable(value) if type(value) is str else value


def _one_line_per_item(data: Mapping[str, Any]) -> str:
    """Return JSON in which each item of a list, such as a layer, is on a line of its own."""
    parts = []
    for key, value in data.items():
        items = ",\n  ".join(map(json.dumps, value)) if isinstance(value, list) else ""
        parts.append(f" {json.dumps(key)}: " + (f"[\n  {items}\n ]" if items else json.dumps(value)))
    return "{\n" + ",\n".join(parts) + "\n}"


def _trusted(text: str) -> Any:
    """Mark the style or the script of the package as text that jinja2 must not escape."""
    return import_module("markupsafe").Markup(text)


def _script_hash(script: str) -> str:
    """Return the hash by which the page's content security policy allows this script only."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
