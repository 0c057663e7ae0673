"""Labelled data: which images are found, how they are split, what is refused; batches depend only on the seed."""

from __future__ import annotations

import gc
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset
from torchvision import transforms

from harmconvert.data import (
    NO_LABEL,
    DataRequest,
    Stream,
    choose_inputs,
    evaluation_batches,
    open_data,
    training_batches,
)
from harmconvert.errors import InputError, UsageError
from harmconvert.network import rank, world_size

from .pictures import digit_folders
from .seams import replace_everywhere

TO_TENSOR = transforms.ToTensor()
RANDOM = transforms.Compose([transforms.RandomCrop(28, 4), transforms.RandomHorizontalFlip(), TO_TENSOR])


@pytest.fixture
def split_folder(tmp_path: Path) -> Path:
    digit_folders(tmp_path / "train", 4)
    digit_folders(tmp_path / "val", 2, first=4)
    return tmp_path


# --- what is found ---


def test_a_folder_with_splits_is_opened(split_folder: Path) -> None:
    data = open_data(DataRequest(data_dir=str(split_folder)))
    assert data.identity() == {"images": [40, 20], "classes": 10}
    assert data.labelled
    assert not data.notes
    labels = [data.train.read(index)[1] for index in range(40)]
    assert sorted(labels) == sorted(list(range(10)) * 4)
    image, label = data.test.read(7)
    assert image.size == (28, 28)
    assert data.test.name(7).endswith(f"val/{label}/1.png")


def test_classes_are_numbered_in_natural_order(tmp_path: Path) -> None:
    for name in ("2", "10", "1"):
        (tmp_path / name).mkdir()
        Image.new("L", (4, 4)).save(tmp_path / name / "a.png")
    data = open_data(DataRequest(data_dir=str(tmp_path), holdout=0), ("test",))
    assert list(data.test.classes) == ["1", "2", "10"]


def test_a_class_is_a_visible_folder_with_all_images_below_it(tmp_path: Path) -> None:
    for name in ("a/x.bmp", "b/deep/deeper/y.webp", "b/z.JPG", "b/.hidden/w.png", ".cache/v.png", "c/u.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(path)
    data = open_data(DataRequest(data_dir=str(tmp_path), holdout=0), ("test",))
    assert list(data.test.classes) == ["a", "b", "c"]
    found = {data.test.name(i).removeprefix(f"{tmp_path}/"): data.test.read(i)[1] for i in range(len(data.test))}
    assert found == {"a/x.bmp": 0, "b/deep/deeper/y.webp": 1, "b/z.JPG": 1, "c/u.png": 2}


def test_a_folder_without_splits_is_split_by_the_seed(tmp_path: Path) -> None:
    digit_folders(tmp_path, 4)
    request = DataRequest(data_dir=str(tmp_path), holdout=0.25, seed=3)
    data, again = open_data(request), open_data(request)
    names = [{part.name(i) for i in range(len(part))} for part in (data.train, data.test)]
    assert [len(name) for name in names] == [30, 10]
    assert not names[0] & names[1]
    assert names[1] == {again.test.name(i) for i in range(10)}
    other = open_data(DataRequest(data_dir=str(tmp_path), holdout=0.25, seed=4))
    assert names[1] != {other.test.name(i) for i in range(10)}
    assert "10 of its 40 images (seed 3) are used for testing only" in data.notes[0]


def test_evaluation_without_a_holdout_uses_all_images(tmp_path: Path) -> None:
    digit_folders(tmp_path, 2)
    assert len(open_data(DataRequest(data_dir=str(tmp_path), holdout=0), ("test",)).test) == 20


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for number in range(10):
        Image.new("L", (8, 8), number).save(tmp_path / f"{number}.png")
    data = open_data(DataRequest(data_dir=str(tmp_path)))
    assert not data.labelled
    assert data.classes is None
    assert data.train.read(0)[1] is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # timm leaves the archive open
def test_a_tar_file_is_opened(tmp_path: Path) -> None:
    digit_folders(tmp_path / "digits", 2)
    with tarfile.open(tmp_path / "digits.tar", "w") as archive:
        archive.add(tmp_path / "digits", "digits")
    data = open_data(DataRequest(data_dir=str(tmp_path / "digits.tar"), holdout=0.5))
    assert data.identity() == {"images": [10, 10], "classes": 10}
    assert data.train.read(0)[0].size == (28, 28)
    del data
    gc.collect()  # so that the warning appears in this test and in no other


def test_torchvision_data_sets_are_opened(tmp_path: Path) -> None:
    """timm's torch/image_folder represents all of them: they are read from a disk in the same way."""
    digit_folders(tmp_path / "train", 2)
    digit_folders(tmp_path / "validation", 1, first=5)
    data = open_data(DataRequest("torch/image_folder", str(tmp_path)))
    assert data.identity() == {"images": [20, 10], "classes": 10}
    assert data.train.read(3)[1] == 1


def test_sample_data_sets_are_opened() -> None:
    digits = open_data(DataRequest("sample:mnist5k"))
    assert digits.identity() == {"images": [4000, 1000], "classes": 10}
    crops = open_data(DataRequest("sample:photographs"))
    assert not crops.labelled
    assert crops.train.read(5)[0] == crops.train.read(5)[0]
    assert crops.train.read(5)[0] != crops.test.read(5)[0]


# --- what lies beside the classes ---


def blank(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4)).save(path)


