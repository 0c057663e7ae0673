"""Calibration inputs: any output of a loader becomes inputs of the network, and indivisible batches stay whole."""

from __future__ import annotations

from collections import UserDict, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import harmconvert as hc
from harmconvert.errors import InputError, UsageError

from .networks import random_input, seeded


def smoothed(shape: tuple[int, ...]) -> Tensor:
    x = random_input(shape)
    return x + x.roll(1, -1)


def calibrated(model: nn.Module, batches: Any) -> hc.Conversion:
    return hc.convert(model, {"*": 2}, calibration=batches)


def alike(one: hc.Conversion, other: hc.Conversion) -> bool:
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return one.calibration.inputs == other.calibration.inputs and all(torch.equal(a, b) for a, b in pairs)


def sound() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Conv1d(2, 6, 5), nn.ReLU(), nn.Conv1d(6, 6, 5)))


def images() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)))


class Detector(nn.Module):
    """A network that takes a list of images of any size, as torchvision's detectors do, and ignores its targets."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)

    def forward(self, images: list[Tensor], targets: Any = None) -> list[dict[str, Tensor]]:
        if any(image.dim() != 3 for image in images):
            raise ValueError("images is expected to be a list of 3d tensors")
        size = [max(sizes) for sizes in zip(*(image.shape[1:] for image in images), strict=True)]
        whole = torch.zeros(len(images), 3, *size)
        for row, image in zip(whole, images, strict=True):
            row[:, : image.shape[1], : image.shape[2]] = image
        return [{"boxes": answer} for answer in self.b(self.a(whole).relu())]


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)

    def forward(self, pixel_values: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.b(self.a(pixel_values).relu())


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("target", ["none", "labels", "alike"])
def test_tensors_of_any_rank_may_come_from_a_loader_of_a_tensor_dataset(axes: int, target: str) -> None:
    kind = getattr(nn, f"Conv{axes}d")
    model = seeded(lambda: nn.Sequential(kind(2, 4, 3), nn.ReLU(), kind(4, 4, 3)))
    x = smoothed((16, 2, *[7] * axes))
    others = {"none": [], "labels": [torch.zeros(16)], "alike": [x + 1]}[target]
    assert alike(calibrated(model, DataLoader(TensorDataset(x, *others), 8)), calibrated(model, x.split(8)))


Pair = namedtuple("Pair", ["pixel_values", "label"])

READINGS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Any]]] = {
    "NumPy arrays": (images, lambda x: x.numpy()),
    "NumPy arrays of float64 and labels": (images, lambda x: (x.double().numpy(), np.zeros(len(x)))),
    "a named pair": (images, lambda x: Pair(x, torch.zeros(len(x)))),
    "a mapping of another class": (Keywords, lambda x: UserDict(pixel_values=x)),
    "keywords and labels that the network does not take": (
        Keywords, lambda x: {"pixel_values": x, "labels": torch.zeros(len(x))}
    ),
    "a mapping and a target": (Keywords, lambda x: (UserDict(pixel_values=x.numpy()), None)),
    "arguments and a target": (Keywords, lambda x: ((x, torch.ones(len(x), 1)), None)),
    "arguments that a loader collated to a list": (Keywords, lambda x: [[x, torch.ones(len(x), 1)], None]),
    "a list of images": (Detector, lambda x: [*x]),
    "lists of images and of targets": (Detector, lambda x: ([*x], [{"boxes": torch.zeros(1, 4)}] * len(x))),
    "tuples of images and of targets": (Detector, lambda x: (tuple(x), ({"boxes": torch.zeros(1, 4)},) * len(x))),
}  # fmt: skip


@pytest.mark.parametrize("name", READINGS)
def test_the_output_of_a_loader_is_converted_to_the_inputs_of_the_network(name: str) -> None:
    make, given = READINGS[name]
    model, x = seeded(make), smoothed((16, 3, 9, 9))
    plain = (lambda part: [*part]) if make is Detector else (lambda part: part)
    found = calibrated(model, [given(part) for part in x.split(8)])
    assert found.calibration.inputs == 16
    assert {layer.decision for layer in found.calibration.layers} == {"refit"}
    assert alike(found, calibrated(model, [plain(part) for part in x.split(8)]))


def test_the_images_of_a_detector_may_have_different_sizes() -> None:
    parts = [[smoothed((3, 9 + i, 12)) for i in range(4)] for _ in range(4)]
    found = calibrated(seeded(Detector), parts)
    assert found.calibration.inputs == 16
    assert found.calibration.held_back == 4
    assert {layer.decision for layer in found.calibration.layers} == {"refit"}


def test_batch_norms_are_reestimated_on_the_calibration_inputs() -> None:
    def normed() -> nn.Module:
        return nn.Sequential(nn.Conv1d(2, 6, 5), nn.BatchNorm1d(6))

    x, found = smoothed((16, 2, 30)), []
    for batches in (x.split(8), DataLoader(TensorDataset(x, x), 8), [part.numpy() for part in x.split(8)]):
        model = seeded(normed)
        assert hc.reestimate_batch_norm(model, batches) == 1
        found.append(model[1].running_var)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_batch_norms_of_a_network_with_two_inputs_and_keywords_are_reestimated() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.b(self.norm(input=self.a(left + right)).relu())

    x = smoothed((16, 3, 9, 9))
    found = calibrated(seeded(Two), [((part, 3 * part), None) for part in x.split(8)])
    assert not any("not re-estimated" in note for note in found.calibration.notes)
    assert hc.reestimate_batch_norm(found.model, [((x, x), None)]) == 1


class Clips(nn.Module):
    """A network whose batch axis holds pairs of frames; the output for each frame depends on both."""

    def __init__(self, strict: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.strict = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3), strict

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        h = h.unflatten(0, (-1, 2)).flip(1).flatten(0, 1) if self.strict else h + h.mean(0, keepdim=True)
        return self.b(h).mean((2, 3))


@pytest.mark.parametrize("strict", [True, False], ids=["fails on a single frame", "answers otherwise"])
def test_whole_batches_are_held_back_where_the_batch_axis_holds_frames(strict: bool) -> None:
    sizes = []
    model, x = seeded(lambda: Clips(strict)), smoothed((32, 3, 9, 9))
    conv = nn.Conv2d.forward

    def counting(self: nn.Conv2d, input: Tensor) -> Tensor:
        sizes.append(len(input))
        return conv(self, input)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Conv2d, "forward", counting)
        record = calibrated(model, x.split(4)).calibration
    assert (record.inputs, record.held_back) == (32, 8)
    assert {layer.decision for layer in record.layers} == {"refit"}
    assert record.divergence < record.plain_divergence
    assert set(sizes) <= {1, 2, 4}
    assert max(map(sizes.count, (1, 2))) <= 4, "to see whether batches may be divided"
    first, last = record.layers
    assert (first.positions, last.positions) == (24 * 49, 24 * 25), "all positions of the frames fitted on"


def test_with_a_single_indivisible_batch_nothing_is_refitted_and_the_record_says_so() -> None:
    record = calibrated(seeded(Clips), [smoothed((4, 3, 9, 9))]).calibration
    assert {layer.decision for layer in record.layers} == {"projection"}
    assert "one batch, which the network takes only as a whole: none can be held back" in record.notes[0]


def broken() -> Iterator[Tensor]:
    yield smoothed((4, 3, 9, 9))
    raise KeyError("labels")


@pytest.mark.parametrize(
    ("batches", "kind", "message"),
    [
        (broken(), InputError, r"calibration= fails at batch 1: KeyError: 'labels'; repair the loader"),
        ("images", UsageError, r"calibration= is a str: give a list or a loader of batches"),
        ({"x": torch.zeros(4, 3, 9, 9)}, UsageError, r"calibration= is a dict: give a list or a loader of batches"),
        (np.zeros((4, 3, 9, 9)), UsageError, r"calibration= is a ndarray: give a list or a loader of batches"),
        ([None], InputError, r"calibration batch 0 is a NoneType without tensors: yield tensors"),
        ([torch.zeros(4, 3, 9, 9), "a.png"], InputError, r"calibration batch 1 is a str without tensors"),
        ([[]], InputError, r"calibration batch 0 is a list without tensors: yield tensors"),
        ([{}], InputError, r"calibration batch 0 is a dict without tensors: yield tensors"),
        ([torch.zeros(0, 3, 9, 9)], InputError, r"calibration= holds no input"),
    ],
)  # fmt: skip
def test_invalid_calibration_inputs_are_refused_in_one_line(batches: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        calibrated(images(), batches)
