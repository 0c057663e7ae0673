"""Large checkpoints: a command needs at most a few times their size in memory."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ..pictures import digit_folders
from .children import child, command, ended, said
from .tally import Counter

# Three convolutions with maps of 1x1: large weights, but few operations.
NETWORK = """
import torch
from torch import nn

class Heavy(nn.Module):
    num_classes = 10
    pretrained_cfg = {"input_size": (1, 28, 28), "mean": (0.5,), "std": (0.5,), "num_classes": 10}

    def __init__(self, width):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 28)
        self.convs = nn.Sequential(*(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(3)))
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.convs(self.stem(x)).flatten(1))

def make(width=%d, num_classes=10):
    torch.manual_seed(0)
    return Heavy(width)
"""
WIDTH = 4320  # 2.01 GB
LIMIT = 3


def measured(*arguments: str) -> None:
    """Run a command, then write the peak of its memory minus the memory at its start."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    before = int(status.split("VmRSS:")[1].split()[0])
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    try:
        command(*arguments)
    finally:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        Path("peak.json").write_text(json.dumps(int(status.split("VmHWM:")[1].split()[0]) - before))


@pytest.mark.slow
def test_commands_need_only_a_few_times_the_size_of_a_large_checkpoint(tmp_path: Path, tally: Counter) -> None:
    count = tally(
        "load",
        f"commands on a network of {27 * WIDTH**2 * 4 / 1e9:.1f} GB: memory at most {LIMIT} times that (verify: 4)",
    )
    if not os.access("/proc/self/clear_refs", os.W_OK):
        count.trial()
        pytest.skip("this system does not say how much memory a process had at its peak")
    (tmp_path / "net.py").write_text(NETWORK % WIDTH)
    digit_folders(tmp_path / "digits" / "val", 1)
    commands = {
        "convert": ["convert", "net.py:make", "-o", "net.safetensors"],
        "cut": ["convert", "net.py:make", "--lambda", "2", "-o", "cut.safetensors"],
        "evaluate": [
            "evaluate",
            "net.safetensors",
            "--trust-code",
            "--data-dir",
            "digits",
            "-b",
            "10",
            "--workers",
            "0",
        ],
        "export": ["export", "net.safetensors", "--trust-code", "-o", "dense.safetensors"],
        "inspect": ["inspect", "net.safetensors", "--trust-code"],
        "verify": ["verify", "net.py:make", "net.safetensors"],
    }
    for name, arguments in commands.items():
        code = ended(child(measured, tmp_path, *arguments))
        peak = json.loads((tmp_path / "peak.json").read_text()) * 1024
        share = peak / (tmp_path / "net.safetensors").stat().st_size
        fine = code == 0 and share <= (LIMIT + 1 if name == "verify" else LIMIT)  # verify reads two networks
        count.trial(None if fine else f"{name}: exit code {code}, {share:.2f} times; {said(tmp_path)[-300:]}")
