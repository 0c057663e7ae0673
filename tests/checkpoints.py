"""Checkpoints of the sample network that many tests begin with: each is converted once in a process, then copied."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from click.testing import CliRunner

from harmconvert.cli import main

SAMPLE = "sample:resnet_mnist5k"


def converted(path: str | Path, *options: str) -> None:
    """Write the file that `harmconvert convert SAMPLE` writes with these options."""
    Path(path).write_bytes(_content(*options))


@cache
def _content(*options: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.safetensors"
        result = CliRunner().invoke(main, ["convert", SAMPLE, *options, "-o", str(path)])
        assert result.exit_code == 0, (result.stderr, result.exception)
        return path.read_bytes()