def test_an_image_beside_the_class_folders_is_left_out_with_a_note(split_folder: Path) -> None:
    blank(split_folder / "train" / "overview.png")
    blank(split_folder / "val" / "logo.JPG")
    blank(split_folder / "banner.png")
    data = open_data(DataRequest(data_dir=str(split_folder)))
    assert data.labelled
    assert data.identity() == {"images": [40, 20], "classes": 10}
    assert [note.rpartition("/")[2] for note in data.notes] == [
        "train has images beside its class folders, which are left out: overview.png",
        "val has images beside its class folders, which are left out: logo.JPG",
    ]


def test_folders_that_are_not_classes_are_left_out(split_folder: Path) -> None:
    blank(split_folder / "train" / "__MACOSX" / "a.png")
    for name in ("train/thumbnails/Thumbs.db", "val/docs/readme.txt", "train/.DS_Store", "val/__MACOSX/._1.png"):
        (split_folder / name).parent.mkdir(exist_ok=True)
        (split_folder / name).write_bytes(b"x")
    data = open_data(DataRequest(data_dir=str(split_folder)))
    assert data.identity() == {"images": [40, 20], "classes": 10}
    assert [note.rpartition("/")[2] for note in data.notes] == [
        "train has folders without an image, which are left out: thumbnails",
        "val has folders without an image, which are left out: docs",
    ]


def test_a_class_without_test_images_is_no_error(split_folder: Path) -> None:
    for image in (split_folder / "val" / "3").iterdir():
        image.unlink()
    data = open_data(DataRequest(data_dir=str(split_folder)))
    assert data.identity() == {"images": [40, 18], "classes": 10}
    assert "left out: 3" in data.notes[0]


def test_a_folder_of_unsupported_images_counts_as_a_class(split_folder: Path) -> None:
    (split_folder / "train" / "phone").mkdir()
    (split_folder / "train" / "phone" / "a.heic").write_bytes(b"x")
    with pytest.raises(InputError, match=r"class folders without an image \(phone\)"):
        open_data(DataRequest(data_dir=str(split_folder)))


def test_if_most_images_are_outside_class_folders_none_has_a_label(tmp_path: Path) -> None:
    for number in range(6):
        blank(tmp_path / f"{number}.png")
    blank(tmp_path / "more" / "a.png")
    data = open_data(DataRequest(data_dir=str(tmp_path), holdout=0), ("test",))
    assert not data.labelled
    assert len(data.test) == 7
    assert "itself has 6 images" in data.notes[0]


def test_the_message_names_an_inner_folder_with_splits(tmp_path: Path) -> None:
    digit_folders(tmp_path / "digits" / "train", 1)
    digit_folders(tmp_path / "digits" / "val", 1)
    (tmp_path / "__MACOSX").mkdir()
    with pytest.raises(UsageError, match=r"has one folder, which has the splits: give data=.*digits"):
        open_data(DataRequest(data_dir=str(tmp_path)))


# --- what is refused ---


def test_the_message_names_an_empty_class_folder(split_folder: Path) -> None:
    (split_folder / "train" / "0a").mkdir()
    with pytest.raises(InputError, match=r"train has class folders without an image \(0a\).*shift the numbers"):
        open_data(DataRequest(data_dir=str(split_folder)))


