"""A printed conversion fits a screen and has the numbers that a user asks for first."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import harmconvert as hc

from .commands import SAMPLE


def fits(text: str) -> bool:
    lines = text.splitlines()
    return len(lines) <= 24 and all(len(line) <= 100 for line in lines)


def test_a_large_network_prints_on_one_screen() -> None:
    text = str(hc.convert(timm.create_model("resnet50"), "progressive", example_input=torch.zeros(1, 3, 64, 64)))
    assert fits(text), text
    assert "Conversion of ResNet: lambda progressive" in text
    assert "parameters  25.6 M -> " in text
    assert "17 converted, " in text
    assert "verify(original, conversion)" in text


def test_a_hundred_layers_with_long_names_and_three_axes_print_on_one_screen() -> None:
    class Deep(nn.Sequential):
        pass

    names = {f"a_block_with_a_long_name_{i}_" + 60 * "x": nn.Conv2d(4, 4, 3, padding=1) for i in range(100)}
    network = Deep()
    for name, layer in names.items():
        network.add_module(name, layer)
    text = str(hc.convert(network, 2, rank=0.5, bits=3))
    assert fits(text), text
    assert "100 converted, 99 with fewer frequencies, 99 with a lower rank, 0 skipped" in text
    assert "bits per weight" in text


def test_the_text_names_calibration_and_search(capsys: pytest.CaptureFixture[str]) -> None:
    layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1)
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 10))
    images = [torch.rand(32, 1, 28, 28, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    text = repr(hc.convert(network, 2, calibration=images))
    assert "calibrated  on 64 inputs, 16 of them held back" in text
    assert "divergence on held-back inputs" in text
    print(hc.convert(network, budget="params=60%", calibration=images))
    printed = capsys.readouterr().out
    assert fits(printed)
    assert "Conversion of Sequential: budget params=60%" in printed
    assert "plans tried" in printed or "plan tried" in printed


def test_the_text_says_if_nothing_is_cut_and_warns_of_a_small_cut() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    assert "nothing is cut: the file is as large as before" in str(hc.convert(network))
    pointwise = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 500, 1))
    assert "warning     lambda 2 cuts nothing in this network" in str(hc.convert(pointwise, 2))


def test_a_written_file_prints_its_verification(tmp_path: Path) -> None:
    text = str(hc.convert_to_file(SAMPLE, tmp_path / "cut.safetensors", 2))
    assert fits(text.split("\n", 1)[1])
    assert "cut as planned in 18 of 19 layers" in text
    assert "not verified" not in text
    again = str(hc.convert_to_file(tmp_path / "cut.safetensors", tmp_path / "same.safetensors"))
    assert "already harmonic and written unchanged; verified: " in again
