"""An exported file gives the outputs of the network for any batch size; otherwise nothing is written."""

from __future__ import annotations

import dataclasses
import json
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

import harmconvert as hc
from harmconvert import load
from harmconvert.deploy import export, graph_files
from harmconvert.deploy.runtimes import InRuntime
from harmconvert.errors import CheckError, InputError, OutsideError, UsageError
from harmconvert.network import comparison_inputs, factor, factoring, fuse, tensors_in
from harmconvert.storage import rounded

from .commands import SAMPLE, converted, fails, ok
from .networks import Branches, random_input, seeded
from .seams import replace_everywhere

X = random_input((1, 3, 24, 24))
# Same padding, squeeze and excitation, dense and split connections, standardised weights, attention, re-parametrised.
ARCHITECTURES = {
    "resnet18": 64, "tf_efficientnet_lite0": 64, "mobilenetv3_small_050": 64, "densenet121": 64, "regnety_002": 64,
    "convnext_atto": 64, "inception_v3": 96, "eca_nfnet_l0": 64, "repvgg_a0": 64, "hrnet_w18_small": 64,
    "resnest14d": 64, "mobilevit_xxs": 64, "vgg11_bn": 64, "test_resnet": 64,
}  # fmt: skip
QUICK = ("test_resnet",)


def in_runtime(path: Path, x: Tensor) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in ARCHITECTURES]
)
def test_exported_architectures_give_the_same_outputs(name: str, tmp_path: Path) -> None:
    size = ARCHITECTURES[name]
    network = seeded(lambda: timm.create_model(name, num_classes=10))
    model = hc.convert(network, 2, example_input=torch.zeros(1, 3, size, size)).model
    x, example = random_input((5, 3, size, size)), torch.zeros(1, 3, size, size)
    with torch.no_grad():
        expected = model(x).numpy()
    scale = np.abs(expected).max()
    found = export(model, tmp_path / "a.onnx", "onnx", example_input=example)
    assert found is not None
    assert found.notes == ()
    assert np.abs(in_runtime(tmp_path / "a.onnx", x) - expected).max() < 1e-4 * scale
    assert export(model, tmp_path / "a.pt2", "torch-export", example_input=example).notes == ()
    with torch.no_grad():
        program = torch.export.load(tmp_path / "a.pt2").module()
        assert np.abs(program(x).numpy() - expected).max() < 1e-5 * scale
    export(model, tmp_path / "a.safetensors", "dense")
    network.load_state_dict(safetensors.torch.load_file(tmp_path / "a.safetensors"))
    with torch.no_grad():
        assert np.abs(network(x).numpy() - expected).max() < 1e-5 * scale
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "a.pt2", "a.safetensors"]


