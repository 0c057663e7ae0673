"""Codecs: every codec fulfils the interface, and a new codec needs no change elsewhere."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

import harmconvert as hc
from harmconvert.codecs import CODECS, Codec, CodecTable, Entry, plain_codec, register, stored_bytes, tolerance_of
from harmconvert.errors import DamageWarning, HarmconvertWarning, InputError, OutsideError
from harmconvert.plan import tensor_bytes
from harmconvert.report import report_of
from harmconvert.storage import METADATA_KEY, Network, as_stored, read_checkpoint, read_header
from harmconvert.storage import tensors as storage_tensors

from .networks import Branches, random_input, seeded

X = random_input((2, 3, 16, 16))
KEY = "shared.coefficients"


class Int8(Codec):
    """A codec that is defined only here: integers from -127 to 127 times a scale."""

    name, version, tolerance = "int8", 1, 0.2

    def entry(self, tensor: Tensor) -> Entry:
        scale = float(tensor.abs().max()) / 127 or 1.0
        return Entry(self.name, self.version, tuple(tensor.shape), tensor.dtype, {"scale": scale})

    def stored(self, entry: Entry) -> tuple[tuple[int, ...], torch.dtype]:
        return (prod(entry.shape),), torch.uint8

    def encode(self, tensor: Tensor, entry: Entry) -> Tensor:
        whole = (tensor.double() / entry.parameters["scale"]).round()
        if whole.abs().max() > 127:
            raise ValueError("out of range")
        return whole.to(torch.int8).flatten().view(torch.uint8)

    def decode(self, stored: Tensor, entry: Entry) -> Tensor:
        values = stored.view(torch.int8).double() * entry.parameters["scale"]
        return values.to(entry.dtype).reshape(entry.shape)

    def check(self, entry: Entry) -> None:
        scale = entry.parameters["scale"]
        if len(entry.parameters) > 1 or not isinstance(scale, float) or not 0 < scale < math.inf:
            raise ValueError(f"scale (={scale!r}) must be above 0")


@pytest.fixture(autouse=True)
def int8() -> Iterator[Int8]:
    codec = Int8()
    register(codec)
    yield codec
    del CODECS["int8", 1]


@pytest.fixture
def conversion(int8: Int8) -> Any:
    """Return a conversion with coded coefficients; the network has the decoded values."""
    done = hc.convert(seeded(Branches), 3, example_input=X)
    state = done.model.state_dict()
    coded = {key: int8.entry(state[key]) for key in state if key.endswith("coefficients")}
    coded = {key: entry for key, entry in coded.items() if key not in ("alias.coefficients", "tied_b.coefficients")}
    return replace(done, model=as_stored(done.model, coded), coded=coded)


@pytest.fixture
def saved(conversion: Any, tmp_path: Path) -> Path:
    hc.save(conversion, tmp_path / "coded.safetensors")
    return tmp_path / "coded.safetensors"


def read(path: Path) -> Network:
    return read_checkpoint(path, model=seeded(Branches, seed=1))


def changed(path: Path, change: Any) -> Path:
    """Write the file again with a changed codec table; return its path."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    header = json.loads(metadata[METADATA_KEY])
    change(header["codecs"])
    other = path.with_name("changed.safetensors")
    metadata[METADATA_KEY] = json.dumps({**header, "crc32": None})
    safetensors.torch.save_file(safetensors.torch.load_file(path), other, metadata)
    return other


# --- every codec ---


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_a_plain_codec_stores_a_tensor_of_its_dtype_unchanged(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 4).to(dtype)
    codec = plain_codec(dtype)
    entry = codec.entry(tensor)
    assert codec.encode(tensor, entry) is tensor
    assert codec.decode(tensor, entry) is tensor
    assert codec.bytes(entry) == stored_bytes(tensor) == 12 * dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "raw", "quantised", "int8"])
def test_every_codec_fulfils_its_interface(name: str, dtype: torch.dtype) -> None:
    codec, tensor = CODECS[name, 1], torch.randn(5, 2, 3, dtype=dtype)
    entry = codec.entry(tensor)
    codec.check(entry)
    stored = codec.encode(tensor, entry)
    assert (tuple(stored.shape), stored.dtype) == codec.stored(entry)
    assert stored.numel() * stored.element_size() == codec.bytes(entry)
    back = codec.decode(stored, entry)
    assert (tuple(back.shape), back.dtype) == (entry.shape, entry.dtype)
    assert torch.equal(codec.encode(back, entry), stored), "what is read is written again bit for bit"
    assert (back - tensor).abs().max() < 1e-2 * tensor.abs().max()


