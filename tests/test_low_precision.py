"""Export in 8 and 16 bits: rounding of weights, corrected biases, layers in floating point, files of both runtimes."""

from __future__ import annotations

import dataclasses
import gc
import json
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import harmconvert as hc
from harmconvert.calibration import Batch, CalibrationContext, CalibrationSettings
from harmconvert.cli import main
from harmconvert.deploy import (
    Benchmark,
    PrecisionSettings,
    Row,
    Target,
    export,
    graph_files,
    int8,
    onnx_bytes,
    quantised_graphs,
)
from harmconvert.deploy.runtime_rows import RUNTIMES, has_bfloat16
from harmconvert.deploy.runtimes import openvino_core
from harmconvert.errors import CheckError, InputError, OutsideError, UsageError
from harmconvert.samples import mnist5k_held_back

from .commands import SAMPLE, converted, fails, ok
from .networks import random_input, seeded

pytest.importorskip("openvino")


class Small(nn.Module):
    """A classifier with a grouped layer, batch norm, and a linear layer."""

    num_classes = 5

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.point = nn.Conv2d(8, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.head(self.point(self.depthwise(x)).relu().mean((2, 3)))


def images_of(count: int = 64) -> list[Tensor]:
    """Return smooth maps, whose neighbouring values are much alike."""
    noise = random_input((count, 3, 16, 16))
    return list(nn.functional.avg_pool2d(noise, 5, 1).split(16))


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


def context_of(network: nn.Module) -> CalibrationContext:
    return CalibrationContext.of(network, images_of(), CalibrationSettings())


def settings(max_drop: float = 100.0) -> PrecisionSettings:
    return PrecisionSettings(images_of(), 64, max_drop)


# --- the simulation ---


def test_rounded_weights_are_multiples_of_a_scale_for_each_channel() -> None:
    for layer in (nn.Conv2d(4, 6, 3), nn.Linear(5, 7), nn.ConvTranspose2d(4, 6, 3), nn.Conv2d(6, 6, 3, groups=6)):
        weight, rounded = layer.weight.detach(), int8.rounded_weight(layer)
        if isinstance(layer, nn.ConvTranspose2d):
            weight, rounded = weight.transpose(0, 1), rounded.transpose(0, 1)
        for exact, row in zip(weight.flatten(1), rounded.flatten(1), strict=True):
            scale = exact.abs().max() / int8.largest_integer()
            assert torch.allclose(row / scale, (exact / scale).round(), atol=1e-3)
            assert (row - exact).abs().max() <= 0.5001 * scale


def test_a_range_has_zero_among_its_values() -> None:
    rounded = int8.Range(-0.7, 2.3).rounded(torch.linspace(-1, 3, 999))
    assert len(rounded.unique()) == 256
    assert 0.0 in rounded
    inside = torch.linspace(-0.69, 2.29, 99)
    assert (int8.Range(-0.7, 2.3).rounded(inside) - inside).abs().max() <= 0.5001 * 3.0 / 255
    assert torch.equal(int8.Range().rounded(inside), inside)


def test_rounding_with_feedback_is_better_than_plain_rounding_and_needs_no_rounding_again() -> None:
    """The feedback leaves shifts of the mean outputs to the biases, so both are compared with corrected biases."""
    network = seeded(Small)
    context = context_of(network)
    better = int8.prepared(network, context)
    plain = int8.with_corrected_biases(network, network, context.data.fit)
    for name, layer in int8.plain_layers(better).items():
        torch.testing.assert_close(int8.rounded_weight(layer), layer.weight.detach(), rtol=1e-5, atol=1e-7, msg=name)
    for layer in int8.plain_layers(plain).values():
        layer.weight.data = int8.rounded_weight(layer)
    errors = [context.compare(one)[0] for one in (better, plain)]
    assert errors[0] < 0.9 * errors[1]


def test_corrected_biases_keep_the_mean_outputs_of_every_layer() -> None:
    network = seeded(Small)
    corrected = int8.with_corrected_biases(network, network, context_of(network).data.fit)
    assert corrected.depthwise.bias is not None  # it had none
    assert not torch.equal(corrected.stem.bias, network.stem.bias)
    layers = int8.plain_layers(corrected)
    ranges = int8.input_ranges(network, int8.plain_layers(network), context_of(network).data.fit)
    x = torch.cat([batch.input for batch in context_of(network).data.fit])
    with torch.no_grad(), int8.simulated(layers, ranges, {n: int8.rounded_weight(own) for n, own in layers.items()}):
        rounded = corrected(x).mean(0)
    with torch.no_grad():
        exact = network(x).mean(0)
    torch.testing.assert_close(rounded, exact, rtol=1e-3, atol=1e-4)
    assert network.depthwise.bias is None


def test_the_layer_that_rounding_harms_most_is_the_first() -> None:
    network = seeded(Small)
    with torch.no_grad():
        network.point.weight[:, 0] *= 300  # the other weights of each row are rounded to nearly nothing
        network.depthwise.weight[0] = 0
    assert int8.layers_by_harm(network, network, context_of(network).data.fit)[0] == "point"


# --- graphs ---


def kinds(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def test_an_onnx_file_in_8_bits_runs_and_is_near_the_network(tmp_path: Path) -> None:
    network = seeded(Small)
    model = hc.convert(network).model
    found = export(
        model, tmp_path / "a.onnx", "onnx", precision="int8", settings=settings(), example_input=images_of()[0]
    )
    assert found.held_back is not None
    assert (found.held_back.inputs, found.held_back.float_layers) == (16, ())
    assert found.held_back.divergence < 1e-3
    assert "DequantizeLinear" in kinds(tmp_path / "a.onnx")
    types = {tensor.data_type for tensor in onnx.load(tmp_path / "a.onnx").graph.initializer if len(tensor.dims) > 1}
    assert types == {onnx.TensorProto.INT8}
    for count in (1, 3):  # any batch size
        x = random_input((count, 3, 12, 12), seed=7)
        with torch.no_grad():
            output = Target("onnx", "int8").open((tmp_path / "a.onnx").read_bytes())(x)
            assert (output - network(x)).abs().max() < 0.05 * network(x).abs().max()


@pytest.mark.parametrize(("precision", "tolerance"), [("f32", 1e-5), ("f16", 2e-3), ("bf16", 2e-2), ("int8", 5e-2)])
def test_openvino_reads_the_two_files(precision: str, tolerance: float, tmp_path: Path) -> None:
    network, path = seeded(Small), tmp_path / "a.xml"
    export(network, path, "openvino", precision=precision, settings=settings(), example_input=images_of()[0])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.bin", "a.xml"]
    hint = {"INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32"}
    compiled = openvino_core().compile_model(str(path), "CPU", hint)
    x = random_input((3, 3, 12, 12), seed=7)
    with torch.no_grad():
        expected = network(x).numpy()
    output = compiled(x.numpy())[0]
    assert np.abs(output - expected).max() < tolerance * np.abs(expected).max()
    if precision == "f32":
        assert (output.argmax(1) == expected.argmax(1)).all()


def test_a_signal_is_handled_after_graphs_were_opened_and_freed() -> None:
    """On processors with AMX, a freed Core of OpenVINO can leave a freed stack for signals."""
    graph = onnx_bytes(seeded(Small), images_of()[0])
    opened = [Target("openvino").open(graph) for _ in range(2)]
    while opened:
        opened.pop(0)(images_of()[0])
        gc.collect()
    seen: list[int] = []
    previous = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    signal.raise_signal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, previous)
    assert seen == [signal.SIGUSR1]


@pytest.mark.slow
def test_layers_that_lose_too_much_stay_in_floating_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer in 8 bits costs a fourth of the inputs here, so three of four must stay in floating point."""
    measured = quantised_graphs.measured

    def lossy(context: Any, run: nn.Module, float_layers: Any = ()) -> Any:
        found = measured(context, run, float_layers)
        return hc.deploy.HeldBack(found.inputs, None, 1.0, 25.0 * (4 - len(float_layers)), tuple(float_layers))

    monkeypatch.setattr(quantised_graphs, "measured", lossy)
    network, path = seeded(Small), tmp_path / "a.onnx"
    found = export(network, path, "onnx", precision="int8", settings=settings(25.0), example_input=images_of()[0])
    order = int8.layers_by_harm(network, network, context_of(network).data.fit)
    assert set(found.held_back.float_layers) <= set(order)
    assert len(found.held_back.float_layers) == 3
    graph = onnx.load(path).graph
    integers = [tensor.name for tensor in graph.initializer if tensor.name.endswith("weight_quantized")]
    assert len(integers) == 1
    assert not any(name.startswith(tuple(found.held_back.float_layers)) for name in integers)


def test_if_the_loss_is_too_large_the_best_attempt_is_kept_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = quantised_graphs.measured

    def lossy(context: Any, run: nn.Module, float_layers: Any = ()) -> Any:
        found = measured(context, run, float_layers)
        return hc.deploy.HeldBack(found.inputs, 0.9, 1.0, 10.0 - len(float_layers), tuple(float_layers))

    monkeypatch.setattr(quantised_graphs, "measured", lossy)
    path = tmp_path / "a.onnx"
    with pytest.raises(
        CheckError, match=r"loses 6.00 % on 16 inputs held back with 4 layers.*attempt is .*a-best.onnx"
    ):
        export(seeded(Small), path, "onnx", precision="int8", settings=settings(1.0), example_input=images_of()[0])
    assert [file.name for file in tmp_path.iterdir()] == ["a-best.onnx"]


@pytest.mark.slow
def test_a_cut_network_is_exported_in_factored_form_in_8_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_files, "measured_once", lambda key, measure: (2.0, 1.0))
    monkeypatch.setattr(graph_files, "times_of", lambda target, dense, factored, inputs: (2.0, 1.0))
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten())
    model = hc.convert(seeded(lambda: network), {"2": 1}).model
    arguments = {"form": "factored", "precision": "int8", "settings": settings(), "example_input": images_of()[0]}
    found = export(model, tmp_path / "a.xml", "openvino", **arguments)
    assert found.factored == ("2",)
    assert found.speedup == 2.0
    monkeypatch.setattr(graph_files, "times_of", lambda target, dense, factored, inputs: (1.0, 2.0))
    slower = export(model, tmp_path / "b.xml", "openvino", **{**arguments, "precision": "f32"})
    assert slower.factored == ()
    assert "the factored form is not faster as a whole" in slower.notes[-1]


@pytest.mark.slow
def test_times_are_measured_once_for_each_runtime_and_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[str] = []
    monkeypatch.setattr(graph_files, "measured_once", lambda key, measure: keys.append(key) or measure())
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3))
    model = hc.convert(seeded(lambda: network), {"1": 1}).model
    for target in (Target("onnx"), Target("onnx", "int8"), Target("openvino"), Target("openvino", "bf16")):
        chosen = graph_files.factor_for(target, model, images_of()[0], lambda what: None)
        assert {layer.form for layer in chosen.layers} <= {"dense", "factored"}
    assert len(set(keys)) == 4


# --- the command line, and what goes wrong ---


@pytest.mark.slow
def test_the_command_writes_8_bits_and_prints_the_comparison() -> None:
    converted("coded.safetensors", "--bits", "4")
    arguments = ["--precision", "int8", "--calibrate", "sample:mnist5k", "--calibration-images", "32"]
    text = ok("export", "coded.safetensors", "--format", "openvino", *arguments, "-o", "a.xml").stdout
    assert "same top-1 as the network on 100.0% of 8 inputs held back" in text
    size = sum(Path(f"a.{suffix}").stat().st_size for suffix in ("xml", "bin"))
    assert f"wrote a.xml ({size / 1e6:.2f} MB)" in text


@pytest.mark.slow
def test_8_bits_classify_images_as_well_as_the_network() -> None:
    arguments = ["--precision", "int8", "--calibrate", "sample:mnist5k", "--calibration-images", "128"]
    found = json.loads(ok("export", SAMPLE, "--format", "onnx", *arguments, "-o", "a.onnx", "--json").stdout)
    assert found["precision"] == "int8"
    assert found["check"]["held_back"]["agreement"] == 1.0
    images, labels = mnist5k_held_back()
    network = Target("onnx", "int8").open(Path("a.onnx").read_bytes())
    assert (network(images).argmax(1) == labels).double().mean() > 0.99


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--format", "onnx", "--precision", "int8", "-o", "a.onnx"],
            "--precision int8 needs inputs on which",
        ),
        (
            ["--format", "onnx", "--precision", "bf16", "-o", "a.onnx"],
            "--precision bf16 is not possible with onnx: use f32, int8",
        ),
        (["--precision", "int8", "-o", "a.safetensors"], "--precision int8 is not possible with dense: use f32"),
        (["--format", "openvino", "-o", "a.onnx"], ".xml"),
        (["--calibrate", "sample:mnist5k", "-o", "a.safetensors"], "--data images is for graphs in low precision"),
        (["--format", "onnx", "--calibration-images", "64", "-o", "a.onnx"], "--data DATA"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(arguments: list[str], message: str) -> None:
    fails(2, message, "export", SAMPLE, *arguments)
    assert list(Path().iterdir()) == []


def test_inputs_that_cannot_be_used_are_reported(tmp_path: Path) -> None:
    network, path = seeded(Small), tmp_path / "a.onnx"
    for calibration, error, message in (
        ([images_of()[0][:1]], UsageError, "held back, but one input: none can be held back"),
        ([], InputError, "holds no input"),
        ([torch.full((4, 3, 12, 12), torch.nan)], InputError, "NaN"),
        ([random_input((4, 1, 12, 12))], UsageError, "does not run"),
    ):
        with pytest.raises(error, match=message):
            export(
                network, path, "onnx", precision="int8", settings=PrecisionSettings(calibration),
                example_input=images_of()[0],
            )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_an_existing_bin_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_text("mine")
    with pytest.raises(UsageError, match=r"a\.bin exists"):
        export(seeded(Small), tmp_path / "a.xml", "openvino", example_input=images_of()[0])
    assert (tmp_path / "a.bin").read_text() == "mine"
    export(seeded(Small), tmp_path / "a.xml", "openvino", example_input=images_of()[0], force=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.bin", "a.xml"]


def test_the_message_for_missing_openvino_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(OutsideError, match=r"OpenVINO needs openvino: pip install 'harmconvert\[openvino\]'"):
        export(seeded(Small), tmp_path / "a.xml", "openvino", example_input=images_of()[0])


def test_nodes_are_found_by_the_layers_that_they_compute() -> None:
    graph = onnx_bytes(seeded(Small), images_of()[0])
    names = {node.name: node.op_type for node in onnx.load_model_from_string(graph).graph.node}
    assert [names[name] for name in quantised_graphs.nodes_of_layers(graph, ["depthwise"])] == ["Conv"]
    assert [names[name] for name in quantised_graphs.nodes_of_layers(graph, ["head"])] == ["Gemm"]
    assert len(quantised_graphs.nodes_of_layers(graph, ["stem", "point", "head", "depthwise"])) == 4


def test_activations_that_can_be_negative_have_a_zero_point_of_0_in_openvino() -> None:
    network, x = seeded(Small).eval(), images_of()[0]
    graph = onnx_bytes(network, x[:1])
    zeros: dict[str, list[np.ndarray]] = {}
    for runtime in ("onnx", "openvino"):
        found = onnx.load_model_from_string(quantised_graphs.to_int8(graph, [Batch(x, (0,), 0)], runtime)).graph
        values = {one.name: onnx.numpy_helper.to_array(one) for one in found.initializer}
        nodes = [node for node in found.node if node.op_type == "QuantizeLinear" and node.input[0] not in values]
        assert nodes[0].input[0] == found.input[0].name
        zeros[runtime] = [values[node.input[2]] for node in nodes]
        assert {zero.dtype.name for zero in zeros[runtime]} <= {"uint8", "int8"}
    assert zeros["onnx"][0].dtype == np.uint8
    assert zeros["onnx"][0] > 0
    assert zeros["openvino"][0].dtype == np.int8
    assert not any(zero for zero in zeros["openvino"] if zero.dtype == np.int8)


class Preactivated(nn.Module):
    """A batch norm that alone reads a sum, and an output that is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.first(x).relu()
        logits = self.head((self.norm(self.second(y) + y)).relu().mean((2, 3)))
        return logits, logits + 1


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_outputs_and_what_only_a_batch_norm_reads_are_not_rounded(runtime: str) -> None:
    network, x = seeded(Preactivated).eval(), images_of()[0]
    network.norm.running_var.fill_(0.5)
    content = quantised_graphs.to_int8(onnx_bytes(network, x[:1]), [Batch(x, (0,), 0)], runtime)
    graph = onnx.load_model_from_string(content).graph
    producers = {name: node for node in graph.node for name in node.output}
    assert producers[graph.output[1].name].op_type == "Add"
    (norm,) = (node for node in graph.node if node.op_type == "BatchNormalization")
    assert producers[norm.input[0]].op_type == "Add"
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) >= 6
    with torch.no_grad():
        expected = network(x)
    for actual, wanted in zip(Target(runtime, "int8").open(content)(x), expected, strict=True):
        assert (actual - wanted).norm() < 0.05 * wanted.norm()


