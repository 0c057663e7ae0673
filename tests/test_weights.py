from __future__ import annotations

import argparse
import collections
import contextlib
import gzip
import hashlib
import pathlib
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from harmconvert.errors import HarmconvertError, InputError
from harmconvert.network import weights_sha256
from harmconvert.storage import load_state, load_weights, read_weights, untied_state, write_tensors
from harmconvert.training import read_identity

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
def test_a_pth_file_without_a_state_dict_raises_input_error(tmp_path: Path, content: Any) -> None:
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
def test_files_that_are_not_weights_are_refused(tmp_path: Path, suffix: str, content: bytes, message: str) -> None:
    path = tmp_path / f"net{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_weights(path)


def test_a_truncated_pth_file_raises_input_error(tmp_path: Path) -> None:
    model = timm.create_model("resnet10t")
    torch.save(model.state_dict(), tmp_path / "net.pth")
    content = (tmp_path / "net.pth").read_bytes()
    for share in (0.01, 0.5, 0.99):
        (tmp_path / "cut.pth").write_bytes(content[: int(len(content) * share)])
        with pytest.raises(InputError, match=r"cut\.pth"):
            read_weights(tmp_path / "cut.pth")


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    state = {k: (v * 9).to(torch.int8) if k.endswith("weight") else v for k, v in seeded(Branches).state_dict().items()}
    with pytest.raises(InputError, match=r"not floating point \(quantised\?\): stem.weight int8"):
        load_state(seeded(Branches), state, "w.pth")


def test_loading_into_a_network_on_the_meta_device_is_refused() -> None:
    state = seeded(Branches).state_dict()
    with torch.device("meta"):
        model = Branches()
    with pytest.raises(InputError, match="the network is on the meta device: build it on the CPU"):
        load_state(model, state, "w.pth")


def test_state_that_is_not_a_tensor_is_not_silently_dropped() -> None:
    class Remembers(nn.Conv2d):
        def get_extra_state(self) -> Any:
            return {"seen": 3}

    with pytest.raises(InputError, match="_extra_state is a dict, which a safetensors file cannot hold"):
        untied_state(Remembers(3, 3, 3))


def test_values_and_names_that_a_file_cannot_hold_are_reported(tmp_path: Path) -> None:
    sparse, double, odd = (nn.Sequential(nn.Conv2d(3, 4, 3)) for _ in range(3))
    sparse.register_buffer("graph", torch.eye(3).to_sparse())
    double.register_buffer("phases", torch.ones(3, dtype=torch.complex128))
    odd.register_buffer("\udc80", torch.ones(1))
    with pytest.raises(InputError, match="graph is a float32 sparse_coo tensor, which a safetensors file cannot"):
        untied_state(sparse)
    with pytest.raises(InputError, match=r"a file cannot hold the name .*\\udc80"):
        untied_state(odd)
    tensors, _ = untied_state(double)
    with pytest.raises(InputError, match="phases: a safetensors file cannot hold complex128 values"):
        write_tensors(tensors, tmp_path / "a.safetensors", {}, force=False)
    assert list(tmp_path.iterdir()) == []
    for network in (sparse, odd):  # networks that cannot be written can still be hashed
        assert len(weights_sha256(network)) == 64


def test_expanded_buffers_are_loaded_with_separate_values() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    network.register_buffer("scale", torch.ones(1).expand(4))
    state = {**network.state_dict(), "scale": torch.arange(4.0)}
    load_state(network, state, "a file")
    assert network.scale.tolist() == [0.0, 1.0, 2.0, 3.0]


# --- containers ---

