"""Run commands in this process, and write checkpoints of the sample network that many tests use."""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path

from click.testing import CliRunner, Result

from harmconvert.cli import main

SAMPLE = "sample:resnet_mnist5k"
RUNNER = CliRunner()


def run(*arguments: str) -> Result:
    """Run a command; return its output and its exit code."""
    return RUNNER.invoke(main, list(arguments))


def ok(*arguments: str) -> Result:
    """Run a command that must succeed."""
    result = run(*arguments)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result


def fails(code: int, message: str, *arguments: str) -> None:
    """Run a command; check its exit code, its one-line error with ``message``, and that it writes nothing."""
    before = written_files()
    result = run(*arguments)
    assert result.exit_code == code, (result.stderr, result.exception)
    lines = [line for line in result.stderr.splitlines() if line.startswith("harmconvert: ")]
    assert len(lines) == 1, result.stderr
    assert message in lines[0]
    assert "Traceback" not in result.stderr
    assert written_files() == before, "nothing may be written"


def written_files() -> list[str]:
    """Return the names in the working folder, without the folder in which Python keeps compiled user code."""
    return sorted(name for name in os.listdir() if name != "__pycache__")


def converted(path: str | Path, *options: str) -> None:
    """Write the output of `harmconvert convert SAMPLE` with these options; later calls copy it."""
    Path(path).write_bytes(_content(*options))


@cache
def _content(*options: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.safetensors"
        ok("convert", SAMPLE, *options, "-o", str(path))
        return path.read_bytes()
