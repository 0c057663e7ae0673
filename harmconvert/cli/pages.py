"""What commands share that write a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import options

if TYPE_CHECKING:
    from ..deploy.benchmark import Benchmark
    from ..report.summary import Report
    from ..storage.checkpoint import Header

option = click.option(
    "--report", metavar="FILE", help="Write a page about what was done, too: .html to look at, or .json, its data."
)


def checked(output: str, report: str | None, force: bool) -> Path | None:
    """Where --report of what goes to ``output`` is written, looked at before long work begins."""
    from ..arguments import check_report

    return check_report(output, report, force) if report else None


def report_on(
    source: str, sizes: Sequence[tuple[int, ...]], given: dict[str, Any], latency: int | None = None
) -> Report:
    """The report of a harmonic checkpoint, its forms timed on batches of ``latency`` examples where that is given.

    Raises:
        UsageError: it is none, or (to time it) nothing says what it takes.
    """
    from ..arguments import check_harmonic, not_harmonic
    from ..files import short_name
    from ..pipeline.inputs import zeros_of
    from ..report.summary import report_of

    check_harmonic(source)
    network = options.opened(source, given)
    if network.header is None:
        raise not_harmonic(source)
    model, header, file = network.model, network.header, Path(source.removeprefix("reference:"))
    times = _times(model, sizes, latency, given["device"]) if latency else None
    example = zeros_of(sizes, model) if sizes else None
    with options.busy(f"reading {source}"):
        return report_of(model, header, short_name(source), path=file, example_input=example, latency=times)


def _times(model: Any, sizes: Sequence[tuple[int, ...]], batch: int, device: str | None) -> Benchmark:
    from ..deploy.benchmark import benchmark
    from ..pipeline.devices import place
    from ..pipeline.inputs import random_of

    place(model, device)
    with options.progress() as progress:
        return benchmark(model, random_of(sizes, model), batches=(batch,), progress=progress)


def write_page(
    model: Any, header: Header, output: str, page: Path, force: bool, sizes: Sequence[tuple[int, ...]] = ()
) -> None:
    """Write the report of a harmonic checkpoint that was just written to ``output``."""
    from ..files import short_name
    from ..pipeline.inputs import zeros_of
    from ..report.page import write_report
    from ..report.summary import report_of

    example = zeros_of(sizes, model) if sizes else None
    with options.busy(f"writing {page}"):
        write_report(report_of(model, header, short_name(output), path=output, example_input=example), page, force)
