"""Metrics: equal to torchmetrics, with intervals that cover, and clear errors for everything that does not fit."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

import harmconvert as hc
from harmconvert.errors import InputError, OutsideError, UsageError
from harmconvert.metrics import METRICS, Measurement, Metric, bootstrap_interval, mean_of, metric_of, network_metric
from harmconvert.report.tables import evaluation_lines
from harmconvert.training import Evaluation

from .commands import SAMPLE, converted, fails, ok
from .networks import seeded
from .pictures import digit_folders

torchmetrics = pytest.importorskip("torchmetrics")
DETECTION = ("boxes", "scores", "labels")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


class Returning(nn.Module):
    """A network that returns parts of its input, as if it had computed them."""

    def forward(self, x: Any) -> Any:
        return x


# --- values ---


def test_miou_equals_that_of_torchmetrics_on_uneven_batches() -> None:
    logits, masks = random(7, 4, 16, 12), (4 * random(7, 16, 12, seed=1)).long()
    masks[2, :5] = 255
    masks[masks == 3] = 2  # class 3 is predicted, and never right
    batches = [(logits[:5], masks[:5]), (logits[5:], masks[5:])]
    found = hc.evaluate(Returning(), batches, metric="miou").measurement
    expected = torchmetrics.JaccardIndex(task="multiclass", num_classes=4, ignore_index=255)(logits, masks)
    assert found is not None
    assert found.value == pytest.approx(100 * expected.item(), rel=1e-6)
    assert (found.samples, found.unit) == (7, "%")
    assert found.interval is not None
    assert found.interval[0] < found.value < found.interval[1]


def test_miou_of_a_network_of_torchvision() -> None:
    net = seeded(lambda: lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3))
    images, masks = random(3, 3, 64, 64), (3 * random(3, 64, 64, seed=1)).long()
    with torch.no_grad():
        expected = torchmetrics.JaccardIndex(task="multiclass", num_classes=3)(net(images)["out"], masks)
    assert hc.evaluate(net, [(images, masks)], metric="miou").metric == pytest.approx(100 * expected.item(), rel=1e-5)


def test_masks_may_be_larger_than_the_outputs_and_binary() -> None:
    small, masks = random(2, 3, 4, 4), torch.zeros(2, 8, 8, dtype=torch.long)
    large = functional.interpolate(small, size=(8, 8), mode="bilinear", align_corners=False)
    values = [hc.evaluate(Returning(), [(logits, masks)], metric="miou").metric for logits in (small, large)]
    assert values[0] == values[1]
    one = torch.tensor([[[[1.0, -1.0], [-1.0, 1.0]]]])
    assert hc.evaluate(Returning(), [(one, (one[:, 0] > 0).long())], metric="miou").metric == 100


def boxes_of(number: int, seed: int, scores: bool) -> dict[str, Tensor]:
    corners = 50 * random(number, 2, seed=seed)
    found = {"boxes": torch.cat([corners, corners + 5 + 20 * random(number, 2, seed=seed + 1)], 1)}
    found["labels"] = (3 * random(number, seed=seed + 2)).long() + 1
    if scores:
        found["scores"] = random(number, seed=seed + 3)
    return found


def shaken(target: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return the boxes of a target, moved a little, with some others."""
    extra = boxes_of(4, seed, True)
    boxes = target["boxes"] + 4 * random(len(target["boxes"]), 4, seed=seed) - 2
    scores = random(len(boxes), seed=seed + 9)
    parts = {"boxes": boxes, "labels": target["labels"], "scores": scores}
    return {key: torch.cat([parts[key], extra[key]]) for key in DETECTION}


def coco_reference() -> Any:
    """Return torchmetrics' metric with thresholds in float64, as pycocotools has them."""
    levels = {"iou_thresholds": np.linspace(0.5, 0.95, 10).tolist(), "rec_thresholds": np.linspace(0, 1, 101).tolist()}
    return torchmetrics.detection.MeanAveragePrecision(backend="pycocotools", **levels)


def test_map_equals_that_of_pycocotools_by_torchmetrics() -> None:
    targets = [boxes_of(3 + image % 4, 100 * image, False) for image in range(8)]
    targets[3] = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    outputs = [shaken(target, 7 * image) for image, target in enumerate(targets)]
    outputs[5] = {key: value[:0] for key, value in outputs[5].items()}
    found = hc.evaluate(Returning(), [(outputs[:3], targets[:3]), (outputs[3:], targets[3:])], metric="map").measurement
    reference = coco_reference()
    reference.update(outputs, targets)
    assert found is not None
    assert found.value == pytest.approx(100 * reference.compute()["map"].item(), rel=1e-5)
    assert found.samples == 8
    assert found.interval is not None
    assert found.interval[0] <= found.value <= found.interval[1]


