"""Fine-tuning on any kind of data: the loss follows from the data, and a loss that cannot train is refused."""

from __future__ import annotations

import json
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import harmconvert as hc
from harmconvert.data import DataRequest
from harmconvert.errors import InputError, UsageError
from harmconvert.training import loss_of, output_distillation

from .commands import fails, ok
from .networks import seeded, tiny_detector
from .pictures import digit_folders
from .test_cli_training import command, environment, started, tensors, torchrun
from .test_task_data import PLAIN, Segmenter, Upscaler, boxes, masks, pairs

FAST = {"epochs": 2, "batch_size": 8, "workers": 0, "crop": "none", "hflip": 0.0}


def tuned(net: nn.Module, data: Path, **settings: Any) -> Any:
    cut = hc.convert(net, {"*": 2})
    request = DataRequest(data_dir=str(data), holdout=0.25)
    return hc.finetune(cut, request, teacher=net, preprocessing=PLAIN, **{**FAST, **settings})


def losses(result: Any) -> list[float]:
    return [row["loss"] for row in result.rows]


# --- values ---


def test_the_cross_entropy_of_pixels_includes_the_auxiliary_head() -> None:
    logits, other = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 2, 2)
    wanted = torch.randint(0, 3, (2, 4, 4))
    wanted[0, 0] = 255
    large = functional.interpolate(other, size=(4, 4), mode="bilinear")
    main, auxiliary = (functional.cross_entropy(one, wanted, ignore_index=255) for one in (logits, large))
    found = loss_of(None, "masks")({"out": logits, "aux": other}, wanted)
    torch.testing.assert_close(found, main + 0.5 * auxiliary)


def test_l1_and_l2_compare_images() -> None:
    images, wanted = torch.rand(2, 3, 4, 4, requires_grad=True), torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(loss_of(None, "images")(images, wanted), (images - wanted).abs().mean())
    torch.testing.assert_close(loss_of("l2", "images")(images, wanted), (images - wanted).square().mean())


def test_distillation_is_the_kl_of_logits_and_the_squared_difference_of_other_outputs() -> None:
    student, teacher = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    kl = functional.kl_div(student.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="batchmean")
    torch.testing.assert_close(output_distillation(student, teacher, 1.0), kl)
    error = (student - teacher).square().mean() / teacher.square().mean()
    torch.testing.assert_close(output_distillation({"a": student}, {"a": teacher}, 1.0, "images"), error)
    maps = [one.view(1, 4, 5, 1).transpose(1, 2) for one in (student, teacher)]
    torch.testing.assert_close(output_distillation(*maps, 1.0, "masks"), kl)
    with pytest.raises(InputError, match="the outputs of the network and of its teacher have other shapes"):
        output_distillation(student, teacher[:2], 1.0)


# --- flows ---


def test_segmentation_is_fine_tuned_with_the_cross_entropy_of_pixels(tmp_path: Path) -> None:
    result = tuned(seeded(Segmenter), masks(tmp_path, 8), epochs=4, lr=0.1)
    assert losses(result)[-1] < losses(result)[0]
    assert [stage.name for stage in result.stages] == ["uncut", "before", "calibrated", "fine-tuned"]
    assert {stage.evaluation.measurement.metric for stage in result.stages} == {"miou"}
    assert result.rows[0]["accuracy"] is None
    assert result.rows[0]["test_mIoU"] > 0


def test_pairs_of_images_are_fine_tuned_with_l1_or_l2(tmp_path: Path) -> None:
    data = pairs(tmp_path, 8, scale=2)
    for loss in (None, "l2"):
        result = tuned(seeded(Upscaler), data, loss=loss, lr=0.05)
        assert losses(result)[-1] < losses(result)[0]
        assert result.recipe.loss == (loss or "")
    assert result.stages[-1].evaluation.measurement.title == "PSNR"


def test_a_network_learns_the_outputs_of_the_uncut_network_without_targets(tmp_path: Path) -> None:
    settings = {"loss": "distillation", "metric": "kl", "lr": 1.0, "epochs": 4, "calibration_images": 0}
    result = tuned(seeded(Segmenter), masks(tmp_path, 8), **settings)
    assert result.recipe.distill == 1
    assert losses(result)[-1] < losses(result)[0]
    assert result.stages[-1].evaluation.measurement.metric == "kl"


def test_plain_images_train_a_network_that_is_no_classifier(tmp_path: Path) -> None:
    settings = {"loss": "distillation", "lr": 0.01, "epochs": 4, "calibration_images": 0}
    result = tuned(seeded(Upscaler), pairs(tmp_path, 8, scale=2), **settings)
    assert losses(result)[-1] < losses(result)[0]


