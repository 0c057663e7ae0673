"""docs/file-format.md is complete: a reader that was written only from it reads every kind of file."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import harmconvert as hc
from harmconvert.codecs import CODECS
from harmconvert.kernels import BASES
from harmconvert.storage import Header, rounded

from . import second_reader
from .networks import Branches, random_input, seeded
from .test_version1 import EXPECTED as VERSION_1
from .test_version1 import FOLDER, digits_maker

PAGE = Path(__file__).resolve().parents[1] / "docs" / "file-format.md"
X = random_input((2, 3, 16, 16))


def _of_one_axis() -> nn.Module:
    return nn.Sequential(nn.Conv1d(4, 6, 5, groups=2), nn.ConvTranspose1d(6, 4, 4, groups=2))


def _of_three_axes() -> nn.Module:
    return nn.Sequential(nn.Conv3d(2, 4, (1, 3, 2)), nn.ConvTranspose2d(4, 3, (2, 5)))


def _with_linear_layers() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 12, 1, groups=2), nn.ConvTranspose2d(12, 8, 1, groups=2), nn.Linear(6, 7))


def _with_convolutions(bias: bool) -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, bias=bias), nn.ReLU(), nn.Conv2d(6, 8, 3))


def _of_blocks(normalize: bool) -> nn.Module:
    conversion = hc.convert(seeded(lambda: _with_convolutions(bias=normalize)), {"2": 2})
    block = hc.HarmonicBlock2d(4, 6, 3, groups=2, bias=normalize, normalize=normalize, normalization="l1")
    if normalize:
        with torch.no_grad():
            block.norm.running_mean.normal_()
            block.norm.running_var.uniform_(0.5, 2)
    model: Any = conversion.model
    model[0] = block
    return model  # type: ignore[no-any-return]


def _cut(make: Callable[[], nn.Module] = Branches, lam: Any = 2, **options: Any) -> Any:
    return lambda: hc.convert(seeded(make), lam, **options)


def _rounded(dtype: torch.dtype) -> Any:
    def converted() -> Any:
        conversion = hc.convert(seeded(Branches), 2, example_input=X)
        return replace(conversion, model=rounded(conversion.model, dtype))

    return converted


KINDS: dict[str, Callable[[], Any]] = {
    "whole": _cut(lam="full"),
    "cut": _cut(example_input=X),
    "progressive": _cut(lam="progressive", example_input=X),
    "calibrated": _cut(calibration=list(random_input((64, 3, 16, 16)).split(16))),
    "float64": lambda: hc.convert(seeded(Branches, torch.float64), 2, example_input=X.double()),
    "float16": _rounded(torch.float16),
    "bfloat16": _rounded(torch.bfloat16),
    "one axis": _cut(_of_one_axis, {"0": 3, "1": 2}),
    "three axes": _cut(_of_three_axes, {"0": 2, "1": 3}),
    "coded": _cut(bits=4),
    "ranked": _cut(rank=0.4),
    "ranked, one axis": _cut(_of_one_axis, {"0": 3, "1": 2}, rank={"*": 1}),
    "ranked, linear and 1x1": _cut(_with_linear_layers, rank={"*": 2}),
    "ranked and coded": _cut(rank=0.4, bits=4),
    "a layer alone": _cut(lambda: nn.Conv2d(3, 4, 5), {"*": 4}),
    "normalizing blocks": lambda: _of_blocks(True),
    "plain blocks": lambda: _of_blocks(False),
    **{f"{basis}, {norm}": _cut(basis=basis, normalization=norm) for basis in BASES for norm in ("ortho", "l1")},
}
PLAIN: dict[str, Callable[[], nn.Module]] = {
    "float64": lambda: seeded(Branches, torch.float64),
    "one axis": _of_one_axis,
    "ranked, one axis": _of_one_axis,
    "ranked, linear and 1x1": lambda: _with_linear_layers(),
    "three axes": _of_three_axes,
    "a layer alone": lambda: nn.Conv2d(3, 4, 5),
    "normalizing blocks": lambda: _with_convolutions(bias=True),
    "plain blocks": lambda: _with_convolutions(bias=False),
}


def compare(path: Path, plain: nn.Module) -> second_reader.Checkpoint:
    """Compare the second reader's kernels and tensors with those of the package's dense form."""
    found = second_reader.read(path)
    state = hc.load(path, model=plain, form="dense").state_dict()
    assert found.whole, "the checksum"
    assert found.merged
    dense = {**found.tensors, **found.merged}
    for key, tensor in state.items():
        precision = tensor.dtype if tensor.dtype.is_floating_point else torch.float32
        expected = tensor.double().numpy()
        assert dense[key].shape == expected.shape, key
        largest = max(np.abs(expected).max(initial=0), 1e-30)
        rounding = torch.finfo(precision).eps * largest
        assert np.abs(dense[key].astype("f8") - expected).max(initial=0) <= 2 * rounding, key
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_written_from_the_documentation_reads_every_kind_of_file(kind: str, tmp_path: Path) -> None:
    made = KINDS[kind]()
    hc.save(made, tmp_path / "net.safetensors")
    found = compare(tmp_path / "net.safetensors", PLAIN.get(kind, lambda: seeded(Branches))())
    assert found.header["format_version"] == 2


@pytest.mark.parametrize("name", VERSION_1)
def test_the_second_reader_reads_every_file_of_version_1(name: str) -> None:
    found = compare(FOLDER / f"{name}.safetensors", digits_maker()())
    assert found.header["format_version"] == 1


def test_the_second_reader_detects_corruption(tmp_path: Path) -> None:
    hc.save(KINDS["cut"](), tmp_path / "net.safetensors")
    content = (tmp_path / "net.safetensors").read_bytes()
    place = content.index(b"torch")  # in the versions of the header
    for damaged in (content[:-1] + bytes([content[-1] ^ 1]), content[:place] + b"tarch" + content[place + 5 :]):
        (tmp_path / "net.safetensors").write_bytes(damaged)
        assert second_reader.read(tmp_path / "net.safetensors").whole is False


def test_the_header_in_the_documentation_is_valid() -> None:
    text = PAGE.read_text()
    block = re.search(r"## 2\. The header\n\n((?:    .*\n)+)", text)
    assert block
    data = json.loads(block[1])
    header = Header.from_json(data)
    own = json.loads(json.dumps(header.to_json()))
    assert [*own] == [*data], "every entry, in the order in which they are written"
    assert own == data
    assert [layer.name for layer in header.plan.layers] == ["conv1"]
    assert set(re.findall(r"^\| `(\w+)` \|", text.split("## 2.")[1].split("## 3.")[0], re.M)) == set(data)


def test_the_documentation_names_every_codec_and_basis() -> None:
    text = PAGE.read_text()
    for name in {name for name, _ in CODECS} | set(BASES):
        assert f"`{name}`" in text, name


def test_the_documentation_has_no_broken_links() -> None:
    text = PAGE.read_text()
    titles = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.M)}
    for anchor in re.findall(r"\]\(#([^)]+)\)", text):
        assert anchor in titles, anchor


def test_files_are_read_without_a_warning(tmp_path: Path) -> None:
    hc.save(KINDS["cut"](), tmp_path / "net.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hc.load(tmp_path / "net.safetensors", model=seeded(Branches))