def test_map_of_resampled_images_is_that_of_the_repeated_images() -> None:
    targets = [boxes_of(4, 100 * image, False) for image in range(4)]
    outputs = [shaken(target, 7 * image) for image, target in enumerate(targets)]
    states = METRICS["map"].states(outcome(outputs, targets))
    often = [2, 0, 1, 3]
    repeated = [i for i, times in enumerate(often) for _ in range(times)]
    reference = coco_reference()
    reference.update([outputs[i] for i in repeated], [targets[i] for i in repeated])
    found = METRICS["map"].summary(states)(np.array(often, dtype=float))
    assert found == pytest.approx(reference.compute()["map"].item(), abs=0.02)  # equal boxes tie in another order


def outcome(outputs: Any, targets: Any) -> Any:
    from harmconvert.metrics import Outcome

    return Outcome(outputs, targets, None, len(outputs))


def test_a_detector_that_finds_nothing_has_a_map_of_zero() -> None:
    nothing = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)}] * 3
    targets = [boxes_of(2, seed, False) for seed in range(3)]
    found = hc.evaluate(Returning(), [(nothing, targets)], metric="map")
    assert (found.metric, found.measurement and found.measurement.interval) == (0, (0, 0))


def test_psnr_and_ssim_equal_those_of_torchmetrics() -> None:
    images, noise = random(6, 3, 24, 24), 0.1 * random(6, 3, 24, 24, seed=1)
    noise *= torch.linspace(0.2, 1, 6)[:, None, None, None]
    pairs = [(images[:4] + noise[:4], images[:4]), (images[4:] + noise[4:], images[4:])]
    image = torchmetrics.functional.image
    psnr = image.peak_signal_noise_ratio(images + noise, images, 1.0, dim=(1, 2, 3), reduction="elementwise_mean")
    ssim = image.structural_similarity_index_measure(images + noise, images, data_range=1.0)
    assert hc.evaluate(Returning(), pairs, metric="psnr").metric == pytest.approx(psnr.item(), rel=1e-5)
    assert hc.evaluate(Returning(), pairs, metric="ssim").metric == pytest.approx(100 * ssim.item(), rel=1e-5)


def test_images_without_targets_are_compared_with_the_uncut_network() -> None:
    net = seeded(lambda: nn.Conv2d(3, 3, 3, padding=1))
    cut, images = hc.convert(net, {"*": 2}), random(4, 3, 16, 16)
    found = hc.evaluate(cut, [images], metric="psnr", compare=net)
    with torch.no_grad():
        errors = (net(images) - cut.model(images)).square().flatten(1).mean(1)
    assert found.metric == pytest.approx((-10 * errors.log10()).mean().item(), rel=1e-4)
    assert 130 < (hc.evaluate(net, [images], metric="psnr", compare=net).metric or 0) < 140


def test_kl_and_agreement_need_no_labels_and_no_other_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchmetrics", "torchmetrics.functional.image", "pycocotools", "pycocotools.coco"):
        monkeypatch.setitem(sys.modules, name, None)
    logits, other = random(40, 5), nn.Linear(5, 5)
    found = {name: hc.evaluate(Returning(), [logits], metric=name, compare=other) for name in ("kl", "agreement")}
    assert found["kl"].metric == pytest.approx(found["kl"].divergence)
    assert found["agreement"].metric == pytest.approx(100 * (found["agreement"].agreement or 0))
    pairs = [(logits, torch.arange(40) % 5)]
    for name in ("top1", "top5"):
        assert hc.evaluate(Returning(), pairs, metric=name).metric is not None
    with pytest.raises(OutsideError, match=r"map needs pycocotools: pip install 'harmconvert\[metrics\]'"):
        hc.evaluate(Returning(), [([boxes_of(1, 0, True)], [boxes_of(1, 1, False)])], metric="map")
    with pytest.raises(OutsideError, match=r"ssim needs torchmetrics: pip install 'harmconvert\[metrics\]'"):
        hc.evaluate(Returning(), [(random(1, 1, 16, 16), random(1, 1, 16, 16))], metric="ssim")