def test_tolerances_match_the_documentation() -> None:
    assert [tolerance_of(d) for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)] == [
        1e-12, 1e-5, 2e-2, 1e-1,
    ]  # fmt: skip
    assert tolerance_of(torch.float32, {"a": Int8().entry(torch.ones(1))}) == 0.2


# --- a codec that nothing else knows of ---


def test_a_coded_tensor_is_bytes_under_its_key_and_an_entry(conversion: Any, saved: Path) -> None:
    with safetensors.safe_open(saved, "pt") as file:
        table = json.loads(file.metadata()[METADATA_KEY])["codecs"]
        assert (file.get_slice(KEY).get_dtype(), file.get_slice(KEY).get_shape()) == ("U8", [8 * 8 * 6])
    entry = conversion.coded[KEY]
    assert table["int8"]["version"] == 1
    assert table["int8"]["tensors"][KEY] == {"shape": [8, 8, 6], "dtype": "float32", **entry.parameters}
    assert table["float32"] == table["raw"] == {"version": 1}, "tensors that are not listed are stored as they are"
    assert read_header(saved).codecs.coded == conversion.coded


def test_a_coded_network_is_read_bit_for_bit(conversion: Any, saved: Path) -> None:
    state = read(saved).model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in conversion.model.state_dict().items())
    dense = hc.load(saved, model=seeded(Branches), form="dense")
    assert torch.allclose(dense(X), conversion.model(X), atol=1e-5)


def test_a_network_that_was_read_is_written_again_unchanged(saved: Path, tmp_path: Path) -> None:
    hc.save(read(saved), tmp_path / "again.safetensors")
    first, again = (safetensors.torch.load_file(path) for path in (saved, tmp_path / "again.safetensors"))
    assert all(torch.equal(again[key], value) for key, value in first.items())
    assert read_header(tmp_path / "again.safetensors").codecs == read_header(saved).codecs


def test_a_tensor_changed_by_training_is_stored_uncoded_with_a_warning(saved: Path, tmp_path: Path) -> None:
    network = read(saved)
    with torch.no_grad():
        network.model.get_parameter(KEY)[0, 0, 0] += 1e-4
    with pytest.warns(HarmconvertWarning, match=f"{KEY}: the values were changed after they were quantised"):
        hc.save(network, tmp_path / "trained.safetensors")
    again = read(tmp_path / "trained.safetensors")
    assert torch.equal(again.model.get_parameter(KEY), network.model.get_parameter(KEY))
    assert again.header is not None
    assert KEY not in again.header.codecs.coded
    assert "stem.coefficients" in again.header.codecs.coded


def test_the_checksum_covers_the_coded_bytes(saved: Path) -> None:
    state = safetensors.torch.load_file(saved)
    with safetensors.safe_open(saved, "pt") as file:
        metadata = file.metadata()
    state[KEY][5] ^= 1
    safetensors.torch.save_file(state, saved, metadata)
    with pytest.warns(DamageWarning, match="is damaged, or was changed after harmconvert wrote it"):
        read(saved)


