"""The output of every command in a real terminal of 80 columns, and in a pipe."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from rich.cells import cell_len

from harmconvert.cli import COMMANDS, waiting
from harmconvert.cli.waiting import busy, progress

from .commands import SAMPLE
from .pictures import digit_folders

pytestmark = pytest.mark.xdist_group("terminal")  # one process, so that the commands below run only once

COLUMNS = 80
DATA = ["--data-dir", "digits", "--workers", "0", "-b", "10"]
TRAIN = [*DATA, "--epochs", "1", "--hflip", "0", "--crop", "padded"]
# The names of layers are too long for any column and have square brackets, which are markup for rich.
NETWORK = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        convs = [nn.Conv2d(4 if number else 1, 4, 3) for number in range(3)]
        self.a_part_with_a_very_long_name = nn.ModuleDict({"of_many_words_and_more[red]": nn.Sequential(*convs)})
    def forward(self, x):
        for part in self.a_part_with_a_very_long_name.values():
            x = part(x)
        return x.mean((2, 3))
"""
LONG = ["net.py:Net", "--input-size", "1,32,32"]
# In this order: later commands need the files of earlier ones.
RUNS: dict[str, list[str]] = {
    "inspect": ["inspect", SAMPLE],
    "inspect, long names": ["inspect", *LONG],
    "convert": ["convert", SAMPLE, "--lambda", "2", "-o", "cut.safetensors", "--report", "cut.html"],
    "convert, long names": ["convert", *LONG, "--lambda", "2", "-o", "long.safetensors"],
    "convert, calibrated": ["convert", SAMPLE, "--lambda", "2", "--calibrate", "digits/val", "-o", "cal.safetensors"],
    "convert, quiet": ["convert", SAMPLE, "-o", "quiet.safetensors", "--quiet"],
    "convert, budget": ["convert", SAMPLE, "--budget", "params=50%", "-o", "budget.safetensors"],
    "verify": ["verify", SAMPLE, "cut.safetensors", "--as-planned"],
    "evaluate": ["evaluate", "cut.safetensors", *DATA],
    "finetune": ["finetune", "cut.safetensors", *TRAIN, "-o", "tuned.safetensors"],
    "train": ["train", SAMPLE, "--recipe", "finetune", *TRAIN, "-o", "trained.safetensors"],
    "report": ["report", "tuned.safetensors"],
    "report, latency": ["report", "tuned.safetensors", "--latency", "2", "-o", "timed.html"],
    "report, errors": ["report", "cal.safetensors", "--figure", "errors"],
    "report, training": ["report", "tuned.safetensors", "--figure", "training"],
    "report, layers": ["report", "tuned.safetensors", "--figure", "layers"],
    "report, tradeoff": ["report", SAMPLE, "--figure", "tradeoff", *DATA],
    "compare": ["compare", "cut.safetensors", "cal.safetensors", "tuned.safetensors"],
    "compare, long names": ["compare", "long.safetensors", "cut.safetensors", "--trust-code"],
    "benchmark": ["benchmark", "cut.safetensors", "-b", "2", "--repeats", "3", "--layers"],
    "export": ["export", "cut.safetensors", "-o", "dense.safetensors"],
    "push": ["push", "cut.safetensors", "me/small", "--local", "hub"],
    "no colour": ["verify", SAMPLE, "cut.safetensors", "--as-planned"],
    "refusal": ["compare", "cut.safetensors"],
}
# One process runs all commands, so that torch is imported once; it prints the separators to both streams.
DRIVER = """
import json, os, sys
from harmconvert.cli import main
for name, arguments in json.load(open("runs.json")).items():
    os.environ.pop("NO_COLOR", None)
    if name == "no colour":
        os.environ["NO_COLOR"] = "1"
    try:
        main(arguments)
        code = 0
    except SystemExit as stop:
        code = stop.code
    for stream in (sys.stdout,) if sys.stdout.isatty() else (sys.stdout, sys.stderr):
        stream.flush()
        print(f"\\n=== {name} === {code}", file=stream, flush=True)
"""


def parted(text: str) -> dict[str, tuple[int, str]]:
    """Return the exit code and the text of each run."""
    pieces = re.split(r"\n=== (.*?) === (\d+)\n", text)
    return {name: (int(code), said) for said, name, code in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=False)}


def prepare(folder: Path) -> list[str]:
    import json

    digit_folders(folder / "digits" / "train", 3)
    digit_folders(folder / "digits" / "val", 3, first=3)
    (folder / "net.py").write_text(NETWORK)
    (folder / "runs.json").write_text(json.dumps(RUNS))
    return [sys.executable, "-c", DRIVER]


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Run all commands in a pseudo-terminal; return exit codes and texts."""
    folder = tmp_path_factory.mktemp("terminal")
    command = prepare(folder)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color"}
    for name in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "CI"):
        environment.pop(name, None)
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, env=environment)
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # a pseudo-terminal raises it at the end of the last process
            break
        if not part:
            break
        parts.append(part)
    os.close(ours)
    assert process.wait() == 0, b"".join(parts)[-2000:]
    return parted(b"".join(parts).decode().replace("\r\n", "\n"))


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """Run all commands with both streams in pipes; return exit codes and texts."""
    folder = tmp_path_factory.mktemp("pipe")
    done = subprocess.run(prepare(folder), capture_output=True, text=True, check=True, cwd=folder)
    out, err = parted(done.stdout), parted(done.stderr)
    return {name: (*out[name], err[name][1]) for name in RUNS}


def seen(text: str) -> list[str]:
    """Return the lines that are on the screen at the end, after all overwriting."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return [line.split("\r")[-1].rstrip() for line in plain.split("\n")]


