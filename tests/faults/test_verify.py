"""`harmconvert verify` on files with one fault: each fault is detected, and its layer is named."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from harmconvert import save
from harmconvert.pipeline import convert
from harmconvert.samples import mnist5k_held_back
from harmconvert.sources import open_source

from ..commands import SAMPLE, ok, run
from .tally import Counter, size

Tensors = dict[str, Tensor]
Fault = Callable[[Tensors, dict[str, Any]], None]

# One file of each kind, with the lambda of its plan.
KINDS = {"whole": "full", "cut": "progressive", "calibrated": {"stage3.*": 2}}
SMALL = ("--input-size", "1,28,28")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return files of the sample network, unchanged."""
    folder, network = tmp_path_factory.mktemp("files"), open_source(SAMPLE)
    images = mnist5k_held_back()[0][:32].split(8)
    for kind, lam in KINDS.items():
        made = convert(network.model, lam, calibration=images if kind == "calibrated" else None)
        header = save(made, folder / f"{kind}.safetensors", source=network.source)
        assert (len(header.calibrated) > 3) is (kind == "calibrated")
    return {kind: folder / f"{kind}.safetensors" for kind in KINDS}


def changed(file: Path, folder: Path, fault: Fault) -> Path:
    """Return a copy of a checkpoint with a fault in its tensors or its header."""
    with safetensors.safe_open(file, "pt") as opened:
        tensors, metadata = {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()  # noqa: SIM118
    header = json.loads(metadata["harmconvert"])
    fault(tensors, header)
    path = folder / "changed.safetensors"
    safetensors.torch.save_file(tensors, path, {**metadata, "harmconvert": json.dumps(header)})
    return path


def complaint(path: Path, *named: str) -> str | None:
    """Return what is wrong with the command's reaction to faults in the parts ``named``; None if it names them."""
    result = run("verify", SAMPLE, str(path), "--as-planned", "--json", *SMALL)
    if result.exit_code != 1:
        return f"{named}: exit code {result.exit_code}: {result.stderr[-200:]} {result.exception!r}"
    found = json.loads(result.stdout)
    if found["ok"] or found["as_planned"] or found["passed"]:
        return f"{named}: it passed"
    last = result.stderr.strip().splitlines()[-1]
    if not last.startswith("harmconvert: check failed: not the same: "):
        return f"{named}: {last!r}"
    for part in named:
        if not any(problem.startswith(part) for problem in found["problems"]):
            return f"{part} is not named in {found['problems'][:3]}"
        if len(found["problems"]) <= 3 and part not in last:
            return f"{part} is not named in {last!r}"
    return None


def layers(file: Path) -> list[str]:
    with safetensors.safe_open(file, "pt") as opened:
        return [key.removesuffix(".coefficients") for key in opened.keys() if key.endswith(".coefficients")]  # noqa: SIM118


@pytest.mark.parametrize("kind", KINDS)
def test_unchanged_files_pass(files: dict[str, Path], kind: str) -> None:
    """This shows that the tests below fail only because of their faults."""
    ok("verify", SAMPLE, str(files[kind]), "--as-planned", *SMALL)
    assert (run("verify", SAMPLE, str(files[kind]), *SMALL).exit_code == 0) is (kind == "whole")


@pytest.mark.parametrize("kind", KINDS)
def test_a_coefficient_wrong_by_a_thousandth_is_detected_in_any_layer(
    files: dict[str, Path], tmp_path: Path, kind: str, tally: Counter
) -> None:
    count, draw = tally("verify", "one coefficient changed by 1e-3"), random.Random(kind)
    names = layers(files[kind])
    assert len(names) == 19
    for name in size(draw.sample(names, 2), names):

        def fault(tensors: Tensors, header: Any, name: str = name) -> None:
            values = tensors[f"{name}.coefficients"].view(-1)
            values[draw.choice(values.nonzero().flatten().tolist())] *= 1.001

        count.trial(complaint(changed(files[kind], tmp_path, fault), f"{name}: "))


@pytest.mark.parametrize("kind", KINDS)
def test_two_swapped_layers_are_detected(files: dict[str, Path], tmp_path: Path, kind: str, tally: Counter) -> None:
    count, draw = tally("verify", "two layers swapped"), random.Random(kind)
    shapes = {name: t.shape for name, t in safetensors.torch.load_file(files[kind]).items() if "coefficients" in name}
    pairs = [(a, b) for a in shapes for b in shapes if a < b and shapes[a] == shapes[b]]
    assert len(pairs) > 10
    for a, b in draw.sample(pairs, size(1, 10)):

        def fault(tensors: Tensors, header: Any, a: str = a, b: str = b) -> None:
            tensors[a], tensors[b] = tensors[b], tensors[a]

        both = (f"{key.removesuffix('.coefficients')}: " for key in (a, b))
        count.trial(complaint(changed(files[kind], tmp_path, fault), *both))


def first(name: str, change: Callable[[Tensor], Any]) -> Fault:
    """Return a fault in one tensor."""

    def fault(tensors: Tensors, header: Any) -> None:
        tensors[name] = change(tensors[name])

    return fault


def next_up(tensor: Tensor) -> Tensor:
    """Return the tensor with the last bit of its first value changed."""
    flat = tensor.clone().view(-1)
    flat[0] = torch.nextafter(flat[0], torch.tensor(9.0))
    return flat.view(tensor.shape)


def another_frequency(tensors: Tensors, header: Any) -> None:
    """Replace one frequency of a truncated layer by another one."""
    layer = next(layer for layer in header["plan"]["layers"] if layer["name"] == "stage3.2.conv1")
    assert layer["space"]["frequencies"] == [[0, 0], [0, 1], [1, 0]]
    layer["space"]["frequencies"] = [[0, 0], [1, 0], [2, 0]]


def tied(tensors: Tensors, header: Any) -> None:
    del tensors["stage1.2.conv1.coefficients"]
    header["tied"]["stage1.2.conv1.coefficients"] = "stage1.1.conv1.coefficients"


def scaled(tensors: Tensors, header: Any) -> None:
    for layer in header["plan"]["layers"]:
        layer["space"]["normalization"] = "l1"


def of_another_basis(tensors: Tensors, header: Any) -> None:
    for layer in header["plan"]["layers"]:
        layer["space"]["basis"] = "haar"


def permuted(axis: int) -> Callable[[Tensor], Tensor]:
    return lambda t: t.index_select(axis, torch.tensor([1, 0, *range(2, t.shape[axis])]))


CONV = "stage3.2.conv1"
FAULTS: dict[str, tuple[str, Fault]] = {
    "coefficients permuted over out channels": (f"{CONV}: ", first(f"{CONV}.coefficients", permuted(0))),
    "coefficients permuted over in channels": (f"{CONV}: ", first(f"{CONV}.coefficients", permuted(1))),
    "two frequencies' coefficients swapped": (f"{CONV}: ", first(f"{CONV}.coefficients", permuted(2))),
    "a layer of zeros": (f"{CONV}: ", first(f"{CONV}.coefficients", torch.zeros_like)),
    "the sign of a layer": (f"{CONV}: ", first(f"{CONV}.coefficients", torch.neg)),
    "the last bits of a layer (float16)": (f"{CONV}: ", first(f"{CONV}.coefficients", lambda t: t.half().float())),
    "another frequency in the plan": (f"{CONV}: ", another_frequency),
    "a layer tied to another": ("stage1.2.conv1: ", tied),
    "another normalisation in the header": ("stem: ", scaled),
    "another basis in the header": ("stem: ", of_another_basis),
    "a running mean": ("stage1.1.norm1.running_mean: ", first("stage1.1.norm1.running_mean", next_up)),
    "a running variance": ("stage1.1.norm1.running_var: ", first("stage1.1.norm1.running_var", next_up)),
    "a batch norm's weight": ("stage1.1.norm1.weight: ", first("stage1.1.norm1.weight", next_up)),
    "a batch norm's bias": ("stage1.1.norm1.bias: ", first("stage1.1.norm1.bias", next_up)),
    "batches tracked": ("norm.num_batches_tracked: ", first("norm.num_batches_tracked", lambda t: t + 1)),
    "a bias": ("head.bias: ", first("head.bias", next_up)),
    "the classifier": ("head.weight: ", first("head.weight", next_up)),
    "a 1x1 convolution": ("stage2.0.shortcut", first("stage2.0.shortcut.weight", next_up)),
}


def tried() -> Iterator[Any]:
    """Yield every fault with every kind of file in which it is possible."""
    for what, (named, fault) in FAULTS.items():
        for kind in KINDS:
            if kind != "whole" or fault is not another_frequency:
                yield pytest.param(what, named, fault, kind, id=f"{what}, {kind}")


ALL = list(tried())


@pytest.mark.parametrize(("what", "named", "fault", "kind"), size(random.Random(0).sample(ALL, 12), ALL))
def test_every_fault_in_a_file_is_detected_and_its_layer_named(
    files: dict[str, Path], tmp_path: Path, what: str, named: str, fault: Fault, kind: str, tally: Counter
) -> None:
    count = tally("verify", "other faults in files")
    count.trial(complaint(changed(files[kind], tmp_path, fault), named))


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_of_nan_is_refused_and_named(files: dict[str, Path], tmp_path: Path, kind: str) -> None:
    file = changed(files[kind], tmp_path, first(f"{CONV}.coefficients", lambda t: t * torch.nan))
    result = run("verify", SAMPLE, str(file), "--as-planned", "--json", *SMALL)
    assert result.exit_code == 3
    assert f"{CONV}.coefficients holds NaN or infinite values" in result.stderr


NETWORK = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, act=nn.ReLU, eps=1e-5, **given):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, **{"padding": 1, **given})
        self.norm = nn.BatchNorm2d(8, eps=eps)
        self.act = act()
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.act(self.norm(self.conv(self.stem(x)))).mean((2, 3)))