# --- times ---


def test_a_benchmark_prints_commands_that_write_the_forms_of_its_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    converted("a.safetensors", "--lambda", "2")
    dense = Row("dense", False, "contiguous", 1, 1, 1.0, 0.0, 1.0, None, 0.0)
    lossy = dataclasses.replace(dense, runtime="openvino", precision="int8", seconds=0.1)

    images = ["--calibrate", "sample:mnist5k", "--calibration-images", "8"]

    def commands(*rows: Row) -> list[str]:
        module = sys.modules["harmconvert.pipeline.benchmark"]
        monkeypatch.setattr(module, "time_forms", lambda *_: Benchmark(rows, {}, {}))
        lines = ok("benchmark", "a.safetensors", "-b", "1", *images).stdout.splitlines()
        return [line.split(": ", 1)[1] for line in lines if line.split(", ")[0] in ("dense", "factored")]

    first, second = commands(dense, lossy)
    assert first == "harmconvert export a.safetensors -o a-dense.safetensors"
    options = "--format openvino --precision int8 --data sample:mnist5k --max-drop 1 -o a-int8.xml"
    assert second == f"harmconvert export a.safetensors {options}"
    [third] = commands(dataclasses.replace(dense, form="factored", runtime="onnx"))
    assert third == "harmconvert export a.safetensors --format onnx --form factored -o a.onnx"
    [fourth] = commands(dataclasses.replace(dense, form="factored", precision="bf16", agreement=1.0))
    assert fourth == "hc.load('a.safetensors', form='factored').bfloat16()"
    ok(*shlex.split(first)[1:])
    assert Path("a-dense.safetensors").is_file()
    for command in (second, third):
        name, *arguments = shlex.split(command)[1:]
        assert main.get_command(click.Context(main), name).make_context(name, arguments)


