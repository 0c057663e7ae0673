"""Networks with outputs of any form are verified, compared and calibrated: dicts, tuples, dataclasses, detections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn, ssdlite320_mobilenet_v3_large
from torchvision.models.segmentation import fcn_resnet50

import harmconvert as hc
from harmconvert.calibration import Divergence, calibration_set
from harmconvert.network import compared_outputs, floating_tensors, heads_of

from .networks import random_input, seeded, tiny_detector


@dataclass
class Output:
    """As transformers' ModelOutput: an object with tensors as attributes."""

    logits: Tensor
    hidden: tuple[Tensor, ...]


FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dict": lambda a, b: {"out": a, "aux": b},
    "tuple": lambda a, b: (a, b),
    "nested": lambda a, b: [a, {"b": (b,)}],
    "dataclass": lambda a, b: Output(a, (b,)),
    "with whole numbers": lambda a, b: {"out": a, "aux": b, "classes": a.argmax(1)},
}


class Several(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 5, 3, padding=1)
        self.third = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        features = self.first(x).relu()
        return FORMS[self.form](self.second(features), self.third(features))


@pytest.mark.parametrize("form", FORMS)
def test_all_floating_point_tensors_of_the_outputs_are_compared(form: str) -> None:
    net, images = seeded(lambda: Several(form)), random_input((8, 3, 12, 12))
    assert hc.verify(net, hc.convert(net), images).ok
    data = calibration_set(list(images.split(2)), model=net)
    for layer in ("second", "third"):  # a change of any output is seen
        cut = hc.convert(net, {layer: 1})
        with torch.no_grad():
            pairs = zip(floating_tensors(net(images)), floating_tensors(cut.model(images)), strict=True)
            power = sum(float(tensor.square().sum()) for tensor in floating_tensors(net(images)))
            error = sum(float((a - b).square().sum()) for a, b in pairs)
        assert Divergence(net, [*data.fit, *data.held])(cut.model)[0] == pytest.approx(error / power, rel=1e-4)
        assert hc.verify(net, cut, images).max_relative_error > 0.01


@pytest.mark.parametrize("form", ["dict", "dataclass"])
def test_networks_with_several_outputs_are_calibrated(form: str) -> None:
    net, images = seeded(lambda: Several(form)), random_input((32, 3, 12, 12))
    record = hc.convert(net, {"*": 1}, calibration=images.split(4)).calibration
    assert record is not None
    assert record.divergence is not None
    assert record.plain_divergence is not None
    assert record.divergence < record.plain_divergence


@pytest.fixture(scope="module")
def detector() -> nn.Module:
    return seeded(tiny_detector)


def images(number: int, seed: int = 0) -> list[Tensor]:
    return list(torch.rand(number, 3, 48, 48, generator=torch.Generator().manual_seed(seed)))


def test_detectors_are_compared_by_the_outputs_of_their_heads(detector: nn.Module) -> None:
    assert list(heads_of(detector)) == ["head"]
    with torch.no_grad():
        found = compared_outputs(detector, lambda: detector(images(2)))
        plain = detector(images(2))
    assert {key: len(value) for key, value in found["head"].items()} == {"bbox_regression": 2, "cls_logits": 2}
    assert set(plain[0]) == {"boxes", "scores", "labels"}
    assert not detector.head._forward_hooks
    assert heads_of(nn.Conv2d(1, 1, 3)) == {}


def test_a_cut_detector_is_verified_although_it_finds_other_boxes(detector: nn.Module) -> None:
    cut = hc.convert(detector, {"*": 2}, example_input=images(1))
    check = hc.verify(detector, cut, images(1))
    assert check.as_planned
    assert 0 < check.max_relative_error < 1
    assert "the outputs of head are compared: those of the detector depend on which boxes are left" in check.notes
    data = calibration_set([images(2, seed) for seed in range(2)], model=detector)
    value, why = Divergence(detector, data.held)(cut.model)
    assert why is None
    assert value is not None
    assert 0 < value < 1


@pytest.mark.slow
def test_a_detector_of_two_stages_is_compared_by_its_regions() -> None:
    net = seeded(
        lambda: fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=3, min_size=64)
    )
    assert list(heads_of(net)) == ["rpn.head"]
    cut = hc.convert(net, {"rpn.head.conv.0.0": 2}, example_input=images(1))
    data = calibration_set([images(2, seed) for seed in range(2)], model=net)
    value, why = Divergence(net, data.held)(cut.model)
    assert (why, value is not None and value > 0) == (None, True)


def test_a_detector_is_calibrated_on_lists_of_images(detector: nn.Module) -> None:
    batches = [images(4, seed) for seed in range(8)]
    record = hc.convert(detector, {"*": 1}, example_input=images(1), calibration=batches).calibration
    assert record is not None
    assert record.divergence is not None
    assert record.plain_divergence is not None
    assert record.divergence < record.plain_divergence
    assert any(note.startswith("the outputs of head are compared") for note in record.notes)


@pytest.mark.slow
def test_a_detector_of_torchvision_is_verified() -> None:
    net = seeded(lambda: ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3))
    cut = hc.convert(net, {"backbone.features.0.0.0": 2, "head.*": 2}, example_input=images(1))
    check = hc.verify(net, cut, images(1))
    assert check.as_planned
    assert 0 < check.max_relative_error < 1


def test_a_network_of_torchvision_with_an_auxiliary_head_is_verified() -> None:
    net = seeded(lambda: fcn_resnet50(weights=None, weights_backbone=None, num_classes=3, aux_loss=True))
    inputs = random_input((1, 3, 32, 32))
    with torch.no_grad():
        assert list(net(inputs)) == ["out", "aux"]
    cut = hc.convert(net, {"aux_classifier.0": 2}, example_input=inputs)
    data = calibration_set([inputs, inputs], model=net)
    value, _ = Divergence(net, data.held)(cut.model)
    assert value is not None
    assert value > 0
