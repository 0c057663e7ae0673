"""Run the notebooks of this folder, and write their outputs into them; or compare the outputs that they have.

python examples/notebooks/run.py                 # run all notebooks, and write them
python examples/notebooks/run.py quick_start     # only this one
python examples/notebooks/run.py --check         # run them, and compare
"""

from __future__ import annotations

import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
# The tag of cells whose outputs depend on the processor or on a clock.
VARIES = "varies"
# Processors round differently, so that a network may recognise one digit more or less.
TOLERANCE = 0.03
NUMBER = re.compile(r"\d[\d,]*\.?\d*(?:e[+-]?\d+)?")


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def executed(path: Path) -> Any:
    """Return a copy of a notebook that was run in an empty folder."""
    notebook = read(path)
    with tempfile.TemporaryDirectory() as folder:
        # With one thread, sums do not depend on the number of cores. Progress bars need another package in a notebook,
        # and warn without it.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": folder}}).execute(env=environment)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":  # progress bars are written to stderr
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
    notebook.metadata.pop("widgets", None)
    # The version of Python would change with each machine.
    notebook.metadata.pop("language_info", None)
    return notebook


def differences(recorded: Any, found: Any) -> list[str]:
    """Return what differs between the outputs of two runs: words, or numbers by more than the tolerance."""
    lines = []
    for before, after in zip(recorded.cells, found.cells, strict=True):
        if before.cell_type != "code" or VARIES in before.metadata.get("tags", ()):
            continue
        one, other = ("\n".join(texts(cell)) for cell in (before, after))
        numbers = zip(*(map(value, NUMBER.findall(text)) for text in (one, other)), strict=False)
        words = NUMBER.sub("#", one) == NUMBER.sub("#", other)
        if not words or any(not math.isclose(a, b, rel_tol=TOLERANCE) for a, b in numbers):
            lines.append(f"recorded:\n{one}\nfound:\n{other}")
    return lines


def value(text: str) -> float:
    return float(text.replace(",", ""))


def texts(cell: Any) -> Iterator[str]:
    """Yield the text of each output; of an image only its kind: its bytes depend on the version of matplotlib."""
    for output in cell.outputs:
        if output.output_type == "stream":
            yield output.text.rstrip()
        elif any(kind.startswith("image/") for kind in output.data):
            yield "(image)"
        else:
            yield output.data["text/plain"]


def main(names: list[str], check: bool) -> int:
    failed = 0
    for path in [FOLDER / f"{name}.ipynb" for name in names] or sorted(FOLDER.glob("*.ipynb")):
        start = time.perf_counter()
        found = executed(path)
        print(f"{path.name}: {time.perf_counter() - start:.1f} s")
        if not check:
            nbformat.write(found, path)
            continue
        for line in differences(read(path), found):
            failed = 1
            print(line)
    return failed


if __name__ == "__main__":
    sys.exit(main([word for word in sys.argv[1:] if word != "--check"], "--check" in sys.argv))
