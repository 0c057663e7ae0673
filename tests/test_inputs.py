"""Errors that commands report before torch is imported: invalid texts, missing files, existing outputs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from harmconvert.cli import COMMANDS, main
from harmconvert.cli.inputs import InputFile

# One process runs all cases; importing torch raises an exception there.
DRIVER = """
import contextlib, io, json, sys
sys.modules["torch"] = None
from harmconvert.cli import main
found = []
for arguments in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            main(arguments)
        except SystemExit as stop:
            found.append((stop.code, said.getvalue()))
print(json.dumps(found))
"""
DATA = ["--dataset", "sample:mnist5k"]
# Arguments with which a command would start its work.
COMPLETE = {
    "convert": ["resnet50"], "finetune": ["resnet50", *DATA], "evaluate": ["resnet50", *DATA],
    "train": ["resnet50", *DATA], "verify": ["resnet50", "resnet18"], "inspect": ["resnet50"],
    "report": ["resnet50", "--figure", "tradeoff", *DATA], "compare": ["resnet50", "resnet18"],
    "benchmark": ["resnet50"], "export": ["resnet50", "-o", "new.safetensors"],
    "push": ["there.safetensors", "me/network"],
}  # fmt: skip
REFUSED = [
    (["convert", "resnet50", "-o", "there.safetensors"], 2, "there.safetensors exists: use --force"),
    (["convert", "there.safetensors", "-o", "there.safetensors"], 2, "there.safetensors exists: use --force"),
    (["convert", "resnet50", "--report", "there.html"], 2, "there.html exists: use --force"),
    (["convert", "resnet50", "--lambda", "half"], 2, "unknown lambda 'half'"),
    (["convert", "resnet50", "--lambda", ""], 2, "unknown lambda ''"),
    (["convert", "resnet50", "--lambda", "9" * 5000], 2, "unknown lambda '9999"),
    (["convert", "resnet50", "--budget", "weight=60%"], 2, "unknown budget 'weight'"),
    (["convert", "resnet50", "--budget", "params="], 2, "the budget params= is no share"),
    (["convert", "resnet50", "--budget", "params=60%", "--lambda", "2"], 2, "each say what to keep"),
    (["convert", "resnet50", "--trials", "3"], 2, "--trials works only with --budget"),
    (["convert", "resnet50", "--damping", "1"], 2, "--damping works only with --data DATA"),
    (["convert", "resnet50", "--calibrate", "nowhere"], 2, "there is no folder nowhere"),
    (["convert", "resnet50", "--max-drop", "1", "--labelled", "no/where"], 2, "there is no folder no/where"),
    (["convert", "resnet50", "--device", "gpu"], 2, "--device gpu: give cpu, cuda, or cuda:N"),
    (["convert", "runs/cut"], 3, "no such file: runs/cut does not exist"),
    (["convert", "net.py"], 3, "no such file: net.py does not exist"),
    (["inspect", "there.onnx"], 3, "there.onnx is a graph for a runtime, not a network in PyTorch: name what it was"),
    (["convert", "resnet50", "--checkpoint", "there.onnx"], 3, "there.onnx is a graph for a runtime"),
    (["convert", "there.py"], 2, "there.py is Python: name the function"),
    (["convert", "net.py:make"], 2, "there is no file net.py"),
    (["convert", "https://example.org/net.pth"], 2, "is an address: download the file"),
    (["convert", "local-dir:nowhere"], 3, "no such folder: nowhere does not exist"),
    (["convert", "reference:none.pth.tar"], 3, "no such file: none.pth.tar does not exist"),
    (["convert", "folder/"], 3, "folder/ is a folder: name a file in it"),
    (["convert", "resnet50", "--checkpoint", "folder"], 3, "folder is a folder: name a file"),
    (["convert", "resnet50", "--checkpoint", "link.pth"], 3, "no such file: link.pth is a link to gone.pth"),
    (["convert", ""], 2, "'' names no network"),
    (["export", "resnet50", "-o", "there.safetensors"], 2, "there.safetensors exists: use --force"),
    (["export", "resnet50", "-o", "net.onnx"], 2, "net.onnx should end in .safetensors"),
    (["export", "resnet50", "-o", "a.onnx", "--format", "onnx", "--dtype", "float16"], 2, "--dtype float16 is only"),
    (["finetune", "resnet50", *DATA], 2, "resnet50 is not a harmonic checkpoint"),
    (["finetune", "there.safetensors"], 2, "no data is named: give --data DATA"),
    (["finetune", "a.safetensors", *DATA, "-o", "run.safetensors"], 2, "run.state.pth is the state of an interrupted"),
    (["evaluate", "resnet50", "--data-dir", "nowhere"], 2, "there is no folder nowhere"),
    (["train", "resnet50", *DATA, "--lambda", "half"], 2, "unknown lambda 'half'"),
    (["report", "resnet50"], 2, "no figure is named:"),
    (["report", "resnet50", "--figure", "layers"], 2, "resnet50 is not a harmonic checkpoint"),
    (["report", "resnet50", "--figure", "filters", "-o", "there.png"], 2, "there.png exists: use --force"),
    (["compare", "resnet50", "resnet18"], 2, "resnet50 is not a harmonic checkpoint"),
    (["compare", "resnet50"], 2, "a comparison needs two checkpoints or more"),
]  # fmt: skip


def missing_files() -> Iterator[tuple[list[str], int, str]]:
    """Yield a command line for every argument and option that names a file, with a missing file."""
    for name, complete in COMPLETE.items():
        command = main.get_command(click.Context(main), name)
        assert command is not None
        arguments = [p for p in command.params if isinstance(p, click.Argument) and isinstance(p.type, InputFile)]
        options = [p for p in command.params if isinstance(p, click.Option) and isinstance(p.type, InputFile)]
        for place in range(2 if name == "compare" else len(arguments)):
            given = [*complete[:place], "none.safetensors", *complete[place + 1 :]]
            yield [name, *given], 3, "no such file: none.safetensors does not exist"
        for option in options:
            yield [name, *complete, option.opts[0], "none.pth"], 3, "no such file: none.pth does not exist"


def test_these_tests_cover_every_command_that_reads_files() -> None:
    assert set(COMPLETE) == set(COMMANDS) - {"demo"}
    assert len(list(missing_files())) > 2 * len(COMPLETE)


def test_invalid_arguments_are_refused_before_torch_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("there.safetensors", "there.html", "there.png", "there.py", "there.onnx", "run.state.pth"):
        Path(name).write_text("mine")
    Path("folder").mkdir()
    Path("link.pth").symlink_to("gone.pth")
    cases = [*REFUSED, *missing_files()]
    before = sorted(tmp_path.iterdir())
    words = json.dumps([arguments for arguments, _, _ in cases])
    done = subprocess.run([sys.executable, "-c", DRIVER], input=words, capture_output=True, text=True, check=True)
    for (arguments, code, message), (found, said) in zip(cases, json.loads(done.stdout), strict=True):
        assert (found, said.count("\n")) == (code, 1), (arguments, said)
        assert message in said, (arguments, said)
    assert sorted(tmp_path.iterdir()) == before


def test_convert_prints_loading_before_torch_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = json.dumps([["convert", "resnet50"]])
    done = subprocess.run([sys.executable, "-c", DRIVER], input=words, capture_output=True, text=True, check=True)
    ((_, said),) = json.loads(done.stdout)
    assert said.startswith("loading resnet50\n")
    assert "import of torch halted" in said
