"""`convert --calibrate` on the command line: folders with broken files, exit codes, several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from harmconvert.samples import mnist5k_held_back
from harmconvert.sources import open_source
from harmconvert.storage import read_header

from .commands import SAMPLE, ok, run


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def digits() -> Path:
    """Write a folder of 24 images of digits, one of them broken; return its path."""
    folder = Path("digits")
    images, _ = mnist5k_held_back()
    folder.mkdir()
    for number, image in enumerate(images[::40][:24, 0]):
        Image.fromarray(((image * 0.3081 + 0.1307) * 255).round().to(torch.uint8).numpy()).save(
            folder / f"{number}.png"
        )
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def test_calibration_improves_a_cut_and_the_file_records_it(digits: Path) -> None:
    result = ok("convert", SAMPLE, "--lambda", "2", "--calibrate", str(digits), "-o", "out.safetensors")
    assert "stage1.0.conv1  refit" in result.stdout
    assert "calibrated on 24 inputs, 6 of them held back: " in result.stdout
    assert "calibrating on 24 images of digits, 1x28x28, mean 0.1307, std 0.3081" in result.stderr
    assert "note: 1 image could not be read: digits/broken.png" in result.stderr
    images, labels = mnist5k_held_back()
    with torch.no_grad():
        right = (open_source("out.safetensors").model(images).argmax(1) == labels).double().mean().item()
    assert right > 0.9  # without calibration: 0.642
    history = read_header("out.safetensors").history["calibration"]
    assert history["inputs"] == 24
    assert all(layer["error_after"] <= layer["error_before"] for layer in history["layers"])
    ok("verify", SAMPLE, "out.safetensors", "--as-planned")


def test_layers_that_need_more_positions_are_named() -> None:
    few = ["--calibrate", "sample:mnist5k", "--calibration-images", "12"]
    result = ok("convert", SAMPLE, "--lambda", "stage3.2.conv1=2", *few, "-o", "out.safetensors")
    # 64 channels x 3 frequencies need ten positions each. An image has 49; a quarter of the images is held back.
    assert "give more or larger inputs: stage3.2.conv1 needs 1,920 positions (53 inputs)" in result.stdout


def test_calibration_is_part_of_the_json_output() -> None:
    result = ok(
        "convert", SAMPLE, "--lambda", "stage3.2.*=2", "--calibrate", "sample:mnist5k", "--calibration-images", "16",
        "--calibration-batch-size", "8", "--damping", "0.01", "--calibration-memory", "1G", "--seed", "3", "--json",
    )  # fmt: skip
    calibration = json.loads(result.stdout)["calibration"]
    assert [layer["name"] for layer in calibration["layers"]] == ["stage3.2.conv1", "stage3.2.conv2"]
    assert {layer["damping"] for layer in calibration["layers"]} <= {0.01, None}
    assert calibration["settings"] == {
        "damping": 0.01, "memory": 1 << 30, "batch_norm": True, "refit": True, "seed": 3, "inputs": 16,
    }  # fmt: skip


FAILING = """
import torch
from torch import nn