def test_the_test_classes_must_be_classes_of_the_training_images(split_folder: Path) -> None:
    (split_folder / "val" / "ten").mkdir()
    Image.new("L", (4, 4)).save(split_folder / "val" / "ten" / "a.png")
    with pytest.raises(InputError, match=r"val has classes that the training images lack \(ten\)"):
        open_data(DataRequest(data_dir=str(split_folder)))


def test_a_class_without_test_images_does_not_shift_the_others(split_folder: Path) -> None:
    for image in (split_folder / "val" / "3").iterdir():
        image.unlink()
    (split_folder / "val" / "3").rmdir()
    data = open_data(DataRequest(data_dir=str(split_folder)))
    for index in range(len(data.test)):
        assert f"/{data.test.read(index)[1]}/" in data.test.name(index)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (DataRequest(), "no data is named: give data=DATA"),
        (DataRequest(data_dir="nowhere"), "there is no folder nowhere"),
        (DataRequest("cifar10"), "there is no folder and no data set 'cifar10': give a folder"),
        (DataRequest("sample:cats"), "there is no sample data set 'sample:cats'"),
        (DataRequest("torch/cifar10"), "needs a folder: name it with data_dir=DIR"),
        (DataRequest("torch/nothing", "."), "timm cannot open torch/nothing"),
    ],
)
def test_missing_data_sets_are_refused(request_: DataRequest, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_data(request_)


def test_training_on_one_split_without_a_holdout_is_refused(tmp_path: Path) -> None:
    digit_folders(tmp_path, 1)
    with pytest.raises(UsageError, match="give holdout above 0"):
        open_data(DataRequest(data_dir=str(tmp_path), holdout=0))


def test_a_data_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no image"):
        open_data(DataRequest(data_dir=str(tmp_path)))


# --- batches ---


def digits(folder: Path, each: int = 4) -> object:
    return open_data(DataRequest(data_dir=str(digit_folders(folder, each)), holdout=0), ("train",)).train


def test_every_epoch_has_another_order_with_every_picture_once(tmp_path: Path) -> None:
    loading = training_batches(digits(tmp_path), TO_TENSOR, "L", 10)
    assert loading.steps == 4
    epochs = [torch.cat([batch.inputs for batch in loading.epoch(epoch)]) for epoch in (0, 1, 0)]
    assert torch.equal(epochs[0], epochs[2])
    assert not torch.equal(epochs[0], epochs[1])
    flat = [sorted(image.sum().item() for image in epoch) for epoch in epochs]
    assert flat[0] == flat[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_resumed_in_the_middle_has_the_remaining_batches(tmp_path: Path, workers: int) -> None:
    pictures = digits(tmp_path)
    whole = list(training_batches(pictures, RANDOM, "L", 8, seed=5).epoch(2))
    loading = training_batches(pictures, RANDOM, "L", 8, seed=5, workers=workers)
    rest = list(loading.epoch(2, first_step=3))
    assert len(rest) == 2
    for batch, expected in zip(rest, whole[3:], strict=True):
        assert torch.equal(batch.inputs, expected.inputs)
        assert torch.equal(batch.targets, expected.targets)


def test_augmentation_depends_only_on_seed_epoch_and_picture(tmp_path: Path) -> None:
    pictures = digits(tmp_path, 1)
    first = next(training_batches(pictures, RANDOM, "L", 10, seed=0).epoch(0))
    torch.manual_seed(99)
    np.random.seed(99)
    assert torch.equal(first.inputs, next(training_batches(pictures, RANDOM, "L", 10, seed=0).epoch(0)).inputs)
    assert not torch.equal(first.inputs, next(training_batches(pictures, RANDOM, "L", 10, seed=1).epoch(0)).inputs)


def test_loading_does_not_change_the_random_state_of_the_run(tmp_path: Path) -> None:
    loading = training_batches(digits(tmp_path), RANDOM, "L", 10)
    torch.manual_seed(1)
    list(loading.epoch(0))
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3))