def twice_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every factored layer and network seem twice as fast as the dense one in a runtime."""
    monkeypatch.setattr(graph_files, "measured_once", lambda key, measure: (2.0, 1.0))
    monkeypatch.setattr(graph_files, "times_of", lambda target, dense, factored, inputs: (2.0, 1.0))


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
@pytest.mark.slow
def test_factored_networks_export_as_standard_operators(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both layers that can be factored are factored, even if this is not faster on this machine."""
    twice_as_fast(monkeypatch)
    replace_everywhere(monkeypatch, factor, lambda model, x=None, layers="factored": factor(model, layers=layers))
    network = nn.Sequential(nn.Conv2d(3, 128, 3), nn.Conv2d(128, 128, 3, padding=1), nn.Conv2d(128, 4, 3), nn.Flatten())
    model = hc.convert(seeded(lambda: network), 1).model
    path = tmp_path / ("a.onnx" if format == "onnx" else "a.pt2")
    example = torch.zeros(8, 3, 12, 12)
    found = export(model, path, format, form="factored", example_input=example)
    assert found.factored == ("1", "2")
    x = random_input((4, 3, 12, 12))
    with torch.no_grad():
        expected = model(x).numpy()
    if format == "onnx":
        import onnx

        graph = onnx.load(path)
        assert {n.domain for n in graph.graph.node} == {""}
        assert found.speedup == 2.0
        got = in_runtime(path, x)
    else:
        program = torch.export.load(path)
        assert not any("harmconvert" in str(node.target) for node in program.graph.nodes)
        got = program.module()(x).detach().numpy()
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        assert len(x) == 1
        return self.conv(x).mean((2, 3))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        y = self.conv(x) * scale[:, None, None, None]
        return {"map": y, "mean": y.mean((2, 3))}


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_the_notes_of_an_export_name_a_fixed_batch_size(format: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.onnx" if format == "onnx" else "a.pt2")
    found = export(hc.convert(seeded(FixedBatch), include=["conv"]).model, path, format, example_input=X)
    assert "the batch size is fixed" in found.notes[0]
    assert path.exists()


def test_networks_with_several_inputs_and_outputs_are_exported(tmp_path: Path) -> None:
    model = hc.convert(seeded(TwoInputs)).model
    found = export(model, tmp_path / "a.onnx", "onnx", example_input=(X, torch.ones(1)))
    assert found.difference < 1e-5
    assert found.top1_agreement is None
    assert export(model, tmp_path / "a.pt2", "torch-export", example_input={"x": X, "scale": torch.ones(1)}).notes == ()


def test_a_mismatch_leaves_existing_files_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.onnx"
    path.write_text("mine")
    forward = InRuntime.forward
    monkeypatch.setattr(InRuntime, "forward", lambda self, *args, **kwargs: forward(self, *args, **kwargs) * 1.001)
    with pytest.raises(
        CheckError,
        match=r"differ from those of the network by 1.0e-03 of the largest, tolerance 1e-04.*nothing was written",
    ):
        export(hc.convert(seeded(Branches)).model, path, "onnx", example_input=X, force=True)
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_a_network_that_cannot_be_exported_is_reported(tmp_path: Path) -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(torch.from_numpy(x.numpy()))

    with pytest.raises(InputError, match="this Stubborn cannot be exported"):
        export(
            hc.convert(Stubborn().eval().requires_grad_(False)).model,
            tmp_path / "a.pt2",
            "torch-export",
            example_input=X,
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_the_message_for_a_missing_package_names_it(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(OutsideError, match=rf"ONNX needs {missing}: pip install 'harmconvert\[onnx\]'"):
        export(hc.convert(seeded(Branches)).model, tmp_path / "a.onnx", "onnx", example_input=X)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "pdf"}, "unknown format 'pdf'"),
        ({"format": "dense", "dtype": "int8"}, "unknown dtype 'int8'"),
        ({"format": "onnx", "dtype": "bfloat16"}, "dtype=bfloat16 is only for state dicts"),
        ({"format": "torch-export", "dtype": "float16"}, "dtype=float16 is only for state dicts"),
        ({"format": "dense", "form": "factored"}, "only onnx, openvino and torch-export can be factored"),
        ({"format": "torch-export"}, "should end in .pt2"),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(
    arguments: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        export(hc.convert(seeded(Branches)).model, tmp_path / "a.onnx", example_input=X, **arguments)


def test_wrong_or_missing_example_inputs_are_refused(tmp_path: Path) -> None:
    model = hc.convert(seeded(Branches)).model
    with pytest.raises(UsageError, match=r"does not run on an example input of shape \(1, 5, 24, 24\)"):
        export(model, tmp_path / "a.onnx", "onnx", example_input=torch.zeros(1, 5, 24, 24))
    with pytest.raises(UsageError, match="give example_input"):
        export(model, tmp_path / "a.onnx", "onnx")


def test_an_onnx_file_beyond_the_size_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_files, "MAX_BYTES", 1000)
    with pytest.raises(InputError, match="do not fit into one ONNX file"):
        export(hc.convert(seeded(Branches)).model, tmp_path / "a.onnx", "onnx", example_input=X)


# --- 16 bits ---


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_files_in_sixteen_bits_have_half_the_size_and_are_loaded(dtype: str, tmp_path: Path) -> None:
    model = hc.convert(hc.open_source(SAMPLE).model, 2).model
    export(model, tmp_path / "a.safetensors", "dense")
    found = export(model, tmp_path / "b.safetensors", "dense", dtype=dtype)
    sizes = [(tmp_path / name).stat().st_size for name in ("a.safetensors", "b.safetensors")]
    assert sizes[1] < 0.53 * sizes[0]
    assert 1e-5 < found.difference < (2e-2 if dtype == "float16" else 1e-1)
    stored = safetensors.torch.load_file(tmp_path / "b.safetensors")
    for key, tensor in fuse(model).state_dict().items():
        if tensor.is_floating_point():
            assert torch.equal(stored[key], tensor.to(stored[key].dtype)), key
            assert str(stored[key].dtype) == f"torch.{dtype}"


def test_the_message_for_a_value_out_of_range_names_its_tensor() -> None:
    network = nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1))
    network[1].running_var.fill_(1e6)
    with pytest.raises(InputError, match=r"1.running_var has values up to 1e\+06, out of float16's range"):
        rounded(network, torch.float16)
    assert rounded(network, torch.bfloat16)[1].running_var.isfinite()