PLAIN, AVERAGED = {"weight": torch.zeros(2, 1)}, {"weight": torch.ones(2, 1)}


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"params": PLAIN, "params_ema": AVERAGED}, "params_ema"),
        ({"model": PLAIN, "ema": AVERAGED, "updates": 9}, "ema"),
        ({"ema": {"module": AVERAGED, "updates": 3}}, "ema.module"),
        ({"state_dict": PLAIN, "model_ema": AVERAGED}, "model_ema"),
        ({"net": PLAIN, "callbacks": {"EMACallback": {"state": AVERAGED}}}, "callbacks.EMACallback.state"),
        ({"generator": PLAIN, "generator_ema": AVERAGED, "discriminator": PLAIN}, "generator_ema"),
        ({"student": PLAIN, "teacher": AVERAGED}, "teacher"),
        ({"model_ema.weight": AVERAGED["weight"], "model.weight": PLAIN["weight"]}, None),
    ],
)
def test_moving_averages_are_preferred_to_the_weights(tmp_path: Path, content: Any, key: str | None) -> None:
    torch.save(content, tmp_path / "net.pth")
    network = nn.Linear(1, 2, bias=False)
    taken = load_weights(network, tmp_path / "net.pth")
    assert network.weight.sum() == 2
    assert taken == {"file": "net.pth", **({"key": key} if key else {"prefix": "model_ema.", "left_out": ANY})}


@pytest.mark.parametrize(
    "key",
    ["model_state_dict", "net", "network", "network_weights", "weights", "generator", "netG", "backbone", "unheard_of"],
)
def test_state_dicts_are_found_under_the_keys_that_training_scripts_use(tmp_path: Path, key: str) -> None:
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({"epoch": 3, key: AVERAGED, "optimizer": optimizer, "loss": torch.tensor(0.5)}, tmp_path / "net.pth")
    assert read_weights(tmp_path / "net.pth")["weight"].sum() == 2


@pytest.mark.parametrize(
    ("arrange", "key"),
    [
        (lambda state, optimizer: (3, state, optimizer), "1"),
        (lambda state, optimizer: {"models": [state], "opt": optimizer}, "models.0"),
        (lambda state, optimizer: {**state, "epoch": 3, "opt": optimizer, "args": argparse.Namespace()}, None),
    ],
)
def test_the_state_of_an_optimizer_is_not_mistaken_for_a_network(tmp_path: Path, arrange: Any, key: str | None) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2, 1)}}, "param_groups": [{"lr": 0.1}]}
    torch.save(arrange(AVERAGED, optimizer), tmp_path / "net.pth")
    assert load_weights(network := nn.Linear(1, 2, bias=False), tmp_path / "net.pth").get("key") == key
    assert network.weight.sum() == 2


def test_among_several_state_dicts_the_one_that_fits_is_loaded(tmp_path: Path) -> None:
    other = {"weight": torch.zeros(3, 3)}
    torch.save({"encoder": other, "decoder": AVERAGED, "head": {"bias": torch.zeros(1)}}, tmp_path / "net.pth")
    network = nn.Linear(1, 2, bias=False)
    assert load_weights(network, tmp_path / "net.pth")["key"] == "decoder"
    torch.save({"net_a": PLAIN, "net_b": AVERAGED}, tmp_path / "net.pth")
    with pytest.raises(InputError, match=r"holds several state dicts that fit \(net_a, net_b\): say which one"):
        load_weights(network, tmp_path / "net.pth")
    with pytest.raises(InputError, match=r"holds several state dicts \(net_a, net_b\): say which one"):
        read_weights(tmp_path / "net.pth")
    load_weights(network, tmp_path / "net.pth", key="net_b")
    assert network.weight.sum() == 2
    with pytest.raises(InputError, match="no state dict under the key 'net_c'; keys of state dicts in it: net_a"):
        load_weights(network, tmp_path / "net.pth", key="net_c")


def test_a_moving_average_that_does_not_fit_is_not_silently_replaced_by_other_weights(tmp_path: Path) -> None:
    torch.save({"model": PLAIN, "ema": {"shadow": {"bias": torch.zeros(1)}}}, tmp_path / "net.pth")
    network = nn.Linear(1, 2, bias=False)
    with pytest.raises(InputError, match=r"missing: weight.*\(its ema.shadow\); it also holds model "):
        load_weights(network, tmp_path / "net.pth")
    assert load_weights(network, tmp_path / "net.pth", key="model")["key"] == "model"


