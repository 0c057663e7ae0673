from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from harmconvert.errors import InputError
from harmconvert.weights import load_state, read_weights, untied_state, weights_sha256

from .networks import Branches, seeded


def test_weights_are_hashed_by_name_type_shape_and_value() -> None:
    network: Any = seeded(Branches)
    digest = weights_sha256(network)
    assert len(digest) == 64
    assert weights_sha256(seeded(Branches)) == digest
    with torch.no_grad():
        network.norm.running_mean[0] = 1.0
    assert weights_sha256(network) != digest
    expected = hashlib.sha256()
    linear = torch.nn.Linear(1, 1, bias=False)
    expected.update(b"weight torch.float32 (1, 1)\n" + linear.weight.detach().numpy().tobytes())
    assert weights_sha256(linear) == expected.hexdigest()


@pytest.mark.parametrize("content", [{"a": 1}, [torch.zeros(1)], {}, torch.zeros(2), {"state_dict": {}}])
def test_a_pth_that_is_no_state_dict_is_bad_input(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "net.pth")
    with pytest.raises(InputError, match="holds no state dict"):
        read_weights(tmp_path / "net.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1", "git-lfs"),
        (b"<html>", "web page"),
        (b"x" * 99, "is not"),
    ],
)
def test_files_that_are_no_weights(tmp_path: Path, suffix: str, content: bytes, message: str) -> None:
    path = tmp_path / f"net{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_weights(path)


def test_a_truncated_pth_is_bad_input(tmp_path: Path) -> None:
    model = timm.create_model("resnet10t")
    torch.save(model.state_dict(), tmp_path / "net.pth")
    content = (tmp_path / "net.pth").read_bytes()
    for share in (0.01, 0.5, 0.99):
        (tmp_path / "cut.pth").write_bytes(content[: int(len(content) * share)])
        with pytest.raises(InputError, match=r"cut\.pth"):
            read_weights(tmp_path / "cut.pth")


def test_weights_without_fractions_are_refused(tmp_path: Path) -> None:
    state = {k: (v * 9).to(torch.int8) if k.endswith("weight") else v for k, v in seeded(Branches).state_dict().items()}
    with pytest.raises(InputError, match=r"not floating point \(quantised\?\): stem.weight int8"):
        load_state(seeded(Branches), state, "w.pth")


def test_loading_into_a_network_without_memory_is_refused() -> None:
    state = seeded(Branches).state_dict()
    with torch.device("meta"):
        model = Branches()
    with pytest.raises(InputError, match="the network is on the meta device: build it on the CPU"):
        load_state(model, state, "w.pth")


def test_state_that_is_no_tensor_is_not_dropped() -> None:
    class Remembers(nn.Conv2d):
        def get_extra_state(self) -> Any:
            return {"seen": 3}

    with pytest.raises(InputError, match="_extra_state is no tensor but a dict"):
        untied_state(Remembers(3, 3, 3))
