"""The page: one HTML file without external resources. It runs only its own script, and names cannot act as markup."""

from __future__ import annotations

import base64
import hashlib
import json
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
from .answers import answers
from .blocks import Block, layer_blocks
from .charts import Chart, error_chart, search_chart, training_charts
from .coding import bits_charts
from .facts import Report
from .ranks import power_text, rank_chart
from .space import HeatMap, heat_maps
from .summary import HISTORY_ERRORS, invalid_history
from .text import bytes_text, layer_name, millions, milliseconds, percent, shortened_name, size_text


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
        "count": millions, "bytes": bytes_text, "size": size_text, "percent": percent, "short": shortened_name,
        "layer_name": layer_name, "colour": grid.hexadecimal, "plan_name": lambda name: shortened_name(name, 36),
        "time": milliseconds, "machine": _machine, "power": power_text,
    }  # fmt: skip
    errors = [chart for chart in (error_chart(report.layers, True), error_chart(report.layers, False)) if chart]
    maps, search, training = heat_maps(report.layers), search_chart(report.search), training_charts(report)
    bits, ranks = bits_charts(report.coding), rank_chart(report.ranks)
    blocks = layer_blocks(report)
    charts = [*errors, *([ranks] if ranks else []), *bits, *([search] if search else []), *training]
    return str(
        environment.get_template("page").render(
            r=report,
            answers=answers(report),
            blocks=blocks,
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
            data=_hover_data(blocks, charts, maps),
            plan_json=_one_line_per_item(report.plan.to_json()),
        )
    )


def _hover_data(blocks: Sequence[Block], charts: Sequence[Chart], maps: Sequence[HeatMap]) -> str:
    """Return the texts that appear when the pointer hovers, as JSON without characters that HTML could interpret."""
    content = {
        "layers": [printable(block.text) for block in blocks],
        "charts": {chart.name: [(x, y, printable(text)) for x, y, text in chart.hover()] for chart in charts},
        "maps": [one.hover() for one in maps],
    }
    text = json.dumps(content, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


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