def test_pixels_are_compared_with_those_of_the_uncut_network() -> None:
    logits = random(2, 3, 4, 4)
    other = Flipped()
    share = (logits.argmax(1) == logits.flip(3).argmax(1)).double().mean().item()
    assert hc.evaluate(Returning(), [logits], metric="agreement", compare=other).metric == pytest.approx(100 * share)


class Flipped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(3)


# --- intervals ---


def test_top1_has_wilsons_interval_and_says_on_what_it_was_measured() -> None:
    found = hc.evaluate(SAMPLE, "sample:mnist5k", metric="top1")
    assert found.interval is not None
    assert found.measurement is not None
    assert found.measurement.interval == pytest.approx(tuple(100 * bound for bound in found.interval))
    assert str(found) == "top-1 99.40% (95 %: 98.70% to 99.72%), 1,000 samples of sample:mnist5k"
    assert Measurement.from_json(json.loads(json.dumps(found.measurement.to_json()))) == found.measurement


def test_the_bootstrap_covers_the_truth_in_about_95_of_100_cases() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for number in range(200):
        values = generator.normal(3.0, 2.0, 60)
        low, high = bootstrap_interval(mean_of(values), 60, seed=number) or ()
        covered += low <= 3.0 <= high
    assert 180 <= covered <= 197


def test_intervals_are_the_same_each_time() -> None:
    pairs = [(random(9, 1, 16, 16), random(9, 1, 16, 16, seed=1))]
    assert len({str(hc.evaluate(Returning(), pairs, metric="psnr")) for _ in range(2)}) == 1


# --- functions of the user ---


def test_a_function_of_outputs_and_targets_has_an_interval() -> None:
    pairs = [(random(20, 3), random(20, 3, seed=1))]
    each = hc.evaluate(Returning(), pairs, metric=lambda outputs, targets: (outputs - targets).abs().mean(1))
    mean = hc.evaluate(Returning(), pairs, metric=lambda outputs, targets: (outputs - targets).abs().mean())
    assert each.metric == pytest.approx(mean.metric)
    assert each.measurement is not None
    assert each.measurement.interval is not None
    assert mean.measurement is not None
    assert mean.measurement.interval is None


def test_a_function_of_model_and_loader_returns_one_number() -> None:
    def share_right(model: nn.Module, loader: Any) -> float:
        assert not model.training
        right = [(model(inputs).argmax(1) == targets).double() for _ in range(2) for inputs, targets in loader]
        return torch.cat(right).mean().item()

    found = hc.evaluate(nn.Identity(), [(torch.eye(3), torch.arange(3))] * 4, metric=share_right)
    assert (found.images, found.measurement and found.measurement.interval) == (12, None)
    assert str(found) == "share_right 1, 12 samples"


def test_an_attribute_says_what_a_function_takes() -> None:
    def judge(a: Any, b: Any) -> float:
        return float(isinstance(a, nn.Module) and len(list(b)) == 1)

    judge.takes = "model"  # type: ignore[attr-defined]
    assert hc.evaluate(nn.Identity(), [(torch.ones(1, 2), torch.ones(1))], metric=judge).metric == 1
    judge.takes = "model"
    with pytest.raises(InputError, match="the metric judge read no sample: the data is empty"):
        hc.evaluate(nn.Identity(), [], metric=judge)
    judge.takes = "all"  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=r"judge.takes is 'all': use 'model' or 'outputs'"):
        hc.evaluate(nn.Identity(), [], metric=judge)


