"""Coding the weights of networks: with a number of bits or of bytes, on calibration inputs or without."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import harmconvert as hc
from harmconvert.calibration import Batch, ErrorMetric, best_shrinkage, squared_changes
from harmconvert.codecs import Layout, affordable_steps, codec_of, layout_of, unpack
from harmconvert.errors import HarmconvertWarning, InputError, UsageError
from harmconvert.kernels import row_bits, shrunk
from harmconvert.network import tensors_of
from harmconvert.plan import Bits, Plan
from harmconvert.report.coding_tables import coding_lines

from .commands import fails, ok
from .networks import CONVOLUTIONS, Branches, random_input, seeded

SAMPLE = "sample:resnet_mnist5k"


class Small(nn.Module):
    """A classifier with a convolution, a depthwise one, a 1x1 one and a linear layer."""

    num_classes = 5

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 24, 1)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.head(self.point(self.depthwise(x).relu()).relu().mean((2, 3)))


IMAGES = random_input((64, 3, 10, 10), seed=3).split(16)


def bits_of(conversion: hc.Conversion) -> float:
    """Return the average bits per coded weight, counted in the streams."""
    sizes = [codec_of(entry).bytes(entry) for entry in conversion.coded.values()]
    return 8 * sum(sizes) / sum(math.prod(entry.shape) for entry in conversion.coded.values())


def divergence(original: nn.Module, converted: nn.Module, inputs: Tensor) -> float:
    with torch.no_grad():
        p, q = (network(inputs).double().log_softmax(1) for network in (original, converted))
    return float((p.exp() * (p - q)).sum(1).mean())


# --- the mathematics ---


@given(st.integers(1, 4), st.integers(1, 5), st.floats(1e-3, 10), st.integers(0, 9))
@settings(deadline=None, max_examples=30)
def test_row_bits_are_the_rate_of_reverse_water_filling_above_the_level(
    groups: int, columns: int, level: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(groups, columns, columns, generator=generator, dtype=torch.float64)
    gram, variances = root @ root.mT, torch.rand(groups, columns, generator=generator, dtype=torch.float64) + 0.1
    actual = row_bits(gram, variances, [level])
    for group in range(groups):
        scaled = variances[group].sqrt()[:, None] * gram[group] * variances[group].sqrt()
        expected = sum(0.5 * math.log2(1 + value / level) for value in torch.linalg.eigvalsh(scaled).tolist())
        assert float(actual[0, group]) == pytest.approx(expected, abs=1e-6)


def test_shrinkage_keeps_the_power_and_ends_at_a_diagonal() -> None:
    root = random_input((2, 6, 6), torch.float64)
    gram = root @ root.mT
    for even in (False, True):
        for share in (0.0, 0.3, 1.0):
            result = shrunk(gram, share, even)
            assert torch.allclose(result.diagonal(dim1=1, dim2=2).sum(1), gram.diagonal(dim1=1, dim2=2).sum(1))
        assert torch.equal(shrunk(gram, 1.0, even), torch.diag_embed(shrunk(gram, 1.0, even).diagonal(dim1=1, dim2=2)))
    assert torch.equal(shrunk(gram, 0.0), gram)


def test_the_metric_of_few_inputs_is_trusted_less_than_that_of_many() -> None:
    root = random_input((1, 24, 24), torch.float64)
    truth = root @ root.mT
    factor = torch.linalg.cholesky(truth)

    def seen(count: int, seed: int) -> ErrorMetric:
        z = random_input((count, 24), torch.float64, seed) @ factor[0].T
        return ErrorMetric((z.T @ z)[None] / count, positions=count)

    penalty = torch.full((1, 24), 1e-3, dtype=torch.float64)
    few, many = (best_shrinkage(seen(count, 1), seen(4000, 2), penalty) for count in (30, 4000))
    assert few.share > many.share
    assert many.share <= 0.01


def test_the_measured_effect_of_errors_is_their_mean_squared_effect_on_the_outputs() -> None:
    """For a linear network the estimate has no error but that of its random numbers."""
    network = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 3, bias=False)).double()
    inputs = random_input((64, 6), torch.float64)
    batches = [Batch(part, tuple(range(16 * i, 16 * i + 16)), i) for i, part in enumerate(inputs.split(16))]
    errors = random_input((200, 4, 6), torch.float64, 5)

    def changes(key: str, gradient: Tensor) -> Tensor:
        assert key == "0.weight"
        return (errors * gradient).sum(-1).square().mean(0)

    parameters = {"0.weight": network[0].weight}
    estimates = [squared_changes(network, parameters, batches, changes, seed)["0.weight"] for seed in range(20)]
    estimate = torch.stack(estimates).mean(0)
    with torch.no_grad():
        outputs, second = network(inputs), network[1].weight
        expected = torch.stack([
            sum(
                ((inputs @ error[row])[:, None] * second[:, row]).square().sum() for error in errors
            ) / len(errors) / outputs.square().sum()
            for row in range(4)
        ])  # fmt: skip
    assert torch.allclose(estimate, expected, rtol=0.3)
    assert torch.allclose(estimate.sum(), expected.sum(), rtol=0.15)
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_measured_effect_on_a_classifier_is_the_divergence_at_its_temperature(temperature: float) -> None:
    network: Any = seeded(lambda: nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 5)), torch.float64)
    network.num_classes = 5
    inputs = random_input((64, 6), torch.float64)
    batches = [Batch(part, tuple(range(16 * i, 16 * i + 16)), i) for i, part in enumerate(inputs.split(16))]
    errors = random_input((200, 5, 4), torch.float64, 5)

    def changes(key: str, gradient: Tensor) -> Tensor:
        return (errors * gradient).sum(-1).square().mean(0)

    parameters = {"1.weight": network[1].weight}
    estimates = [
        squared_changes(network, parameters, batches, changes, seed, temperature=temperature)["1.weight"]
        for seed in range(60)
    ]
    with torch.no_grad():
        p, hidden = (network(inputs) / temperature).softmax(1), network[0](inputs)
        expected = 0.5 * (p * (1 - p) * (hidden @ errors.transpose(1, 2)).square().mean(0)).mean(0)
    assert torch.allclose(torch.stack(estimates).mean(0), expected, rtol=0.25)


def test_steps_of_a_depthwise_weight_are_simplified_and_those_of_many_rows_are_not() -> None:
    generator = np.random.default_rng(0)
    steps = generator.integers(-3, 4, (32, 9)).astype(np.int32)
    assert len(np.unique(affordable_steps(steps, Layout((32, 1, 9), 32)) - steps)) > 1
    steps = generator.integers(-3, 4, (1, 90)).astype(np.int32)
    assert np.array_equal(affordable_steps(steps, Layout((2000, 10, 9))), steps)


# --- bits ---


@pytest.mark.parametrize("bits", [1.0, 2.5, pytest.param(6.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("calibration", [None, IMAGES])
def test_the_streams_have_the_bits_per_weight_that_are_asked_for(bits: float, calibration: Any) -> None:
    model = hc.open_source(SAMPLE, form="dense").model if calibration is None else seeded(Small)
    conversion = hc.convert(model, bits=bits, calibration=calibration)
    # A thousand weights need more for steps and tables than the prediction knows.
    assert bits_of(conversion) == pytest.approx(bits, rel=0.03 if calibration is None else 0.35)
    assert all(not layer.on("precision").shared for layer in conversion.plan.layers)
    assert len(conversion.coded) == (22 if calibration is None else 4)


def test_calibrated_coding_is_far_nearer_to_the_original_than_rounding(tmp_path: Path) -> None:
    model = seeded(Small)
    test = random_input((64, 3, 10, 10), seed=9)
    rounded, coded = (hc.convert(model, bits=3, calibration=images) for images in (None, IMAGES))
    assert bits_of(coded) < 1.2 * bits_of(rounded)
    assert divergence(model, coded.model, test) < 0.5 * divergence(model, rounded.model, test)
    record = coded.calibration
    assert record is not None
    assert record.divergence is not None
    assert record.plain_divergence is not None
    assert record.divergence < record.plain_divergence
    assert all(layer.bits for layer in record.layers)


@pytest.mark.parametrize("calibration", [None, IMAGES])
def test_a_file_has_the_streams_and_its_networks_the_coded_values(tmp_path: Path, calibration: Any) -> None:
    model = seeded(Small)
    conversion = hc.convert(model, 2, bits=3, calibration=calibration)
    path = tmp_path / "coded.safetensors"
    hc.save(conversion, path)
    with safetensors.safe_open(path, "pt") as file:
        for key, entry in conversion.coded.items():
            stream = file.get_tensor(key)
            assert stream.dtype == torch.uint8
            quantised = unpack(stream.numpy().tobytes(), layout_of(entry))
            values = torch.from_numpy(layout_of(entry).from_matrices(quantised.values())).float()
            assert torch.equal(values, tensors_of(conversion.model)[key])
    loaded = hc.load(path, model=model)
    expected, actual = tensors_of(conversion.model), tensors_of(loaded)
    assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items())
    for form in ("dense", "factored"):
        other = hc.load(path, model=model, form=form, example_input=IMAGES[0][:1])
        with torch.no_grad():
            assert torch.allclose(other(IMAGES[0]), conversion.model(IMAGES[0]), atol=1e-4)
    check = hc.verify(model, conversion, IMAGES[0])
    assert check.as_planned
    assert check.verdict.startswith("coded as planned in 4 of 4 layers: ")


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_every_class_of_convolution_can_be_coded(name: str, tmp_path: Path) -> None:
    make, shape = CONVOLUTIONS[name]
    model = seeded(lambda: nn.Sequential(make(), nn.ReLU()))
    x = random_input((8, *shape[1:]))
    conversion = hc.convert(model, bits=6, calibration=x.split(2), example_input=x[:1])
    assert [*conversion.coded] == ["0.coefficients"]
    path = tmp_path / "coded.safetensors"
    hc.save(conversion, path)
    loaded = hc.load(path, model=model)
    with torch.no_grad():
        assert torch.equal(loaded(x), conversion.model(x))
        assert float((loaded(x) - model(x)).norm() / model(x).norm()) < 0.15


def test_tied_weights_layers_that_run_twice_and_layers_that_never_run_are_coded(tmp_path: Path) -> None:
    model = seeded(Branches)
    images = random_input((24, 3, 12, 12)).split(8)
    conversion = hc.convert(model, bits=5, calibration=images)
    assert {*conversion.coded} == {
        "stem.coefficients", "shared.coefficients", "tied_a.coefficients", "deep.odd name [x].coefficients",
        "unused.coefficients", "point.weight",
    }  # fmt: skip
    path = tmp_path / "coded.safetensors"
    hc.save(conversion, path)
    with torch.no_grad():
        assert torch.equal(hc.load(path, model=model)(images[0]), conversion.model(images[0]))
    assert hc.verify(model, conversion, images[0]).as_planned


def test_patterns_code_only_the_layers_that_they_name_each_with_its_bits() -> None:
    model = hc.open_source(SAMPLE, form="dense").model
    conversion = hc.convert(model, bits={"stage3.*": 3, "stage3.1.*": 5})
    kept = conversion.plan.on("precision")
    assert {name.split(".")[0] for name in kept} == {"stage3"}
    for name, value in kept.items():
        assert value.bits == pytest.approx(5 if name.startswith("stage3.1.") else 3, rel=0.05), name


def test_a_plan_with_bits_is_json_and_can_be_followed(tmp_path: Path) -> None:
    model = seeded(Small)
    conversion = hc.convert(model, bits=4, calibration=IMAGES)
    plan = Plan.from_json(json.loads(json.dumps(conversion.plan.to_json())))
    assert plan == conversion.plan
    again = hc.convert(model, plan, calibration=IMAGES)
    for name, kept in plan.on("precision").items():
        assert again.plan.on("precision")[name].bits == pytest.approx(kept.bits, rel=0.05), name


@pytest.mark.parametrize("data", [{"bits": True}, {"bits": -1}, {"bits": 1e9}, {"bits": "3"}, {"bits": 3, "shared": 1}])
def test_bits_in_a_file_are_checked(data: Any) -> None:
    layer = {"name": "0", "kernel_size": [3, 3], "precision": data}
    with pytest.raises(InputError, match="this is not a plan"):
        Plan.from_json({"layers": [layer]})


@pytest.mark.parametrize("bits", [0, -1, 10.5, math.nan, math.inf, True])
def test_bits_out_of_range_are_refused(bits: Any) -> None:
    with pytest.raises(UsageError, match="must be above 0 and at most 10 bits per weight"):
        hc.convert(seeded(Small), bits=bits)


def test_wrong_combinations_are_refused() -> None:
    model = seeded(Small)
    with pytest.raises(UsageError, match=r"'nothing\*' matches no layer with weights to code"):
        hc.convert(model, bits={"nothing*": 3})
    with pytest.raises(UsageError, match="both say how many bits weights have"):
        hc.convert(model, bits=3, budget="bytes=20%")
    with pytest.raises(UsageError, match="finds the fewest bits within max_drop"):
        hc.convert(model, bits="auto")


def test_a_network_without_convolutions_over_1x1_can_be_coded(tmp_path: Path) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4)))
    x = random_input((64, 20))
    conversion = hc.convert(model, bits=4, calibration=x.split(16))
    hc.save(conversion, tmp_path / "coded.safetensors")
    with torch.no_grad():
        assert torch.equal(hc.load(tmp_path / "coded.safetensors", model=model)(x), conversion.model(x))
    assert {*hc.convert(seeded(lambda: nn.Linear(20, 30)), bits=4).coded} == {"weight"}, "a network that is a layer"


def test_a_network_without_gradients_is_coded_with_the_same_relative_error_and_says_so() -> None:
    class Frozen(Small):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(x)

    conversion = hc.convert(seeded(Frozen), bits=4, calibration=IMAGES)
    assert conversion.calibration is not None
    assert any("all layers get the same relative error" in note for note in conversion.calibration.notes)


def test_inputs_without_variety_are_reported() -> None:
    """The inputs for the fit are constant images; every fourth one, which is held back, is noise."""
    images = torch.cat(IMAGES)
    levels = torch.linspace(-1, 1, len(images))[:, None, None, None].expand(images.shape)
    held = (torch.arange(len(images)) % 4 == 3)[:, None, None, None]
    conversion = hc.convert(seeded(Small), bits=4, calibration=torch.where(held, images, levels).split(16))
    assert conversion.calibration is not None
    assert any("the calibration inputs lack variety" in note for note in conversion.calibration.notes)
    varied = hc.convert(seeded(Small), bits=4, calibration=IMAGES).calibration
    assert varied is not None
    assert not any("lack variety" in note for note in varied.notes)


def test_large_tensors_that_are_not_coded_are_named() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.positions = nn.Conv1d(4, 32, 3), nn.Parameter(torch.randn(32, 180))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + self.positions[:, : x.shape[-1] - 2]

    lines = coding_lines(hc.convert(seeded(Positions), bits=4))
    assert len(lines) == 2
    assert lines[1] == "large tensors that are not coded: positions (0.02 MB)"


def test_networks_in_16_bits_keep_their_dtype(tmp_path: Path) -> None:
    model = seeded(Small).bfloat16()
    conversion = hc.convert(model, bits=4, calibration=[x.bfloat16() for x in IMAGES])
    path = tmp_path / "coded.safetensors"
    hc.save(conversion, path)
    expected, actual = tensors_of(conversion.model), tensors_of(hc.load(path, model=seeded(Small).bfloat16()))
    for key, tensor in expected.items():
        assert torch.equal(actual[key].to(tensor.dtype), tensor), key
    assert conversion.coded["head.weight"].dtype == torch.bfloat16


def test_a_changed_weight_is_reported_and_stored_uncoded(tmp_path: Path) -> None:
    model = seeded(Small)
    conversion = hc.convert(model, bits=4)
    with torch.no_grad():
        conversion.model.head.weight[0, 0] += 0.25
    assert "head: its weights are not those that were coded" in hc.verify(model, conversion, IMAGES[0]).problems
    with pytest.warns(HarmconvertWarning, match=r"head\.weight: the values were changed"):
        hc.save(conversion, tmp_path / "coded.safetensors")


# --- bytes and drops ---


@pytest.mark.parametrize(
    ("network", "budget", "calibrated"),
    [pytest.param("sample", "bytes=9%", True, marks=pytest.mark.slow), ("sample", "bytes=60kB", False),
     ("small", "bytes=5600B", True),
     ("small", "bytes=6kB", True), ("small", "bytes=90%", False), ("small", "bytes=100%", False)],
)  # fmt: skip
def test_a_budget_of_bytes_is_never_exceeded(network: str, budget: str, calibrated: bool, tmp_path: Path) -> None:
    model = hc.open_source(SAMPLE, form="dense").model if network == "sample" else seeded(Small)
    shape = (32, 1, 28, 28) if network == "sample" else (32, 3, 10, 10)
    conversion = hc.convert(model, budget=budget, calibration=random_input(shape).split(16) if calibrated else None)
    hc.save(conversion, tmp_path / "coded.safetensors")
    size = (tmp_path / "coded.safetensors").stat().st_size
    with safetensors.safe_open(tmp_path / "coded.safetensors", "pt") as file:
        tensors = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118  not a dict
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) == conversion.cost.harmonic_bytes
    search = conversion.search
    assert search is not None
    assert size <= search.best.cost <= min(size + 64, search.limit)
    if budget in ("bytes=9%", "bytes=60kB"):
        assert size >= 0.93 * search.limit, "and it is used"
    assert conversion.plan.policy == budget


def test_the_file_of_the_command_is_within_its_budget_with_source_and_options(tmp_path: Path) -> None:
    done = hc.convert_to_file(
        SAMPLE, tmp_path / "a.safetensors", budget="bytes=60kB", command={"words": ["--exclude", 2000 * "x"]}
    )
    assert 58_000 < (tmp_path / "a.safetensors").stat().st_size <= 60_000
    assert done.conversion is not None
    assert done.conversion.search is not None
    assert done.conversion.search.limit == 60_000


def test_a_budget_below_what_is_not_coded_says_the_smallest_size() -> None:
    model = hc.open_source(SAMPLE, form="dense").model
    with pytest.raises(UsageError, match=r"the budget bytes=1% cannot be met: .* at least \(25,0\d\d of them are not"):
        hc.convert(model, budget="bytes=1%")


@pytest.mark.slow
def test_the_fewest_bits_within_a_drop_are_found() -> None:
    model = seeded(Small)
    test = torch.cat(IMAGES)

    def metric(network: nn.Module) -> float:
        with torch.no_grad():
            return 100 * float((network(test).argmax(1) == model(test).argmax(1)).double().mean())

    conversion = hc.convert(model, bits="auto", max_drop=10, metric=metric, calibration=IMAGES)
    assert metric(conversion.model) >= 90
    assert len(conversion.drops) == 7
    assert conversion.cost.harmonic_bytes < 0.5 * conversion.cost.bytes
    smaller = [step for step in conversion.drops if step.share < conversion.cost.harmonic_bytes / conversion.cost.bytes]
    assert all(step.drop > 10 for step in smaller)


# --- the command line ---


def test_the_command_codes_and_prints_the_bytes_of_each_layer(tmp_path: Path) -> None:
    output = tmp_path / "coded.safetensors"
    result = ok("convert", SAMPLE, "--bits", "3", "-o", str(output))
    assert "coded: 22 tensors with 270,608 weights in 0.10 MB" in result.stdout
    assert "coded as planned in 22 of 22 layers" in result.stdout
    assert output.stat().st_size < 150_000
    ok("evaluate", str(output), "--dataset", "sample:mnist5k")
    ok("export", str(output), "-o", str(tmp_path / "dense.safetensors"))
    ok("verify", SAMPLE, str(output), "--as-planned")
    fails(2, "--bits 11.0 must be above 0 and at most 10 bits per weight", "convert", SAMPLE, "--bits", "11")
    fails(2, "unknown bits 'x'", "convert", SAMPLE, "--bits", "x")


@pytest.mark.slow
def test_the_default_name_of_a_coded_file_has_the_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ok("convert", SAMPLE, "--lambda", "2", "--bits", "2.5", "--dtype", "float16")
    (file,) = tmp_path.glob("*.safetensors")
    assert file.name == "resnet_mnist5k-harmonic-2-2.5bit.safetensors"
    ok("verify", SAMPLE, str(file), "--as-planned")


def test_a_coded_checkpoint_can_be_coded_again(tmp_path: Path) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    ok("convert", SAMPLE, "--lambda", "2", "-o", str(first))
    ok("convert", str(first), "--bits", "4", "-o", str(second))
    plan = hc.open_source(str(second)).header.plan
    assert {len(layer.frequencies) for layer in plan.layers if layer.on("space")} == {3, 9}, "it keeps its plan"
    assert isinstance(plan.layers[0].on("precision"), Bits)


# --- training ---


DIGITS = {"input_size": (1, 28, 28), "preprocess": "none"}


class Digits(nn.Module):
    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 5, stride=3), nn.Conv2d(8, 12, 3, stride=2)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def coded_digits() -> hc.Conversion:
    return hc.convert(seeded(Digits), bits=4)


def test_finetuning_a_coded_network_keeps_its_integers_and_the_size_of_the_file(
    coded_digits: hc.Conversion, tmp_path: Path
) -> None:
    before, after = tmp_path / "before.safetensors", tmp_path / "after.safetensors"
    header = hc.save(coded_digits, before)
    tuned = hc.finetune(
        coded_digits, "sample:mnist5k", after, preprocessing=DIGITS, epochs=1, lr=0.05, crop="none", ema=0.9,
        calibration_images=0,
    )  # fmt: skip
    losses = {stage.name: stage.evaluation.loss for stage in tuned.stages if stage.evaluation}
    assert losses["fine-tuned"] < losses["before"]
    assert tuned.header is not None
    for key, entry in header.codecs.coded.items():
        old, new = (
            unpack(one.stream.numpy().tobytes(), layout_of(one)) for one in (entry, tuned.header.codecs.coded[key])
        )
        assert np.array_equal(old.integers_GON, new.integers_GON), key
        assert np.array_equal(old.column_steps_GN, new.column_steps_GN)
        assert new.scales_GO is not None
        assert new.scales_GO.std() > 0, "a scale for each row was trained"
    rows = sum(entry.shape[0] for entry in header.codecs.coded.values())
    with safetensors.safe_open(before, "pt") as one, safetensors.safe_open(after, "pt") as two:
        sizes = [sum(file.get_tensor(key).nbytes for key in file.keys()) for file in (one, two)]  # noqa: SIM118
    assert sizes[1] <= sizes[0] + 4 * rows + 4 * len(header.codecs.coded)
    loaded = hc.load(after, model=seeded(Digits))
    expected = tensors_of(tuned.model)
    assert all(torch.equal(expected[key], tensor) for key, tensor in tensors_of(loaded).items())


@pytest.mark.slow
def test_recode_trains_all_weights_and_codes_them_again(coded_digits: hc.Conversion, tmp_path: Path) -> None:
    after = tmp_path / "after.safetensors"
    tuned = hc.finetune(
        coded_digits, "sample:mnist5k", after, preprocessing=DIGITS, epochs=1, lr=0.05, crop="none", recode=True
    )
    assert [stage.name for stage in tuned.stages][-2:] == ["fine-tuned", "coded again"]
    assert tuned.header is not None
    changed = 0
    for key, entry in coded_digits.coded.items():
        old, new = (
            unpack(one.stream.numpy().tobytes(), layout_of(one)) for one in (entry, tuned.header.codecs.coded[key])
        )
        changed += not np.array_equal(old.integers_GON, new.integers_GON)
    assert changed == len(coded_digits.coded)
    loaded = hc.load(after, model=seeded(Digits))
    assert all(torch.equal(tensors_of(tuned.model)[key], tensor) for key, tensor in tensors_of(loaded).items())


def test_recode_needs_a_coded_network() -> None:
    with pytest.raises(UsageError, match="codes the weights again, but those of this network are not coded"):
        hc.finetune(hc.convert(seeded(Digits)), "sample:mnist5k", preprocessing=DIGITS, recode=True)


@pytest.mark.parametrize("channels", [32, 1100])
def test_a_layer_whose_inputs_hardly_vary_is_coded(channels: int) -> None:
    """Behind a mean over all positions, the variance can be less than the rounding error of the sums."""

    class Excited(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, channels, 3)
            self.norm = nn.BatchNorm2d(channels, affine=False)
            self.reduce = nn.Conv2d(channels, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x))
            return self.reduce((1e-6 * y + 0.3).mean((2, 3), keepdim=True)).flatten(1) + y.mean((2, 3))[:, :4]

    network, x = seeded(Excited), random_input((4, 3, 16, 16), seed=1)
    conversion = hc.convert(network, bits=6, calibration=list(random_input((32, 3, 16, 16)).split(16)))
    assert conversion.coded
    with torch.no_grad():
        actual, expected = conversion.model(x), network(x)
    assert (actual - expected).norm() < 0.1 * (expected - expected.mean(0)).norm()


def test_a_layer_of_few_weights_is_coded_saved_and_loaded(tmp_path: Path) -> None:
    """Its stream has more bytes than its weights in float32."""
    network = seeded(lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Conv2d(2, 1, 1), nn.Linear(14, 1)))
    conversion = hc.convert(network, bits=4, calibration=list(random_input((32, 3, 16, 16)).split(16)))
    hc.save(conversion, tmp_path / "net.safetensors")
    again = hc.load(tmp_path / "net.safetensors", model=network)
    x = random_input((2, 3, 16, 16))
    assert torch.equal(again.eval()(x), conversion.model.eval()(x))


def test_a_layer_with_more_columns_than_a_cholesky_factor_takes_is_coded() -> None:
    """Its metric has the correlations within each input channel alone, as in the first layer of VGG's classifier."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(16 * 24 * 24, 32)).eval()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        network[1].weight.copy_(torch.randn(32, 16 * 24 * 24, generator=generator) / 96)
        loud = torch.where(torch.rand(1, 16, 24, 24, generator=generator) < 0.2, 10.0, 1.0)
        batches = [loud * torch.randn(16, 16, 24, 24, generator=generator) for _ in range(2)]
        conversion = hc.convert(network, bits=2, calibration=batches)
        outputs = network(batches[0])
        errors = [
            float((one.model(batches[0]) - outputs).square().mean())
            for one in (conversion, hc.convert(network, bits=2))
        ]
    (layer,) = conversion.calibration.layers
    assert layer.bits == pytest.approx(2, abs=0.2)
    assert errors[0] < errors[1], "the loud inputs count more"


def test_layers_without_an_effect_on_the_outputs_do_not_take_the_bits_of_the_others() -> None:
    """Residual branches that begin at zero, and auxiliary heads that do not run in eval mode, have no gradients."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 5)
            self.silent, self.unused = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x).relu()
            return self.last((y + 0 * self.silent(y)).mean((2, 3)))

    network, x = seeded(Branches), random_input((64, 3, 12, 12))
    conversion = hc.convert(network, bits=4, calibration=list(x.split(16)))
    bits = {key: 8 * int(e.parameters["bytes"]) / math.prod(e.shape) for key, e in conversion.coded.items()}
    assert len(bits) == 4
    assert min(bits.values()) > 2.5
    with torch.no_grad():
        outputs = network(x)
        assert (conversion.model(x) - outputs).norm() < 0.2 * (outputs - outputs.mean(0)).norm()