def test_these_tests_cover_every_command() -> None:
    # The demo runs the other commands one after another; it is tested in test_cli.py.
    assert {run[0] for run in RUNS.values()} == set(COMMANDS) - {"demo"}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.slow
def test_in_a_terminal_everything_fits_80_columns(name: str, terminal: dict[str, tuple[int, str]]) -> None:
    code, text = terminal[name]
    assert code == (2 if name == "refusal" else 0), text
    for line in seen(text):
        if not line.startswith(("harmconvert: error: ", "Next: ")):  # these are one line of any length
            assert cell_len(line) <= COLUMNS, line
        assert "…" not in line, "rich leaves out what does not fit"
    if name == "convert, quiet":
        assert text == ""
    elif name != "refusal":
        assert text.strip()


@pytest.mark.slow
def test_long_names_are_wrapped_and_not_cut(terminal: dict[str, tuple[int, str]]) -> None:
    for name in ("inspect, long names", "convert, long names", "compare, long names"):
        lines = seen(terminal[name][1])
        # The first column, read from top to bottom, has the complete name of the second layer.
        column = "".join(line.split(" ")[0] for line in lines)
        assert "a_part_with_a_very_long_name.of_many_words_and_more[red].1" in column, lines


@pytest.mark.slow
def test_numbers_are_never_wrapped(terminal: dict[str, tuple[int, str]]) -> None:
    text = "\n".join(seen(terminal["report, tradeoff"][1]))
    assert re.search(r"^progressive +119.93k +44.1% +71.8% ", text, re.MULTILINE)
    assert re.search(r"^stage1.0.conv1 +refit ", "\n".join(seen(terminal["convert, calibrated"][1])), re.MULTILINE)


@pytest.mark.slow
def test_in_a_terminal_progress_bars_disappear_at_the_end(terminal: dict[str, tuple[int, str]]) -> None:
    for name in ("convert, calibrated", "verify", "evaluate", "finetune", "report, tradeoff"):
        _, text = terminal[name]
        assert "━" in text, name
        assert re.search(r"\x1b\[36m(\d:\d\d:\d\d|-:--:--)", text), f"{name}: the time left, in its colour"


@pytest.mark.slow
def test_in_a_terminal_a_spinner_is_shown_while_a_network_loads_and_then_disappears(
    terminal: dict[str, tuple[int, str]],
) -> None:
    turning = re.compile(r"[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏][^\n]* loading ")
    for name in set(RUNS) - {"refusal", "convert, quiet"}:
        _, text = terminal[name]
        *_, last = turning.finditer(text)
        assert "\x1b[2K" in text[last.end() :], f"{name}: the line is cleared"
    assert not turning.search(terminal["convert, quiet"][1])


class Screen(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_spinner_stops_when_other_output_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", screen)
    with busy("loading resnet50") as tell:
        tell("reading resnet50")
        print("12 % of a download", file=sys.stderr)
    assert sys.stderr is screen
    turned, cleared, rest = screen.getvalue().rpartition("\x1b[2K")
    assert "loading resnet50" in turned
    assert cleared
    assert rest == "12 % of a download\n", "and the spinner does not come back"


def test_in_a_pipe_a_line_announces_each_long_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(waiting, "_QUIET_SECONDS", 0.05)
    with busy("loading a small network"):
        pass
    with busy("loading a large network"):
        time.sleep(0.5)
    with progress("converting"):
        time.sleep(0.5)
    monkeypatch.setenv("RANK", "1")
    with busy("loading it again"), progress("converting"):
        time.sleep(0.2)
    assert capsys.readouterr() == ("", "  loading a large network\n  converting\n")


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.slow
def test_in_a_pipe_the_output_is_plain_text(name: str, pipe: dict[str, tuple[int, str, str]]) -> None:
    code, out, err = pipe[name]
    assert code == (2 if name == "refusal" else 0), err
    for text in (out, err):
        assert not re.search(r"[\x1b\r\x07━…]", text)
        assert all(line.strip() for line in text.splitlines()), "no empty lines"
    if name == "convert, quiet":
        assert (out, err) == ("", "")
    if name == "refusal":
        assert err == "harmconvert: error: a comparison needs two checkpoints or more\n"
        assert out == ""


@pytest.mark.slow
def test_in_a_pipe_a_row_is_one_line(pipe: dict[str, tuple[int, str, str]]) -> None:
    long = "a_part_with_a_very_long_name.of_many_words_and_more[red].1"
    assert re.search(rf"^{re.escape(long)} +3x3 +3/9 ", pipe["convert, long names"][1], re.MULTILINE)
    assert re.search(rf"^{re.escape(long)} +3/9 +-$", pipe["compare, long names"][1], re.MULTILINE)


@pytest.mark.slow
def test_colours_are_off_if_the_environment_says_so(terminal: dict[str, tuple[int, str]]) -> None:
    coloured = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-7]|38;[\d;]+|9[0-7])(?:;\d+)*m")
    assert coloured.search(terminal["verify"][1]), "bars have colours"
    assert not coloured.search(terminal["no colour"][1])