# --- what does not fit ---


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "metric is nan on 4 samples: the outputs of the network are not finite"),
        (
            torch.ones(3),
            r"the metric metric returns a tensor of \(3,\): it should return one number, or one for each of",
        ),
        (None, "the metric metric returns nothing: it should return one number"),
        ("good", "the metric metric returns a str: it should return one number"),
    ],
)
def test_metrics_that_return_no_number_are_refused(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        hc.evaluate(Returning(), [(torch.ones(4, 2), torch.ones(4))], metric=lambda outputs, targets: value)


def test_functions_of_a_model_that_return_no_number_are_refused() -> None:
    for value, message in ((float("nan"), "returns nan"), (torch.ones(2), "a tensor of"), (None, "returns nothing")):
        with pytest.raises(InputError, match=f"the metric metric {message}" if value is None else message):
            hc.evaluate(Returning(), [(torch.ones(4, 2), 1)], metric=lambda model, loader, v=value: v)
    with pytest.raises(InputError, match="the metric metric fails: ZeroDivisionError: division by zero"):
        hc.evaluate(Returning(), [(torch.ones(4, 2), 1)], metric=lambda model, loader: 1 / 0)


def test_loaders_that_are_empty_or_read_before_are_refused() -> None:
    pairs = iter([(torch.eye(3), torch.arange(3))])
    hc.evaluate(Returning(), pairs, metric="top1")
    for data in (pairs, []):
        with pytest.raises(InputError, match="the data is empty, or it is an iterator that was read before"):
            hc.evaluate(Returning(), data, metric="top1")


def test_loaders_that_fail_or_yield_other_things_are_refused() -> None:
    def failing() -> Iterator[Any]:
        yield torch.eye(3), torch.arange(3)
        raise ValueError("disk")

    with pytest.raises(InputError, match="the data fails at batch 1: ValueError: disk; repair the loader"):
        hc.evaluate(Returning(), failing(), metric="top1")
    with pytest.raises(InputError, match=r"batch 0 is a tuple of 3: give \(inputs, targets\) pairs"):
        hc.evaluate(Returning(), [(1, 2, 3)], metric="top1")
    with pytest.raises(UsageError, match=r"the data is a Tensor: give a list or a loader of \(inputs, targets\) pairs"):
        hc.evaluate(Returning(), torch.ones(2, 3), metric="top1")
    images = [(torch.ones(1, channels, 5, 5), torch.zeros(1, 3, 3).long()) for channels in (3, 1)]
    with pytest.raises(UsageError, match=r"the network does not run on images of 1x5x5"):
        hc.evaluate(nn.Conv2d(3, 2, 3), images, metric="miou")


@pytest.mark.parametrize(
    ("metric", "outputs", "targets", "message"),
    [
        ("top1", torch.eye(3), torch.ones(3), "one class number for each sample: these are shape"),
        ("top1", torch.eye(3), torch.arange(2), "the network has 3 outputs for 2 labels"),
        ("top1", torch.ones(1, 2, 3), torch.arange(1), r"not a classifier: its output has shape \(1, 2, 3\)"),
        ("top1", torch.eye(3), None, "top1 compares with the targets of the data, and the data has no targets"),
        ("miou", torch.eye(3), torch.zeros(3, 4, 4).long(), r"logits \(images, classes, H, W\): the output has shape"),
        ("miou", torch.ones(1, 2, 4, 4), torch.zeros(1, 4, 4), r"masks \(images, H, W\) of class numbers: these are"),
        ("miou", torch.ones(1, 2, 4, 4), torch.full((1, 4, 4), 2), "a mask has the class 2, the network has 2 classes"),
        ("map", torch.eye(3), torch.arange(3), "map needs outputs that are a list with a dict of boxes, scores"),
        ("map", [boxes_of(1, 0, True)], [{"boxes": torch.ones(1, 4)}], "map needs targets .*: one has boxes"),
        ("map", [boxes_of(1, 0, True)] * 2, [boxes_of(1, 0, False)], "the network has 2 outputs for 1 target"),
        ("psnr", torch.ones(1, 3, 8, 8), torch.ones(1, 3, 4, 4), r"the outputs have shape \(1, 3, 8, 8\), the targets"),
        ("psnr", torch.ones(1, 3, 8, 8), torch.full((1, 3, 8, 8), 200.0), "values from 0 to 1, but they reach 200"),
        ("ssim", torch.ones(1, 3, 8, 8), torch.ones(1, 3, 8, 8), "at least 11x11 pixels: these have shape"),
    ],
)  # fmt: skip
def test_metrics_say_what_they_need(metric: str, outputs: Any, targets: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        hc.evaluate(Returning(), [(outputs, targets)], metric=metric)


def test_unknown_metrics_list_those_that_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    known = "use top1, top5, agreement, kl, miou, map, psnr, ssim, or FILE.py:FUNCTION"
    fails(2, f"unknown metric 'f1': {known}", "evaluate", SAMPLE, "--dataset", "sample:mnist5k", "--metric", "f1")
    with pytest.raises(UsageError, match="a metric is a name, a Metric or a function, not a int"):
        metric_of(3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="kl compares with the uncut network: name it with compare=SOURCE"):
        hc.evaluate(Returning(), [torch.eye(3)], metric="kl")


# --- how much a network may lose ---


def test_a_network_is_cut_until_a_metric_on_data_has_dropped() -> None:
    net = seeded(lambda: nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1)))
    images = random(6, 1, 16, 16)
    with torch.no_grad():
        pairs = [(images, net(images).clamp(0, 1) + 0.05 * random(6, 1, 16, 16, seed=1))]
    for metric, allowed in (("psnr", 3.0), (worst, 0.02)):
        found = hc.convert(net, max_drop=allowed, metric=metric, labelled=pairs, example_input=images[:1])
        assert len(found.drops) > 1
        whole, cut = (hc.evaluate(one, pairs, metric=metric).metric or 0.0 for one in (net, found))
        assert (whole - cut if metric == "psnr" else cut - whole) <= allowed
        assert found.cost.harmonic_parameters < found.cost.parameters


