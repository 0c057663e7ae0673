"""The vectors of a coded network, such as batch norms: rounded to coarse grids, and packed in its file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import harmconvert as hc
from harmconvert.calibration import CalibrationContext, CalibrationSettings, calibrating
from harmconvert.codecs import PACKED, CodecTable, packed_entry
from harmconvert.errors import InputError
from harmconvert.plan import round_vectors, rounded_vectors
from harmconvert.plan.precision import VECTOR_BITS
from harmconvert.storage import read_checkpoint, read_header
from harmconvert.storage.history import MOST_LAYERS, with_layers

from . import second_reader
from .networks import random_input, seeded

WIDTH = 80
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
X = random_input((4, 3, 12, 12))


class Wide(nn.Sequential):
    """A network whose vectors are long enough to be packed; no channel has the same statistics as another."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, groups=WIDTH), nn.BatchNorm2d(WIDTH), nn.PReLU(WIDTH),
            nn.Conv2d(WIDTH, WIDTH, 1), nn.GroupNorm(4, WIDTH), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(4 * WIDTH, 70),
        )  # fmt: skip
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.data.normal_(1, 0.4)
                module.bias.data.normal_(0, 0.3)
                module.running_mean.normal_(0, 0.5)  # type: ignore[union-attr]
                module.running_var.copy_(torch.randn(WIDTH).mul(1.5).exp())  # type: ignore[union-attr]


def wide() -> nn.Module:
    return seeded(Wide).eval()


def norm_of(weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(len(weight)).eval()
    state = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": variance}
    norm.load_state_dict(state, strict=False)
    return norm


# --- the codec ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@given(values=st.lists(FLOATS, min_size=1, max_size=90))
def test_packing_is_lossless_or_refused(dtype: torch.dtype, values: list[float]) -> None:
    tensor = torch.tensor(values).to(dtype)
    tensor = tensor[torch.isfinite(tensor)]
    if not len(tensor):
        return
    try:
        entry = PACKED.entry(tensor)
    except ValueError:
        exponents = np.frexp(tensor.double().numpy())[1]
        assert exponents.max() - exponents.min() + 53 > 31, "values this near to each other fit into 31 bits"
        return
    PACKED.check(entry)
    stream = PACKED.encode(tensor, entry)
    assert tuple(stream.shape) == PACKED.stored(entry)[0]
    assert torch.equal(PACKED.decode(stream, entry), tensor)


@given(st.lists(st.integers(-(2**20), 2**20), min_size=64, max_size=200), st.integers(-40, 40))
def test_the_bits_of_a_number_are_as_few_as_their_range_needs(numbers: list[int], exponent: int) -> None:
    common = math.gcd(*numbers) or 1
    power = common & -common
    entry = PACKED.entry(torch.tensor(numbers, dtype=torch.float64) * 2.0**exponent)
    bits = ((max(numbers) - min(numbers)) // power).bit_length()
    assert entry.parameters["bytes"] == 8 + -(-bits * len(numbers) // 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_powers_of_a_fourth_root_need_the_bits_of_their_exponents(dtype: torch.dtype) -> None:
    tensor = torch.from_numpy(2.0 ** (np.arange(-20, 44) / 4)).to(dtype)
    entry = PACKED.entry(tensor)
    assert entry.parameters["bytes"] == 8 + 64 * 6 // 8
    assert torch.equal(PACKED.decode(PACKED.encode(tensor, entry), entry), tensor)
    actual = second_reader.packed([64, 0, "float64"], bytes(PACKED.encode(tensor, entry).numpy()))
    assert torch.equal(torch.from_numpy(actual).to(dtype), tensor)


def test_only_vectors_that_become_smaller_are_packed() -> None:
    grid, noise = torch.arange(64.0), torch.randn(64)
    assert packed_entry("norm.weight", grid) is not None
    assert packed_entry("norm.weight", noise) is None
    assert packed_entry("norm.weight", grid[:31]) is None, "its entry in the codec table costs what is saved"
    assert packed_entry(100 * "long", grid) is None
    assert packed_entry("norm.weight", grid.long()) is None
    assert packed_entry("norm.weight", grid[:, None]) is None
    assert packed_entry("norm.weight", torch.where(grid > 5, grid, torch.nan)) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: 2}, "its grid is unknown"),
        ({2: 100}, "its grid is unknown"),
        ({7: 200}, "its grid is unknown"),
        ({7: 5}, "do not hold 65 numbers of 5 bits"),
        ({-1: 255}, "bits after its last number are not zero"),
        ({0: 1, 5: 100}, "a value is out of range"),
    ],
)
def test_a_damaged_stream_is_refused(change: dict[int, int], message: str) -> None:
    tensor = torch.arange(65.0)
    entry = PACKED.entry(tensor)
    stream = PACKED.encode(tensor, entry).clone()
    for place, value in change.items():
        stream[place] = value
    with pytest.raises(ValueError, match=message):
        PACKED.decode(stream, entry)
    with pytest.raises(ValueError, match="the stream ends in its prefix"):
        PACKED.decode(stream[:7], entry)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([64, 72, "int64"], "not a floating-point"),
        ([64, 72, "float"], "unknown dtype 'float'"),
        ([0, 8], "not that of a vector"),
        ([64, -1], "bytes"),
        ([64, "72"], "bytes"),
        ([[64], 72], "shape"),
        ([64], "not a list of the length, the bytes and the dtype"),
        ([64, 72, "float32", 1], "not a list of the length, the bytes and the dtype"),
        ({"shape": [64], "dtype": "float32", "bytes": 72}, "not a list of the length"),
    ],
)
def test_an_invalid_entry_is_refused(entry: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"codec table is unreadable.*{message}"):
        CodecTable.from_json({"packed": {"version": 1, "tensors": {"a": entry}}})


