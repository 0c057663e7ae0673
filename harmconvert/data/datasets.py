"""Open labelled pictures for training and testing, from folders, timm's data sets or the samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import IterableDataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..arguments import DATA_FILES, PACKAGES, check_labelled, is_function
from ..errors import Argument, InputError, OutsideError, UsageError, counted, first_line
from ..samples import mnist5k, mnist5k_held_back_pixels
from .folders import class_folders, open_labelled_folder
from .loaded import LoadedSamples, loader_of
from .pictures import CLASSES, Pictures, open_picture, photographs, random_crop
from .recognising import recognised

_SYNONYMS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "eval", "evaluation", "test"),
}
# The share that measures, of data without splits that also calibrates.
DIVIDED = 0.5
# Number of random crops of the photographs in an epoch.
PHOTOGRAPH_CROPS = {"train": 2000, "validation": 200}


@dataclass(frozen=True)
class Stream:
    """A data set that can only be read in its own order (timm's hfids/, tfds/, wds/), one pass for each epoch."""

    dataset: Any
    classes: Sequence[str] | None = None
    labelled: bool = True
    task: str = CLASSES


@dataclass(frozen=True)
class Data:
    """The pictures for training and for testing (None: not requested), and notes for the user."""

    train: Pictures | Stream | None
    test: Pictures | Stream | None
    notes: tuple[str, ...] = ()

    @property
    def labelled(self) -> bool:
        """Return whether all pictures have labels."""
        return all(part.labelled for part in (self.train, self.test) if part is not None)

    @property
    def classes(self) -> int | None:
        """Return the number of classes; None without labels, or if the data set does not name its classes."""
        counts = [len(p.classes) for p in (self.train, self.test) if p is not None and p.labelled and p.classes]
        return max(counts) if counts else None

    @property
    def task(self) -> str:
        """Return the kind of the data."""
        return next((part.task for part in (self.train, self.test) if part is not None), CLASSES)

    @property
    def prepared(self) -> bool:
        """Return whether the inputs need no pre-processing."""
        return any(isinstance(part, Pictures) and part.prepared for part in (self.train, self.test))

    @property
    def largest_label(self) -> int:
        """Return the largest category of boxes; 0 for other kinds of data."""
        return max((one.largest_label for one in (self.train, self.test) if isinstance(one, Pictures)), default=0)

    def identity(self) -> dict[str, Any]:
        """Return the numbers of images and classes. They must be the same when a run is resumed."""
        parts = (self.train, self.test)
        return {"images": [len(p) if isinstance(p, Pictures) else None for p in parts], "classes": self.classes}


@dataclass(frozen=True)
class DataRequest:
    """The data to open: ``dataset`` (timm's name or ``sample:NAME``; empty: a folder), its folder, and its splits.

    If the data has only one split, the share ``holdout`` (0 to 1) of its images is used for testing. ``seed`` chooses
    these images.
    """

    dataset: str = ""
    data_dir: str | None = None
    train_split: str = "train"
    val_split: str = "validation"
    holdout: float = 0.1
    seed: int = 0

    @classmethod
    def parse(cls, data: str | Path | DataRequest, **settings: Any) -> DataRequest:
        """Return the request for a folder, a .tar file or the name of a data set; return a request unchanged.

        >>> str(DataRequest.parse("sample:mnist5k")), DataRequest.parse("digits.tar").data_dir
        ('sample:mnist5k', 'digits.tar')
        """
        if isinstance(data, DataRequest):
            return data
        text = str(data)
        is_path = Path(text).is_dir() or text.endswith(DATA_FILES)
        return cls("" if is_path else text, text if is_path else None, **settings)

    @property
    def name(self) -> str:
        """Return the name of the data set, or the path of the folder if the data is a folder."""
        return self.dataset or str(self.data_dir)

    def __str__(self) -> str:
        return " ".join(filter(None, (self.dataset, self.data_dir)))


def open_data(request: DataRequest, parts: Sequence[str] = ("train", "test")) -> Data:
    """Return the pictures that a request names. Each picture is decoded only when it is read.

    Raises:
        UsageError: there is no such data set or split.
        InputError: a class folder is empty, the classes differ between the splits, or there are no images.
        OutsideError: the download of the data set failed, or a package is missing.
    """
    name, root = request.dataset, request.data_dir
    if name.startswith("sample:"):
        return _open_sample(name, parts)
    if name.startswith(PACKAGES):
        splits = {"train": request.train_split, "test": request.val_split}
        opened = {part: _open_package(name, root, splits[part], part == "train", request.seed) for part in parts}
        return Data(opened.get("train"), opened.get("test"))
    check_labelled(name, root)
    if is_function(name):
        return _open_loaders(request, parts)
    assert root is not None
    if Path(root).is_file() and (samples := recognised(Path(root))) is not None:
        return _split_by_holdout(samples, request, parts, (f"{root}: {samples.description}",))
    if not Path(root).is_dir():
        return _split_by_holdout(_ReaderPictures(open_timm("", root).reader), request, parts)
    return _open_folders(Path(root), request, parts)


def user_loader(request: DataRequest, part: str = "test") -> Iterable[Any] | None:
    """Return the loader that the user's function in a request returns; None if it names none. See `loader_of`."""
    if not is_function(request.dataset):
        return None
    return loader_of(request.dataset, request.train_split if part == "train" else request.val_split)


def open_timm(name: str, root: str | None, **options: Any) -> Any:
    """Call timm's `create_dataset`; turn its exceptions into errors with a remedy."""
    if root is None and name.startswith("torch/"):
        raise UsageError(f"{name} needs a folder: name it with ", Argument("data_dir", "DIR"))
    try:
        return create_dataset(name, root=root, **options)
    except (AssertionError, ValueError, RuntimeError, LookupError, TypeError, FileNotFoundError, ImportError) as error:
        raise UsageError(
            f"timm cannot open {name or root} (split {options.get('split')!r}, in {root or 'no folder'}): "
            f"{first_line(error) or type(error).__name__}; see ", Argument("data_dir"), " and the split options",
        ) from error  # fmt: skip
    except OSError as error:
        raise OutsideError(f"{name} cannot be downloaded: {first_line(error)}; give a folder of images") from error


# --- kinds of pictures ---


@dataclass(frozen=True)
class _ArrayPictures(Pictures):
    images: np.ndarray  # (N, H, W) uint8
    labels: np.ndarray
    classes: Sequence[str]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


@dataclass(frozen=True)
class _PhotographCrops(Pictures):
    pictures: list[Image.Image]
    count: int
    seed: int
    labelled: bool = False

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> tuple[Image.Image, None]:
        return random_crop(self.pictures, np.random.default_rng([self.seed, index])), None


class _ReaderPictures(Pictures):
    """Pictures of timm's tar files and Hugging Face data sets, which timm reads as files or bytes with labels."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader
        # The attribute of timm's tar reader has another name.
        names = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None) or {}
        self.classes = sorted(names, key=names.__getitem__) or None

    def __len__(self) -> int:
        return len(self.reader)

    def read(self, index: int) -> tuple[Image.Image, int | None]:
        file, label = self.reader[index][:2]
        with file:
            image = open_picture(file, self.name(index))
        return image, int(label) if label is not None else None

    def name(self, index: int) -> str:
        try:
            return str(self.reader.filename(index, absolute=True))
        except (AttributeError, AssertionError, NotImplementedError):
            return super().name(index)


class _TorchvisionPictures(Pictures):
    """Pictures of torchvision's data sets."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.classes = list(getattr(dataset, "classes", None) or []) or None

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Image.Image, int]:
        image, label = self.dataset[index]
        return image, int(label)


