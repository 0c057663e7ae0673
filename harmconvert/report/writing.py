"""Where reports and figures are written. A figure is an image, and the numbers that it shows as a .csv beside it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import OutsideError
from ..files import write_csv, write_file


def drawing() -> ModuleType:
    """The room that draws, `harmconvert.report.figures`.

    Raises:
        OutsideError: matplotlib is not installed.
    """
    try:
        return import_module(".figures", __package__)
    except ImportError as error:
        raise OutsideError("figures are drawn by matplotlib: pip install 'harmconvert[report]'") from error


def write_figure(found: Any, image: Path, numbers: Path, force: bool = False) -> list[dict[str, Any]]:
    """Draw a `FilterBank`, `Spectrum`, `Tradeoff`, `Sheet` or `Strip`, write both files, and give back the .csv's rows.

    Raises: as `drawing`, and as `harmconvert.files.write_file`.
    """
    figures, rows = drawing(), found.rows()
    figure = figures.draw(found)
    write_csv(numbers, rows, force)
    write_file(image, lambda staging: figures.save(figure, staging, image.suffix.lower()), force)
    return list(rows)