def test_processes_divide_each_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = digits(tmp_path)
    whole = list(training_batches(pictures, RANDOM, "L", 8).epoch(0))
    tested = list(evaluation_batches(pictures, TO_TENSOR, "L", 7).epoch(0))
    shares: list[list[torch.Tensor]] = []
    test_shares: list[torch.Tensor] = []
    for number in range(2):
        with monkeypatch.context() as patch:
            replace_everywhere(patch, rank, lambda number=number: number)
            replace_everywhere(patch, world_size, lambda: 2)
            shares.append([batch.inputs for batch in training_batches(pictures, RANDOM, "L", 8).epoch(0)])
            test_shares += [batch.targets for batch in evaluation_batches(pictures, TO_TENSOR, "L", 7).epoch(0)]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([shares[0][step], shares[1][step]]), batch.inputs)
    assert sorted(torch.cat(test_shares).tolist()) == sorted(torch.cat([b.targets for b in tested]).tolist())


def test_training_leaves_out_the_incomplete_batch_and_evaluation_includes_it(tmp_path: Path) -> None:
    pictures = digits(tmp_path)
    assert [len(b.inputs) for b in training_batches(pictures, TO_TENSOR, "L", 16).epoch(0)] == [16, 16]
    assert [len(b.inputs) for b in evaluation_batches(pictures, TO_TENSOR, "L", 16).epoch(0)] == [16, 16, 8]
    assert [len(b.inputs) for b in training_batches(pictures, TO_TENSOR, "L", 100).epoch(0)] == [40]


def test_a_broken_picture_is_replaced_in_training_and_left_out_in_evaluation(tmp_path: Path) -> None:
    folder = digit_folders(tmp_path, 2)
    (folder / "4" / "0.png").write_bytes(b"nothing")
    pictures = open_data(DataRequest(data_dir=str(folder), holdout=0), ("train",)).train
    (batch,) = training_batches(pictures, TO_TENSOR, "L", 20).epoch(0)
    assert len(batch.inputs) == 20
    assert sorted(batch.targets.tolist()).count(4) == 2  # the next picture, which replaces it, is the other 4
    assert len(batch.unreadable) == 1
    assert "4/0.png (cannot identify image file" in batch.unreadable[0]
    (batch,) = evaluation_batches(pictures, TO_TENSOR, "L", 20).epoch(0)
    assert len(batch.inputs) == 19
    assert len(batch.unreadable) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_many_broken_pictures_in_a_row_are_an_error(tmp_path: Path, workers: int) -> None:
    folder = digit_folders(tmp_path, 2)
    for image in folder.glob("*/*.png"):
        image.write_bytes(b"nothing")
    pictures = open_data(DataRequest(data_dir=str(folder), holdout=0), ("train",)).train
    with pytest.raises(InputError, match=r"^10 images in a row cannot be read: .*png.*repair the data$"):
        list(training_batches(pictures, TO_TENSOR, "L", 20, workers=workers).epoch(0))


def test_calibration_images_are_chosen_by_the_seed(tmp_path: Path) -> None:
    pictures = digits(tmp_path)
    first, again, other = (torch.stack(choose_inputs(pictures, TO_TENSOR, "L", 12, seed=seed)) for seed in (1, 1, 2))
    assert first.shape == (12, 1, 28, 28)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


class _Counted(IterableDataset):
    """A data set like timm's streams: pictures and labels in their own order, epoch by epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> object:
        return ((Image.new("L", (28, 28), 10 * self.epoch + n), n) for n in range(7))


def test_a_stream_is_read_once_in_each_epoch() -> None:
    loading = training_batches(Stream(_Counted()), TO_TENSOR, "L", 3)
    assert loading.steps is None
    assert [batch.targets.tolist() for batch in loading.epoch(0)] == [[0, 1, 2], [3, 4, 5]]
    assert [batch.targets.tolist() for batch in loading.epoch(1, first_step=1)] == [[3, 4, 5]]
    (first, *_) = loading.epoch(1)
    assert (first.inputs[0] * 255).round().max() == 10
    assert sum(len(batch.inputs) for batch in evaluation_batches(Stream(_Counted()), TO_TENSOR, "L", 3).epoch(0)) == 7


def test_unlabelled_pictures_have_no_label_in_a_batch(tmp_path: Path) -> None:
    for number in range(4):
        Image.new("L", (8, 8), number).save(tmp_path / f"{number}.png")
    pictures = open_data(DataRequest(data_dir=str(tmp_path), holdout=0), ("train",)).train
    (batch,) = training_batches(pictures, TO_TENSOR, "L", 4).epoch(0)
    assert batch.targets.tolist() == [NO_LABEL] * 4