def test_the_forms_of_the_advice_are_listed_once() -> None:
    dense = Row("dense", False, "contiguous", 1, 1, 1.0, 0.0, 1.0, None, 0.0)
    lossy = dataclasses.replace(dense, runtime="openvino", precision="int8", seconds=0.1, agreement=0.97)
    more = [dataclasses.replace(row, batch=16) for row in (dense, lossy)]
    assert Benchmark((dense, lossy, *more), {}, {}).advised() == [dense, lossy]
    assert Benchmark((dense, lossy, *more), {}, {}, max_drop=3.0).advised() == [lossy]


@pytest.mark.slow
def test_a_benchmark_times_every_runtime_and_precision_and_compares_them_on_images() -> None:
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = hc.convert(seeded(lambda: network), {"2": 1}).model
    every = {"runtimes": RUNTIMES, "precisions": ("f32", "bf16", "int8"), "layouts": ["channels_last"], "repeats": 3}
    found = hc.benchmark(model, images_of(64)[0][:1], batches=[2], data=images_of(64), **every)
    where = [(row.runtime, row.precision) for row in found.rows if row.form == "dense"]
    bf16 = [("torch", "bf16")] * has_bfloat16()
    openvino = [("openvino", "f32"), *[("openvino", "bf16")] * has_bfloat16(), ("openvino", "int8")]
    assert where == [("torch", "f32"), *bf16, ("onnx", "f32"), ("onnx", "int8"), *openvino]
    for row in found.rows:
        assert row.seconds is not None, row.note
        assert row.error < (1e-5 if row.precision == "f32" else 0.3)
        assert (row.agreement is None) == (row.precision == "f32")
    assert found.notes == ()
    assert found.to_json()["rows"][-1]["runtime"] == "openvino"