@pytest.fixture(scope="module")
def detector() -> nn.Module:
    return seeded(tiny_detector)


def test_detectors_are_fine_tuned_with_their_own_losses(tmp_path: Path, detector: nn.Module) -> None:
    cut = hc.convert(detector, {"head.*": 2}, example_input=[torch.rand(3, 64, 64)])
    request = DataRequest(data_dir=str(boxes(tmp_path, 6)), holdout=0.4)
    settings = {**FAST, "epochs": 1, "calibration_images": 0, "freeze_bn": True}
    result = hc.finetune(cut, request, teacher=detector, **settings)
    assert result.rows[0]["loss"] > 0
    assert result.stages[-1].evaluation.measurement.metric == "map"
    taught = hc.finetune(cut, request, teacher=detector, loss="distillation", **{**settings, "epochs": 4, "lr": 0.1})
    assert losses(taught)[-1] < losses(taught)[0]


def test_a_function_of_the_user_is_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def loss(outputs, targets):\n    return (outputs - targets).abs().sqrt().mean()\n")
    result = tuned(seeded(Upscaler), pairs(tmp_path / "data", 4, scale=2), loss="mine.py:loss", epochs=1)
    assert result.recipe.loss == "mine.py:loss"
    mine = tuned(seeded(Upscaler), tmp_path / "data", loss=lambda outputs, targets: outputs.abs().mean(), epochs=1)
    assert mine.recipe.loss == "<lambda>"


def test_a_loader_of_the_user_is_read_and_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "import torch\n"
        "def data(split):\n"
        "    generator = torch.Generator().manual_seed(0)\n"
        "    batch = torch.rand(4, 3, 8, 8, generator=generator), torch.randint(0, 3, (4, 8, 8), generator=generator)\n"
        "    return [batch] * (2 if split == 'train' else 1)\n"
        "def uneven(split):\n    return [(torch.rand(4, 3, 8, 8), torch.zeros(3, dtype=torch.long))]\n"
    )
    cut, net = hc.convert(seeded(Segmenter), {"*": 2}), seeded(Segmenter)
    result = hc.finetune(cut, "mine.py:data", teacher=net, **FAST)
    assert result.stages[-1].evaluation.measurement.metric == "miou"
    assert (result.rows[0]["images"], result.stages[0].evaluation.images) == (8, 4)
    with pytest.raises(InputError, match=r"mine.py:uneven yields other numbers of inputs and targets in batch 0"):
        hc.finetune(cut, "mine.py:uneven", teacher=net, **FAST)


# --- what cannot train ---


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda outputs, targets: (outputs - targets).abs(),
            r"returns a tensor of shape \(3, 3, 32, 24\): it should return",
        ),
        (lambda outputs, targets: 1.0, "returns a float: it should return a tensor with one number"),
        (
            lambda outputs, targets: targets.mean(),
            "does not depend on the trained parameters: compute it from the outputs",
        ),
        (lambda outputs, targets: outputs.detach().mean(), "does not depend on the trained parameters"),
        (lambda outputs, targets: outputs["x"], "fails: TypeError|fails: IndexError|fails: ValueError"),
    ],
)
def test_losses_that_cannot_train_are_refused(tmp_path: Path, function: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"the loss <lambda> {message}"):
        tuned(seeded(Upscaler), pairs(tmp_path, 4, scale=2), loss=function, calibration_images=0)


