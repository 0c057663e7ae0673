"""The factored form gives the outputs of the harmonic form, is used where it is faster, and shares its parameters."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import harmconvert as hc
from harmconvert.errors import CheckError, InputError, UsageError
from harmconvert.kernels import frequencies_below, level_count
from harmconvert.layers import (
    FactoredMixin,
    HarmonicMixin,
    LayerInput,
    LowRank,
    RankedMixin,
    Times,
    harmonic_class,
    in_turns,
    layer_times,
    native,
    reason_not_factorable,
    to_dense,
    to_factored,
    to_harmonic,
)
from harmconvert.network import factor, factoring, fuse
from harmconvert.pipeline import convert

from . import oracle
from .networks import CONVOLUTIONS, Branches, random_input, seeded
from .seams import replace_everywhere

X = random_input((2, 3, 24, 24))
COMPILER = native.reason_unavailable()


def truncated(conv: nn.Module, levels: int = 2) -> HarmonicMixin:
    harmonic = to_harmonic(conv, frequencies_below(conv.kernel_size, levels))
    assert isinstance(harmonic, HarmonicMixin)
    return harmonic


def outputs(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return module(x)


def test_a_c_compiler_is_available_for_these_tests() -> None:
    """Without a compiler, half of this file would compare an implementation with itself."""
    assert COMPILER is None


@settings(max_examples=60)
@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    channels=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    levels=st.integers(1, 7),
    batch=st.integers(1, 3),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**20),
)
def test_the_compiled_kernel_computes_the_convolution(
    sizes: tuple[int, int], channels: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int],
    dilation: tuple[int, int], padding: tuple[int, int], levels: int, batch: int, bias: bool, dtype: torch.dtype,
    seed: int,
) -> None:  # fmt: skip
    """The reference is `oracle.convolution`: a sum for every output, in float64."""
    torch.manual_seed(seed)
    size = tuple(max(n, d * (k - 1) + 1 - 2 * p) for n, k, d, p in zip(sizes, kernel, dilation, padding, strict=True))
    conv = nn.Conv2d(*channels, kernel, stride, padding, dilation, bias=bias)
    factored = to_factored(truncated(conv, min(levels, level_count(kernel))).to(dtype))
    x = torch.randn(batch, channels[0], *size).to(dtype)
    merged = to_dense(copy.deepcopy(factored).double())
    kernel_OIAB = merged.weight.detach().numpy()
    expected = oracle.convolution(x.double().numpy(), kernel_OIAB, stride, padding, dilation)
    scale = oracle.convolution(x.double().abs().numpy(), np.abs(kernel_OIAB), stride, padding, dilation).max()
    if bias:
        expected += merged.bias.detach().numpy()[:, None, None]
    found = outputs(factored, x)
    assert factored._packed is not None, "computed another way"
    assert found.shape == expected.shape
    assert found.dtype == dtype
    error = np.abs(found.double().numpy() - expected).max()
    assert error <= (1e-5 if dtype == torch.float32 else 2**-7) * max(1, scale)


@pytest.mark.parametrize(
    ("channels", "size", "batch"), [(160, 16, 2), (64, 30, 3), (512, 5, 2), (33, 17, 1), (700, 3, 1)]
)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_beyond_one_block_and_tile_are_computed_correctly(
    channels: int, size: int, batch: int, threads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "CACHED_RESPONSES", 3 * 512 * 25)  # one image of 512 channels at a time
    conv = truncated(nn.Conv2d(channels, channels + 7, 3, padding=1)).to(dtype)
    x = torch.randn(batch, channels, size, size).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = outputs(to_factored(conv), x)
    finally:
        torch.set_num_threads(before)
    expected = outputs(to_dense(conv.double()), x.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    assert (found - expected).abs().max() < tolerance * expected.abs().max()
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_numbers_that_are_not_finite_stay_so_in_bfloat16() -> None:
    conv = truncated(nn.Conv2d(17, 3, 3, padding=1)).bfloat16()
    for value in (float("nan"), float("inf")):
        x = torch.zeros(1, 17, 5, 9, dtype=torch.bfloat16)
        x[0, 16, 2, 4] = value
        x[0, 3, 0, 0] = value
        found = outputs(to_factored(conv), x)
        assert not found[0, :, 2, 4].isfinite().any()
        assert not found[0, :, 0, 0].isfinite().any()
        assert found[0, :, 4, 8].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_every_class_of_convolution_is_factored_or_has_a_reason(name: str, dtype: torch.dtype) -> None:
    make, shape = CONVOLUTIONS[name]
    conv = truncated(seeded(make, dtype), 1)
    transposed_or_standardised = "Transpose" in name or "Std" in name
    assert (reason_not_factorable(conv) is not None) == transposed_or_standardised
    if transposed_or_standardised:
        return
    factored, x = to_factored(conv), random_input(shape, dtype)
    assert type(factored).__name__ == f"Factored{type(conv).convolution.__name__}"
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert torch.allclose(outputs(factored, x), outputs(conv, x), atol=tolerance, rtol=tolerance)
    assert torch.allclose(outputs(factored, x[0]), outputs(conv, x[0]), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("basis", ["haar", "gaussian", "klt"])
@pytest.mark.parametrize("normalization", ["ortho", "l1"])
def test_layers_in_other_bases_are_factored(basis: str, normalization: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3, padding=1))
    harmonic = convert(network, {"1": 2}, basis=basis, normalization=normalization).model
    factored = factor(harmonic, layers="factored")
    assert isinstance(factored[1], FactoredMixin)
    assert torch.allclose(outputs(factored, X), outputs(harmonic, X), atol=1e-5)


def test_layers_with_a_whole_basis_or_hooks_are_not_factored() -> None:
    assert reason_not_factorable(to_harmonic(nn.Conv2d(3, 4, 3))) == "it keeps the whole basis"
    hooked = truncated(nn.Conv2d(3, 4, 3))
    hooked.register_forward_hook(lambda module, args, output: None)
    assert reason_not_factorable(hooked) == "it has hooks"


# --- gradients, state, and what changes the parameters ---


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(5, 7, 3, padding=1), lambda: nn.Conv2d(4, 6, 3, 2, groups=2)])
def test_gradients_equal_those_of_the_harmonic_form(make: object) -> None:
    harmonic = truncated(make())
    factored = to_factored(harmonic)
    grads = []
    for module in (harmonic, factored):
        x = random_input((2, module.in_channels, 8, 8)).requires_grad_()
        module(x).square().sum().backward()
        grads.append([x.grad, module.coefficients.grad, module.bias.grad])
    for expected, found in zip(*grads, strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


def test_gradients_pass_gradcheck_in_float64() -> None:
    factored = to_factored(truncated(nn.Conv2d(2, 3, 3, padding=1).double()))
    x = random_input((1, 2, 4, 4), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(factored, (x,))


def test_with_frozen_coefficients_only_the_input_gets_gradients() -> None:
    factored = to_factored(truncated(nn.Conv2d(5, 7, 3))).requires_grad_(False)
    x = random_input((1, 5, 8, 8)).requires_grad_()
    factored(x).sum().backward()
    assert x.grad is not None
    assert factored.coefficients.grad is None


def test_training_in_the_factored_form_equals_training_in_the_harmonic_form() -> None:
    networks = [seeded(lambda: convert(Branches(), 2, example_input=X).model)]
    networks.append(factor(networks[0], layers="factored"))
    for network in networks:
        network.train()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            network(X).square().mean().backward()
            optimizer.step()
        network.eval()
    assert torch.allclose(outputs(networks[1], X), outputs(networks[0], X), atol=1e-5)
    before = outputs(networks[1], X)
    networks[1].load_state_dict(
        factor(convert(seeded(Branches), 2, example_input=X).model, layers="factored").state_dict()
    )
    assert not torch.allclose(outputs(networks[1], X), before, atol=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f.coefficients.mul_(2),
        lambda f: setattr(f.coefficients, "data", f.coefficients.data * 2),
        lambda f: setattr(f, "coefficients", nn.Parameter(f.coefficients.detach() * 2)),
        lambda f: f.bias.add_(1),
        lambda f: f.load_state_dict({key: 2 * value for key, value in f.state_dict().items()}),
    ],
)
def test_changed_parameters_take_effect(change: object) -> None:
    factored = to_factored(truncated(nn.Conv2d(5, 7, 3)))
    x = random_input((1, 5, 8, 8))
    before = outputs(factored, x)
    with torch.no_grad():
        change(factored)
    after = outputs(factored, x)
    assert not torch.allclose(before, after, atol=1e-3)
    assert torch.allclose(after, outputs(to_dense(factored), x), atol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))])
def test_copies_are_factored_and_independent(copied: object) -> None:
    factored = to_factored(truncated(nn.Conv2d(5, 7, 3)))
    x = random_input((1, 5, 8, 8))
    expected = outputs(factored, x)
    other = copied(factored)
    assert type(other) is type(factored)
    with torch.no_grad():
        factored.coefficients.zero_()
    assert torch.equal(outputs(other, x), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_supported(dtype: torch.dtype) -> None:
    harmonic = truncated(nn.Conv2d(5, 7, 3))
    x = random_input((1, 5, 8, 8))
    found = outputs(to_factored(harmonic).to(dtype), x.to(dtype))
    assert found.dtype == dtype
    assert torch.allclose(found.float(), outputs(harmonic, x), atol=3e-2 if dtype == torch.bfloat16 else 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert outputs(to_factored(harmonic), x).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(1, 64, 8, 8), (1, 16, 8, 8), (1, 32, 2, 8), (1, 32, 8, 1)])
def test_inputs_of_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    """With wrong channels or a map smaller than the kernel, compiled code would read outside of the tensor."""
    factored = to_factored(truncated(nn.Conv2d(32, 48, 3))).eval()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"channels|Kernel size"):
        factored(torch.randn(shape))
    packed = factored._pack()
    with pytest.raises(RuntimeError, match="a map of 16 channels does not fit this layer"):
        native.run(torch.randn(1, 16, 8, 8), packed, 48, native.Geometry(0, 0, (1, 1), (1, 1), (6, 6)))


def test_nan_is_propagated() -> None:
    factored = to_factored(truncated(nn.Conv2d(5, 7, 3, padding=1)))
    x = torch.zeros(1, 5, 8, 8)
    x[0, 2, 4, 4] = torch.nan
    found = outputs(factored, x)
    assert found[0, :, 3:6, 3:6].isnan().all()
    assert not found[0, :, :3].isnan().any()


# --- factor() ---


def test_factor_keeps_the_state_and_shared_layers() -> None:
    harmonic = convert(seeded(Branches), 2, example_input=X).model
    chosen = factoring(harmonic, layers="factored")
    factored = chosen.model
    assert isinstance(factored.shared, FactoredMixin)
    assert factored.alias is factored.shared
    assert factored.tied_a.coefficients is factored.tied_b.coefficients
    assert type(factored.stem).__name__ == "Conv2d", "the whole basis is merged"
    cut = [
        name for name, m in harmonic.named_modules() if isinstance(m, HarmonicMixin) and not reason_not_factorable(m)
    ]
    assert chosen.factored == tuple(cut)
    assert torch.allclose(outputs(factored, X), outputs(harmonic, X), atol=1e-5)
    assert torch.allclose(outputs(fuse(factored), X), outputs(harmonic, X), atol=1e-5)
    assert set(fuse(factored).state_dict()) == set(seeded(Branches).state_dict())
    assert hc.verify(seeded(Branches), factored, X).as_planned
    assert not any(isinstance(module, FactoredMixin) for module in harmonic.modules())


def test_factor_measures_and_never_makes_the_network_slower() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 96, 3), nn.Conv2d(96, 96, 3, padding=1), nn.Conv2d(96, 4, 3), nn.Conv2d(4, 4, 3)
    )
    harmonic = convert(network.eval(), 1).model
    x = random_input((8, 3, 24, 24))
    chosen = factoring(harmonic, x)
    factored = chosen.model
    record = chosen
    assert [layer.name for layer in record.layers] == ["0", "1", "2", "3"]
    assert record.layers[0].why == "it keeps the whole basis"
    for layer in record.layers[1:]:
        assert layer.dense_seconds > 0
        assert layer.factored_seconds > 0
        assert (layer.form == "factored") == isinstance(factored[int(layer.name)], FactoredMixin)
    assert torch.allclose(outputs(factored, x), outputs(harmonic, x), atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "whole", "form"),
    [
        ((2.0, 1.0), {"dense": 5.0, "dense, channels_last": 4.0, "factored": 3.0}, "factored"),
        ((2.0, 1.0), {"dense": 5.0, "dense, channels_last": 4.0, "factored": 4.5}, "dense, channels_last"),
        ((2.0, 1.0), {"dense": 4.0, "dense, channels_last": 5.0, "factored": 4.5}, "dense"),
        ((1.0, 2.0), {"dense": 4.0, "dense, channels_last": 5.0}, "dense"),
        ((1.0, 0.99), {"dense": 5.0, "dense, channels_last": 4.0}, "dense, channels_last"),
    ],
)
def test_factor_chooses_the_fastest_whole_network(
    monkeypatch: pytest.MonkeyPatch, layer: tuple[float, float], whole: dict[str, float], form: str
) -> None:
    """The times are fixed. However fast single layers are, the network never gets slower."""
    replace_everywhere(monkeypatch, layer_times, lambda conv, layer_input: layer)
    replace_everywhere(monkeypatch, in_turns, lambda runs, *_: {name: Times((whole[name],)) for name in runs})
    harmonic = convert(seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))), {"*": 1}).model
    chosen = factoring(harmonic, X)
    taken = whole[form]
    assert taken == min(whole.values())
    assert chosen.factored == (("0", "1") if form == "factored" else ())
    assert chosen.dense_seconds == min(seconds for name, seconds in whole.items() if name != "factored")
    assert chosen.factored_seconds == whole.get("factored")
    assert (chosen.factored_seconds if chosen.factored else chosen.dense_seconds) == taken
    assert [isinstance(module, FactoredMixin) for module in chosen.model] == [form == "factored"] * 2
    kernel = next(chosen.model.parameters())
    channels_last = kernel.is_contiguous(memory_format=torch.channels_last) and not kernel.is_contiguous()
    assert form == "factored" or channels_last == (form == "dense, channels_last")
    if "factored" in whole and form != "factored":
        assert {one.why for one in chosen.layers} == {"factored, the whole network is no faster"}
    assert torch.allclose(outputs(chosen.model, X), outputs(harmonic, X), atol=1e-5)


@pytest.mark.parametrize(("first", "factored"), [((2.0, 1.0), True), ((1.0, 2.0), False)])
def test_the_first_of_two_layers_has_the_faster_form(
    monkeypatch: pytest.MonkeyPatch, first: tuple[float, float], factored: bool
) -> None:
    """The times are fixed: two layers are faster than one, and the first of them has each of the two forms once."""
    replace_everywhere(
        monkeypatch, layer_times, lambda layer, _: (4.0, 1.0) if isinstance(layer, RankedMixin) else first
    )
    times = {"dense": 5.0, "dense, channels_last": 4.0, "factored": 3.0}
    replace_everywhere(monkeypatch, in_turns, lambda runs, *_: {name: Times((times[name],)) for name in runs})
    ranked = convert(seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3))), {"1": 2}, rank=3).model
    chosen = factoring(ranked, X)
    (two,) = (layer for layer in chosen.model if isinstance(layer, LowRank))
    assert isinstance(two.first, FactoredMixin) == factored
    assert [layer.first for layer in chosen.layers if layer.name == "1"] == ["factored" if factored else "dense"]
    assert torch.allclose(outputs(chosen.model, X), outputs(ranked, X), atol=1e-5)


def test_factor_measures_at_the_input_size_of_the_network_by_default() -> None:
    harmonic = convert(hc.open_source("sample:resnet_mnist5k").model, 2).model
    assert factoring(harmonic).dense_seconds > 0


def test_patterns_choose_the_form_without_measurement() -> None:
    harmonic = convert(seeded(Branches), 2, example_input=X).model
    chosen = factoring(harmonic, layers={"*": "dense", "tied_*": "factored"})
    assert chosen.factored == ("tied_a", "tied_b")
    assert {layer.why for layer in chosen.layers if layer.form == "dense"} == {"as asked for"}


@pytest.mark.parametrize(
    ("layers", "x", "message"),
    [
        ("quick", X, "unknown form 'quick'"),
        ({"nothing*": "dense"}, X, "no harmonic convolution matches 'nothing\\*'"),
        ("measured", None, "give example_input"),
        ("measured", torch.zeros(1, 5, 24, 24), "does not run on an example input of shape \\(1, 5, 24, 24\\)"),
    ],
)
def test_factor_refuses_invalid_arguments(layers: object, x: object, message: str) -> None:
    harmonic = convert(seeded(Branches), 2, example_input=X).model
    with pytest.raises(UsageError, match=message):
        factor(harmonic, x, layers=layers)


def test_a_network_without_truncated_layers_is_fused() -> None:
    chosen = factoring(seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())), X)
    factored = chosen.model
    assert chosen.layers == ()
    assert type(factored[0]) is nn.Conv2d


@pytest.mark.slow
def test_layer_times_are_stored_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARMCONVERT_CACHE", str(tmp_path))
    conv, layer_input = truncated(nn.Conv2d(3, 4, 3)), LayerInput((1, 3, 8, 8), torch.float32, torch.device("cpu"))
    times = layer_times(conv, layer_input)
    [path] = tmp_path.glob("layer-times-*.json")
    [(key, kept)] = json.loads(path.read_text()).items()
    assert tuple(kept) == times
    assert layer_times(conv, layer_input) == times
    path.write_text(json.dumps({key: [7.0, 5.0]}))
    read = (
        "import json, sys; from tests.test_forms import *; torch.set_num_threads(int(sys.argv[1])); print(layer_times("
    )
    read += "truncated(nn.Conv2d(3, 4, 3)), LayerInput((1, 3, 8, 8), torch.float32, torch.device('cpu'))))"
    done = subprocess.run([sys.executable, "-c", read, str(torch.get_num_threads())], capture_output=True, text=True)
    assert done.stdout.strip() == "(7.0, 5.0)", done.stderr


@pytest.mark.parametrize("damage", ["", "[1", '{"a": 1}', '{"a": ["x", 1]}', "[]"])
def test_a_damaged_file_of_times_is_measured_again(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conv, layer_input = truncated(nn.Conv2d(3, 4, 3)), LayerInput((1, 3, 8, 8), torch.float32, torch.device("cpu"))
    monkeypatch.setenv("HARMCONVERT_CACHE", str(tmp_path / "first"))
    layer_times(conv, layer_input)
    [path] = (tmp_path / "first").glob("layer-times-*.json")
    monkeypatch.setenv("HARMCONVERT_CACHE", str(tmp_path / "damaged"))
    (tmp_path / "damaged").mkdir()
    damaged = tmp_path / "damaged" / path.name
    damaged.write_text(damage)
    times = layer_times(conv, layer_input)
    assert all(t > 0 for t in times)
    assert [*json.loads(damaged.read_text()).values()] == [[*times]]


@pytest.mark.parametrize("setting", [{"HARMCONVERT_NATIVE": "0"}, {"CC": "no-such-compiler"}, {"CC": "false"}])
@pytest.mark.slow
def test_without_a_compiler_the_operators_of_torch_are_used(setting: dict[str, str], tmp_path: Path) -> None:
    code = (
        "from tests.test_forms import *\n"
        "assert native.reason_unavailable(), 'compiled all the same'\n"
        "harmonic = convert(seeded(Branches), 2, example_input=X).model\n"
        "factored = factor(harmonic, layers='factored')\n"
        "assert factored.shared._packed is None\n"
        "assert torch.allclose(outputs(factored, X), outputs(harmonic, X), atol=1e-5)\n"
        "print(native.reason_unavailable())"
    )
    env = {**os.environ, **setting, "HARMCONVERT_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert next(iter(setting.values())) in done.stdout or "no compiled kernel" in done.stdout


def test_a_library_that_another_user_could_have_written_is_not_loaded(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    code = "from harmconvert.layers import native; print(native.reason_unavailable())"
    env = {**os.environ, "HARMCONVERT_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert f"others may write in {tmp_path}: chmod go-w it" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_library_is_compiled_once_and_written_completely(tmp_path: Path) -> None:
    """Several processes compile at the same time: each of them loads the library, and one file remains."""
    code = (
        "from harmconvert.layers import native; assert native.reason_unavailable() is None, native.reason_unavailable()"
    )
    env = {**os.environ, "HARMCONVERT_CACHE": str(tmp_path)}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=env) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"]


def test_a_checkpoint_is_loaded_in_factored_form(tmp_path: Path) -> None:
    network = hc.open_source("sample:resnet_mnist5k").model
    conversion = hc.convert(network, 2)
    hc.save(conversion, tmp_path / "a.safetensors")
    assert factoring(hc.load(tmp_path / "a.safetensors")).dense_seconds > 0
    x = torch.randn(16, 1, 28, 28)
    factored = hc.load(tmp_path / "a.safetensors", model=network, form="factored", example_input=x)
    assert len(factoring(hc.load(tmp_path / "a.safetensors", model=network), x).layers) == 19
    assert torch.allclose(outputs(factored, x), outputs(conversion.model, x), atol=1e-4)


@pytest.mark.slow
def test_the_factored_form_works_with_torch_compile() -> None:
    harmonic = convert(seeded(Branches), 2, example_input=X).model
    factored = factor(harmonic, layers="factored")
    compiled = torch.compile(factored, fullgraph=True)
    assert torch.allclose(outputs(compiled, X), outputs(harmonic, X), atol=1e-5)


def test_timed_forms_alternate_and_their_runs_are_counted() -> None:
    seen: list[str] = []
    times = in_turns({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 4, warm=1)
    assert seen == ["a", "b", *["a", "a", "b", "b"] * 4]  # a run that is not timed before each one that is
    assert {len(t.seconds) for t in times.values()} == {4}
    assert times["a"].median > 0


def test_harmonic_and_factored_classes_are_cached() -> None:
    assert harmonic_class(nn.Conv2d) is harmonic_class(nn.Conv2d)
    assert type(to_factored(truncated(nn.Conv2d(1, 1, 3)))) is type(to_factored(truncated(nn.Conv2d(2, 1, 3))))


def test_merged_kernels_out_of_range_are_refused_and_the_layer_named() -> None:
    harmonic = nn.Sequential(to_harmonic(nn.Conv2d(1, 1, 3).half()))
    with torch.no_grad():
        harmonic[0].coefficients.fill_(65000.0)  # the sum at the first position is out of range
    for make in (fuse, lambda model: factor(model, layers="dense")):
        with pytest.raises(InputError, match="layer 0: its merged kernels are out of float16's range"):
            make(harmonic)
    with torch.no_grad():
        harmonic[0].coefficients[0, 0, 0] = float("nan")
    assert fuse(harmonic)[0].weight.isnan().any(), "what was NaN before is no matter of range"


def test_a_network_without_values_cannot_be_measured() -> None:
    conversion = convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)).to("meta"), 2)
    with pytest.raises(InputError, match=r"layer 1 has no values to measure with \(meta device\)"):
        factor(conversion.model, torch.zeros(1, 3, 8, 8))
    assert factor(conversion.model, layers="dense")[1].weight.is_meta


# --- each form is compared with the network before it is handed back ---


def _circular_in_x(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    padded = nn.functional.pad(nn.functional.pad(x, (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1))
    return nn.functional.conv2d(padded, weight, bias)


def _plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))


@pytest.mark.parametrize("layers", ["measured", "factored", {"2": "factored"}])
@pytest.mark.parametrize("method", ["_conv_forward", "forward"])
def test_a_layer_with_its_own_forward_method_stays_dense(method: str, layers: object) -> None:
    harmonic = convert(seeded(_plain), {"2": 2}, example_input=X).model
    conv = harmonic[2]
    if method == "_conv_forward":
        conv._conv_forward = _circular_in_x.__get__(conv)
    else:
        conv.forward = lambda x, conv=conv: nn.functional.conv2d(x, conv.weight, conv.bias).abs()
    chosen = factoring(harmonic, X, layers=layers)
    factored = chosen.model
    assert chosen.layers[-1].why == f"its method {method} is not the one of Conv2d"
    assert torch.allclose(outputs(factored, X), outputs(harmonic, X), atol=1e-5)


def test_a_method_replaced_for_all_convolutions_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", _circular_in_x)
    harmonic = convert(seeded(_plain), {"2": 2}, example_input=X).model
    chosen = factoring(harmonic, X, layers="factored")
    factored = chosen.model
    assert chosen.factored == ()
    assert torch.allclose(outputs(factored, X), outputs(harmonic, X), atol=1e-5)


@pytest.mark.parametrize("x", [X, None])
def test_a_factored_layer_with_other_outputs_stays_dense(x: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    harmonic = convert(seeded(Branches), 2, example_input=X).model
    run = FactoredMixin._run_native
    monkeypatch.setattr(
        FactoredMixin, "_run_native", lambda self, *args: run(self, *args) * (2 if self.dilation == (2, 2) else 1)
    )
    chosen = factoring(harmonic, x, layers="factored")
    factored = chosen.model
    record = {layer.name: layer for layer in chosen.layers}
    assert record["tied_b"].form == "dense"
    assert record["tied_b"].why.startswith("factored, outputs differ by")
    assert record["tied_a"].form == "factored"
    assert torch.allclose(outputs(factored, X), outputs(harmonic, X), atol=1e-5)


def test_a_network_that_needs_contiguous_maps_stays_dense() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.second(self.first(x))
            return y.view(len(y), -1)

    harmonic = convert(seeded(Flat), {"*": 1}, example_input=X).model
    for layers in ("factored", "measured"):
        factored = factor(harmonic, X, layers=layers)
        assert torch.allclose(outputs(factored, X), outputs(harmonic, X), atol=1e-5)
    assert "it does not run: RuntimeError: view size" in factoring(harmonic, X, layers="factored").layers[0].why


@pytest.mark.parametrize("x", [X, None])
def test_a_dense_form_with_other_outputs_is_not_returned(x: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(conv: nn.Module, memo: dict[int, object] | None = None) -> nn.Module:
        dense = to_dense(conv, memo)
        if conv.out_channels == 16:
            dense.weight.data.mul_(2)
        return dense

    harmonic = convert(seeded(Branches), 2, example_input=X).model
    replace_everywhere(monkeypatch, to_dense, doubled)
    message = r"the dense form of this Branches does not compute what.*layer deep.odd name \[x\]: outputs differ by"
    with pytest.raises(CheckError, match=message):
        fuse(harmonic, x)
    with pytest.raises(CheckError, match=message):
        factor(harmonic, x, layers="dense")


def test_kernels_written_in_the_forward_pass_prevent_a_dense_form() -> None:
    class Merging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
            self.source = nn.Parameter(torch.ones(4, 8, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            self.second.weight.data = self.source.data * 0.01
            return self.second(self.first(x))

    network = seeded(Merging)
    harmonic = nn.Sequential(network)
    network.second = truncated(network.second)
    with pytest.raises(CheckError, match="outputs differ by"):
        fuse(harmonic, X)


def test_networks_whose_outputs_cannot_be_compared_are_compared_layer_by_layer() -> None:
    """They return no tensor, or another one in each run."""

    class Odd(nn.Module):
        def __init__(self, change: object) -> None:
            super().__init__()
            self.first, self.second, self.change = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), change

        def forward(self, x: Tensor) -> object:
            return self.change(self.second(self.first(x)))

    for change in (lambda y: y.detach().numpy(), lambda y: None, lambda y: {"a": None, "b": y + np.random.rand()}):
        harmonic = convert(seeded(lambda change=change: Odd(change)), {"*": 2}, example_input=X).model
        assert isinstance(factor(harmonic, X, layers="factored").second, FactoredMixin)
        assert type(fuse(harmonic, X).second) is nn.Conv2d


def test_fuse_refuses_an_input_on_which_it_cannot_compare() -> None:
    harmonic = convert(seeded(Branches), 2, example_input=X).model
    with pytest.raises(UsageError, match=r"does not run on an example input of shape \(1, 5, 24, 24\)"):
        fuse(harmonic, torch.zeros(1, 5, 24, 24))


def test_comparing_and_timing_do_not_change_the_network() -> None:
    harmonic = convert(seeded(_plain), {"2": 2}, example_input=X).model
    seen: list[int] = []
    harmonic[1].register_forward_hook(lambda *_: seen.append(1))
    factor(harmonic, X)
    fuse(harmonic, X)
    assert seen == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_in_sixteen_bits_are_factored(dtype: torch.dtype) -> None:
    """Either the whole network is in 16 bits, or only its convolutions; the latter runs only in float32."""
    for change in (lambda net: net.to(dtype), lambda net: net[2].to(dtype)):
        network = seeded(_plain)
        change(network)
        harmonic = convert(network, {"2": 2}).model
        for layers in ("measured", "factored"):
            factored = factor(harmonic, X, layers=layers)
            assert {p.dtype for p in factored[2].parameters()} == {dtype}
            expected = outputs(copy.deepcopy(harmonic).float(), X)
            assert torch.allclose(outputs(copy.deepcopy(factored).float(), X), expected, atol=0.05)


@pytest.mark.parametrize(
    "draw",
    [nn.functional.dropout, lambda y: y * random.random(), lambda y: y + np.random.rand()],
    ids=["dropout", "random", "numpy"],
)
def test_a_network_with_random_numbers_in_its_forward_pass_is_fused_and_factored(draw: object) -> None:
    """With the same seed, torch generates other values for another memory format."""

    class Draws(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](draw(self[0](x))).mean((2, 3))

    network = seeded(lambda: Draws(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)))
    assert hc.verify(network, convert(network).model, X).ok
    factor(convert(network, {"1": 2}).model, X)


def test_a_checkpoint_loaded_as_dense_is_compared_on_the_example_input(tmp_path: Path) -> None:
    network = seeded(Branches).float().eval()
    hc.save(hc.convert(network, 2), tmp_path / "cut.safetensors")
    dense = hc.load(tmp_path / "cut.safetensors", model=network, form="dense", example_input=random_input((2, 3, 9, 9)))
    assert not any(isinstance(module, HarmonicMixin) for module in dense.modules())
    with pytest.raises(UsageError, match=r"does not run on an example input of shape \(2, 5, 9, 9\)"):
        hc.load(tmp_path / "cut.safetensors", model=network, form="dense", example_input=random_input((2, 5, 9, 9)))
