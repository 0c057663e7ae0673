"""Checkpoints of the reference implementation: their outputs equal recorded ones, and other files are refused.

record_reference.py ran the reference implementation with the same weights and recorded the outputs.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

import harmconvert as hc
from harmconvert.errors import InputError, UsageError
from harmconvert.layers import HarmonicBlock2d, HarmonicMixin
from harmconvert.network import weights_sha256
from harmconvert.plan import bases_of
from harmconvert.sources import open_original, open_reference, open_source
from harmconvert.storage import BlockRecord, Header, Network, read_header
from harmconvert.training import harmonize

from .commands import fails, ok
from .networks import random_input, seeded
from .pictures import digit_folders
from .reference_cases import CASES, RECORDING, random_tensor

# Largest difference relative to the largest logit: both sides are float32, but the order of summation differs.
TOLERANCE = 1e-5


@cache
def recording() -> dict[str, np.ndarray]:
    with np.load(RECORDING, allow_pickle=False) as file:
        return dict(file)


def state_of(name: str) -> dict[str, Tensor]:
    """Return the state dict of a case, with the recorded DCT kernels."""
    shapes = json.loads(recording()[f"{name}/shapes"].tobytes())
    return {
        key: _recorded_dct(key, shape) if key.endswith("dct") else random_tensor(key, tuple(shape))
        for key, shape in shapes.items()
    }


def _recorded_dct(key: str, shape: list[int]) -> Tensor:
    found = torch.from_numpy(recording()[f"dct/{key if shape[1] == 1 else shape[1]}"])
    assert list(found.shape) == shape
    return found


def as_saved(name: str, state: dict[str, Tensor]) -> dict[str, Any]:
    """Return a state dict inside the container that its training scripts write."""
    if CASES[name].module == "imagenet":
        wrapped = {f"module.{key}": value for key, value in state.items()}
        optimizer = {"state": {0: {"momentum_buffer": torch.zeros(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
        return {"epoch": 90, "arch": "resnet50", "state_dict": wrapped, "best_acc1": torch.tensor(76.9),
                "optimizer": optimizer}  # fmt: skip
    return {"params": {key: value.requires_grad_("running" not in key) for key, value in state.items()}, "epoch": 200,
            "optimizer": {"state": {}, "param_groups": []}}  # fmt: skip


def written(folder: Path, name: str, **changed: Tensor | None) -> str:
    """Write the file of a case with replaced or (None) removed tensors; return its path."""
    state = {k: v for k, v in {**state_of(name), **changed}.items() if v is not None}
    path = folder / ("model_best.pth.tar" if CASES[name].module == "imagenet" else "model.pt7")
    torch.save(as_saved(name, state), path)
    return str(path)


def opened(path: str, name: str, form: str = "harmonic") -> Network:
    pool = CASES[name].pool
    return open_source(f"reference:{path}", arguments={"pool": pool} if pool else None, form=form)


def difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


# As the other networks, in other combinations.
SLOW = ("resnet50_harm_blocks", "harm_resnet50_progressive_avg", "harm_resnet50")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CASES])
def test_outputs_equal_those_of_the_reference_implementation(tmp_path: Path, name: str) -> None:
    case, path = CASES[name], written(tmp_path, name)
    expected, x = torch.from_numpy(recording()[f"{name}/output"]), case.input()
    assert difference(expected[0], expected[1]) > 0.02, "a recording that hardly depends on its input shows nothing"
    network = opened(path, name)
    assert difference(outputs(network.model, x), expected) < TOLERANCE
    assert not network.model.training
    assert (str(network.source), network.source.arguments["architecture"]) == (f"reference:{path}", case.architecture)
    kept = {len(m.frequencies) for m in network.model.modules() if isinstance(m, HarmonicMixin)}
    assert kept == case.kept
    blocks = [m for m in network.model.modules() if isinstance(m, HarmonicBlock2d)]
    assert len(blocks) == (case.arguments.get("harm_root", case.module.startswith("harm")))
    dense = opened(path, name, "dense")
    assert difference(outputs(dense.model, x), expected) < TOLERANCE
    arguments = {k: v for k, v in dense.source.arguments.items() if k != "architecture"}
    plain = timm.create_model(case.architecture, **arguments)
    assert list(dense.model.state_dict()) == list(plain.state_dict()), "stock code loads the dense form"


def test_a_file_with_only_the_tensors_is_read_in_any_format(tmp_path: Path) -> None:
    state = state_of("harm_wrn10_1")
    torch.save({"params": state}, tmp_path / "a.pth")
    torch.save(state, tmp_path / "b.pth")
    safetensors.torch.save_file(state, tmp_path / "c.safetensors")
    found = [
        weights_sha256(open_source(f"reference:{tmp_path / f}").model) for f in ("a.pth", "b.pth", "c.safetensors")
    ]
    assert len(set(found)) == 1


def test_files_without_dct_kernels_and_counters_are_read(tmp_path: Path) -> None:
    """Its loading code accepts such files: the frequencies follow from the shapes, and the counters have no effect."""
    name = "harm_resnet50_progressive_avg"
    left_out = {key: None for key in state_of(name) if key.endswith(("dct", "num_batches_tracked"))}
    assert len(left_out) == 17 + 54
    model = opened(written(tmp_path, name, **left_out), name).model
    expected = torch.from_numpy(recording()[f"{name}/output"])
    assert difference(outputs(model, CASES[name].input()), expected) < TOLERANCE


def test_wide_resnets_with_their_dct_kernels_are_read(tmp_path: Path) -> None:
    nine, six, three = (torch.from_numpy(recording()[f"dct/{count}"]) for count in (9, 6, 3))
    root = nine.transpose(0, 1).repeat(3, 1, 1, 1)
    for name, more in {
        "harm1_wrn10_1": {"dct": root},
        "harm_wrn10_1": {"dct0": root, "dct": nine.repeat(64, 1, 1, 1)},
        "harm_wrn16_4_lambda3": {"dct0": root, "dct": six.repeat(256, 1, 1, 1)},
        "harm_wrn22_1_progressive": {"dct0": root, "dctfull": nine, "dctl3": six, "dctl2": three},
    }.items():
        network = opened(written(tmp_path, name, **more), name)
        assert network.header is not None
        with pytest.raises(InputError, match=r"dct.* is not the L1-normalised DCT"):
            opened(written(tmp_path, name, **{k: v * 1.00002 for k, v in more.items()}), name)


def test_a_first_layer_without_batch_norm_is_read(tmp_path: Path) -> None:
    """This is "Harm1-WRN, no BN" of Table 1."""
    left_out = {"harmonic0.bn.running_mean": None, "harmonic0.bn.running_var": None}
    network = opened(written(tmp_path, "harm1_wrn10_1", **left_out), "harm1_wrn10_1")
    assert network.header is not None
    assert network.header.blocks == {"stem": BlockRecord(normalize=False, normalization="l1")}
    assert network.model.stem.mix.bias is None


def test_images_are_normalised_as_in_its_training_code(tmp_path: Path) -> None:
    ten, hundred = (
        opened(written(tmp_path, name), name).model.pretrained_cfg for name in ("harm_wrn10_1", "harm_wrn16_4_lambda3")
    )
    assert ten["mean"] == pytest.approx((0.4914, 0.4824, 0.4467), abs=1e-4)
    assert hundred["std"] == pytest.approx((0.2675, 0.2565, 0.2761), abs=1e-4)
    assert ten["crop_pct"] == 1.0


@pytest.mark.parametrize("name", ["harm_wrn10_1", "harm_wrn22_1_progressive", "harm1_wrn10_1"])
def test_a_saved_reference_network_is_opened_without_its_original_file(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, name)
    network = opened(path, name)
    hc.save(network, tmp_path / "ours.safetensors")
    Path(path).unlink()
    again = open_source(str(tmp_path / "ours.safetensors"))
    x = CASES[name].input()
    assert torch.equal(outputs(again.model, x), outputs(network.model, x))
    assert again.source == network.source
    assert bases_of(again.header.plan)[0].normalization == ("l1" if again.header.plan.layers else "ortho")
    assert again.header.history["training"] == [{"by": "the reference implementation"}]
    assert read_header(tmp_path / "ours.safetensors").blocks == {"stem": BlockRecord(True, "l1", (3, 3))}


def test_the_original_of_a_converted_reference_network_is_its_file(tmp_path: Path) -> None:
    name = "harm_wrn10_1"
    dense = opened(written(tmp_path, name), name, "dense")
    hc.save(hc.convert(dense.model, 2), tmp_path / "cut.safetensors", source=dense.source)
    header = read_header(tmp_path / "cut.safetensors")
    assert weights_sha256(open_original(header)) == weights_sha256(dense.model)
    written(tmp_path, name, **{"fc.bias": torch.ones(10)})
    with pytest.raises(InputError, match="are not those that were converted: name them with teacher"):
        open_original(header)


@pytest.mark.slow
def test_the_pooling_of_a_file_is_recorded(tmp_path: Path) -> None:
    name = "harm1_resnet50_max"
    network = opened(written(tmp_path, name), name)
    assert network.header is not None
    assert isinstance(open_original(network.header).maxpool, nn.MaxPool2d)
    assert isinstance(opened(str(tmp_path / "model_best.pth.tar"), "harm_resnet50").model.maxpool, nn.Identity)


def test_blocks_of_older_files_are_read() -> None:
    data = {**Header(hc.Plan(())).to_json(), "blocks": {"stem": True, "other": False}}
    assert Header.from_json(data).blocks == {"stem": BlockRecord(True, "ortho"), "other": BlockRecord(False, "ortho")}
    for block in ({"normalize": True}, {"normalize": True, "normalization": "l3"}, "yes"):
        with pytest.raises(InputError, match="its header is unreadable"):
            Header.from_json({**data, "blocks": {"stem": block}})


def test_the_scale_of_the_dct_changes_a_block_with_batch_norm() -> None:
    """The batch norm adds its eps to variances of either scale; rescaled weights do not compensate for this."""
    l1 = HarmonicBlock2d(3, 4, 3, normalization="l1").eval()
    ortho = HarmonicBlock2d(3, 4, 3).eval()
    with torch.no_grad():
        scale_F = ortho.basis.abs().sum(1).repeat(3)
        for block, factor in ((l1, torch.ones(27)), (ortho, scale_F)):
            block.norm.running_var.fill_(1e-4).mul_(factor**2)
        ortho.mix.weight.copy_(l1.mix.weight)
        ortho.mix.bias.copy_(l1.mix.bias)
    x = random_input((2, 3, 9, 9))
    assert difference(outputs(ortho, x), outputs(l1, x)) > 1e-2
    l1.norm.eps = ortho.norm.eps = 1e-30  # older versions of torch refuse 0
    assert difference(outputs(ortho, x), outputs(l1, x)) < 1e-5
    with pytest.raises(UsageError, match="unknown normalization 'l3'"):
        HarmonicBlock2d(3, 4, 3, normalization="l3")


@pytest.mark.slow
def test_messages_about_wrong_files_say_what_is_wrong_where_and_what_to_do(tmp_path: Path) -> None:
    resnet, wrn = "harm_resnet50_progressive_avg", "harm_wrn10_1"
    for name, changed, message in [
        (wrn, {"group1.block0.bn1.weight": None}, r"lacks group1.block0.bn1.weight: it is cut off or of another net"),
        (wrn, {"group2.block0.harmonic1.conv": None}, "lacks group2.block0.conv1"),
        (wrn, {"harmonic0.conv": None}, "lacks harmonic0.conv"),
        (wrn, {"group0.block0.gate": torch.ones(2)}, "tensors that no such network .* has: group0.block0.gate"),
        (wrn, {"group1.block1.bn0.bias": torch.ones(2)}, "has 1-2-1 blocks: a wide ResNet has three groups with"),
        (wrn, {"fc.weight": torch.ones(10, 96)}, "has width 1.5: only wide ResNets of integer width are supported"),
        (wrn, {"fc.weight": torch.ones(10, 128)}, "does not fit this WideResNet: missing: stage1.0.shortcut.weight;"),
        (wrn, {"group0.block0.harmonic0.conv": torch.ones(16, 16, 5, 1, 1)}, r"harmonic0.conv has shape \(16, 16, 5, "),
        (wrn, {"harmonic0.conv": torch.ones(16, 18, 1, 1)}, r"has shape \(16, 18, 1, 1\), not \(out, 27, 1, 1\)"),
        (wrn, {"dct0": torch.ones(27, 1, 3, 3)}, "dct0 is not the L1-normalised DCT from the zero frequency on"),
        (wrn, {"dct0": torch.ones(26, 1, 3, 3)}, r"has shape \(26, 1, 3, 3\), which is not the 3x3 DCT of its"),
        (resnet, {"layer1.0.harm2.dct": state_of(resnet)["layer1.0.harm2.dct"] * 3}, r"layer1.0.harm2.dct is not the"),
        (resnet, {"layer1.0.harm2.dct": _without_dc()}, r"has shape \(1, 8, 3, 3\), which is not the 3x3 DCT"),
        (resnet, {"layer4.2.bn3.running_var": None}, "lacks layer4.2.bn3.running_var"),
        (resnet, {"layer4.2.harm2.weight": None}, "lacks layer4.2.harm2.weight"),
        (resnet, {"layer1.3.bn1.weight": torch.ones(64)}, "has 4-4-6-3 blocks: only ResNets of 50, 101 and 152 layers"),
        (resnet, {"harm1.weight": torch.ones(64, 144, 1, 1)}, r"not \(out, 147, 1, 1\): the first layer must keep"),
        (resnet, {"layer1.0.conv3.weight": None}, "basic blocks .18 or 34 layers., which the reference implementation"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=message) as caught:
            opened(written(tmp_path, name, **changed), name)
        assert str(tmp_path) in str(caught.value)


def _without_dc() -> Tensor:
    return torch.from_numpy(recording()["dct/9"])[:, 1:]


def test_bases_without_the_zero_frequency_are_refused(tmp_path: Path) -> None:
    """Eight frequencies may lack the highest or the zero frequency; the recorded kernels show which."""
    name = "resnet50_harm_blocks"
    with pytest.raises(InputError, match=r"is not the L1-normalised DCT from the zero frequency on .it differs by"):
        opened(written(tmp_path, name, **{"layer1.0.harm2.dct": _without_dc()}), name)
    with pytest.raises(InputError, match=r"lacks layer1.0.harm2.dct: without it, 8 frequencies may be"):
        opened(written(tmp_path, name, **{"layer1.0.harm2.dct": None}), name)


def test_files_that_are_not_reference_checkpoints_are_refused(tmp_path: Path) -> None:
    plain = timm.create_model("resnet50", num_classes=2)
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    torch.save(timm.create_model("vgg11", num_classes=2).features.state_dict(), tmp_path / "vgg.pth")
    torch.save(state_of("harm_wrn10_1"), tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:20000])
    malicious = {"params": state_of("harm_wrn10_1"), "epoch": _Malicious(tmp_path / "ran")}
    torch.save(malicious, tmp_path / "zip.pth")
    torch.save(malicious, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for file, message in [
        (
            "plain.pth",
            "holds a plain ResNet, no layer of it is harmonic: .* resnet50_nomaxpool, .* if it has max pooling",
        ),
        ("vgg.pth", r"is no ResNet and no wide ResNet of the reference implementation .there are: 0.weight, 0.bias"),
        ("cut.pth", "is damaged"),
        ("old.pth", "holds more than tensors, and reading it would run code: refused"),
        ("zip.pth", "holds more than tensors, and reading it would run code: refused"),
        ("none.pth", "does not exist"),
    ]:
        with pytest.raises(InputError, match=message):
            open_source(f"reference:{tmp_path / file}")
    assert not (tmp_path / "ran").exists()


class _Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_unknown_arguments_of_a_reference_source_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "harm_wrn10_1")
    with pytest.raises(UsageError, match="it takes no other weights, and no arguments except pool"):
        open_source(f"reference:{path}", arguments={"num_classes": 3})
    with pytest.raises(UsageError, match="it takes no other weights, and no arguments except pool"):
        open_source(f"reference:{path}", weights=path)
    with pytest.raises(UsageError, match="names nothing after 'reference:'"):
        open_source("reference:")
    with pytest.raises(UsageError, match=r"pool \(='sum'\) must be one of none, avg, max"):
        open_source(f"reference:{written(tmp_path, 'harm1_resnet50_max')}", arguments={"pool": "sum"})
    assert open_reference(path, {}, "dense")[0].training


def test_commands_accept_a_reference_checkpoint_as_a_harmonic_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "harm_wrn22_1_progressive")
    source = "reference:model.pt7"
    text = ok("convert", source).stdout
    assert f"{source} is already harmonic: written unchanged" in text
    assert "wrote model-harmonic.safetensors" in text
    plan = read_header("model-harmonic.safetensors").plan
    assert {layer.levels for layer in plan.layers} == {5, 3, 2}
    assert "verified: outputs differ by 0.0e+00" in ok("verify", source, "model-harmonic.safetensors").stdout
    ok("verify", "model-harmonic.safetensors", source)
    ok("export", source, "-o", "dense.safetensors")
    ok("verify", source, "dense.safetensors")
    stock = timm.create_model("wrn22_1", num_classes=7).eval()
    stock.load_state_dict(safetensors.torch.load_file("dense.safetensors"))
    ok("export", source, "--format", "timm", "-o", "folder")
    ok("verify", source, "local-dir:folder")
    assert "19 convolutions over 1x1" in ok("inspect", source).stdout
    data = json.loads(ok("convert", source, "--json", "-o", "again.safetensors").stdout)
    assert data["verification"]["ok"] is True
    fails(2, "exists", "convert", source)


def test_a_reference_network_is_converted_again_if_a_lambda_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "harm_wrn10_1")
    ok("convert", "reference:model.pt7", "--lambda", "2")
    cut = open_source("model-harmonic-2.safetensors")
    assert cut.header is not None
    assert {len(layer.frequencies) for layer in cut.header.plan.layers} == {9, 3}
    ok("verify", "reference:model.pt7", "model-harmonic-2.safetensors", "--as-planned")
    ok("convert", "model-harmonic-2.safetensors", "-o", "same.safetensors")
    ok("convert", "model-harmonic-2.safetensors", "--lambda", "full")
    whole = read_header("model-harmonic-2-harmonic-full.safetensors").plan
    assert whole.whole
    ok("verify", "model-harmonic-2.safetensors", "same.safetensors")
    assert open_source("same.safetensors").source == cut.source


def test_a_reference_network_is_evaluated_and_finetuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "harm_wrn10_1")
    digits = ["--data-dir", str(digit_folders(tmp_path / "digits", 2)), "--holdout", "0.5", "--workers", "0"]
    data = json.loads(ok("evaluate", "reference:model.pt7", *digits, "--json").stdout)
    assert (data["images"], data["preprocessing"]["input_size"]) == (10, [3, 32, 32])
    quick = ["--epochs", "1", "-b", "10", "--crop", "padded", "--json"]
    found = json.loads(ok("finetune", "reference:model.pt7", *digits, *quick).stdout)
    # The run starts with this network and compares with its own dense form.
    assert [stage["name"] for stage in found["stages"]] == ["uncut", "before", "fine-tuned"]
    assert found["stages"][0]["evaluation"]["top1"] == found["stages"][1]["evaluation"]["top1"] == data["top1"]
    header = read_header("model-finetuned.safetensors")
    assert [run.get("by") for run in header.history["training"]] == ["the reference implementation", None]
    assert header.blocks == {"stem": BlockRecord(True, "l1", (3, 3))}


def test_a_plain_wide_resnet_is_converted_like_any_other_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "wrn10_2")
    ok("convert", "reference:model.pt7")
    ok("verify", "reference:model.pt7", "model-harmonic.safetensors")
    fails(2, "is not a harmonic checkpoint: make one first", "finetune", "reference:model.pt7", "--dataset", "sample:x")


def test_a_network_with_blocks_is_compared_with_its_dense_form() -> None:
    network = harmonize(seeded(lambda: timm.create_model("wrn", depth=10, width=1)), "all")
    x = random_input((2, 3, 32, 32))
    assert hc.verify(hc.fuse(network), network, x).max_relative_error < 1e-5
    assert hc.verify(network, network, x).ok
    network.stem.mix.weight.data[0, 0] += 0.1
    assert not hc.verify(hc.fuse(harmonize(timm.create_model("wrn", depth=10, width=1), "all")), network, x).ok