def test_a_file_is_decoded_before_it_replaces_the_old_one(
    conversion: Any, tmp_path: Path, int8: Int8, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the bytes are correct but the decoder returns other values, the file is not kept."""
    calls = []

    def drifting(self: Int8, stored: Tensor, entry: Entry) -> Tensor:
        calls.append(entry)
        return decode(self, stored, entry) + (1e-6 if len(calls) > len(conversion.coded) else 0)

    decode = Int8.decode
    monkeypatch.setattr(Int8, "decode", drifting)
    with pytest.raises(OutsideError, match="the file that was written cannot be read back unchanged"):
        hc.save(conversion, tmp_path / "coded.safetensors")
    assert not list(tmp_path.iterdir())


def test_verify_uses_the_tolerance_of_the_codecs(conversion: Any, saved: Path) -> None:
    network = seeded(Branches)
    for converted in (conversion, read(saved)):
        assert hc.verify(network, converted, X).tolerance == 0.2
    assert hc.verify(network, conversion.model, X).tolerance == 1e-5, "a bare network does not say"


def test_the_bytes_in_reports_are_the_bytes_in_the_file(conversion: Any, saved: Path) -> None:
    state = safetensors.torch.load_file(saved)
    written = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    assert tensor_bytes(conversion.model, conversion.coded) == written < tensor_bytes(conversion.model) / 2
    network = read(saved)
    assert network.header is not None
    report = report_of(network.model, network.header, "net", example_input=X)
    assert report.form("harmonic").bytes == report.form("factored").bytes == written


def test_codec_tables_of_large_networks_are_small() -> None:
    with torch.device("meta"):
        model = timm.create_model("resnet50")
    table = CodecTable.of({tensor.dtype for tensor in model.state_dict().values()})
    assert len(json.dumps(table.to_json())) < 100


# --- tables that lie ---


def _entry(**new: Any) -> Any:
    return lambda table: table["int8"]["tensors"][KEY].update(new)


def _twice(table: Any) -> None:
    table["float32"]["tensors"] = {KEY: table["int8"]["tensors"][KEY]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(int9=t.pop("int8")), "stored with the codec 'int9' version 1, which this harmconvert does"),
        (
            lambda t: t["int8"].update(version=2),
            "the codec 'int8' version 2, which this harmconvert does not know: up",
        ),
        (lambda t: t["float32"].update(version=7), "the codec 'float32' version 7, which"),
        (lambda t: t["int8"].pop("tensors"), "int8: it should list tensors"),
        (_twice, "float32: it should not list tensors"),
        (lambda t: t.pop("float32"), "codec table and tensors disagree: only one of them has float32"),
        (lambda t: t.update(bfloat16={"version": 1}), "codec table and tensors disagree: only one of"),
        (lambda t: t["int8"]["tensors"].pop(KEY), "should hold 6 frequencies, it has shape [384]"),
        (lambda t: t["int8"]["tensors"].update(other=t["int8"]["tensors"][KEY]), "disagree: other should be U8 [384]"),
        (_entry(shape=[8, 8, 5]), f"disagree: {KEY} should be U8 [320], it is U8 [384]"),
        (_entry(shape=[8, 4, 12]), f"{KEY} should hold 6 frequencies, it has shape [8, 4, 12]"),
        (_entry(shape=[16, 4, 6]), f"does not fit this Branches: its codec table says that {KEY} has "),
        (_entry(shape=[2**62, 2**62]), "its shape is out of range"),
        (_entry(shape=[1] * 17), "its shape is out of range"),
        (_entry(shape=[-8, -8, 6]), "-8 should be a count"),
        (_entry(shape=[0, 2**40, 6]), f"disagree: {KEY} should be U8 [0]"),
        (_entry(dtype="float31"), "unknown dtype 'float31'"),
        (_entry(dtype=3), "3 should be text"),
        (_entry(scale=-1.0), f"int8: {KEY}: scale (=-1.0) must be above 0"),
        (_entry(scale=None), "scale (=None) must be above 0"),
        (_entry(more=3), "must be above 0"),
        (lambda t: t["int8"]["tensors"][KEY].pop("scale"), "int8"),
        (lambda t: t["int8"]["tensors"][KEY].pop("shape"), "'shape' is missing"),
    ],
)
def test_a_wrong_codec_table_is_refused(saved: Path, change: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(changed(saved, change))
    assert message in str(caught.value)
    assert "changed.safetensors" in str(caught.value)


def test_a_header_without_a_codec_table_is_refused(saved: Path) -> None:
    with pytest.raises(InputError, match="its codec table is unreadable: codecs: None should be an object"):
        read_header(_without_table(saved))


def _without_table(path: Path) -> Path:
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    header = json.loads(metadata[METADATA_KEY])
    metadata[METADATA_KEY] = json.dumps({key: value for key, value in header.items() if key != "codecs"})
    other = path.with_name("without.safetensors")
    safetensors.torch.save_file(safetensors.torch.load_file(path), other, metadata)
    return other


def test_decoded_tensors_are_limited_by_the_size_of_the_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A codec with high compression could claim any size, so the size of the file limits the memory."""
    decoded = sum(entry.decoded_bytes for entry in read_header(saved).codecs.coded.values())
    monkeypatch.setattr(storage_tensors, "_LEAST_LIMIT", 1000)
    monkeypatch.setattr(storage_tensors, "_MOST_PER_BYTE", 0)
    with pytest.raises(InputError, match=f"claims tensors of {decoded:,} bytes, far more than the file holds: refused"):
        read_header(saved)


def test_values_that_cannot_be_decoded_raise_input_error(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: Int8, stored: Tensor, entry: Entry) -> Tensor:
        raise IndexError("the bytes end early")

    monkeypatch.setattr(Int8, "decode", failing)
    with pytest.raises(InputError, match=r"coefficients cannot be decoded \(the bytes end early\): get the file again"):
        read(saved)
    monkeypatch.setattr(Int8, "decode", lambda self, stored, entry: nn.Parameter(torch.zeros(1)))
    with pytest.raises(InputError, match="does not have the shape and dtype of the codec table"):
        read(saved)
