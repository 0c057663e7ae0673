"""Labelled pictures to train on and to test on: folders, timm's data sets, the samples."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_dataset
from timm.utils.misc import natural_key
from torch.utils.data import IterableDataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..arguments import PACKAGES, check_labelled
from ..errors import InputError, OutsideError, UsageError, counted, first_line, shortened
from ..samples import mnist5k, mnist5k_held_back_pixels
from .pictures import photographs, random_crop

_SYNONYMS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "eval", "evaluation", "test"),
}
# Photographs are cropped without end: an epoch of them is as long as this.
PHOTOGRAPH_CROPS = {"train": 2000, "validation": 200}


class Pictures(ABC):
    """Pictures by index: a Pillow image and its label, or None where there are no labels."""

    classes: Sequence[str] | None = None
    labelled: bool = True

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> tuple[Image.Image, int | None]:
        """The picture and its label; raises what Pillow raises where the file is broken."""

    def name(self, index: int) -> str:
        """What to call a picture in a message."""
        return f"image {index}"


@dataclass(frozen=True)
class Stream:
    """A data set that is read in its own order (timm's hfids/, tfds/, wds/), one pass an epoch."""

    dataset: Any
    classes: Sequence[str] | None = None
    labelled: bool = True


@dataclass(frozen=True)
class Data:
    """What there is to train on and to test on (None where not asked for), and what a user should know about it."""

    train: Pictures | Stream | None
    test: Pictures | Stream | None
    notes: tuple[str, ...] = ()

    @property
    def labelled(self) -> bool:
        """Whether the pictures have labels."""
        return all(part.labelled for part in (self.train, self.test) if part is not None)

    @property
    def classes(self) -> int | None:
        """Number of classes; None where there are no labels or the data set does not say."""
        counts = [len(p.classes) for p in (self.train, self.test) if p is not None and p.labelled and p.classes]
        return max(counts) if counts else None

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on with it: numbers of images and classes."""
        parts = (self.train, self.test)
        return {"images": [len(p) if isinstance(p, Pictures) else None for p in parts], "classes": self.classes}


@dataclass(frozen=True)
class DataRequest:
    """Which data: timm's name of a set or ``sample:NAME`` (empty: a folder), where it lies, the names of its splits.

    Where only one split is there, ``holdout`` (0 to 1) of it, chosen by ``seed``, is kept from training and tested on.
    """

    dataset: str = ""
    data_dir: str | None = None
    train_split: str = "train"
    val_split: str = "validation"
    holdout: float = 0.1
    seed: int = 0

    def __str__(self) -> str:
        return " ".join(filter(None, (self.dataset, self.data_dir)))


def open_data(request: DataRequest, parts: Sequence[str] = ("train", "test")) -> Data:
    """Find the pictures; nothing is decoded yet.

    Raises:
        UsageError: no such data set or split. InputError: an empty class folder, classes that differ between the
            splits, no images. OutsideError: it has to be downloaded and cannot be, or a package is missing.
    """
    name, root = request.dataset, request.data_dir
    if name.startswith("sample:"):
        return _sample(name, parts)
    if name.startswith(PACKAGES):
        splits = {"train": request.train_split, "test": request.val_split}
        found = {part: _packaged(name, root, splits[part], part == "train", request.seed) for part in parts}
        return Data(found.get("train"), found.get("test"))
    check_labelled(name, root)
    assert root is not None
    if not Path(root).is_dir():
        return _split(_FromReader(open_timm("", root).reader), request, parts)
    return _folders(Path(root), request, parts)


def open_timm(name: str, root: str | None, **more: Any) -> Any:
    """timm's `create_dataset`, what it raises turned into what a user can act on."""
    if root is None and name.startswith("torch/"):
        raise UsageError(f"{name}: say where it lies with --data-dir DIR")
    try:
        return create_dataset(name, root=root, **more)
    except (AssertionError, ValueError, RuntimeError, LookupError, TypeError, FileNotFoundError, ImportError) as error:
        raise UsageError(
            f"timm cannot open {name or root} (split {more.get('split')!r}, in {root or 'no folder'}): "
            f"{first_line(error) or type(error).__name__}; see --data-dir and the split options"
        ) from error
    except OSError as error:
        raise OutsideError(f"{name} cannot be fetched: {first_line(error)}; give a folder of images") from error


# --- kinds of pictures ---


@dataclass(frozen=True)
class _FromArrays(Pictures):
    images: np.ndarray  # (N, H, W) uint8
    labels: np.ndarray
    classes: Sequence[str]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


@dataclass(frozen=True)
class _FromPhotographs(Pictures):
    pictures: list[Image.Image]
    count: int
    seed: int
    labelled: bool = False

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> tuple[Image.Image, None]:
        return random_crop(self.pictures, np.random.default_rng([self.seed, index])), None


class Files(Pictures):
    """All images below a folder; those below a folder named in ``classes`` are of that class and others left out, or
    where there are no classes all are pictures without labels."""

    def __init__(self, root: Path, classes: Sequence[str] | None = None) -> None:
        self.classes, self.labelled = classes, classes is not None
        labels = {name: label for label, name in enumerate(classes or ())}
        found = [(path, labels.get(Path(path).relative_to(root).parts[0])) for path in image_files(root)]
        self.files = [(path, label) for path, label in found if classes is None or label is not None]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[Image.Image, int | None]:
        path, label = self.files[index]
        with Image.open(path) as image:
            image.load()
            return image, label

    def name(self, index: int) -> str:
        return self.files[index][0]


class _FromReader(Pictures):
    """timm's tar files and Hugging Face data sets: a reader gives files or bytes, and labels."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader
        # timm's tar reader has another name for it.
        names = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None) or {}
        self.classes = sorted(names, key=names.__getitem__) or None

    def __len__(self) -> int:
        return len(self.reader)

    def read(self, index: int) -> tuple[Image.Image, int | None]:
        file, label = self.reader[index][:2]
        with file:
            image = Image.open(file)
            image.load()
        return image, int(label) if label is not None else None

    def name(self, index: int) -> str:
        try:
            return str(self.reader.filename(index, absolute=True))
        except (AttributeError, AssertionError, NotImplementedError):
            return super().name(index)


class _FromTorch(Pictures):
    """torchvision's data sets."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.classes = list(getattr(dataset, "classes", None) or []) or None

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Image.Image, int]:
        image, label = self.dataset[index]
        return image, int(label)


