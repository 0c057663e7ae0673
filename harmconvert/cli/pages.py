"""What commands share that write a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import options

if TYPE_CHECKING:
    from ..checkpoint import Header
    from ..report.summary import Report

option = click.option(
    "--report", metavar="FILE", help="Write a page about what was done, too: .html to look at, or .json, its data."
)


def checked(output: str, report: str | None, force: bool) -> Path | None:
    """Where --report of what goes to ``output`` is written, looked at before long work begins."""
    from ..report.page import check_report

    return check_report(output, report, force) if report else None


def report_on(source: str, sizes: Sequence[tuple[int, ...]], given: dict[str, Any]) -> Report:
    """The report of a harmonic checkpoint.

    Raises:
        UsageError: it is none.
    """
    from ..errors import UsageError
    from ..files import short_name
    from ..report.summary import report_of
    from ..sources import is_harmonic_source

    network = (
        options.opened(source, {"weights": None, "arguments": (), **given}) if is_harmonic_source(source) else None
    )
    if network is None or network.header is None:
        raise UsageError(f"{source} is no harmonic checkpoint: make one first with: harmconvert convert {source}")
    example, file = (
        options.example_input(sizes, network.model) if sizes else None,
        Path(source.removeprefix("reference:")),
    )
    return report_of(network.model, network.header, short_name(source), path=file, example_input=example)


def write_page(
    model: Any, header: Header, output: str, page: Path, force: bool, sizes: Sequence[tuple[int, ...]] = ()
) -> None:
    """Write the report of a harmonic checkpoint that was just written to ``output``."""
    from ..files import short_name
    from ..report.page import write_report
    from ..report.summary import report_of

    example = options.example_input(sizes, model) if sizes else None
    write_report(report_of(model, header, short_name(output), path=output, example_input=example), page, force)
