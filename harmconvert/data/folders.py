"""Folders of pictures: find the class folders and the images in them."""

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

# Folders that archives, file servers and notebooks create; they are never classes.
_NEVER_CLASSES = ("__MACOSX", "@eaDir", "lost+found", "System Volume Information", "$RECYCLE.BIN", "__pycache__")
# Formats of images and arrays that this package cannot read. A folder with such files is a class without images.
_UNSUPPORTED = (".heic", ".heif", ".avif", ".jxl", ".dcm", ".npy", ".npz", ".nii", ".gz")


class Files(Pictures):
    """All images below a folder.

    With ``classes``, the label of an image is the class whose folder contains the image; other images are left out.
    Without ``classes``, no image has a label.
    """

    def __init__(self, root: Path, classes: Sequence[str] | None = None, paths: Iterable[str] | None = None) -> None:
        self.root, self.classes, self.labelled = root, classes, classes is not None
        labels = {name: label for label, name in enumerate(classes or ())}
        paths = image_files(root) if paths is None else paths
        labelled = [(path, labels.get(_top_folder(path, root))) for path in paths]
        self.files = [(path, label) for path, label in labelled if classes is None or label is not None]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[Image.Image, int | None]:
        path, label = self.files[index]
        with open(path, "rb") as file:
            return open_picture(file, path), label

    def name(self, index: int) -> str:
        return self.files[index][0]


def class_folders(root: Path) -> list[str]:
    """Return the names of the folders that may be classes, in timm's order (numbers are sorted by value)."""
    names = [entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    return sorted((name for name in names if name not in _NEVER_CLASSES), key=natural_key)


def image_files(folder: Path) -> Iterator[str]:
    """Yield the paths of all images below a folder, in a fixed order; skip hidden files and folders."""
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _NEVER_CLASSES)
        for name in sorted(names):
            if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith("."):
                yield os.path.join(root, name)


def _top_folder(path: str, root: Path) -> str:
    """Return the name of the folder in ``root`` that contains an image; empty for an image in ``root`` itself."""
    return os.path.relpath(path, root).rpartition(os.sep)[0].partition(os.sep)[0]


def open_labelled_folder(root: Path, train: Pictures | None = None) -> tuple[Files, tuple[str, ...]]:
    """Return the pictures of a folder, labelled by its class folders as in torchvision, and notes for the user.

    A few images beside the class folders (an overview, a logo) are left out. No image has a label if most images are in
    the folder itself. The same holds if there is only one other folder and ``train`` does not have it as a class.

    Raises:
        InputError: there is no image, a class has no image, or ``train`` lacks a class.
    """
    folders, paths = class_folders(root), list(image_files(root))
    counts = Counter(_top_folder(path, root) for path in paths)
    beside = [Path(path).name for path in paths if not _top_folder(path, root)]
    inside, known = len(paths) - len(beside), train.classes if train is not None else None
    if not paths:
        raise InputError(f"{root} has no image: give a folder with a folder of images for each class")
    filled = [name for name in folders if counts[name]]
    if beside and (len(beside) > inside or (len(filled) < 2 and not set(filled) <= set(known or ()))):
        below = f", and {inside} in its folders ({shortened(filled, 3)})" if inside else ""
        note = f"{root} itself has {counted(len(beside), 'image')}{below}: no image has a label"
        return Files(root, None, paths), (note,) if inside else ()
    notes: tuple[str, ...] = ()
    if beside:
        notes += (f"{root} has images beside its class folders, which are left out: {shortened(beside, 3)}",)
    no_classes = [name for name in folders if not counts[name] and _is_not_a_class(root / name, known)]
    if no_classes:
        notes += (f"{root} has folders without an image, which are left out: {shortened(no_classes, 3)}",)
    classes = [name for name in folders if name not in no_classes]
    if empty := [name for name in classes if not counts[name]]:
        raise InputError(
            f"{root} has class folders without an image ({shortened(empty, 3)}), and leaving them out would shift the "
            "numbers of the classes after them: add images to them or remove them"
        )
    if known and (unknown := [name for name in classes if name not in known]):
        raise InputError(
            f"{root} has classes that the training images lack ({shortened(unknown, 3)}): remove them, or add "
            "training images"
        )
    return Files(root, known or classes, paths), notes


def _is_not_a_class(folder: Path, known: Sequence[str] | None) -> bool:
    """Return whether a folder without a readable image is not a class: it has only files that are not images.

    If the classes are ``known``, such a folder is never a class.
    """
    if known is not None:
        return True  # the numbers of the classes come from the training images
    files = [Path(file) for _, _, names in os.walk(folder) for file in names if not file.startswith(".")]
    images = {*Image.registered_extensions(), *_UNSUPPORTED}
    return bool(files) and not any(file.suffix.lower() in images for file in files)