# --- rounding ---


@pytest.mark.parametrize("bits", VECTOR_BITS)
@given(seed=st.integers(0, 1000), spread=st.floats(0, 4))
def test_a_rounded_norm_has_the_same_output_apart_from_the_steps_of_its_weight_and_bias(
    bits: int, seed: int, spread: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, bias, mean = (torch.randn(50, generator=generator) for _ in range(3))
    variance = (spread * torch.randn(50, generator=generator)).exp()
    norm = norm_of(weight, bias, 3 * mean * variance.sqrt(), variance).double()
    inputs = norm.running_mean + variance.sqrt() * torch.randn(200, 50, generator=generator)  # type: ignore[operator]
    expected = norm(inputs)
    round_vectors(norm, bits)
    difference = (norm(inputs) - expected).abs().amax(0)
    weight_step, bias_step = (
        2.0**-bits * float(one.square().mean().sqrt()) for one in (norm.weight.detach(), norm.bias.detach())
    )
    deviations = ((inputs - norm.running_mean).abs() / (norm.running_var + norm.eps).sqrt()).amax(0)  # type: ignore[operator]
    assert (difference <= 1.01 * (deviations * weight_step + bias_step)).all()
    exponents = 4 * norm.running_var.log2()  # type: ignore[union-attr,operator]
    assert torch.allclose(exponents, exponents.round(), atol=1e-9)
    assert (norm.running_var / variance - 1).abs().max() < 0.1, "in training, the output changes little"  # type: ignore[operator]


def test_channels_without_variance_keep_their_output() -> None:
    mean, variance = torch.arange(40.0), torch.tensor([0.0, 1e-9, 1, 4]).repeat(10)
    norm = norm_of(torch.ones(40), torch.ones(40), mean, variance)
    inputs = mean.repeat(2, 1)
    before = norm(inputs)
    round_vectors(norm, 12)
    assert torch.allclose(norm(inputs), before, atol=1e-3)
    assert (norm.running_var > 0).all()  # type: ignore[operator]


@pytest.mark.parametrize("state", [{"running_var": 65000.0}, {"eps": 0.0, "running_var": 0.0}])
def test_all_vectors_of_a_norm_are_rounded_or_none(state: dict[str, float]) -> None:
    norm = norm_of(torch.randn(40), torch.randn(40), torch.randn(40), torch.full((40,), state["running_var"]))
    norm.eps = state.get("eps", norm.eps)
    assert not rounded_vectors(norm.half(), 8)


def test_only_vectors_of_known_layers_are_rounded() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(70))
            self.register_buffer("window", torch.randn(70))

    network = nn.ModuleDict({
        "own": Own(), "plain": nn.BatchNorm2d(70, affine=False), "linear": nn.Linear(3, 70), "norm": nn.LayerNorm(70),
        "forgets": nn.BatchNorm2d(70, track_running_stats=False), "lstm": nn.LSTM(3, 70),
    })  # fmt: skip
    network["short"] = nn.BatchNorm2d(31)
    assert {*rounded_vectors(network, 8)} == {
        "linear.bias", "norm.weight", "norm.bias", "forgets.weight", "forgets.bias",
    }  # fmt: skip


def test_a_norm_with_a_shared_weight_keeps_its_statistics() -> None:
    network = wide()
    network[4].weight = network[1].weight
    rounded = rounded_vectors(network, 8)
    assert not {key for key in rounded if "running" in key}
    assert torch.equal(rounded["1.weight"], rounded["4.weight"])


# --- networks and files ---