class Overflowing(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return self.b(torch.where(x.mean() == 0, self.a(x), self.a(x) / 0)).nan_to_num()

def make():
    torch.manual_seed(0)
    return Overflowing()
"""


def test_a_layer_that_fails_keeps_its_projection_and_the_command_exits_with_1() -> None:
    Path("net.py").write_text(FAILING)
    common = [
        "convert",
        "net.py:make",
        "--lambda",
        "*=2",
        "--calibrate",
        "sample:photographs",
        "--input-size",
        "3,16,16",
        "--preprocess",
        "imagenet",
    ]
    few = ["--calibration-images", "8", "-o", "out.safetensors"]
    result = run(*common, *few)
    assert result.exit_code == 1, result.stderr
    assert (
        "check failed: 1 layer of out.safetensors could not be calibrated and stays a plain cut: b (" in result.stderr
    )
    assert Path("out.safetensors").exists()
    result = ok(*common, *few, "--allow-fallback", "--force")
    assert "note: 1 layer of out.safetensors" in result.stderr


@pytest.mark.parametrize(
    ("code", "message", "options"),
    [
        (2, "there is no folder nowhere", ["--calibrate", "nowhere"]),
        (2, "'lots' is not a size such as 500M or 2G", ["--calibration-memory", "lots"]),
        (2, "-1.0 is not in the range x>=0", ["--calibrate", "sample:mnist5k", "--damping", "-1"]),
        (2, "'a,b' is not a list of numbers", ["--mean", "a,b"]),
        (2, "0 is not in the range x>=1", ["--calibrate", "sample:mnist5k", "--calibration-images", "0"]),
        (2, "--device nonsense", ["--device", "nonsense"]),
        (2, "--device meta holds no values", ["--device", "meta"]),
        (2, "--damping works only with --data DATA", ["--damping", "0.1"]),
        (2, "-1 is not in the range x>=0", ["--seed", "-1"]),
        (2, "'foo' is not one of", ["--interpolation", "foo"]),
        (2, "--std is a divisor", ["--calibrate", "sample:mnist5k", "--std", "0"]),
    ],
)
def test_calibration_options_out_of_range_are_refused(code: int, message: str, options: list[str]) -> None:
    result = run("convert", SAMPLE, "--lambda", "2", *options)
    assert result.exit_code == code, result.stderr
    assert message in result.stderr
    assert os.listdir() == []


OWN = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def prepare(image):
    return torch.full((1, 12, 12), image.getpixel((3, 3)) / 255)
"""


def test_the_preprocessing_of_the_users_own_network_is_printed_once() -> None:
    Path("net.py").write_text(OWN)
    own = ["convert", "net.py:make", "--lambda", "*=2", "--input-size", "1,12,12", "-o", "a.safetensors"]
    few = ["--calibrate", "sample:mnist5k", "--calibration-images", "8"]
    result = run(*own, *few)
    assert result.exit_code == 2
    assert "does not declare its preprocessing" in result.stderr
    result = ok(*own, *few, "--mean", "0.13", "--std", "0.3", "--allow-fallback")
    assert "1x12x12, mean 0.13, std 0.3, bicubic, crop 1" in result.stderr
    assert read_header("a.safetensors").preprocessing["mean"] == [0.13]
    again = ["a.safetensors", "--trust-code"]
    result = ok("evaluate", *again, "--dataset", "sample:mnist5k")
    assert "preprocessing: 1x12x12, mean 0.13, std 0.3, bicubic, crop 1" in result.stderr
    other = ok("evaluate", *again, "--dataset", "sample:mnist5k", "--input-size", "1,20,20", "--preprocess", "none")
    assert "preprocessing: 1x20x20, mean 0, std 1, bicubic, squashed" in other.stderr
    ok("export", *again, "-o", "dense.safetensors")
    ok("verify", "net.py:make", "a.safetensors", "--as-planned")
    ok("report", *again, "-o", "a.json")
    assert json.loads(Path("a.json").read_text())["forms"][0]["macs"] > 0, "counted on the recorded size"
    result = run("evaluate", *again, "--dataset", "sample:mnist5k", "--input-size", "1,20,20", "--img-size", "20")
    assert result.exit_code == 2
    assert "--input-size and --img-size both give the size" in result.stderr


def test_preprocessing_is_recorded_without_calibration_and_user_functions_by_name() -> None:
    Path("net.py").write_text(OWN)
    own = ["convert", "net.py:make", "--input-size", "1,12,12", "-o", "a.safetensors"]
    ok(*own, "--preprocess", "net.py:prepare")
    assert read_header("a.safetensors").preprocessing == {"input_sizes": [[1, 12, 12]], "function": "net.py:prepare"}
    result = ok("evaluate", "a.safetensors", "--trust-code", "--dataset", "sample:mnist5k")
    assert "preprocessing: 1x12x12, by net.py:prepare" in result.stderr
    assert "warning: the network " in result.stderr, "corners of digits are all black"


@pytest.mark.slow
def test_several_processes_write_one_file() -> None:
    options = ["convert", SAMPLE, "--lambda", "stage3.2.*=2", "--calibrate", "sample:mnist5k"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "harmconvert"]
    few = ["--calibration-images", "16", "--calibration-batch-size", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *options, *few], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("wrote resnet_mnist5k-harmonic-custom.safetensors") == 1
    ok("verify", SAMPLE, "resnet_mnist5k-harmonic-custom.safetensors", "--as-planned")