def test_the_message_for_a_file_without_a_state_dict_names_its_content(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "weights": [1.0, 2.0]}, tmp_path / "net.pth")
    with pytest.raises(InputError, match=r"holds no state dict .*; its keys are epoch, weights"):
        read_weights(tmp_path / "net.pth")


# --- prefixes ---


class Wrapper(nn.Module):
    """A network with a submodule whose name wrappers use, too."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(2, 3))
        self.norm = nn.BatchNorm1d(3)


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "backbone.", "module._orig_mod.", "my.own."])
@pytest.mark.parametrize("child", ["fc", "module", "model"])
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_a_common_prefix_is_dropped_but_not_the_name_of_a_submodule(
    tmp_path: Path, prefix: str, child: str, ending: str
) -> None:
    trained = seeded(lambda: Wrapper(child))
    path = tmp_path / f"net{ending}"
    for start in ("", prefix):
        state = {start + key: tensor for key, tensor in trained.state_dict().items()}
        torch.save(state, path) if ending == ".pth" else safetensors.torch.save_file(state, path)
        network = seeded(lambda: Wrapper(child), seed=1)
        taken = load_weights(network, path)
        assert weights_sha256(network) == weights_sha256(trained)
        assert taken.get("prefix", "") == start


def test_names_of_wrappers_inside_a_network_are_ignored() -> None:
    trained = seeded(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(2, 3)))
    state = {key.replace("0.", "0.module."): tensor for key, tensor in trained.state_dict().items()}
    network = seeded(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(2, 3)), seed=1)
    load_state(network, {**state, "n_averaged": torch.tensor(3)}, "w.pth")
    assert weights_sha256(network) == weights_sha256(trained)


def test_other_weights_are_left_out_only_if_a_known_prefix_separates_them(tmp_path: Path) -> None:
    network = nn.Linear(1, 2, bias=False)
    both = {"model.weight": torch.ones(2, 1), "criterion.weight": torch.zeros(2, 1)}
    torch.save({"state_dict": both}, tmp_path / "net.ckpt")
    taken = load_weights(network, tmp_path / "net.ckpt")
    assert taken == {"file": "net.ckpt", "key": "state_dict", "prefix": "model.", "left_out": "criterion.weight"}
    with pytest.raises(InputError, match=r"unexpected: layer9.weight"):
        load_state(network, {"weight": torch.ones(2, 1), "layer9.weight": torch.ones(1)}, "w.pth")
    with pytest.raises(InputError, match=r"missing: weight; unexpected: layer8.weight, layer9.weight"):
        load_state(network, {"layer8.weight": torch.ones(2, 1), "layer9.weight": torch.ones(1)}, "w.pth")
    with pytest.raises(InputError, match=r"fit under several prefixes, 'net.', 'model.': say which"):
        load_state(network, {"net.weight": torch.ones(2, 1), "model.weight": torch.zeros(2, 1)}, "w.pth")
    load_state(network, {"net.weight": torch.ones(2, 1), "model.weight": torch.zeros(2, 1)}, "w.pth", prefix="model.")
    assert network.weight.sum() == 0


def test_the_message_names_an_unknown_prefix_under_which_names_would_fit(tmp_path: Path) -> None:
    state = {"module.trunk.weight": torch.ones(2, 1), "module.text.bias": torch.zeros(3)}
    torch.save({"state_dict": state}, tmp_path / "net.pth")
    with pytest.raises(InputError, match=r"names that fit under 'module.trunk.': .* \(strip_prefix\)"):
        load_weights(nn.Linear(1, 2, bias=False), tmp_path / "net.pth")
    assert load_weights(nn.Linear(1, 2, bias=False), tmp_path / "net.pth", prefix="module.trunk.")


def test_of_the_two_encoders_of_contrastive_learning_the_trained_one_is_loaded() -> None:
    network = nn.Linear(1, 2, bias=False)
    state = {"module.encoder_q.weight": torch.ones(2, 1), "module.encoder_k.weight": torch.zeros(2, 1)}
    assert load_state(network, {**state, "module.queue": torch.zeros(3)}, "w.pth").prefix == "module.encoder_q."
    assert network.weight.sum() == 2


def test_scalars_may_be_stored_with_one_dimension() -> None:
    network = nn.BatchNorm2d(2)
    load_state(network, {**nn.BatchNorm2d(2).state_dict(), "num_batches_tracked": torch.tensor([7])}, "w.pth")
    assert network.num_batches_tracked == torch.tensor(7)


def test_counters_may_be_missing_or_superfluous() -> None:
    make = lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))  # noqa: E731
    state = seeded(make).state_dict()
    old = {key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")}
    profiled = {**old, "total_ops": torch.zeros(1), "1.total_params": torch.zeros(1)}
    profiled["0.num_batches_tracked"] = state["1.num_batches_tracked"]
    for weights in (old, profiled):
        network = seeded(make, seed=1)
        load_state(network, weights, "w.pth")
        assert weights_sha256(network) == weights_sha256(seeded(make))
    with pytest.raises(InputError, match=r"missing: 1.weight, 1.num_batches_tracked$"):
        load_state(seeded(make), {key: tensor for key, tensor in old.items() if key != "1.weight"}, "w.pth")


# --- other objects in the file ---


def test_other_objects_in_a_file_are_ignored_and_not_imported(tmp_path: Path) -> None:
    beside = {
        "hyper_parameters": argparse.Namespace(lr=0.1, width=[1, 2]),
        "best": np.float64(0.93),
        "folder": pathlib.PurePosixPath("data"),
        "counts": collections.defaultdict(list, {"a": [1]}),
        "history": collections.deque([1, 2]),
        "activation": nn.ReLU(),  # older files contain the source code of its class
    }
    for new in (True, False):
        torch.save({"state_dict": AVERAGED, **beside}, tmp_path / "net.ckpt", _use_new_zipfile_serialization=new)
        assert read_weights(tmp_path / "net.ckpt")["weight"].sum() == 2
    torch.save({"state_dict": {**AVERAGED, "extra": argparse.Namespace()}}, tmp_path / "net.ckpt")
    with pytest.raises(InputError, match=r"would run code: refused .an object of the class argparse.Namespace"):
        read_weights(tmp_path / "net.ckpt")
    torch.save({"model": nn.Linear(1, 2)}, tmp_path / "net.ckpt")
    with pytest.raises(InputError, match=r"holds more than tensors, .*class torch.nn.modules.linear.Linear"):
        read_weights(tmp_path / "net.ckpt")


def test_a_pickle_can_neither_call_nor_change_code_of_its_reader(tmp_path: Path) -> None:
    """Objects in ordinary files become placeholders; a malicious file cannot reach the functions that it names."""

    class Spoils:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (torch.zeros(1).untyped_storage(), 0, (1,), (1,)), {"spoilt": 1}

    class Calls:
        def __reduce__(self) -> Any:
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    for evil in (Spoils(), Calls()):
        torch.save({"state_dict": AVERAGED, "beside": evil, "more": pathlib.PurePath("a")}, tmp_path / "net.pth")
        with contextlib.suppress(InputError):
            read_weights(tmp_path / "net.pth")
    assert not (tmp_path / "ran").exists()
    assert not hasattr(torch._utils._rebuild_tensor_v2, "spoilt")


NAMES = ["model", "ema", "weight", "module.weight", 0, 2.5, None, "state_dict"]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.recursive(
        st.sampled_from([None, True, 3, 0.5, "x", b"b", torch.zeros(2, 1), torch.tensor(3), np.float64(2), {1}]),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.tuples(inner, inner),
            st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
        ),
        max_leaves=8,
    )
)
def test_any_content_of_a_file_is_read_or_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "net.pth")
    for read in (read_weights, lambda path: load_weights(nn.Linear(1, 2, bias=False), path)):
        with contextlib.suppress(InputError):
            read(tmp_path / "net.pth")


@pytest.mark.parametrize(
    "state",
    [None, 3, [], (torch.zeros(1),), {"weight": 3}, {"weight": [1.0]}, {0: torch.zeros(2, 1)}, {"weight": np.ones(2)}],
)
def test_arguments_that_are_not_state_dicts_are_refused(state: Any) -> None:
    with pytest.raises(InputError, match=r"^mine"):
        load_state(nn.Linear(1, 2, bias=False), state, "mine")
    with pytest.raises(HarmconvertError, match="must be the path of a file"):
        read_weights(state)


# --- networks that read or write state dicts in their own way ---


class Renames(nn.Conv2d):
    """A layer that reads files of its first version (weight was named kernel) and derives a number from the weight."""

    scale = 0.0

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        if f"{prefix}kernel" in state:
            state[f"{prefix}weight"] = state.pop(f"{prefix}kernel")
        super()._load_from_state_dict(state, prefix, *rest)
        self.scale = float(self.weight.detach().sum())


def test_a_loading_method_of_the_network_is_used() -> None:
    trained = seeded(lambda: nn.Sequential(Renames(1, 2, 3)))
    for name in ("kernel", "weight"):
        network: Any = seeded(lambda: nn.Sequential(Renames(1, 2, 3)), seed=1)
        load_state(network, {f"0.{name}": trained[0].weight, "0.bias": trained[0].bias}, "w.pth")
        assert weights_sha256(network) == weights_sha256(trained)
        assert network[0].scale == pytest.approx(float(trained[0].weight.detach().sum()))
    with pytest.raises(InputError, match=r"missing: 0.weight, 0.bias; unexpected: 0.core; it does not load"):
        load_state(network, {"0.core": trained[0].weight}, "w.pth")


def test_a_state_dict_method_of_the_network_does_not_hide_tensors() -> None:
    class Hides(nn.Sequential):
        def state_dict(self) -> Any:  # type: ignore[override]
            return {"conv.weight": self[0].weight}

    network = seeded(lambda: Hides(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    plain = seeded(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    assert weights_sha256(network) == weights_sha256(plain)
    assert set(untied_state(network)[0]) == set(plain.state_dict())
    load_state(network, seeded(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), seed=1).state_dict(), "w")
    assert weights_sha256(network) != weights_sha256(plain)


OTHERS = [
    (b"hello world\n" * 90, "it is text"),
    (b'{"weights": [1, 2]}', "it is text"),
    (b"\x89HDF\r\n\x1a\n" + bytes(99), "it is an HDF5 file, as Keras writes"),
    (b"GGUF" + bytes(99), "it is a GGUF file"),
    (b"\x89PNG\r\n\x1a\n" + bytes(99), "it is an image"),
    (pickle.dumps({"a": 1.0}), "it is a pickle that torch.save did not write: save its tensors with torch.save"),
    (safetensors.torch.save({"a": torch.zeros(3)}), "it is a safetensors file: rename it to end in .safetensors"),
    (bytes(257) + b"ustar" + bytes(999), "it is a tar archive: unpack it"),
    (gzip.compress(b"weights"), "it is a gzip archive: unpack it"),
    (bytes(5000), "it is damaged, cut off, or was not written by torch.save: get it again"),
]


@pytest.mark.parametrize(("content", "message"), OTHERS, ids=[message for _, message in OTHERS])
def test_the_message_for_a_file_of_another_format_names_the_format(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "net.pth"
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(f"{path} is not a readable .pth file: {message}")):
        read_weights(path)
    with pytest.raises(InputError, match=re.escape(f"{path} is not a readable training state: {message}")):
        read_identity(path)


def test_truncated_old_files_and_other_archives_have_clear_messages(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save({"a": torch.zeros(99)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for length in (30, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="it is damaged, cut off, or was not written"):
            read_weights(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "none")
    with pytest.raises(InputError, match=r"it is an archive that torch\.save did not write"):
        read_weights(path)