def test_the_advice_leaves_out_low_precision_whose_loss_is_too_large_or_unknown() -> None:
    dense = Row("dense", False, "contiguous", 1, 1, 1.0, 0.0, 1.0, None, 0.0)
    lossy = dataclasses.replace(dense, runtime="openvino", precision="int8", seconds=0.1, agreement=0.97)
    unknown = dataclasses.replace(lossy, seconds=0.2, agreement=None)
    [line] = Benchmark((dense, lossy), {}, {}).advice()
    assert line.startswith("batch 1, 1 thread: deploy the dense form, contiguous, eager")
    assert line.endswith("the dense form, OpenVINO with int8, 10.00 times (same top-1 on 97.0% of the images)")
    assert Benchmark((dense, lossy), {}, {}).fastest(1, 1, max_drop=3.0) == lossy
    assert Benchmark((dense, lossy), {}, {}).fastest(1, 1, max_drop=2.9) == dense
    [line] = Benchmark((dense, unknown), {}, {}).advice()
    assert "5.00 times (its loss is not measured without images)" in line


def test_a_missing_runtime_is_named_once_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    found = hc.benchmark(seeded(Small), images_of(2)[0][:1], batches=[1, 2], runtimes=RUNTIMES, repeats=3)
    assert {row.runtime for row in found.rows} == {"torch", "onnx"}
    note = "OpenVINO was not timed, because openvino is not installed: pip install 'harmconvert[openvino]'"
    assert found.notes == (note,)
