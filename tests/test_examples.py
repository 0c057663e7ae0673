"""The examples run, and their figures are those of networks that work."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

pytest.importorskip("pycocotools")
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
