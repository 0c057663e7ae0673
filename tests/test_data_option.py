"""One word for data: --data of every command that takes data, and the earlier names, which keep working."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from PIL import Image
from torch import nn

import harmconvert as hc
from harmconvert.cli import main
from harmconvert.cli.groups import Renamed
from harmconvert.data import calibration_images

from .commands import RUNNER, SAMPLE, converted, fails, ok, run
from .networks import seeded
from .pictures import digit_folders

EARLIER = {
    "convert": "--calibrate", "finetune": "--dataset", "evaluate": "--dataset", "train": "--dataset",
    "report": "--dataset", "compare": "--labelled", "benchmark": "--calibrate", "export": "--calibrate",
}  # fmt: skip
CUT = "cut.safetensors"
SMALL = """
from torch import nn
def make():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2), nn.Flatten(), nn.Linear(144, 10)
    )
"""
DROP = ("convert", "small.py:make", "--preprocess", "none", "--input-size", "1,28,28", "--bits", "auto", "-o", CUT)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(SMALL)
    return tmp_path


@pytest.mark.parametrize("name", EARLIER)
def test_the_help_shows_data_and_names_the_earlier_word_once(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    (option,) = [one for one in command.params if isinstance(one, Renamed) and "--data" in one.opts]
    assert option.opts == ["--data", EARLIER[name]]
    text = " ".join(ok(name, "--help").stdout.split())
    assert "--data DATA " in text
    assert f"--data, {EARLIER[name]}" not in text
    assert f"(Also: {EARLIER[name]}.)" in text


def test_data_is_a_name_or_a_folder_as_the_earlier_options_were(folder: Path) -> None:
    digit_folders(folder / "digits", 3)

    def top1(*words: str) -> object:
        found = json.loads(ok("evaluate", SAMPLE, *words, "--json").stdout)
        return found["images"], found["top1"], found["loss"]

    assert top1("--data", "digits") == top1("--data-dir", "digits") == top1("--dataset", "digits")
    assert top1("--data", "digits")[0] == 30
    fails(2, "--data digits and --data-dir digits both name a folder: give --data only",
          "evaluate", SAMPLE, "--data", "digits", "--data-dir", "digits")  # fmt: skip
    fails(2, "there is no folder and no data set 'nowhere': give a folder", "evaluate", SAMPLE, "--data", "nowhere")


def test_messages_name_the_present_word() -> None:
    for name in ("convert", "export", "benchmark"):
        more = ("-o", "x.safetensors") if name == "export" else ()
        fails(2, "--calibration-images works only with --data DATA", name, SAMPLE, "--calibration-images", "8", *more)
    converted(CUT, "--lambda", "2")
    fails(2, "--mean works only with --data DATA", "compare", CUT, CUT, "--mean", "0")


def test_a_file_records_the_data_under_names_that_every_version_reads(folder: Path) -> None:
    converted(CUT, "--lambda", "2")
    digit_folders(folder / "digits", 4)
    words = ("--epochs", "1", "--crop", "none", "--hflip", "0", "--workers", "0", "--calibration-images", "0")
    ok("finetune", CUT, "--data", "digits", *words, "-o", "tuned.safetensors")
    (training,) = hc.open_source("tuned.safetensors").header.history["training"]  # type: ignore[union-attr]
    recorded = training["command"]["words"]
    assert recorded[recorded.index("--data-dir") + 1] == "digits"
    ok("convert", SAMPLE, "--lambda", "2", "--data", "digits", "-o", "calibrated.safetensors")
    command = hc.open_source("calibrated.safetensors").header.history["command"]  # type: ignore[union-attr]
    assert command["words"] == ["--lambda", "2", "--data", "digits"]
    digit_folders(folder / "others" / "val", 1, first=4)
    for file, name in {CUT: None, "tuned.safetensors": "finetune", "calibrated.safetensors": "convert"}.items():
        known = f"note: {name} read images of digits when it made this network, so the figures can be too good: test it"
        assert (known in ok("evaluate", file, "--data", "digits").stderr) == (name is not None)
        assert "too good" not in ok("evaluate", file, "--data", "others").stderr


@pytest.mark.slow
def test_data_of_one_folder_calibrates_and_measures_different_images(folder: Path) -> None:
    digit_folders(folder / "digits", 6)
    words = (*DROP, "--max-drop", "100", "--json")
    result = RUNNER.invoke(main, [*words, "--data", "digits"])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    # Half of the 60 images calibrates; of the other half, one half chooses, the other measures.
    assert found["calibration"]["inputs"] == 30
    assert found["held_out"]["uncut"]["images"] == 15
    assert "digits has one split: 30 of its 60 images (seed 0) are used for testing only" in result.stderr
    ok(*words, "--calibrate", "digits", "--labelled", "digits", "--force")


@pytest.mark.slow
def test_data_with_splits_calibrates_on_the_training_part(folder: Path) -> None:
    digit_folders(folder / "digits" / "train", 4)
    digit_folders(folder / "digits" / "val", 2, first=4)
    (folder / "digits" / "val" / "0" / "broken.png").write_bytes(b"no image")
    result = run(*DROP, "--max-drop", "100", "--data", "digits", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["calibration"]["inputs"] == 40
    assert "calibrating on 40 images of digits/train, " in result.stderr
    assert "could not be read" not in result.stderr.split("calibrating on")[1].splitlines()[0]


def test_largest_drop_needs_data_with_labels_or_a_metric_without(folder: Path) -> None:
    digit_folders(folder / "digits", 4)
    images = folder / "plain"
    images.mkdir()
    for number, path in enumerate(sorted((folder / "digits").rglob("*.png"))):
        path.rename(images / f"{number}.png")
    words = (*DROP, "--max-drop", "100")
    fails(2, "--max-drop POINTS is measured on data: give --data DATA", *words)
    message = "plain has no labels: give a folder with a folder for each class, or --metric agreement"
    fails(3, message, *words, "--data", "plain")
    ok(*words, "--data", "plain", "--metric", "agreement")


def test_a_ratio_to_the_uncut_network_names_metrics_that_have_a_drop() -> None:
    import torch
    from torch import nn

    network = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1))
    images = [torch.rand(2, 3, 8, 8) for _ in range(2)]
    with pytest.raises(hc.HarmconvertError, match="to measure a drop without targets, use ssim, agreement or kl"):
        hc.convert(network, max_drop=1, metric="psnr", labelled=images)


def test_images_for_testing_are_not_used_for_calibration(tmp_path: Path) -> None:
    for part, shade in (("train", 50), ("val", 250)):
        (tmp_path / part / "a").mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8), (shade, shade, shade)).save(tmp_path / part / "a" / f"{number}.png")
    network = seeded(lambda: nn.Conv2d(3, 4, 3))
    overrides = {"input_size": (3, 8, 8), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    images = calibration_images(tmp_path, network, overrides=overrides)
    assert len(images) == 4
    assert max(float(batch.max()) for batch in images.batches) < 0.5
    assert len(calibration_images(tmp_path / "val", network, overrides=overrides)) == 4
