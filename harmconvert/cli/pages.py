"""Shared code of the commands that write a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .listening import CommandLine

if TYPE_CHECKING:
    from torch import nn

    from ..storage import Header

option = click.option(
    "--report", metavar="FILE", help="Also write a page about the result: .html, or its data as .json."
)


def checked(output: str, report: str | None, force: bool) -> Path | None:
    """Return the path of --report for ``output``, and check it before long work begins."""
    from ..arguments import check_report

    return check_report(output, report, force) if report else None


def write_page(
    model: nn.Module, header: Header, output: str, page: Path, force: bool, sizes: Sequence[tuple[int, ...]] = ()
) -> None:
    """Write the page about the harmonic checkpoint ``output``."""
    from ..report import report
    from ..storage import Network, Source

    network = Network(model, header.source or Source("unknown", output), header)
    report(network, page, file=output, input_sizes=sizes, force=force, listener=CommandLine())
