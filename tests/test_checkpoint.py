from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import re
import stat
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import harmconvert as hc
from harmconvert import load, save
from harmconvert.errors import HarmconvertError, HarmconvertWarning, InputError, OutsideError, UsageError
from harmconvert.files import default_name
from harmconvert.network import default_input
from harmconvert.pipeline import convert
from harmconvert.sources import load as load_rebuilt
from harmconvert.storage import METADATA_KEY, Header, Source, read_header

from .networks import CONVOLUTIONS, Branches, random_input, seeded

X = random_input((2, 3, 16, 16))


@pytest.fixture
def network() -> Any:
    return seeded(Branches)


@pytest.fixture
def saved(network: Any, tmp_path: Path) -> Path:
    save(convert(network, 2, example_input=X), tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


@pytest.mark.parametrize("lam", ["full", 2, "progressive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_saving_and_loading_gives_the_same_bits(tmp_path: Path, lam: Any, dtype: torch.dtype) -> None:
    model = seeded(Branches, dtype)
    conversion = convert(model, lam, example_input=X.to(dtype))
    save(conversion, tmp_path / "net.safetensors")
    loaded: Any = load(tmp_path / "net.safetensors", model=seeded(Branches, seed=1))
    for key, value in conversion.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
        assert loaded.state_dict()[key].dtype == value.dtype
    assert loaded.tied_a.coefficients is loaded.tied_b.coefficients
    assert torch.equal(loaded(X.to(dtype)), conversion.model(X.to(dtype)))


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convert_save_load_fuse_is_within_two_ulp(tmp_path: Path, kind: str) -> None:
    conv: Any = seeded(CONVOLUTIONS[kind][0])
    save(convert(conv), tmp_path / "conv.safetensors")
    again: Any = load(tmp_path / "conv.safetensors", model=conv, form="dense")
    assert type(again) is type(conv)
    ulp = torch.finfo(torch.float32).eps * conv.weight.abs().flatten(1).amax(1)
    assert ((again.weight - conv.weight).abs().flatten(1).amax(1) <= 2 * ulp).all()


def test_the_file_matches_its_documentation(network: Any, saved: Path) -> None:
    with safetensors.safe_open(saved, "pt") as file:
        keys = set(file.keys())
        header = json.loads(file.metadata()[METADATA_KEY])
        assert file.get_slice("shared.coefficients").get_shape() == [8, 8, 3]
    own = set(network.state_dict())
    aliases = {"alias.weight", "alias.bias", "tied_b.weight"}
    convs = ["stem", "shared", "tied_a", "deep.odd name [x]", "unused"]
    assert keys == own - aliases - {f"{c}.weight" for c in convs} | {f"{c}.coefficients" for c in convs}
    assert header["format_version"] == 2
    assert header["codecs"] == {"float32": {"version": 1}, "raw": {"version": 1}}, "raw: counters of batch norms"
    assert header["tied"]["tied_b.coefficients"] == "tied_a.coefficients"
    assert set(header["versions"]) == {"harmconvert", "torch", "timm"}
    layer = next(layer for layer in header["plan"]["layers"] if layer["name"] == "shared")
    space = {"frequencies": [[0, 0], [0, 1], [1, 0]], "basis": "dct", "normalization": "ortho"}
    assert layer == {"name": "shared", "kernel_size": [3, 3], "space": space}


KEEPS_ARGUMENTS = pytest.mark.skipif(
    not hasattr(timm.models, "get_model_args"), reason="this timm does not keep the arguments of its networks"
)


@KEEPS_ARGUMENTS
def test_the_source_of_a_timm_network_is_detected_and_rebuilt(tmp_path: Path) -> None:
    model = timm.create_model("resnet10t", num_classes=7, in_chans=1).eval()
    conversion = convert(model, 2)
    header = save(conversion, tmp_path / "net.safetensors")
    assert header.source is not None
    assert (header.source.scheme, header.source.name) == ("timm", "resnet10t")
    assert header.source.arguments["num_classes"] == 7
    assert header.source.arguments["in_chans"] == 1
    x = torch.randn(1, 1, 64, 64)
    loaded = load_rebuilt(tmp_path / "net.safetensors").eval()
    assert torch.equal(loaded(x), conversion.model(x))
    dense = load_rebuilt(tmp_path / "net.safetensors", form="dense")
    assert list(dense.state_dict()) == list(model.state_dict())


@KEEPS_ARGUMENTS
def test_settings_that_change_no_shape_are_not_lost(tmp_path: Path) -> None:
    """A network rebuilt without its output stride would have the same shapes and compute something else."""
    conversion = convert(timm.create_model("resnet10t", output_stride=8).eval(), 2)
    x = torch.randn(1, 3, 64, 64)
    assert save(conversion, tmp_path / "net.safetensors").source is not None
    assert torch.equal(load_rebuilt(tmp_path / "net.safetensors").eval()(x), conversion.model(x))


def test_a_modified_timm_network_is_not_recorded_as_the_stock_network(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = timm.create_model("resnet10t").eval()
    model.layer4[0].act1 = torch.nn.Hardswish()
    with caplog.at_level(logging.INFO, "harmconvert"):
        assert save(convert(model, 2), tmp_path / "net.safetensors").source is None
    assert "no source is recorded: timm's network with the name resnet10t differs" in caplog.text


def test_a_loaded_and_trained_network_is_saved_again_with_its_source(tmp_path: Path) -> None:
    source = Source("timm", "resnet10t", {"num_classes": 3}, sha256="ab", licence="apache-2.0")
    first = convert(timm.create_model("resnet10t", num_classes=3), 2)
    save(first, tmp_path / "a.safetensors", source=source)
    network = hc.open_source(str(tmp_path / "a.safetensors"))
    with torch.no_grad():
        network.model.fc.bias.fill_(3.0)
    save(network, tmp_path / "b.safetensors")
    assert read_header(tmp_path / "b.safetensors").source == source
    assert read_header(tmp_path / "b.safetensors").plan == first.plan
    again: Any = load_rebuilt(tmp_path / "b.safetensors")
    assert (again.fc.bias == 3).all()


def test_loading_a_network_of_unknown_source_asks_for_the_network(saved: Path) -> None:
    with pytest.raises(UsageError, match="does not say how to build its network: pass the plain network as model="):
        load_rebuilt(saved)


def test_user_code_that_a_file_names_is_not_run_without_permission(tmp_path: Path) -> None:
    code = tmp_path / "evil.py"
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    source = Source("code", f"{code}:make")
    save(convert(seeded(Branches), 2, example_input=X), tmp_path / "net.safetensors", source=source)
    with pytest.raises(
        UsageError, match=r"made by user code .* not run without permission: pass the plain network as model="
    ):
        load_rebuilt(tmp_path / "net.safetensors")
    assert not (tmp_path / "ran").exists()


def test_load_does_not_change_its_model_argument(network: Any, saved: Path) -> None:
    other = seeded(Branches, seed=1)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    load(saved, model=other)
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())


def test_saving_a_network_without_harmonic_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no harmonic convolution: convert it first"):
        save(seeded(Branches), tmp_path / "net.safetensors")
    with torch.device("meta"):
        conversion = convert(Branches())
    with pytest.raises(InputError, match="no values"):
        save(conversion, tmp_path / "net.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_replaced_only_with_force(network: Any, saved: Path) -> None:
    before = saved.read_bytes()
    with pytest.raises(UsageError, match="exists: use force=True"):
        save(convert(network), saved)
    assert saved.read_bytes() == before
    save(convert(network), saved, force=True)
    assert read_header(saved).plan.whole


def test_the_permissions_of_the_file_follow_the_umask(network: Any, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save(convert(network), tmp_path / "net.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "net.safetensors").stat().st_mode) == 0o640


def test_a_full_disk_leaves_the_old_file(network: Any, saved: Path) -> None:
    import resource
    import signal

    before = saved.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OutsideError, match="cannot write"):
            save(convert(network), saved, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "is a git-lfs pointer"),
        (b"<!DOCTYPE html><html>not found</html>", "is a web page"),
        (b"\n\n<html>", "is a web page"),
        (b"PK\x03\x04aaaa", "is a pickle, not safetensors: rename it to .pth"),
        (b"\x80\x02}q\x00.", "is a pickle"),
        (b"hello, world, this is text", "is not a whole safetensors file"),
        (struct.pack("<Q", 2**63) + b"{}", "is not a whole safetensors file"),
    ],
)
def test_the_message_for_another_kind_of_file_says_what_it_is(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "net.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_header(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("length", [0x80, 0x180, 0x3C, 0x4B50])
def test_a_header_whose_length_looks_like_another_format_is_read(tmp_path: Path, length: int) -> None:
    """The first bytes are a length, which may look like the start of a pickle, a zip file or a web page."""
    header = b'{"__metadata__":{"format":"pt"}}'
    path = tmp_path / "net.safetensors"
    path.write_bytes(struct.pack("<Q", max(length, len(header))) + header.ljust(length))
    with pytest.raises(InputError, match="is a safetensors file but not a harmonic checkpoint"):
        read_header(path)


def test_a_missing_file_and_a_folder_have_their_own_messages(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="is not a regular file"):
        read_header(tmp_path)


def test_the_message_for_a_plain_safetensors_file_says_how_to_use_it(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(
        InputError, match=r"not a harmonic checkpoint: name its network and give the weights with weights="
    ):
        read_header(tmp_path / "a.safetensors")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.floats(0, 1))
def test_a_truncated_file_raises_input_error(saved: Path, where: float) -> None:
    content = saved.read_bytes()
    cut = saved.with_name("cut.safetensors")
    cut.write_bytes(content[: int(where * (len(content) - 1))])
    with pytest.raises(InputError):
        load(cut, model=seeded(Branches))


def rewritten(path: Path, change: Any) -> Path:
    """Write the checkpoint again with a changed harmconvert header; return its path."""
    with safetensors.safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    header = json.loads(metadata[METADATA_KEY])
    header = change(header) or header
    metadata[METADATA_KEY] = header if isinstance(header, str) else json.dumps(header)
    other = path.with_name("other.safetensors")
    safetensors.torch.save_file(tensors, other, metadata)
    return other


def _set(path: str, value: Any) -> Any:
    def change(header: Any) -> None:
        *parents, last = [int(p) if p.isdigit() else p for p in path.split("/")]
        for parent in parents:
            header = header[parent]
        header[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("format_version", 3), "format version 3, this harmconvert reads versions 1 and 2: update harmconvert"),
        (_set("format_version", True), "format version True"),
        (_set("format_version", None), "format version None"),
        (_set("plan/layers/0/space/basis", "fourier"), "basis 'fourier'"),
        (
            _set("plan/layers/0/space/basis", "klt"),
            "disagree: stem.fitted_basis should have shape [9, 9], it is missing",
        ),
        (_set("plan/layers/0/kernel_size", [10**9, 3]), "this is not a plan"),
        (_set("plan/layers/0/space/frequencies", [[0, -1]]), "this is not a plan"),
        (_set("plan/layers/1/space/frequencies", [[0, 0]]), "disagree: shared.coefficients should hold 1 frequency"),
        (_set("plan/layers/1/name", "elsewhere"), "disagree: elsewhere.coefficients should hold 3"),
        (_set("plan/layers", None), "this is not a plan"),
        (_set("plan", None), "this is not a plan"),
        (_set("tied", 3), "unreadable"),
        (_set("source", 3), "unreadable"),
        (lambda header: "{", "its header is not JSON"),
        (lambda header: "[" * 100_000, "not JSON"),
        (lambda header: "[]", "format version None"),
    ],
)
def test_a_wrong_header_raises_input_error(saved: Path, change: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load(rewritten(saved, change), model=seeded(Branches))
    assert message in str(caught.value)


def test_keys_that_do_not_fit_are_listed_up_to_ten(saved: Path) -> None:
    with pytest.raises(InputError, match="does not fit this ResNet: it has no such layer: stem, shared, tied_a"):
        load(saved, model=timm.create_model("resnet10t"))
    other: Any = seeded(Branches)
    other.norm = torch.nn.Sequential(*(torch.nn.BatchNorm2d(16) for _ in range(4)))
    other.point = torch.nn.Conv2d(16, 5, 1)
    with pytest.raises(InputError) as caught:
        load(saved, model=other)
    text = str(caught.value)
    assert "missing: norm.0.weight" in text
    assert "and 10 more" in text
    assert "norm.weight" in text.split("unexpected: ")[1]
    assert "other shape: point.weight (4, 16, 1, 1) instead of (5, 16, 1, 1)" in text


def test_unknown_forms_are_refused(saved: Path) -> None:
    with pytest.raises(UsageError, match="unknown form 'dens': use one of harmonic, dense"):
        load(saved, model=seeded(Branches), form="dens")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(st.data())
def test_flipped_header_bytes_cause_only_our_own_errors(saved: Path, data: st.DataObject) -> None:
    content = bytearray(saved.read_bytes())
    size = struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 8 + size - 1))] = data.draw(st.integers(0, 255))
    flipped = saved.with_name("flipped.safetensors")
    flipped.write_bytes(bytes(content))
    with contextlib.suppress(HarmconvertError, HarmconvertWarning):  # in tests, warnings are errors
        load(flipped, model=seeded(Branches))