@dataclass(frozen=True)
class Subset(Pictures):
    """The pictures of another set that have the given indices."""

    whole: Pictures
    indices: np.ndarray
    task: str = field(init=False)
    largest_label: int = field(init=False)
    prepared: bool = field(init=False)
    classes: Sequence[str] | None = field(init=False)
    labelled: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "task", self.whole.task)
        object.__setattr__(self, "largest_label", self.whole.largest_label)
        object.__setattr__(self, "prepared", self.whole.prepared)
        object.__setattr__(self, "classes", self.whole.classes)
        object.__setattr__(self, "labelled", self.whole.labelled)

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> tuple[Any, Any]:
        return self.whole.read(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.whole.name(int(self.indices[index]))


# --- sources of pictures ---


def _open_sample(name: str, parts: Sequence[str]) -> Data:
    if name == "sample:mnist5k":
        digits = [str(digit) for digit in range(10)]
        makers = {"train": mnist5k, "test": mnist5k_held_back_pixels}
        opened: dict[str, Pictures] = {}
        for part in parts:
            images, labels = makers[part]()
            opened[part] = _ArrayPictures(images.numpy(), labels.numpy(), digits)
    elif name == "sample:photographs":
        pictures = photographs()
        lengths = {"train": PHOTOGRAPH_CROPS["train"], "test": PHOTOGRAPH_CROPS["validation"]}
        opened = {part: _PhotographCrops(pictures, lengths[part], int(part == "test")) for part in parts}
    else:
        raise UsageError(f"there is no sample data set {name!r}: use sample:mnist5k or sample:photographs")
    return Data(opened.get("train"), opened.get("test"))


def _open_package(name: str, root: str | None, split: str, training: bool, seed: int) -> Pictures | Stream:
    return pictures_from_timm(open_timm(name, root, split=split, is_training=training, seed=seed))


def pictures_from_timm(dataset: Any) -> Pictures | Stream:
    """Return the pictures of a data set that timm opened."""
    if isinstance(dataset, IterableDataset):
        return Stream(dataset)
    return _ReaderPictures(dataset.reader) if hasattr(dataset, "reader") else _TorchvisionPictures(dataset)


def _open_folders(root: Path, request: DataRequest, parts: Sequence[str]) -> Data:
    train = split_folder(root, request.train_split, "train")
    test = split_folder(root, request.val_split, "validation")
    if (root / "images").is_dir() and (annotated := _annotated(root, request, parts)) is not None:
        return annotated
    if train is None and test is None:
        if inner := _only_folder(root, request):
            raise UsageError(f"{root} has one folder, which has the splits: give ", Argument("data", inner))
        pictures, notes = _open_folder(root)
        return _split_by_holdout(pictures, request, parts, notes)
    if train is None and "train" in parts:
        problem = f"{root} has a folder {test.name if test else ''} but no folder of training images: name it with "
        raise UsageError(problem, Argument("train_split"))
    train_files, notes = _open_folder(train) if train is not None else (None, ())
    if test is None:
        assert train_files is not None
        return _split_by_holdout(train_files, request, parts, notes)
    test_files, more = _open_folder(test, train_files) if "test" in parts else (None, ())
    return Data(train_files if "train" in parts else None, test_files, (*(notes if "train" in parts else ()), *more))


def _open_loaders(request: DataRequest, parts: Sequence[str]) -> Data:
    """Return the samples of the loaders that a function of the user returns for each split."""
    name, opened = request.dataset, {}
    for part in parts:
        loader = user_loader(request, part)
        assert loader is not None
        opened[part] = LoadedSamples(loader, name)
    notes = tuple(f"{name}: {one.description}" for one in opened.values())
    return Data(opened.get("train"), opened.get("test"), notes)


def _open_folder(folder: Path, train: Pictures | None = None) -> tuple[Pictures, tuple[str, ...]]:
    """Return the samples of a folder, and notes that say what was recognised."""
    samples = recognised(folder)
    if samples is None:
        return open_labelled_folder(folder, train)
    if train is not None and train.task != samples.task:
        raise InputError(f"{folder} has {samples.description}, but the training data is of another kind")
    return samples, (f"{folder}: {samples.description}",)


def _annotated(root: Path, request: DataRequest, parts: Sequence[str]) -> Data | None:
    """Return the data of a folder whose pictures are in ``images``; each split may have its own file of annotations."""
    splits = {"train": (request.train_split, "train"), "test": (request.val_split, "validation")}
    names = {part: (split, *_SYNONYMS[kind]) for part, (split, kind) in splits.items()}
    if len([*root.glob("annotations*.json"), *(root / "annotations").glob("*.json")]) < 2:
        samples = recognised(root)
        note = () if samples is None else (f"{root}: {samples.description}",)
        return None if samples is None else _split_by_holdout(samples, request, parts, note)
    opened = {part: recognised(root, names[part]) for part in parts}
    notes = tuple(f"{root}: {one.description}" for one in opened.values() if one is not None)
    return Data(opened.get("train"), opened.get("test"), notes)


def _only_folder(root: Path, request: DataRequest) -> Path | None:
    """Return the folder with the splits if ``root`` has no other folder and no image, as an unpacked archive."""
    folders = [root / name for name in class_folders(root)]
    if len(folders) != 1 or any(entry.suffix.lower() in IMG_EXTENSIONS for entry in root.iterdir() if entry.is_file()):
        return None
    splits = ((request.train_split, "train"), (request.val_split, "validation"))
    return folders[0] if all(split_folder(folders[0], *split) for split in splits) else None


def split_folder(root: Path, split: str, kind: str) -> Path | None:
    """Return the folder of a split, also under a common other name of it; None if there is none."""
    names = (split, *(_SYNONYMS[kind] if split in _SYNONYMS[kind] else ()))
    return next((root / name for name in names if (root / name).is_dir()), None)


def _split_by_holdout(
    pictures: Pictures, request: DataRequest, parts: Sequence[str], notes: tuple[str, ...] = ()
) -> Data:
    """Divide one set of pictures into training and test pictures by a seed; do not divide it if ``holdout`` is 0."""
    if not 0 <= request.holdout < 1:
        holdout = Argument("holdout", request.holdout)
        raise UsageError(holdout, ": give the share of the images for testing, at least 0 and below 1")
    if request.holdout == 0:
        if "train" in parts and "test" in parts:
            holdout = Argument("holdout")
            raise UsageError(f"{request} has one split: give ", holdout, " above 0, or a folder of test images")
        return Data(pictures if "train" in parts else None, pictures if "test" in parts else None, notes)
    order = np.random.default_rng(request.seed).permutation(len(pictures))
    held_back = max(1, round(request.holdout * len(pictures)))
    if held_back == len(pictures):
        raise InputError(f"{request} has {len(pictures)} image: training and testing need at least one image each")
    test, train = Subset(pictures, np.sort(order[:held_back])), Subset(pictures, np.sort(order[held_back:]))
    note = (
        f"{request} has one split: {len(test)} of its {counted(len(pictures), 'image')} (seed "
        f"{request.seed}) are used for testing only"
    )
    return Data(train if "train" in parts else None, test if "test" in parts else None, (*notes, note))
