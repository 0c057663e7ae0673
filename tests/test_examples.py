"""The examples and the notebooks run, and their figures are those of networks that work."""

from __future__ import annotations

import copy
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples"
# The metric, and the least value of the network and of the fine-tuned file.
METRICS = {
    "audio": ("top-1", 75.0), "classification": ("top-1", 85.0), "detection": ("mAP", 60.0),
    "segmentation": ("mIoU", 75.0), "super_resolution": ("PSNR", 25.0), "volumes": ("top-1", 85.0),
}  # fmt: skip


def test_every_example_is_tested_and_listed() -> None:
    scripts = {path.stem for path in FOLDER.glob("*.py")}
    assert scripts == set(METRICS)
    assert scripts == set(re.findall(r"`(\w+)\.py`", (FOLDER / "README.md").read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("name", METRICS)
def test_an_example_prints_its_figures(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pycocotools")
    runpy.run_path(str(FOLDER / f"{name}.py"))["main"](tmp_path)
    text = capsys.readouterr().out
    title, least = METRICS[name]
    values = {line.split(":")[0]: re.search(rf"{title} ([\d.]+)", line) for line in text.splitlines() if title in line}
    assert set(values) == {"network", "small", "fine-tuned"}, text
    assert all(found is not None for found in values.values()), text
    for network in ("network", "fine-tuned"):
        assert float(values[network][1]) >= least, text
    before, after = (int(number.replace(",", "")) for number in re.findall(r"([\d,]+) bytes", text))
    assert after < before / 2


# --- notebooks ---

NOTEBOOKS = FOLDER / "notebooks"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))


def runner() -> dict[str, Any]:
    """Return the functions of the script that runs the notebooks."""
    pytest.importorskip("nbclient")
    return runpy.run_path(str(NOTEBOOKS / "run.py"))


def outputs(name: str) -> list[dict[str, Any]]:
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
    return [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]


def test_every_notebook_is_listed() -> None:
    assert len(NAMES) >= 4
    for page in (FOLDER / "README.md", FOLDER.parent / "docs" / "tutorials" / "notebooks.md"):
        assert set(re.findall(r"(\w+)\.ipynb", page.read_text())) == set(NAMES), page


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_can_be_read_without_running_it(name: str) -> None:
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)], "run from top to bottom"
    assert sum(bool(cell["outputs"]) for cell in code) >= len(code) - 2
    assert "".join(cells[0]["source"]).startswith("# ")
    assert all(output.get("name") != "stderr" for output in outputs(name)), "no warnings, and no paths of a machine"


def test_notebooks_are_small() -> None:
    for name in NAMES:
        for output in outputs(name):
            assert all(len(data) < 40_000 for data in output.get("data", {}).values()), name
    assert sum(path.stat().st_size for path in NOTEBOOKS.glob("*.ipynb")) < 300_000


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_and_has_the_outputs_that_it_shows(name: str) -> None:
    if name == "deploy_onnx":
        pytest.importorskip("onnxruntime")
    run = runner()
    path = NOTEBOOKS / f"{name}.ipynb"
    assert run["differences"](run["read"](path), run["executed"](path)) == []


def test_other_words_and_other_numbers_in_an_output_are_found() -> None:
    run = runner()
    recorded = run["read"](NOTEBOOKS / "quick_start.ipynb")
    for old, new in (("uncut: top-1 99", "uncut: top-1 80"), ("uncut: top-1", "whole: top-1")):
        found = copy.deepcopy(recorded)
        (output,) = found.cells[1].outputs
        assert old in output.text
        output.text = output.text.replace(old, new)
        (line,) = run["differences"](recorded, found)
        assert new in line
        found.cells[1].metadata["tags"] = recorded.cells[1].metadata["tags"] = ["varies"]
        assert run["differences"](recorded, found) == []
        recorded.cells[1].metadata["tags"] = []
    assert run["differences"](recorded, recorded) == []