def worst(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).abs().flatten(1).amax(1)


worst.higher_is_better = False  # type: ignore[attr-defined]


def test_a_function_of_a_network_may_be_better_when_it_is_lower() -> None:
    def size(network: nn.Module) -> float:
        return float(sum(p.numel() for p in network.parameters()))

    assert network_metric(size, None, nn.Identity()).drop(10.0, nn.Linear(2, 1)) == 7
    size.higher_is_better = False  # type: ignore[attr-defined]
    assert network_metric(size, None, nn.Identity()).drop(10.0, nn.Linear(2, 1)) == -7


def test_a_metric_of_data_needs_data() -> None:
    net = nn.Conv2d(1, 1, 3)
    for metric in ("miou", METRICS["psnr"], worst):
        with pytest.raises(UsageError, match=r"the metric \w+ is measured on data: give labelled=DATA"):
            hc.convert(net, max_drop=1.0, metric=metric)
    with pytest.raises(UsageError, match="max_drop needs a metric of the network or labelled batches"):
        hc.convert(net, max_drop=1.0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 1, 3))
    with pytest.raises(InputError, match=r"psnr compares with the targets of the data .* has no targets"):
        hc.convert(net, max_drop=1.0, metric="psnr", labelled=[random(2, 1, 8, 8)])


# --- differences from a second network ---


def test_the_difference_from_a_second_network_is_that_of_the_two_values_with_a_paired_interval() -> None:
    targets = torch.arange(200) % 5
    logits = torch.eye(5)[targets]

    class Wrong(nn.Module):
        def __init__(self, wrong: slice) -> None:
            super().__init__()
            self.wrong = wrong

        def forward(self, x: Tensor) -> Tensor:
            out = x.clone()
            out[self.wrong] = out[self.wrong].roll(1, 1)
            return out

    batches = [(logits, targets)]
    own, other = Wrong(slice(0, 20)), Wrong(slice(12, 24))  # 12 errors of the first alone, 4 of the second alone
    found = hc.evaluate(own, batches, compare=other)
    values = [hc.evaluate(one, batches).top1 or 0.0 for one in (own, other)]
    assert found.difference is not None
    assert found.difference.value == pytest.approx(100 * (values[0] - values[1]))
    # Agresti and Min 2005: half a sample in each of the four cells.
    share = (4.5 - 12.5) / 202
    spread = 1.959964 * math.sqrt(17 - 64 / 202) / 202
    assert found.difference.interval == pytest.approx((100 * (share - spread), 100 * (share + spread)), rel=1e-4)
    low, high = found.difference.interval or (0, 0)
    assert high - low < 2 * 1.96 * 100 * math.sqrt(2 * 0.9 * 0.1 / 200), "narrower than for separate samples"
    assert hc.evaluate(own, batches).difference is None
    assert "difference" not in hc.evaluate(own, batches).to_json()
    assert Evaluation.from_json(json.loads(json.dumps(found.to_json()))).difference == found.difference
    assert "second network: top-1 94.00%; difference -4.00 points (95 %: " in "\n".join(evaluation_lines(found))


def test_the_difference_of_any_metric_is_resampled_in_pairs() -> None:
    inputs, targets = random(40, 1, 4, 4), random(40, 1, 4, 4)
    distance = lambda outputs, targets: (outputs - targets).square().flatten(1).mean(1)  # noqa: E731
    batches = [(inputs[:25], targets[:25]), (inputs[25:], targets[25:])]
    shifted = nn.Conv2d(1, 1, 1)
    with torch.no_grad():
        shifted.weight.fill_(1.0), shifted.bias.fill_(0.5)
    found = hc.evaluate(nn.Identity(), batches, metric=distance, compare=shifted)
    errors = [((x - targets) ** 2).flatten(1).mean(1).numpy() for x in (inputs, inputs + 0.5)]
    pairs = errors[0] - errors[1]
    assert found.difference is not None
    assert found.difference.value == pytest.approx(pairs.mean(), rel=1e-5)
    low, high = found.difference.interval or (0.0, 0.0)
    spread = 1.96 * pairs.std() / math.sqrt(40)
    assert (low, high) == (
        pytest.approx(pairs.mean() - spread, abs=0.02),
        pytest.approx(pairs.mean() + spread, abs=0.02),
    )
    assert hc.evaluate(nn.Identity(), [inputs], metric="psnr", compare=shifted).difference is None


