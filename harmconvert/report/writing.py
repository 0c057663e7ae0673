"""Where reports and figures are written. A figure is an image, and the numbers that it shows as a .csv beside it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import OutsideError, UsageError
from ..files import check_output, short_name, write_csv, write_file

SUFFIXES = (".png", ".svg")
PAGE_SUFFIXES = (".html", ".json")


def drawing() -> ModuleType:
    """The room that draws, `harmconvert.report.figures`.

    Raises:
        OutsideError: matplotlib is not installed.
    """
    try:
        return import_module(".figures", __package__)
    except ImportError as error:
        raise OutsideError("figures are drawn by matplotlib: pip install 'harmconvert[report]'") from error


def templating() -> ModuleType:
    """jinja2, which fills the page.

    Raises:
        OutsideError: it is not installed.
    """
    try:
        return import_module("jinja2")
    except ImportError as error:
        raise OutsideError("the report page is made by jinja2: pip install 'harmconvert[report]'") from error


def check_report(source: str, output: str | None, force: bool) -> Path:
    """The file that a report of ``source`` goes to, NAME-report.html where none is named; call it before long work.

    Raises:
        UsageError: neither .html nor .json; it exists and ``force`` is not set. OutsideError: jinja2 is missing.
    """
    path = Path(output) if output is not None else Path(f"{short_name(source)}-report.html")
    if path.suffix.lower() not in PAGE_SUFFIXES:
        raise UsageError(f"{path} should end in {' or '.join(PAGE_SUFFIXES)}: the suffix says what to write")
    check_output(path, force)
    if path.suffix.lower() == ".html":
        templating()
    return path


def check_figure(source: str, figure: str, output: str | None, force: bool) -> tuple[Path, Path]:
    """The image and the .csv that a figure of ``source`` goes to, NAME-FIGURE.png where no output is named.

    Raises:
        UsageError: no image that can be written; either file exists and ``force`` is not set.
    """
    image = Path(output) if output is not None else Path(f"{short_name(source)}-{figure}.png")
    if image.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{image} should end in {' or '.join(SUFFIXES)}: the suffix says what to write")
    numbers = image.with_suffix(".csv")
    for path in (image, numbers):
        check_output(path, force)
    return image, numbers


def write_figure(found: Any, image: Path, numbers: Path, force: bool = False) -> list[dict[str, Any]]:
    """Draw a `FilterBank`, `Spectrum`, `Tradeoff`, `Sheet` or `Strip`, write both files, and give back the .csv's rows.

    Raises: as `drawing`, and as `harmconvert.files.write_file`.
    """
    figures, rows = drawing(), found.rows()
    figure = figures.draw(found)
    write_csv(numbers, rows, force)
    write_file(image, lambda staging: figures.save(figure, staging, image.suffix.lower()), force)
    return list(rows)
