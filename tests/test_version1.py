"""Files of format version 1, written by release 0.1.0, remain readable."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

import harmconvert as hc
from harmconvert.errors import DamageWarning
from harmconvert.storage import read_header

from .commands import run

FOLDER = Path(__file__).parent / "data" / "version1"
EXPECTED: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text())
KEPT = {  # the numbers of frequencies of stem, depthwise and last; None: a plain convolution
    "whole": (9, 25, 9),
    "lambda2": (None, 10, 3),
    "calibrated": (9, 25, 3),
    "klt": (8, 25, 3),
    "haar": (9, 25, 6),
    "float16": (9, 25, 3),
    "searched": (9, 25, 6),
    "finetuned": (None, 10, 3),
}
CUT_IN_TWO: dict[str, Any] = {"lam": 2, "include": ("last", "depthwise")}
CONVERTED: dict[str, dict[str, Any]] = {  # the arguments with which the release made each file
    "whole": {},
    "lambda2": CUT_IN_TWO,
    "calibrated": {"lam": {"last": 2}},
    "klt": {"lam": {"last": 2, "stem": 4}, "basis": "klt"},
    "haar": {"lam": {"last": 3}, "basis": "haar"},
    "float16": {"lam": {"last": 2}},
    "searched": {"lam": {"last": 3}},  # the result of the search
    "finetuned": CUT_IN_TWO,
}


def digits_maker() -> Callable[[], nn.Module]:
    """Return the function that builds the network of the files."""
    spec = spec_from_file_location("digits_network", FOLDER / "digits_network.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return cast(Callable[[], nn.Module], module.make)


@pytest.fixture
def make() -> Callable[[], nn.Module]:
    return digits_maker()


def header_text(name: str) -> Any:
    """Return the metadata entry ``harmconvert`` of a file, read without the package."""
    content = (FOLDER / f"{name}.safetensors").read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["harmconvert"])


def images() -> torch.Tensor:
    return torch.linspace(-1, 1, 2 * 28 * 28).reshape(2, 1, 28, 28)


def described(tensor: torch.Tensor) -> str:
    values = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} {hashlib.sha256(values).hexdigest()}"


def test_there_is_a_file_for_each_feature() -> None:
    assert set(EXPECTED) == set(KEPT) == {path.stem for path in FOLDER.glob("*.safetensors")} - {"weights"}
    for name, record in EXPECTED.items():
        assert hashlib.sha256((FOLDER / f"{name}.safetensors").read_bytes()).hexdigest() == record["file"]


@pytest.mark.parametrize("name", EXPECTED)
def test_every_tensor_is_read_bit_for_bit(name: str, make: Callable[[], nn.Module]) -> None:
    network = hc.load(FOLDER / f"{name}.safetensors", model=make())
    assert {key: described(tensor) for key, tensor in network.state_dict().items()} == EXPECTED[name]["tensors"]


@pytest.mark.parametrize("name", EXPECTED)
def test_every_layer_keeps_the_expected_frequencies(name: str, make: Callable[[], nn.Module]) -> None:
    state = hc.load(FOLDER / f"{name}.safetensors", model=make()).state_dict()
    kept = [state.get(f"{layer}.coefficients") for layer in ("stem", "depthwise", "last")]
    assert tuple(None if tensor is None else tensor.shape[2] for tensor in kept) == KEPT[name]
    assert any(key.endswith("fitted_basis") for key in state) is (name == "klt")


@pytest.mark.parametrize("name", EXPECTED)
def test_the_plan_equals_the_plan_given_to_the_release(name: str, make: Callable[[], nn.Module]) -> None:
    """This compares its frequencies, basis, normalization, policy, skipped layers and notes."""
    plan = read_header(FOLDER / f"{name}.safetensors").plan
    expected = hc.convert(make(), **CONVERTED[name]).plan
    if name == "searched":
        expected = replace(expected, policy="params=80%", notes={"stem": "whole: it reads the network's input"})
    assert plan == expected
    assert plan.notes == expected.notes
    for basis in ("dct", "haar", "klt"):
        other = hc.convert(make(), **{**CONVERTED[name], "basis": basis}).plan
        assert (plan == replace(other, policy=plan.policy)) is (basis == CONVERTED[name].get("basis", "dct"))
    other = hc.convert(make(), **CONVERTED[name], normalization="l1").plan
    assert plan != replace(other, policy=plan.policy)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_rest_of_the_header_is_read(name: str) -> None:
    header, text = read_header(FOLDER / f"{name}.safetensors"), header_text(name)
    assert text["format_version"] == header.format_version == 1
    assert header.history == text["history"]
    assert {"calibrated": {"calibration"}, "finetuned": {"training"}, "searched": {"calibration"}}.get(
        name, set()
    ) == header.history.keys() - {"conversion", "command"}
    assert bool(header.calibrated) is (name in ("calibrated", "searched"))
    assert header.preprocessing == text["preprocessing"]
    assert header.preprocessing is not None
    assert header.preprocessing["input_sizes"] == [[1, 28, 28]]
    assert (header.preprocessing["mean"], header.preprocessing["std"]) == ([0.13], [0.31])
    assert header.source is not None
    assert (header.source.scheme, header.source.name) == ("code", "digits_network.py:make")
    assert header.source.sha256 == text["source"]["sha256"]
    assert header.versions == text["versions"]
    assert (header.crc32, header.tied, header.blocks) == (text["crc32"], {}, {})


@pytest.mark.parametrize("name", EXPECTED)
def test_the_checksum_is_verified(name: str, tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hc.load(FOLDER / f"{name}.safetensors", model=make())
    damaged = bytearray((FOLDER / f"{name}.safetensors").read_bytes())
    damaged[-3] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(damaged)
    with pytest.warns(DamageWarning, match="was changed after harmconvert wrote it"):
        hc.load(tmp_path / "damaged.safetensors", model=make())


@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_is_written_again_in_the_current_version(
    name: str, tmp_path: Path, make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(FOLDER)
    old = hc.open_source(f"{name}.safetensors", code="digits_network.py:make")
    header = hc.save(old, tmp_path / "new.safetensors")
    assert read_header(tmp_path / "new.safetensors").format_version == 2
    first = read_header(FOLDER / f"{name}.safetensors")
    for part in ("plan", "source", "history", "preprocessing"):
        assert getattr(header, part) == getattr(first, part), part
    state = hc.load(tmp_path / "new.safetensors", model=make()).state_dict()
    assert {key: described(tensor) for key, tensor in state.items()} == EXPECTED[name]["tensors"]


def test_a_plan_file_of_the_release_is_followed(
    tmp_path: Path, make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = hc.convert(make(), {"last": 2})
    plan = hc.Plan.load(FOLDER / "plan.json")
    assert plan == expected.plan
    assert hc.convert(make(), plan).plan == expected.plan
    monkeypatch.chdir(FOLDER)
    target = str(tmp_path / "planned.safetensors")
    command = ["convert", "digits_network.py:make", "--checkpoint", "weights.safetensors", "-o", target]
    result = run(*command, "--plan", "plan.json")
    assert result.exit_code == 0, result.stderr
    state = hc.load(target, model=make()).state_dict()
    whole = EXPECTED["whole"]["tensors"]
    assert described(state["depthwise.coefficients"]) == whole["depthwise.coefficients"]
    assert state["last.coefficients"].shape[2] == 3


def test_probes_of_the_release_are_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search with the same inputs measures nothing again and finds the same plan."""
    probes = tmp_path / "probes.json"
    shutil.copy(FOLDER / "probes.json", probes)
    monkeypatch.chdir(FOLDER)
    target = tmp_path / "searched.safetensors"
    command = ["convert", "digits_network.py:make", "--checkpoint", "weights.safetensors", "-o", str(target)]
    search = ["--budget", "params=80%", "--calibrate", "sample:mnist5k", "--calibration-images", "64", "--trials", "2",
              "--axes", "space"]  # fmt: skip
    result = run(*command, *search, "--probes", str(probes))
    assert result.exit_code == 0, result.stderr
    assert read_header(target).plan == read_header(FOLDER / "searched.safetensors").plan
    before, after = (json.loads(path.read_text()) for path in (FOLDER / "probes.json", probes))
    assert after["key"] == before["key"]
    assert after["single"] == before["single"], "scores are not measured again"


@pytest.mark.parametrize("form", ["harmonic", "dense", "factored"])
@pytest.mark.parametrize("name", EXPECTED)
def test_outputs_equal_those_of_the_release_that_wrote_the_file(
    name: str, form: str, make: Callable[[], nn.Module]
) -> None:
    path = FOLDER / f"{name}.safetensors"
    network = hc.load(path, model=make(), form=form, example_input=images()).eval().float()
    # 16-bit weights are merged in 16 bits in one form and in float32 in another.
    tolerance = 5e-3 if name == "float16" else 1e-5
    with torch.no_grad():
        torch.testing.assert_close(network(images()), torch.tensor(EXPECTED[name]["outputs"]), rtol=0, atol=tolerance)