def test_rounding_that_changes_the_outputs_too_much_is_refused(tmp_path: Path) -> None:
    """The output is a difference of nearly equal numbers: it consists of the bits that bfloat16 drops."""
    network = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.Conv2d(2, 1, 1, bias=False))
    with torch.no_grad():
        network[0].weight[1] = network[0].weight[0] * 1.001
        network[1].weight[:] = torch.tensor([1.0, -1.0])[None, :, None, None]
    with pytest.raises(CheckError, match="rounded to bfloat16 the outputs differ"):
        export(
            hc.convert(network).model,
            tmp_path / "a.safetensors",
            dtype="bfloat16",
            example_input=torch.zeros(1, 1, 8, 8),
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_checkpoints_in_sixteen_bits_are_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        "rounded to bfloat16: outputs differ by"
        in ok("convert", SAMPLE, "--dtype", "bfloat16", "-o", "a.safetensors").stdout
    )
    converted("b.safetensors")
    assert Path("a.safetensors").stat().st_size < 0.56 * Path("b.safetensors").stat().st_size
    assert next(load("a.safetensors", model=hc.open_source(SAMPLE).model).parameters()).dtype == torch.bfloat16
    ok("verify", SAMPLE, "a.safetensors")
    ok(
        "convert",
        SAMPLE,
        "--lambda",
        "2",
        "--calibrate",
        "sample:mnist5k",
        "--calibration-images",
        "32",
        "--dtype",
        "float16",
        "-o",
        "c.safetensors",
    )
    ok("verify", SAMPLE, "c.safetensors", "--as-planned")
    ok("evaluate", "c.safetensors", "--dataset", "sample:mnist5k")


def test_the_export_command_writes_files_and_prints_the_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    converted("a.safetensors", "--lambda", "2")
    text = ok("export", "a.safetensors", "--format", "onnx", "-o", "a.onnx").stdout
    assert "compared with the network in torch: outputs differ by" in text
    assert "same top-1 on 100%" in text
    data = json.loads(ok("export", "a.safetensors", "--format", "torch-export", "-o", "a.pt2", "--json").stdout)
    assert data["check"]["difference"] < 1e-5
    fails(2, "exists: use --force", "export", "a.safetensors", "--format", "onnx", "-o", "a.onnx")
    fails(
        2,
        "does not run on an example input",
        "export",
        "a.safetensors",
        "--format",
        "onnx",
        "-o",
        "b.onnx",
        "--input-size",
        "3,28,28",
    )
    fails(
        2,
        "--dtype float16 is only for state dicts",
        "export",
        "a.safetensors",
        "--format",
        "onnx",
        "--dtype",
        "float16",
        "-o",
        "b.onnx",
    )


def test_rounding_does_not_change_complex_numbers() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    network.register_buffer("phase", torch.tensor([1j]))
    small = rounded(network, torch.float16)
    assert (small.phase.dtype, small.phase.item()) == (torch.complex64, 1j)
    assert small[0].weight.dtype == torch.float16


# --- the file is compared with the harmonic network, and what goes wrong is said in a line ---


