"""Data of other tasks than classification: folders and files are recognised, and what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import harmconvert as hc
from harmconvert.data import (
    DataRequest,
    calibration_images,
    open_data,
    recognised,
    sample_transform,
    task_preprocessing,
)
from harmconvert.errors import InputError, UsageError

from .commands import fails, ok
from .networks import seeded, tiny_detector
from .test_flows import Recorder

PLAIN = {"preprocess": "none"}


def picture(path: Path, width: int, height: int, seed: int, channels: int = 3) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (height, width, 3) if channels == 3 else (height, width)
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(values).save(path)


def masks(root: Path, number: int = 4, classes: int = 3, size: tuple[int, int] = (24, 16)) -> Path:
    for index in range(number):
        picture(root / "images" / f"{index}.png", *size, index)
        values = np.random.default_rng(index).integers(0, classes, size[::-1], dtype=np.uint8)
        (root / "masks").mkdir(exist_ok=True)
        Image.fromarray(values).save(root / "masks" / f"{index}.png")
    return root


def boxes(root: Path, number: int = 4, name: str = "annotations.json") -> Path:
    images, annotations = [], []
    for index in range(number):
        picture(root / "images" / f"{index}.jpg", 64, 48, index)
        images.append({"id": index + 5, "file_name": f"{index}.jpg", "width": 64, "height": 48})
        for box in range(index):
            annotations.append({"id": len(annotations), "image_id": index + 5, "category_id": 1 + box % 2,
                                "bbox": [4.0 * box, 3.0, 10.0, 20.0], "area": 200.0, "iscrowd": 0})  # fmt: skip
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text(json.dumps({"images": images, "annotations": annotations, "categories": []}))
    return root


def pairs(root: Path, number: int = 4, scale: int = 1) -> Path:
    for index in range(number):
        picture(root / "input" / f"{index}.png", 12, 16, index)
        picture(root / "target" / f"{index}.png", 12 * scale, 16 * scale, index + 100)
    return root


class Segmenter(nn.Module):
    """Logits of three classes for each pixel, in a dict as torchvision's networks return them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.last(self.first(x).relu())}


