"""Recognise the kind of data in a folder or file from its contents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError, UsageError, shortened
from .annotated import BoxFiles, PairedFiles
from .folders import class_folders, image_files
from .pictures import IMAGES, MASKS, Pictures
from .tensor_files import SUFFIXES, TensorFiles, TensorRows


def recognised(path: Path, split: Sequence[str] = ()) -> Pictures | None:
    """Return the samples of a folder or file that is no set of class folders or plain pictures; None if it is one.

    Args:
        split: names of a split, which choose among several files of annotations.

    Raises:
        UsageError: several files of annotations fit.
        InputError: files are missing or damaged.
    """
    if path.is_file():
        suffix = path.suffix.lower()
        return BoxFiles(path) if suffix == ".json" else TensorRows(path) if suffix in (".npy", ".pt") else None
    if (path / "images").is_dir():
        if (path / "masks").is_dir():
            return PairedFiles(path, MASKS)
        if annotations := _annotations(path, split):
            return BoxFiles(annotations)
    if (path / "input").is_dir() and (path / "target").is_dir():
        return PairedFiles(path, IMAGES)
    return _tensor_files(path)


def _annotations(path: Path, split: Sequence[str]) -> Path | None:
    files = sorted([*path.glob("annotations*.json"), *(path / "annotations").glob("*.json")])
    if len(files) < 2:
        return files[0] if files else None
    chosen = [file for file in files if any(name in file.stem for name in split)]
    if len(chosen) != 1:
        names = shortened([str(file) for file in (chosen or files)], 3)
        raise UsageError(f"{path} has several files of annotations ({names}): name one of them as the data")
    return chosen[0]


def _tensor_files(path: Path) -> Pictures | None:
    if not path.is_dir() or next(image_files(path), None) is not None:
        return None
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not files:
        return None
    beside = [file for file in files if file.parent == path]
    if beside and len(beside) < len(files):
        raise InputError(f"{path} has tensor files beside its class folders ({shortened([f.name for f in beside], 3)})")
    return TensorFiles(path, files, [] if beside else class_folders(path))
