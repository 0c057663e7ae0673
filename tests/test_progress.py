"""What Python users see while a function works: bars in an interactive session, and log records."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import harmconvert as hc

from .commands import SAMPLE

DIGITS = {"input_size": (1, 28, 28), "preprocess": "none"}


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
    )


def images() -> list[torch.Tensor]:
    return [torch.rand(32, 1, 28, 28, generator=torch.Generator().manual_seed(0)) for _ in range(2)]


@pytest.fixture
def records(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, "harmconvert"):
        yield caplog


def test_a_script_sees_nothing(network: nn.Module, capfd: pytest.CaptureFixture[str]) -> None:
    conversion = hc.convert(network, 2, calibration=images())
    hc.verify(network, conversion, images()[0])
    assert capfd.readouterr() == ("", "")


def test_progress_true_shows_a_bar_on_stderr_and_false_never(
    network: nn.Module, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    conversion = hc.convert(network, 2, calibration=images(), progress=True)
    shown = capfd.readouterr()
    assert "converting:   0%" in shown.err
    assert "| 0/2 [" in shown.err
    assert shown.out == ""
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    hc.verify(network, conversion, images()[0], progress=False)
    assert capfd.readouterr().err == ""


def test_an_interactive_session_shows_a_bar(
    network: nn.Module, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    hc.convert(network, 2, calibration=images())
    assert "converting:   0%" in capfd.readouterr().err
    monkeypatch.setenv("RANK", "1")
    hc.convert(network, 2)
    assert capfd.readouterr().err == ""


def test_a_search_logs_a_line_for_each_stage(records: pytest.LogCaptureFixture) -> None:
    small = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    example = torch.zeros(1, 1, 12, 12)
    batches = [torch.rand(32, 1, 12, 12, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    hc.convert(small, budget="params=60%", example_input=example, calibration=batches)
    lines = [record.getMessage() for record in records.records]
    assert any("60%" in line for line in lines), lines
    assert "converting, 10 steps, recording the inputs of layers" in lines
    assert "converting, 8 steps, trying whole plans" in lines
    records.clear()
    hc.convert(small, max_drop=5, metric=lambda one: 90.0, example_input=example)
    assert "32% of the parameters: metric is worse by 0.00 points" in records.text


def test_a_training_shows_bars_and_logs_each_epoch(
    tmp_path: Path, records: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    layers = nn.Conv2d(1, 4, 7, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    cut = hc.convert(nn.Sequential(*layers), 2, include=["0"])
    hc.finetune(
        cut, "sample:mnist5k", tmp_path / "tuned.safetensors", preprocessing=DIGITS, epochs=1, crop="none",
        progress=True, workers=0,
    )  # fmt: skip
    assert "epoch 1/1: loss " in records.text
    assert f"wrote {tmp_path / 'tuned.safetensors'}" in records.text
    assert "epoch 1, loss " in capfd.readouterr().err


def test_warnings_are_logged_as_warnings(caplog: pytest.LogCaptureFixture) -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 10, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0 * self.conv(x).mean((2, 3)) + torch.arange(10.0)

    hc.evaluate(Constant(), "sample:mnist5k", preprocessing=DIGITS)
    (record,) = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert record.name == "harmconvert"
    assert not record.getMessage().startswith("warning")


def test_a_listener_takes_the_place_of_bars_and_records(tmp_path: Path, records: pytest.LogCaptureFixture) -> None:
    said: list[str] = []

    class Collecting(hc.Listener):
        def say(self, message: str, *, urgent: bool = False) -> None:
            said.append(message)

    hc.convert_to_file(SAMPLE, tmp_path / "cut.safetensors", 2, listener=Collecting(), progress=True)
    assert said == ["verifying"]
    assert not [one for one in records.records if one.name == "harmconvert"]
