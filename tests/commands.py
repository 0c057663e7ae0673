"""Commands in this process, and checkpoints of the sample network that many tests begin with."""

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
    """What a command prints, and its exit code."""
    return RUNNER.invoke(main, list(arguments))


def ok(*arguments: str) -> Result:
    """`run`, of a command that should succeed."""
    result = run(*arguments)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result


def fails(code: int, message: str, *arguments: str) -> None:
    """The command ends with that exit code and one line of an error that holds ``message``, and writes nothing."""
    before = sorted(os.listdir())
    result = run(*arguments)
    assert result.exit_code == code, (result.stderr, result.exception)
    lines = [line for line in result.stderr.splitlines() if line.startswith("harmconvert: ")]
    assert len(lines) == 1, result.stderr
    assert message in lines[0]
    assert "Traceback" not in result.stderr
    assert sorted(os.listdir()) == before, "nothing may be written"


def converted(path: str | Path, *options: str) -> None:
    """Write the file that `harmconvert convert SAMPLE` writes with these options; made once, then copied."""
    Path(path).write_bytes(_content(*options))


@cache
def _content(*options: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.safetensors"
        ok("convert", SAMPLE, *options, "-o", str(path))
        return path.read_bytes()