class Upscaler(nn.Module):
    """A network that doubles the size of pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(self.last(self.first(x).relu()), 2)


@pytest.fixture(scope="module")
def detector() -> nn.Module:
    return seeded(tiny_detector)


# --- kinds ---


@pytest.mark.parametrize(
    ("make", "task", "text"),
    [
        (masks, "masks", "4 samples: images with masks (images/ and masks/)"),
        (boxes, "boxes", "4 samples: images with boxes (annotations.json, COCO's format)"),
        (pairs, "images", "4 samples: pairs of images (input/ and target/)"),
    ],
)
def test_the_kind_of_a_folder_is_recognised_and_said(tmp_path: Path, make: Any, task: str, text: str) -> None:
    found = recognised(make(tmp_path / "data"))
    assert found is not None
    assert (found.task, len(found), found.description) == (task, 4, text)
    data = open_data(DataRequest(data_dir=str(tmp_path / "data"), holdout=0.25))
    assert data.notes[0] == f"{tmp_path / 'data'}: {text}"
    assert data.train is not None
    assert data.test is not None
    assert (len(data.train), len(data.test), data.task) == (3, 1, task)


def test_splits_have_their_own_folders_or_files_of_annotations(tmp_path: Path) -> None:
    masks(tmp_path / "a" / "train", 3)
    masks(tmp_path / "a" / "val", 2)
    boxes(tmp_path / "b", 3, "annotations/instances_train.json")
    boxes(tmp_path / "b", 2, "annotations/instances_val.json")
    for name in ("a", "b"):
        data = open_data(DataRequest(data_dir=str(tmp_path / name)))
        assert [len(part) for part in (data.train, data.test) if part is not None] == [3, 2]
    with pytest.raises(UsageError, match=r"has several files of annotations .*: name one of them as the data"):
        recognised(tmp_path / "b")
    assert len(recognised(tmp_path / "b" / "annotations" / "instances_val.json") or ()) == 2


def test_files_of_tensors_are_samples(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    values = torch.rand(6, 2, 10)
    np.save(tmp_path / "all.npy", values.numpy())
    torch.save(values, tmp_path / "all.pt")
    for name in ("all.npy", "all.pt"):
        rows = recognised(tmp_path / name)
        assert rows is not None
        assert (len(rows), rows.labelled) == (6, False)
        assert torch.equal(rows.read(3)[0], values[3])
    folder = tmp_path / "sounds"
    for index in range(4):
        part = folder / ("dog" if index % 2 else "cat")
        part.mkdir(parents=True, exist_ok=True)
        soundfile.write(part / f"{index}.wav", values[index].T.numpy(), 8000, subtype="FLOAT")
    sounds = recognised(folder)
    assert sounds is not None
    assert (sounds.classes, sounds.description) == (["cat", "dog"], "4 samples: tensors in files (.wav) of 2 classes")
    sound, label = sounds.read(3)
    assert torch.equal(sound, values[3])
    assert label == 1


def test_damaged_files_of_tensors_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "text.npy", np.array(["a", "b"]))
    np.save(tmp_path / "number.npy", np.array([1.0, 2.0]))
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)
    torch.save({"weights": torch.ones(2)}, tmp_path / "dict.pt")
    torch.save(Path, tmp_path / "class.pt")
    for name, message in (
        ("text.npy", "has no array of real numbers"),
        ("object.npy", "cannot be read: Object arrays cannot be loaded"),
        ("number.npy", "has a tensor of 1 axis: the first one counts the samples"),
        ("dict.pt", "has a dict: it should have one tensor of real numbers"),
        ("class.pt", "cannot be read: Weights only load failed"),
    ):
        with pytest.raises(InputError, match=f"{name} {message}"):
            recognised(tmp_path / name)


# --- what does not fit ---


def test_masks_must_have_the_size_of_their_images(tmp_path: Path) -> None:
    picture(masks(tmp_path) / "masks" / "2.png", 8, 8, 0, channels=1)
    found = recognised(tmp_path)
    assert found is not None
    with pytest.raises(
        InputError, match=r"masks/2.png has 8x8 pixels, its image 24x16: a mask must have the size of its"
    ):
        found.read(2)
    picture(tmp_path / "masks" / "2.png", 24, 16, 0)
    with pytest.raises(InputError, match=r"masks/2.png is no mask: it should have one channel"):
        found.read(2)


def test_each_image_needs_its_mask(tmp_path: Path) -> None:
    (masks(tmp_path) / "masks" / "1.png").unlink()
    with pytest.raises(InputError, match=r"masks lacks files for 1 picture \(1\): each needs a file of the same stem"):
        recognised(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": [{"id": 5, "file_name": "none.jpg"}]},
            "names 1 image that .*images does not have .none.jpg.: add them",
        ),
        (
            {"annotations": [{"image_id": 99, "category_id": 1, "bbox": [0, 0, 1, 1]}]},
            "has a box for image 99, which it",
        ),
        (
            {"annotations": [{"image_id": 5, "category_id": 1, "bbox": [0, 0, 1]}]},
            "a box of 3 numbers: it should have x",
        ),
        (
            {"annotations": [{"image_id": 5}]},
            "is not in COCO's format for detection: one of its annotations has no 'category_id'",
        ),
        ({"images": []}, "lists no image|for image 6, which it"),
    ],
)
def test_wrong_annotations_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = boxes(tmp_path) / "annotations.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        recognised(tmp_path)


def test_categories_beyond_the_classes_of_a_detector_are_refused(tmp_path: Path, detector: nn.Module) -> None:
    file = boxes(tmp_path) / "annotations.json"
    document = json.loads(file.read_text())
    document["annotations"][0]["category_id"] = 3
    file.write_text(json.dumps(document))
    with pytest.raises(
        InputError, match=r"category 3 is beyond the 3 classes of this network, of which 0 is the background"
    ):
        hc.evaluate(detector, tmp_path)


def test_masks_of_a_class_that_the_network_lacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a mask has the class 4, the network has 3 classes"):
        hc.evaluate(Segmenter(), masks(tmp_path, classes=5), preprocessing=PLAIN)


def test_samples_of_different_sizes_need_a_size(tmp_path: Path) -> None:
    picture(pairs(tmp_path) / "input" / "0.png", 20, 20, 0)
    picture(tmp_path / "target" / "0.png", 20, 20, 1)
    net = nn.Conv2d(3, 3, 3, padding=1)
    with pytest.raises(
        InputError, match=r"samples of a batch have different sizes \(3x16x12, 3x20x20\): give batch_size=1"
    ):
        hc.evaluate(net, tmp_path, workers=0)
    assert hc.evaluate(net, tmp_path, workers=0, batch_size=1).images == 4


# --- transforms ---


def test_masks_and_boxes_follow_their_images() -> None:
    net = nn.Conv2d(3, 2, 3)
    config = task_preprocessing(net, {"input_size": (3, 8, 12), **PLAIN}, "masks")
    image = Image.fromarray(np.zeros((16, 24, 3), dtype=np.uint8))
    mask = torch.zeros(16, 24, dtype=torch.long)
    mask[:8, :12] = 2
    found, wanted = sample_transform(config)(image, mask)  # type: ignore[call-arg]
    assert (found.shape, wanted.shape, wanted.dtype) == ((3, 8, 12), (8, 12), torch.long)
    assert int((wanted == 2).sum()) == 24
    config = task_preprocessing(net, {"input_size": (3, 8, 12), **PLAIN}, "boxes")
    target = {"boxes": torch.tensor([[2.0, 4.0, 10.0, 8.0]]), "labels": torch.tensor([1])}
    _, moved = sample_transform(config)(image, target)  # type: ignore[call-arg]
    assert moved["boxes"].tolist() == [[1, 2, 5, 4]]


# --- flows ---


def test_a_segmentation_folder_is_evaluated_with_miou(tmp_path: Path) -> None:
    listener = Recorder()
    found = hc.evaluate(Segmenter(), masks(tmp_path), preprocessing=PLAIN, workers=0, listener=listener)
    assert found.measurement is not None
    assert (found.measurement.metric, found.images, found.top1) == ("miou", 4, None)
    assert listener.said[0] == f"note: {tmp_path}: 4 samples: images with masks (images/ and masks/)"
    assert listener.said[1] == "preprocessing: own size, mean 0,0,0, std 1,1,1"


def test_a_detector_of_torchvision_is_evaluated_with_map(tmp_path: Path, detector: nn.Module) -> None:
    found = hc.evaluate(detector, boxes(tmp_path, 3), workers=0, batch_size=2)
    assert found.measurement is not None
    assert (found.measurement.metric, found.images) == ("map", 3)


def test_pairs_of_images_are_evaluated_with_psnr(tmp_path: Path) -> None:
    found = hc.evaluate(Upscaler(), pairs(tmp_path, scale=2), workers=0)
    assert found.measurement is not None
    assert (found.measurement.metric, found.images, found.measurement.unit) == ("psnr", 4, "dB")


def test_sound_is_evaluated_with_top1(tmp_path: Path) -> None:
    for index in range(4):
        part = tmp_path / str(index % 2)
        part.mkdir(exist_ok=True)
        np.save(part / f"{index}.npy", np.random.default_rng(index).normal(size=(1, 40)).astype(np.float32))
    net = nn.Sequential(nn.Conv1d(1, 4, 5), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 2))
    found = hc.evaluate(net, tmp_path, workers=0)
    assert (found.images, found.labelled) == (4, 4)


def test_a_network_is_cut_until_its_miou_has_dropped(tmp_path: Path) -> None:
    net = seeded(Segmenter)
    file = hc.convert_to_file(
        net, tmp_path / "a.safetensors", max_drop=50, labelled=masks(tmp_path / "data"), preprocessing=PLAIN,
        input_sizes=[(3, 16, 24)],
    )  # fmt: skip
    assert file.held_out is not None
    measured = file.held_out["converted"].measurement
    assert measured is not None
    assert (measured.metric, measured.samples) == ("miou", 2)


@pytest.mark.parametrize("make", [masks, pairs])
def test_calibration_reads_the_inputs_of_every_kind_of_data(tmp_path: Path, make: Any) -> None:
    images = calibration_images(make(tmp_path), Segmenter(), 3, overrides=PLAIN)
    assert [tuple(batch.shape[:2]) for batch in images.batches] == [(3, 3)]


def test_detectors_are_calibrated_on_lists_of_images(tmp_path: Path, detector: nn.Module) -> None:
    images = calibration_images(boxes(tmp_path), detector, 4, batch_size=2)
    assert [[tuple(image.shape) for image in batch] for batch in images.batches] == [[(3, 48, 64)] * 2] * 2


def test_a_file_of_tensors_calibrates_a_network_of_sound(tmp_path: Path) -> None:
    np.save(tmp_path / "sound.npy", np.random.default_rng(0).normal(size=(40, 1, 64)).astype(np.float32))
    net = seeded(
        lambda: nn.Sequential(nn.Conv1d(1, 8, 9), nn.ReLU(), nn.Conv1d(8, 8, 9), nn.ReLU(), nn.Conv1d(8, 2, 9))
    )
    listener = Recorder()
    file = hc.convert_to_file(
        net, tmp_path / "cut.safetensors", {"*": 4}, calibration=tmp_path / "sound.npy", input_sizes=[(1, 64)],
        listener=listener,
    )  # fmt: skip
    assert file.conversion is not None
    assert file.conversion.calibration is not None
    assert file.conversion.calibration.inputs == 40
    assert f"calibrating on 40 samples of {tmp_path / 'sound.npy'}, used as they are" in listener.said


def test_a_function_of_the_user_returns_a_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "import torch\n"
        "def data(split):\n    return [(torch.eye(4), torch.arange(4))] * (2 if split == 'validation' else 3)\n"
        "def broken():\n    raise KeyError('x')\n"
        "def number():\n    return 3\n"
    )
    found = hc.evaluate(nn.Identity(), "mine.py:data", metric="top1")
    assert str(found) == "top-1 100.00% (95 %: 67.56% to 100.00%), 8 samples of mine.py:data"
    for name, message in (
        ("broken", "mine.py:broken fails: KeyError: 'x'"),
        ("number", "mine.py:number returns a int"),
    ):
        with pytest.raises(InputError, match=message):
            hc.evaluate(nn.Identity(), f"mine.py:{name}")
    fails(2, "mine.py has no function 'none'", "evaluate", "sample:resnet_mnist5k", "--dataset", "mine.py:none")


def test_the_command_line_takes_every_kind_of_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text("from tests.test_task_data import Segmenter\n")
    masks(tmp_path / "data")
    arguments = ["evaluate", "net.py:Segmenter", "--data-dir", "data", "--preprocess", "none", "--workers", "0"]
    result = ok(*arguments)
    assert "mIoU" in result.stdout
    assert "4 samples of data" in result.stdout