# --- commands ---


def test_commands_measure_and_record_a_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def right(outputs, targets):\n    return (outputs.argmax(1) == targets).double()\n")
    digit_folders(tmp_path / "digits", 4)
    data = ["--data-dir", "digits", "--workers", "0"]
    text = ok("evaluate", SAMPLE, *data, "--metric", "mine.py:right").stdout
    assert text.startswith("right 1 (95 %: 1 to 1), 40 samples of digits\n")
    converted("a.safetensors", "--lambda", "2")
    converted("b.safetensors", "--lambda", "3")
    text = ok("evaluate", "a.safetensors", *data, "--metric", "kl", "--compare", SAMPLE).stdout
    assert re.match(r"KL [0-9.]+ nats \(95 %: [0-9.]+ nats to [0-9.]+ nats\), 40 samples of digits", text)
    comparison = ["compare", "a.safetensors", "b.safetensors", "--labelled", "digits", "--metric", "kl"]
    columns = json.loads(ok(*comparison, "--json").stdout)["checkpoints"]
    assert columns[0]["measurement"]["value"] > columns[1]["measurement"]["value"] > 0
    tuned = ["finetune", "a.safetensors", *data, "--metric", "top5", "--epochs", "1", "--lr", "0", "--crop", "none"]
    result = ok(*tuned, "--holdout", "0.5", "--calibration-images", "0", "-o", "tuned.safetensors", "--json")
    record = json.loads(result.stdout)
    assert record["stages"][-1]["evaluation"]["measurement"]["metric"] == "top5"
    assert record["epochs"][0]["test_top-5"] == pytest.approx(100 * record["epochs"][0]["test_top5"])
    text = ok("compare", "a.safetensors", "tuned.safetensors").stdout
    assert re.search(r"^top-5 +not known +[0-9.]+%$", text, re.MULTILINE)
    fails(2, "--metric works only with --max-drop POINTS", "convert", SAMPLE, "--metric", "kl")
    fails(2, "unknown metric 'f1': use top1,", "convert", SAMPLE, "--max-drop", "1", "--labelled", "digits",
          "--metric", "f1")  # fmt: skip


@pytest.mark.slow
def test_convert_allows_a_drop_of_agreement_without_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--max-drop", "2", "--metric", "agreement", "--labelled", "sample:mnist5k", "--trials", "0", "--json"]
    record = json.loads(ok("convert", SAMPLE, "--axes", "space", "-o", "cut.safetensors", *arguments).stdout)
    measured = record["held_out"]["converted"]["measurement"]
    assert (measured["metric"], measured["samples"], measured["data"]) == ("agreement", 500, "half of sample:mnist5k")
    assert record["held_out"]["uncut"]["measurement"]["value"] == 100


@pytest.mark.slow
def test_a_benchmark_measures_low_precision_with_a_metric() -> None:
    pytest.importorskip("onnxruntime")
    net = seeded(lambda: nn.Sequential(nn.Conv2d(1, 3, 3, padding=1)))
    images = random(8, 1, 16, 16)
    with torch.no_grad():
        pairs = [(images, net(images).clamp(-0.9, 0.9))]
    found = hc.benchmark(
        net, images[:1], batches=[1], repeats=3, runtimes=["torch", "onnx"], precisions=["f32", "int8"], data=pairs,
        metric="psnr",
    )  # fmt: skip
    values = {(row.runtime, row.precision): row.measurement for row in found.rows if row.seconds}
    full, low = values["torch", "f32"], values["onnx", "int8"]
    assert full is not None
    assert low is not None
    assert full.value > low.value > 10
    with pytest.raises(UsageError, match="metric is measured on data: give data=DATA"):
        hc.benchmark(net, images[:1], metric="psnr")


def test_a_metric_is_a_description_that_users_can_make() -> None:
    mine = Metric("mae", "error", lambda o: (o.outputs - o.targets).abs().flatten(1).mean(1).numpy(), unit="K",
                  higher_is_better=False)  # fmt: skip
    found = hc.evaluate(Returning(), [(torch.ones(3, 2), torch.zeros(3, 2))], metric=mine)
    assert str(found) == "error 1 K (95 %: 1 K to 1 K), 3 samples"
