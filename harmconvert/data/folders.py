"""Folders of pictures: which folder is a class, and what lies beside the classes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image
from timm.utils.misc import natural_key
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..errors import InputError, counted, shortened
from .pictures import Pictures, open_picture

# Folders that archives, file servers and notebooks leave behind; they are no classes, empty or not.
_LEFT_BEHIND = ("__MACOSX", "@eaDir", "lost+found", "System Volume Information", "$RECYCLE.BIN", "__pycache__")
# Pictures and arrays that nothing here reads: a folder of them is a class whose images are missing.
_NOT_READ = (".heic", ".heif", ".avif", ".jxl", ".dcm", ".npy", ".npz", ".nii", ".gz")


class Files(Pictures):
    """All images below a folder; those below a folder named in ``classes`` are of that class and others left out, or
    where there are no classes all are pictures without labels."""

    def __init__(self, root: Path, classes: Sequence[str] | None = None, paths: Iterable[str] | None = None) -> None:
        self.classes, self.labelled = classes, classes is not None
        labels = {name: label for label, name in enumerate(classes or ())}
        found = [(path, labels.get(_folder(path, root))) for path in (image_files(root) if paths is None else paths)]
        self.files = [(path, label) for path, label in found if classes is None or label is not None]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[Image.Image, int | None]:
        path, label = self.files[index]
        with open(path, "rb") as file:
            return open_picture(file, path), label

    def name(self, index: int) -> str:
        return self.files[index][0]


def class_folders(root: Path) -> list[str]:
    """Names of the folders in a folder that may be classes, numbers in them by value, as timm numbers classes."""
    names = [entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    return sorted((name for name in names if name not in _LEFT_BEHIND), key=natural_key)


def image_files(folder: Path) -> Iterator[str]:
    """Paths of all images below a folder, in a fixed order; hidden files and folders are passed over."""
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _LEFT_BEHIND)
        for name in sorted(names):
            if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith("."):
                yield os.path.join(root, name)


def _folder(path: str, root: Path) -> str:
    """The name of the folder in ``root`` that an image is below; empty where it lies in ``root`` itself."""
    return os.path.relpath(path, root).rpartition(os.sep)[0].partition(os.sep)[0]


def folder_of_pictures(root: Path, train: Pictures | None = None) -> tuple[Files, tuple[str, ...]]:
    """The pictures of one folder, labelled by the folders in it as torchvision labels them, and what to know of them.

    A few images beside the class folders (an overview, a logo) are left out. Where most images lie in the folder
    itself, or beside a single folder that is no class of ``train``, none has a label.

    Raises:
        InputError: no image at all, a class without an image, a class that ``train`` lacks.
    """
    folders, paths = class_folders(root), list(image_files(root))
    counts = Counter(_folder(path, root) for path in paths)
    beside = [Path(path).name for path in paths if not _folder(path, root)]
    inside, known = len(paths) - len(beside), train.classes if train is not None else None
    if not paths:
        raise InputError(f"{root} holds no image: give --data-dir a folder with a folder of images for each class")
    filled = [name for name in folders if counts[name]]
    if beside and (len(beside) > inside or (len(filled) < 2 and not set(filled) <= set(known or ()))):
        below = f", and {inside} in folders in it ({shortened(filled, 3)})" if inside else ""
        note = f"{root} itself holds {counted(len(beside), 'image')}{below}: none has a label"
        return Files(root, None, paths), (note,) if inside else ()
    notes: tuple[str, ...] = ()
    if beside:
        notes += (f"{root} has images beside its class folders, which are left out: {shortened(beside, 3)}",)
    strays = [name for name in folders if not counts[name] and _no_class(root / name, known)]
    if strays:
        notes += (f"{root} has folders without an image, which are left out: {shortened(strays, 3)}",)
    classes = [name for name in folders if name not in strays]
    if empty := [name for name in classes if not counts[name]]:
        raise InputError(
            f"{root} has class folders without an image ({shortened(empty, 3)}), and leaving them out would shift the "
            "numbers of the classes after them: fill or remove them"
        )
    if known and (strangers := [name for name in classes if name not in known]):
        raise InputError(f"{root} has classes that there are none of to train on: {shortened(strangers, 3)}")
    return Files(root, known or classes, paths), notes


def _no_class(folder: Path, known: Sequence[str] | None) -> bool:
    """Whether a folder without an image can be left out: the classes are known, or it holds other things only."""
    if known is not None:
        return True  # numbers are those of the training images
    files = [Path(file) for _, _, names in os.walk(folder) for file in names if not file.startswith(".")]
    unread = {*Image.registered_extensions(), *_NOT_READ}
    return bool(files) and not any(file.suffix.lower() in unread for file in files)