def test_losses_say_what_they_need(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown loss 'focal': use cross-entropy, l1, l2, detector, distillation, or"):
        loss_of("focal", "classes")
    with pytest.raises(UsageError, match=r"loss=l1 is not for this data .masks.: leave it out for cross-entropy"):
        loss_of("l1", "masks")
    with pytest.raises(InputError, match=r"one shape: the outputs have shape \(3, 3, 32, 24\), the targets shape"):
        tuned(seeded(Upscaler), pairs(tmp_path, 4), metric=_shape, calibration_images=0)
    with pytest.raises(InputError, match=r"the loss of a detector is a dict of losses, .*: this is a Tensor"):
        loss_of(None, "boxes")(torch.ones(1), None)


def _shape(outputs: Tensor, targets: Tensor) -> float:
    return float(outputs.shape[-1])


def test_the_command_line_fine_tunes_and_resumes_with_the_same_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text("from tests.test_task_data import Segmenter\n")
    masks(tmp_path / "data", 8)
    ok("convert", "net.py:Segmenter", "--lambda", "*=2", "--input-size", "3,16,24", "-o", "cut.safetensors")
    arguments = ["finetune", "cut.safetensors", "--data-dir", "data", "--preprocess", "none", "--workers", "0"]
    arguments += ["--batch-size", "4", "--epochs", "1", "--trust-code", "--crop", "none"]
    record = json.loads(ok(*arguments, "-o", "a.safetensors", "--json").stdout)
    assert record["stages"][-1]["evaluation"]["measurement"]["metric"] == "miou"
    assert "mIoU" in ok("compare", "cut.safetensors", "a.safetensors", "--trust-code").stdout
    fails(2, "--loss l1 is not for this data (masks)", *arguments, "--loss", "l1", "-o", "b.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["masks", "pairs", "boxes"])
def test_two_processes_and_a_killed_run_give_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The sets divide evenly. A detector divides its losses by the boxes of each process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    Path("net.py").write_text(
        "from tests.networks import seeded, tiny_detector\n"
        "from tests.test_task_data import Segmenter, Upscaler\n"
        "def masks(): return seeded(Segmenter)\ndef pairs(): return seeded(Upscaler)\n"
        "def boxes(): return seeded(tiny_detector)\n"
    )
    make, size, pattern = {
        "masks": (masks, "3,16,24", "*=2"),
        "pairs": (partial(pairs, scale=2), "3,16,12", "*=2"),
        "boxes": (boxes, "3,64,64", "head.*=2"),
    }[kind]
    for split, number in (("train", 8), ("val", 4)):
        make(tmp_path / "data" / split, number)
    ok("convert", f"net.py:{kind}", "--lambda", pattern, "--input-size", size, "-o", "cut.safetensors")
    run = ["finetune", "cut.safetensors", "--data", "data", "--preprocess", "none", "--workers", "0", "--trust-code",
           "--crop", "none", "--hflip", "0", "--batch-size", "4", "--epochs", "3", "--calibration-images", "0",
           "--lr", "0.01", "--save-every", "1"]  # fmt: skip
    results = {}
    for processes in (1, 2):
        done = torchrun(processes, *run, "-o", f"{processes}.safetensors", "--json")
        assert done.returncode == 0, done.stderr[-3000:]
        results[processes] = json.loads(done.stdout)
    near = kind == "boxes"
    for one, two in zip(results[1]["epochs"], results[2]["epochs"], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=0.02 if near else 1e-4)
    measured = [
        [stage["evaluation"]["measurement"] for stage in result["stages"] if stage["evaluation"]]
        for result in results.values()
    ]
    assert len(measured[0]) >= 2
    for one, two in zip(*measured, strict=True):
        assert one["metric"] == two["metric"] == {"masks": "miou", "pairs": "psnr", "boxes": "map"}[kind]
        assert near or one["value"] == pytest.approx(two["value"], abs=0.01)
    weights = {name: tensors(f"{name}.safetensors") for name in ("1", "2")}
    for key, tensor in weights["1"].items():
        assert near or torch.allclose(tensor.double(), weights["2"][key].double(), rtol=1e-3, atol=1e-5), key
    state, arguments = Path("killed.state.pth"), [*run, "-o", "killed.safetensors"]
    process = started(*arguments)
    while process.poll() is None and not state.exists():
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert state.exists(), "the run ended before it was killed"
    done = subprocess.run(command(*arguments, "--resume", str(state)), capture_output=True, env=environment())
    assert done.returncode == 0, done.stderr
    killed = tensors("killed.safetensors")
    assert all(torch.equal(tensor, killed[key]) for key, tensor in weights["1"].items())


def test_classes_are_trained_as_before_and_take_a_loss_of_the_user(tmp_path: Path) -> None:
    data, sample = digit_folders(tmp_path, 2), hc.open_source("sample:resnet_mnist5k").model
    settings = {"epochs": 1, "batch_size": 10, "workers": 0, "crop": "none", "calibration_images": 0, "teacher": sample}
    cut = hc.convert(sample, {"stage3.*": 2})
    request = DataRequest(data_dir=str(data), holdout=0.5)
    plain = hc.finetune(cut, request, **settings)
    own = hc.finetune(cut, request, loss=functional.cross_entropy, **settings)
    assert own.rows[0]["loss"] == pytest.approx(plain.rows[0]["loss"], rel=1e-6)
    assert (plain.rows[0]["accuracy"] is None, own.rows[0]["accuracy"]) == (False, None)