def test_corruption_of_a_tensor_is_reported(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    content[-5] ^= 1
    saved.write_bytes(content)
    with pytest.warns(HarmconvertWarning, match="is damaged, or was changed after harmconvert wrote it"):
        load(saved, model=seeded(Branches))


def test_weights_that_are_not_finite_are_neither_written_nor_read(saved: Path, tmp_path: Path) -> None:
    network = load(saved, model=seeded(Branches))
    with torch.no_grad():
        next(iter(network.parameters())).flatten()[0] = torch.nan
    with pytest.raises(InputError, match="holds NaN or infinite values"):
        save(network, tmp_path / "nan.safetensors")
    assert not (tmp_path / "nan.safetensors").exists()
    tensors = safetensors.torch.load_file(saved)
    with safetensors.safe_open(saved, "pt") as file:
        metadata = file.metadata()
    key = next(key for key in tensors if key.endswith("coefficients"))
    tensors[key].flatten()[0] = torch.inf
    safetensors.torch.save_file(tensors, saved, metadata)
    with (
        pytest.warns(HarmconvertWarning),
        pytest.raises(InputError, match=re.escape(f"{key} holds NaN or infinite values")),
    ):
        load(saved, model=seeded(Branches))


def test_unusual_file_names_are_handled() -> None:
    assert default_name("sample:resnet_mnist5k", "2") == "resnet_mnist5k-harmonic-2.safetensors"
    assert default_name("net.py:make_net", "full") == "make_net-harmonic-full.safetensors"
    assert default_name("local-dir:/some/where/", "full") == "where-harmonic-full.safetensors"
    assert default_name("a-harmonic-full.safetensors", "3") == "a-harmonic-full-harmonic-3.safetensors"


# --- networks with a state dict of their own ---


class _Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = torch.nn.Conv2d(3, 4, 3)
        self.head = torch.nn.Conv2d(4, 4, 3)
        self.register_buffer("mask", torch.ones(2), persistent=False)
        self.register_buffer("steps", torch.tensor(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.frozen(x))


class _WithoutKeywords(_Small):
    def state_dict(self) -> Any:  # type: ignore[override]
        return super().state_dict()


class _LeavesFrozenOut(_Small):
    def state_dict(self, *arguments: Any, **keywords: Any) -> Any:
        whole = super().state_dict(*arguments, **keywords)
        return {key: tensor for key, tensor in whole.items() if "frozen" not in key}


class _Renames(_Small):
    def __init__(self) -> None:
        super().__init__()
        self._register_state_dict_hook(lambda _m, state, _p, _l: {f"net.{key}": value for key, value in state.items()})
        self.head._register_load_state_dict_pre_hook(lambda *_: 1 / 0)


class _Wraps(_Small):
    """A wrapper whose state dict is that of the wrapped network."""

    def state_dict(self, *arguments: Any, **keywords: Any) -> Any:
        return self.head.state_dict(*arguments, **keywords)

    def load_state_dict(self, state: Any, *arguments: Any, **keywords: Any) -> Any:
        return self.head.load_state_dict(state, *arguments, **keywords)


@pytest.mark.parametrize("kind", [_Small, _WithoutKeywords, _LeavesFrozenOut, _Renames, _Wraps])
@pytest.mark.parametrize("form", ["harmonic", "dense"])
def test_a_network_with_its_own_state_dict_is_written_and_read(tmp_path: Path, kind: Any, form: str) -> None:
    network = seeded(kind)
    conversion = convert(network, 2)
    save(conversion, tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert set(file.keys()) == {
            "frozen.coefficients", "frozen.bias", "head.coefficients", "head.bias", "steps",
        }  # fmt: skip
    loaded = load(tmp_path / "a.safetensors", model=seeded(kind, seed=1), form=form)
    x = random_input((1, 3, 9, 9))
    assert torch.allclose(loaded(x), conversion.model(x), atol=1e-6)


def test_a_file_that_could_not_be_loaded_is_not_written(tmp_path: Path, network: Any) -> None:
    conversion = convert(network, 2)
    conversion.model.deep["odd name [x]"].register_buffer("more", torch.zeros(1))
    conversion.model.add_module("late", torch.nn.Conv2d(1, 1, 3))
    save(conversion, tmp_path / "a.safetensors")  # the user may add tensors to the network
    strange = convert(network, 2)
    strange.model.stem = torch.nn.Conv2d(3, 8, 5)
    with pytest.raises(InputError, match=r"what would be written does not fit this Branches: it has no such .*stem"):
        save(strange, tmp_path / "b.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_file_is_read_back_before_it_replaces_the_old_one(
    saved: Path, network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = safetensors.torch.save_file

    def damaged(tensors: Any, path: Path, metadata: Any) -> None:
        write(tensors, path, metadata)
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)

    before = saved.read_bytes()
    monkeypatch.setattr(safetensors.torch, "save_file", damaged)
    with pytest.raises(OutsideError, match="the file that was written cannot be read back unchanged"):
        save(convert(network), saved, force=True)
    assert saved.read_bytes() == before


class _Counting(nn.Module):
    """A module that cannot be copied without values, because copying reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def __deepcopy__(self, memo: Any) -> _Counting:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        copied.sum = float(next(iter(copied.conv.parameters())).sum())
        return copied


def test_a_network_that_cannot_be_copied_without_values_is_checked_with_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "harmconvert"):
        save(convert(seeded(_Counting)), tmp_path / "a.safetensors")
    assert "_Counting is checked with its values: it cannot be copied without them" in caplog.text
    load(tmp_path / "a.safetensors", model=seeded(_Counting))


# --- pre-processing ---


def own() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3))


def test_preprocessing_is_recorded_and_declared_again(tmp_path: Path) -> None:
    given = {"input_size": (1, 9, 9), "mean": (0.13,), "std": (0.31,), "crop_pct": 1.0}
    header = save(convert(own()), tmp_path / "a.safetensors", preprocessing=given)
    assert header.preprocessing == {"input_sizes": [[1, 9, 9]], "mean": [0.13], "std": [0.31], "crop_pct": 1.0}
    assert read_header(tmp_path / "a.safetensors") == header
    for form in ("harmonic", "dense", "factored"):
        model = load(tmp_path / "a.safetensors", model=own(), form=form)
        assert model.pretrained_cfg["mean"] == (0.13,)
        assert default_input(model).shape == (1, 1, 9, 9)
    model = load(tmp_path / "a.safetensors", model=own())
    assert save(model, tmp_path / "b.safetensors").preprocessing == header.preprocessing, "kept unless told otherwise"


def test_sizes_of_several_inputs_are_recorded(tmp_path: Path) -> None:
    save(convert(own()), tmp_path / "a.safetensors", preprocessing={"input_sizes": [(1, 9, 9), (3,)]})
    model = load(tmp_path / "a.safetensors", model=own())
    assert [tensor.shape for tensor in default_input(model, 2)] == [(2, 1, 9, 9), (2, 3)]


def test_a_file_without_a_preprocessing_record_is_read(tmp_path: Path) -> None:
    header = save(convert(own()), tmp_path / "a.safetensors")
    assert header.preprocessing is None
    assert "preprocessing" not in header.to_json(), "nor is its checksum another"


@pytest.mark.parametrize(
    "record",
    [
        3,
        {"input_sizes": [[1 << 40, 1 << 20]]},
        {"input_sizes": [[0, 3, 3]]},
        {"mean": ["a"]},
        {"std": [0.0]},
        {"interpolation": "evil"},
        {"crop_pct": -1},
        {"function": ["a"]},
    ],
)
def test_an_invalid_preprocessing_record_is_refused(tmp_path: Path, record: object) -> None:
    with pytest.raises(InputError, match="preprocessing"):
        Header.from_json({**save(convert(own()), tmp_path / "a.safetensors").to_json(), "preprocessing": record})
    if isinstance(record, dict):
        with pytest.raises(UsageError, match="preprocessing"):
            save(convert(own()), tmp_path / "b.safetensors", preprocessing=record)
    with pytest.raises(UsageError, match="preprocessing has no entry 'colour'"):
        save(convert(own()), tmp_path / "b.safetensors", preprocessing={"colour": 1})