@dataclass(frozen=True)
class Some(Pictures):
    """Some of the pictures of another set, by their indices."""

    whole: Pictures
    indices: np.ndarray
    classes: Sequence[str] | None = field(init=False)
    labelled: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", self.whole.classes)
        object.__setattr__(self, "labelled", self.whole.labelled)

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> tuple[Image.Image, int | None]:
        return self.whole.read(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.whole.name(int(self.indices[index]))


# --- where they are found ---


def _sample(name: str, parts: Sequence[str]) -> Data:
    if name == "sample:mnist5k":
        digits = [str(digit) for digit in range(10)]
        makers = {"train": mnist5k, "test": mnist5k_held_back_pixels}
        found: dict[str, Pictures] = {}
        for part in parts:
            images, labels = makers[part]()
            found[part] = _FromArrays(images.numpy(), labels.numpy(), digits)
    elif name == "sample:photographs":
        pictures = photographs()
        lengths = {"train": PHOTOGRAPH_CROPS["train"], "test": PHOTOGRAPH_CROPS["validation"]}
        found = {part: _FromPhotographs(pictures, lengths[part], int(part == "test")) for part in parts}
    else:
        raise UsageError(f"there is no sample data set {name!r}: use sample:mnist5k or sample:photographs")
    return Data(found.get("train"), found.get("test"))


def _packaged(name: str, root: str | None, split: str, training: bool, seed: int) -> Pictures | Stream:
    return pictures_of(open_timm(name, root, split=split, is_training=training, seed=seed))


def pictures_of(dataset: Any) -> Pictures | Stream:
    """The pictures of what timm opened."""
    if isinstance(dataset, IterableDataset):
        return Stream(dataset)
    return _FromReader(dataset.reader) if hasattr(dataset, "reader") else _FromTorch(dataset)


def _folders(root: Path, request: DataRequest, parts: Sequence[str]) -> Data:
    train = _split_folder(root, request.train_split, "train")
    test = _split_folder(root, request.val_split, "validation")
    if train is None and test is None:
        return _split(_folder(root, None), request, parts)
    if train is None and "train" in parts:
        raise UsageError(f"{root} has a folder {test.name if test else ''} but none to train on: see --train-split")
    pictures = _folder(train, None) if train is not None else None
    if test is None:
        assert pictures is not None
        return _split(pictures, request, parts)
    tested = _folder(test, pictures) if "test" in parts else None
    return Data(pictures if "train" in parts else None, tested)


def _split_folder(root: Path, split: str, kind: str) -> Path | None:
    names = (split, *(_SYNONYMS[kind] if split in _SYNONYMS[kind] else ()))
    return next((root / name for name in names if (root / name).is_dir()), None)


def _folder(root: Path, train: Pictures | None) -> Pictures:
    """The pictures of one folder: labelled by its folders, unlabelled where they lie in it directly."""
    folders = class_folders(root)
    labelled = not any(entry.suffix.lower() in IMG_EXTENSIONS for entry in root.iterdir() if entry.is_file())
    if labelled and (empty := [name for name in folders if not any(image_files(root / name))]):
        raise InputError(
            f"{root} has class folders without an image ({shortened(empty, 3)}), and leaving them out would shift the "
            "numbers of the classes after them: fill or remove them"
        )
    if not any(image_files(root)):
        raise InputError(f"{root} holds no image: give --data-dir a folder with a folder of images for each class")
    known = train.classes if train is not None else None
    if labelled and known and (strangers := [name for name in folders if name not in known]):
        raise InputError(f"{root} has classes that there are none of to train on: {shortened(strangers, 3)}")
    return Files(root, (known or folders) if labelled else None)


def class_folders(root: Path) -> list[str]:
    """Names of the visible folders in a folder, numbers in them by value, as timm numbers classes."""
    names = [entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    return sorted(names, key=natural_key)


def image_files(folder: Path) -> Iterator[str]:
    """Paths of all images below a folder, in a fixed order; hidden files and folders are passed over."""
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith("."):
                yield os.path.join(root, name)


def _split(pictures: Pictures, request: DataRequest, parts: Sequence[str]) -> Data:
    """One set of pictures as two, some of them held back by a seed; as it is where nothing is held back."""
    if not 0 <= request.holdout < 1:
        raise UsageError(f"--holdout {request.holdout}: give the share of the images to test on, from 0 to below 1")
    if request.holdout == 0:
        if "train" in parts and "test" in parts:
            raise UsageError(f"{request} has one split: give --holdout above 0, or a folder of images to test on")
        return Data(pictures if "train" in parts else None, pictures if "test" in parts else None)
    order = np.random.default_rng(request.seed).permutation(len(pictures))
    kept_back = max(1, round(request.holdout * len(pictures)))
    if kept_back == len(pictures):
        raise InputError(f"{request} holds {len(pictures)} image: too few to train on and to test on")
    test, train = Some(pictures, np.sort(order[:kept_back])), Some(pictures, np.sort(order[kept_back:]))
    note = (
        f"{request} has one split: {len(test)} of its {counted(len(pictures), 'image')} (seed "
        f"{request.seed}) are tested on"
    )
    return Data(train if "train" in parts else None, test if "test" in parts else None, (note,))