def _circular_in_x(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    padded = nn.functional.pad(nn.functional.pad(x, (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1))
    return nn.functional.conv2d(padded, weight, bias)


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
@pytest.mark.slow
def test_files_in_factored_form_give_the_outputs_of_the_harmonic_network(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twice_as_fast(monkeypatch)
    replace_everywhere(
        monkeypatch, factoring, lambda model, x=None, layers="factored": factoring(model, x, layers=layers)
    )
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 3))
    model = hc.convert(seeded(lambda: network), {"*": 2}, example_input=X).model
    model[1]._conv_forward = _circular_in_x.__get__(model[1])
    path = tmp_path / ("a.onnx" if format == "onnx" else "a.pt2")
    found = export(model, path, format, form="factored", example_input=X)
    assert found.factored == ("0", "2")
    with torch.no_grad():
        expected = model(X)
        got = torch.from_numpy(in_runtime(path, X)) if format == "onnx" else torch.export.load(path).module()(X)
    assert torch.allclose(got, expected, atol=1e-5)


def test_a_wrong_dense_form_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file agrees with the dense form that was exported, but this form is wrong."""

    def off(model: nn.Module, x: object = None) -> nn.Module:
        dense = fuse(model)
        dense.point.weight.data *= 1.01
        return dense

    replace_everywhere(monkeypatch, fuse, off)
    with pytest.raises(CheckError, match="the outputs of the exported file differ from those of the network"):
        export(hc.convert(seeded(Branches)).model, tmp_path / "a.pt2", "torch-export", example_input=X)
    assert list(tmp_path.iterdir()) == []


def test_the_comparison_uses_the_values_of_the_example_input() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    ids = torch.tensor([3, 7])
    assert torch.equal(comparison_inputs(x), x)
    rows = comparison_inputs((x, ids), 3)
    assert torch.equal(rows[0], torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [3.0, 1.0, 2.0]]))
    assert rows[1].tolist() == [3, 7, 3]
    assert comparison_inputs(torch.zeros(2, 3)).std() > 0.1
    assert comparison_inputs(torch.zeros(2, dtype=torch.int64)).tolist() == [0, 0]


@pytest.mark.parametrize("x", [X, None])
def test_a_state_dict_that_loads_as_another_network_is_not_written(x: Tensor | None, tmp_path: Path) -> None:
    model = hc.convert(nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 4, 3))).model

    class Halved(nn.Sequential):
        def load_state_dict(self, state: dict[str, Tensor], strict: bool = True) -> Any:
            return super().load_state_dict({key: value / 2 for key, value in state.items()}, strict)

    model.__class__ = Halved
    with pytest.raises(CheckError, match="the dense form of this Halved does not compute what the harmonic form does"):
        export(model, tmp_path / "a.safetensors", example_input=x)
    assert list(tmp_path.iterdir()) == []


def test_a_timm_folder_that_makes_another_network_is_not_written(tmp_path: Path) -> None:
    network = seeded(lambda: timm.create_model("resnet10t", num_classes=4))
    model = hc.convert(network, 2, example_input=torch.zeros(1, 3, 64, 64)).model
    model.act1 = nn.Tanh()
    with pytest.raises(CheckError, match="timm does not make this ResNet from the folder"):
        export(model, tmp_path / "folder", "timm", example_input=torch.zeros(1, 3, 64, 64))
    assert not (tmp_path / "folder").exists()


class Pairs(nn.Module):
    """A network that accepts only an even batch: pairs of frames."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y.view(len(y) // 2, 2, *y.shape[1:]).flip(1).reshape(y.shape).mean((2, 3))


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_a_network_that_supports_only_some_batch_sizes_is_exported_with_a_fixed_one(
    format: str, tmp_path: Path
) -> None:
    path = tmp_path / ("a.onnx" if format == "onnx" else "a.pt2")
    found = export(hc.convert(seeded(Pairs)).model, path, format, example_input=random_input((4, 3, 8, 8)))
    assert "the batch size is fixed" in found.notes[0]
    assert path.exists()


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + 1 if y.sum() > 0 else y


class Eigenvalues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(self.conv(x)[:, 0]).real


@pytest.mark.parametrize(
    ("network", "format", "cause"),
    [
        (Branching, "onnx", "Could not guard on data-dependent expression"),
        (Branching, "torch-export", "Could not guard on data-dependent expression"),
        (Eigenvalues, "onnx", "No ONNX function found for"),
    ],
)
def test_a_failing_exporter_prints_nothing_and_its_cause_is_the_message(
    network: type[nn.Module], format: str, cause: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / ("a.onnx" if format == "onnx" else "a.pt2")
    with pytest.raises(InputError) as caught:
        export(hc.convert(seeded(network)).model, path, format, example_input=random_input((1, 3, 8, 8)))
    assert capfd.readouterr() == ("", "")
    assert str(caught.value).startswith(f"this {network.__name__} cannot be exported: ")
    assert cause in str(caught.value)
    assert "x1b" not in str(caught.value)


# --- 16 bits through every command ---

_STORED = {
    "plain": "    return sample.to(dtype)",
    "mixed": "    for module in sample.modules():\n        if isinstance(module, torch.nn.Conv2d):\n"
    "            module.to(dtype)\n    return sample",
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("stored", _STORED)
def test_networks_in_sixteen_bits_are_compared_and_exported_in_float32(
    stored: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network comes from user code and is written to a checkpoint and a torch-export file."""
    monkeypatch.chdir(tmp_path)
    code = f"import torch\nimport harmconvert as hc\ndef make():\n    dtype = torch.{dtype}\n"
    code += f"    sample = hc.open_source('{SAMPLE}').model\n{_STORED[stored]}\n"
    Path("net.py").write_text(code)
    ok("convert", "net.py:make", "--lambda", "2", "-o", "a.safetensors")
    ok("export", "a.safetensors", "--trust-code", "-o", "dense.safetensors")
    ok("export", "a.safetensors", "--trust-code", "--format", "torch-export", "-o", "a.pt2")
    x = random_input((2, 1, 28, 28))
    model = load("a.safetensors", model=hc.open_source(SAMPLE).model).float()
    with torch.no_grad():
        found, expected = torch.export.load("a.pt2").module()(x), model(x)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < (2e-2 if dtype == "float16" else 1e-1) * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_command_accepts_a_checkpoint_in_sixteen_bits(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ok("convert", SAMPLE, "--lambda", "2", "--dtype", dtype, "-o", "a.safetensors")
    ok("inspect", "a.safetensors")
    ok("convert", "a.safetensors", "--lambda", "1", "-o", "b.safetensors")
    ok("verify", SAMPLE, "a.safetensors", "--as-planned")
    ok("evaluate", "a.safetensors", "--dataset", "sample:mnist5k")
    ok("finetune", "a.safetensors", "--dataset", "sample:mnist5k", "--epochs", "1", "-b", "512", "-o", "c.safetensors")
    ok("export", "a.safetensors", "--format", "timm", "-o", "folder")
    for form in ("dense", "factored"):
        ok("export", "a.safetensors", "--format", "onnx", "--form", form, "-o", f"{form}.onnx")
        ok("export", "a.safetensors", "--format", "torch-export", "--form", form, "-o", f"{form}.pt2")
    ok("benchmark", "a.safetensors", "-b", "1", "--repeats", "3")
    ok("report", "a.safetensors", "-o", "page.html")
    ok("compare", "a.safetensors", "b.safetensors")
    network = hc.open_source(SAMPLE).model
    for form in ("dense", "factored"):
        assert next(hc.load("a.safetensors", model=network, form=form).parameters()).dtype == getattr(torch, dtype)


class Found(OrderedDict[str, Any]):
    """A mapping of a class that exporters do not support."""


Named = namedtuple("Named", ["logits", "twice"])


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    name: str = "logits"


OUTPUTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "a mapping of its own class": lambda y: Found(logits=y),
    "a dataclass": lambda y: Answer(y),
    "a named tuple": lambda y: Named(y, y * 2),
}


@pytest.mark.parametrize(
    "make", [lambda y: y, lambda y: {"logits": y}, lambda y: [y, None]], ids=["tensor", "dict", "list"]
)
def test_plain_outputs_are_exported_unchanged(make: Any, tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> Any:
            return make(self.conv(x))

    x = random_input((2, 3, 9, 9))
    export(hc.convert(seeded(Net)).model, tmp_path / "a.pt2", "torch-export", example_input=x)
    outputs = torch.export.load(tmp_path / "a.pt2").module()(x)
    assert type(outputs) is type(make(x))


@pytest.mark.parametrize("make", OUTPUTS.values(), ids=OUTPUTS)
def test_records_of_classes_that_exporters_do_not_know_become_tuples_of_tensors(make: Any, tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x: torch.Tensor) -> Any:
            return make(self.b(self.a(x).relu()).mean((2, 3)))

    x = random_input((2, 3, 9, 9))
    model = hc.convert(seeded(Net), 2, example_input=x).model
    found = export(model, tmp_path / "a.pt2", "torch-export", example_input=x)
    assert found is not None
    assert any("its outputs are a tuple of tensors" in note for note in found.notes)
    assert not model._forward_hooks
    outputs = torch.export.load(tmp_path / "a.pt2").module()(x)
    with torch.no_grad():
        assert torch.allclose(outputs[0], tensors_in(model(x))[0], atol=1e-5)


class Extras(nn.Module):
    """A network that returns the tensors and other values that its ``make`` returns."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.conv, self.make = nn.Conv2d(3, 4, 3), make

    def forward(self, images: Tensor) -> Any:
        return self.make(self.conv(images).mean((2, 3)))


def test_outputs_that_are_not_tensors_are_named(tmp_path: Path) -> None:
    example = torch.randn(2, 3, 9, 9)
    for number, (make, kinds) in enumerate(
        [(lambda y: {"logits": y, "stride": 8}, "int"), (lambda y: (y, {1, 2}, "name"), "set, str")]
    ):
        network = hc.convert(Extras(make).eval()).model
        found = export(network, tmp_path / f"{number}.pt2", "torch-export", example_input=example)
        assert f"graphs compute only tensors: outputs of {kinds} are left out, or constant" in found.notes
    for make, message in [
        (lambda y: (y, y.numpy()), "its output has NumPy arrays: make it return tensors"),
        (lambda y: y.numpy(), "cannot be exported: its output has no tensor, but ndarray"),
    ]:
        with pytest.raises(InputError, match=message):
            export(hc.convert(Extras(make).eval()).model, tmp_path / "a.pt2", "torch-export", example_input=example)