def plain(): return Net()
def strided(): return Net(stride=2)
def strided_across(): return Net(stride=(1, 2))
def padded(): return Net(padding=0)
def dilated(): return Net(dilation=2)
def reflected(): return Net(padding_mode="reflect")
def grouped(): return Net(groups=2)
def with_another_eps(): return Net(eps=1e-3)
def with_another_activation(): return Net(act=nn.GELU)
"""


@pytest.mark.parametrize(
    ("factory", "named"),
    [
        ("strided", "conv: stride is (2, 2)"),
        ("strided_across", "conv: stride is (1, 2)"),
        ("padded", "conv: padding is (0, 0)"),
        ("dilated", "conv: dilation is (2, 2)"),
        ("reflected", "conv: padding_mode is reflect"),
        ("grouped", "conv: its kernel has shape (8, 4, 3, 3)"),
        ("with_another_eps", "norm: eps is 0.001"),
        ("with_another_activation", "act: is a GELU"),
    ],
)
def test_a_network_with_another_structure_is_detected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str, named: str, tally: Counter
) -> None:
    """The dense export of a converted network is loaded by code that builds another structure than the original's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NETWORK)
    sizes = ("--input-size", "3,16,16")
    ok("verify", "net.py:plain", "net.py:plain", *sizes)
    result = run("verify", "net.py:plain", f"net.py:{factory}", *sizes, "--json")
    found = json.loads(result.stdout)
    named_there = any(problem.startswith(named) for problem in found["problems"])
    wrong = f"exit code {result.exit_code}, {found['problems']}"
    tally("verify", "networks built otherwise").trial(None if result.exit_code == 1 and named_there else wrong)