def test_the_file_of_a_coded_network_is_smaller_and_has_the_same_outputs(tmp_path: Path) -> None:
    network = wide()
    conversion = hc.convert(network, bits=4)
    saved = tmp_path / "coded.safetensors"
    header = hc.save(conversion, saved)
    assert {"1.weight", "1.running_mean", "1.running_var", "4.bias", "5.weight"} <= {*header.codecs.packed}
    assert {*header.codecs.coded} == {*conversion.coded}
    assert read_header(saved).codecs == header.codecs
    stored = second_reader.container(saved.read_bytes())[0]
    floats = sum(4 * tensor.numel() for tensor in network.state_dict().values() if tensor.dim() == 1)
    packed = sum(stored[key]["data_offsets"][1] - stored[key]["data_offsets"][0] for key in header.codecs.packed)
    assert packed < 0.4 * floats
    loaded = hc.load(saved, model=wide())
    state = loaded.state_dict()
    assert all(torch.equal(state[key], value) for key, value in conversion.model.state_dict().items())
    read = second_reader.read(saved)
    assert all(np.array_equal(read.tensors[key], state[key].numpy()) for key in header.codecs.packed)
    assert not hc.verify(network, read_checkpoint(saved, model=wide()), X).problems
    rounded = wide()
    round_vectors(rounded, VECTOR_BITS[0])
    change, coded = ((one.eval()(X) - network(X)).square().mean() for one in (rounded, loaded))
    assert change < 1e-2 * coded, "far below the rounding of the weights"


def test_verify_accepts_rounded_vectors_and_no_others() -> None:
    network = wide()
    conversion = hc.convert(network, bits=4)
    assert not hc.verify(network, conversion, X).problems
    with torch.no_grad():
        conversion.model[1].bias[3] += 2**-6
    assert hc.verify(network, conversion, X).problems == ("1.bias: differs from the original's",)


def test_bits_for_single_layers_leave_all_vectors_as_they_are() -> None:
    network = wide()
    conversion = hc.convert(network, bits={"0": 4}, calibration=[X])
    state = conversion.model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in network.state_dict().items() if "running" in key)


@pytest.mark.parametrize("bits", [3, 8])
def test_on_calibration_inputs_the_divergence_is_that_of_the_rounded_network(bits: float, tmp_path: Path) -> None:
    network, batches = wide(), [random_input((16, 3, 12, 12), seed=seed) for seed in range(4)]
    conversion = hc.convert(network, bits=bits, calibration=batches)
    assert conversion.calibration is not None
    context = CalibrationContext.of(network, batches, CalibrationSettings())
    assert conversion.calibration.divergence == pytest.approx(context.compare(conversion.model)[0])
    header = hc.save(conversion, tmp_path / "coded.safetensors")
    assert header.codecs.packed
    assert not {*header.calibrated} & {"1.running_var"}, "rounding alone is no calibration"
    assert not hc.verify(network, read_checkpoint(tmp_path / "coded.safetensors", model=wide()), X).problems


def test_verify_accepts_vectors_that_were_calibrated_and_then_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrating, "BATCH_NORM_GAIN", 100.0)
    network, inputs = wide(), random_input((32, 3, 12, 12))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    network.train()(inputs)  # the statistics are those of the inputs, so that they can be estimated again
    network.eval()
    conversion = hc.convert(network, 2, bits=2, calibration=[inputs])
    assert conversion.calibration is not None
    assert conversion.calibration.batch_norms == 2
    assert {"1.weight", "1.running_var", "4.running_mean"} <= {*conversion.calibration.changed}
    assert not hc.verify(network, conversion, X).problems
    with torch.no_grad():
        conversion.model[1].weight[0] += 0.5
    assert hc.verify(network, conversion, X).problems == ("1.weight: is not what calibration wrote",)


def test_vectors_stay_if_rounding_them_would_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    from harmconvert.calibration import vectors

    monkeypatch.setattr(vectors, "MOST_CHANGE", 0.0)
    network = wide()
    conversion = hc.convert(network, bits=3, calibration=[random_input((32, 3, 12, 12))])
    state = conversion.model.state_dict()
    assert torch.equal(state["1.running_var"], network.state_dict()["1.running_var"])


def test_a_network_without_coded_weights_is_stored_as_it_is(tmp_path: Path) -> None:
    network = wide()
    round_vectors(network, 8)
    header = hc.save(hc.convert(network, 2), tmp_path / "cut.safetensors")
    assert not header.codecs.packed


def test_values_that_all_layers_share_cannot_fill_the_memory() -> None:
    names = [*map(str, range(MOST_LAYERS + 1))]
    for columns in ({"name": names, "inputs": 1}, {"name": ["a"], **dict.fromkeys(names[:50], 1)}):
        with pytest.raises(ValueError, match="are too many"):
            with_layers({"calibration": {"layers": columns}})


def test_inspect_counts_packed_vectors() -> None:
    network = wide()
    inspection = hc.inspect(network, X)
    conversion = hc.convert(network, bits=4)
    assert inspection.coded_bytes(4) == pytest.approx(conversion.cost.harmonic_bytes, rel=0.03)
    assert hc.inspect(wide().to("meta"), energies=False).other_bytes > inspection.other_bytes
