"""Write figures: an image, and a .csv file with the numbers that it shows."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import OutsideError
from ..files import write_csv, write_file


def drawing() -> ModuleType:
    """Import `harmconvert.report.figures`, which needs matplotlib.

    Raises:
        OutsideError: matplotlib is not installed.
    """
    try:
        return import_module(".figures", __package__)
    except ImportError as error:
        raise OutsideError("figures are drawn by matplotlib: pip install 'harmconvert[report]'") from error


def write_figure(content: Any, image: Path, numbers: Path, force: bool = False) -> list[dict[str, Any]]:
    """Draw a figure, write its image and its .csv file, and return the rows of the .csv file.

    ``content``: a `FilterBank`, `Spectrum`, `Tradeoff`, `Sheet` or `Strip`.

    Raises: the errors of `drawing` and `harmconvert.files.write_file`.
    """
    figures, rows = drawing(), content.rows()
    figure = figures.draw(content)
    write_csv(numbers, rows, force)
    write_file(image, lambda staging: figures.save(figure, staging, image.suffix.lower()), force)
    return list(rows)
