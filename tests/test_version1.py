"""Files of format version 1, written by release 0.1.0, are read for good."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

import harmconvert as hc

FOLDER = Path(__file__).parent / "data" / "version1"
EXPECTED: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text())
KEPT = {  # frequencies of stem, depthwise, last
    "whole": (9, 25, 9),
    "lambda2": (None, 15, 3),
    "calibrated": (9, 25, 3),
    "klt": (9, 25, 3),
    "haar": (9, 25, 6),
    "float16": (9, 25, 3),
    "searched": (9, 25, 6),
    "finetuned": (None, 15, 3),
}


@pytest.fixture
def make() -> Callable[[], nn.Module]:
    spec = spec_from_file_location("digits_network", FOLDER / "digits_network.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return cast(Callable[[], nn.Module], module.make)


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


@pytest.mark.parametrize("form", ["harmonic", "dense", "factored"])
@pytest.mark.parametrize("name", EXPECTED)
def test_outputs_are_those_of_the_release_that_wrote_it(name: str, form: str, make: Callable[[], nn.Module]) -> None:
    path = FOLDER / f"{name}.safetensors"
    network = hc.load(path, model=make(), form=form, example_input=images()).eval().float()
    # 16-bit weights merge in 16 bits in one form and in float32 in another.
    tolerance = 5e-3 if name == "float16" else 1e-5
    with torch.no_grad():
        torch.testing.assert_close(network(images()), torch.tensor(EXPECTED[name]["outputs"]), rtol=0, atol=tolerance)
