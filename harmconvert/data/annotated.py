"""Folders of pictures with masks, with boxes in COCO's format, or in pairs of input and target."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..documents import check, count, finite
from ..errors import InputError, counted, first_line, shortened
from .pictures import BOXES, IMAGES, MASKS, Pictures, open_picture

# Names of the folders with pictures, and of those with what belongs to each picture.
_FOLDERS = {MASKS: ("images", "masks"), IMAGES: ("input", "target")}
_COCO = {
    "images": [{"id": count, "file_name": str}],
    "annotations": [{"image_id": count, "category_id": count, "bbox": [finite], "iscrowd": (count, None)}],
}
_NEEDED = {"images": ("id", "file_name"), "annotations": ("image_id", "category_id", "bbox")}


class PairedFiles(Pictures):
    """Pictures in one folder, and what belongs to each of them, under the same stem, in another one."""

    def __init__(self, root: Path, task: str) -> None:
        self.task = task
        self.root, (first, second) = root, _FOLDERS[task]
        inputs, targets = (_by_stem(root / name) for name in (first, second))
        for name, missing in ((second, inputs.keys() - targets.keys()), (first, targets.keys() - inputs.keys())):
            if missing:
                problem = f"{root / name} lacks files for {counted(len(missing), 'picture')}"
                raise InputError(f"{problem} ({shortened(sorted(missing), 3)}): each needs a file of the same stem")
        if not inputs:
            raise InputError(f"{root / first} has no image")
        self.files = [(inputs[stem], targets[stem]) for stem in sorted(inputs)]

    @property
    def description(self) -> str:  # type: ignore[override]
        """Return what was recognised, for a message."""
        first, second = _FOLDERS[self.task]
        what = "images with masks" if self.task == MASKS else "pairs of images"
        return f"{counted(len(self), 'sample')}: {what} ({first}/ and {second}/)"

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[Image.Image, Any]:
        input, target = self.files[index]
        picture = _opened(input)
        if self.task == IMAGES:
            return picture, _opened(target)
        mask = _mask(target)
        if tuple(mask.shape) != picture.size[::-1]:
            height, width = mask.shape
            sizes = f"{width}x{height} pixels, its image {'x'.join(map(str, picture.size))}"
            raise InputError(f"{target} has {sizes}: a mask must have the size of its image")
        return picture, mask

    def name(self, index: int) -> str:
        return str(self.files[index][0])


class BoxFiles(Pictures):
    """Pictures with boxes and categories in a JSON file of COCO's format; labels are the ids of the categories."""

    task = BOXES

    def __init__(self, annotations: Path) -> None:
        document = _coco(annotations)
        listed = {image["id"]: image["file_name"] for image in document["images"]}
        self.annotations, self.folder = annotations, _folder_of(annotations, [*listed.values()])
        missing = [name for name in listed.values() if not (self.folder / name).is_file()]
        if missing:
            problem = f"{annotations} names {counted(len(missing), 'image')} that {self.folder} does not have"
            raise InputError(f"{problem} ({shortened(missing, 3)}): add them, or remove them from the file")
        boxes: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
        for box in document["annotations"]:
            if box["image_id"] not in listed:
                raise InputError(f"{annotations} has a box for image {box['image_id']}, which it does not list")
            if len(box["bbox"]) != 4:
                has = counted(len(box["bbox"]), "number")
                raise InputError(f"{annotations} has a box of {has}: it should have x, y, width, height")
            boxes[box["image_id"]].append(box)
        if not listed:
            raise InputError(f"{annotations} lists no image")
        self.items = [(name, boxes[number]) for number, name in sorted(listed.items())]
        self.largest_label = max((box["category_id"] for box in document["annotations"]), default=0)

    @property
    def description(self) -> str:  # type: ignore[override]
        """Return what was recognised, for a message."""
        return f"{counted(len(self), 'sample')}: images with boxes ({self.annotations.name}, COCO's format)"

    def __len__(self) -> int:
        return len(self.items)

    def read(self, index: int) -> tuple[Image.Image, dict[str, Tensor]]:
        name, boxes = self.items[index]
        corners = torch.tensor([box["bbox"] for box in boxes], dtype=torch.float32).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        full = (corners[:, 2:] > corners[:, :2]).all(1)  # a box without area is no object
        return _opened(str(self.folder / name)), {
            "boxes": corners[full],
            "labels": torch.tensor([box["category_id"] for box in boxes], dtype=torch.long)[full],
            "iscrowd": torch.tensor([box.get("iscrowd") or 0 for box in boxes], dtype=torch.long)[full],
        }

    def name(self, index: int) -> str:
        return str(self.folder / self.items[index][0])


def _coco(path: Path) -> dict[str, Any]:
    """Return the document of a file in COCO's format; raise InputError if it is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        check(document, _COCO, "its entries")
        if missing := [key for key in _COCO if key not in document]:
            raise ValueError(f"it has no entry {missing[0]!r}")
        for kind, needed in _NEEDED.items():
            lacking = [key for one in document[kind] for key in needed if one.get(key) is None]
            if lacking:
                raise ValueError(f"one of its {kind} has no {lacking[0]!r}")
        return dict(document)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is not in COCO's format for detection: {first_line(error)}") from error


def _folder_of(annotations: Path, names: list[str]) -> Path:
    """Return the folder of the images: ``images``, or one that the file's name ends in, beside the file or above it."""
    near = (annotations.parent, annotations.parent.parent)
    ending = annotations.stem.rpartition("_")[2]
    candidates = [folder / name for name in ("images", ending, "") for folder in near]
    for folder in candidates:
        if names and (folder / names[0]).is_file():
            return folder
    return next((folder for folder in candidates if folder.is_dir()), annotations.parent)


def _by_stem(folder: Path) -> dict[str, str]:
    """Return the images of a folder by the path without suffix, relative to the folder."""
    files = [
        path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS and not path.name.startswith(".")
    ]
    return {str(path.relative_to(folder).with_suffix("")): str(path) for path in files}


def _opened(path: str) -> Image.Image:
    with open(path, "rb") as file:
        return open_picture(file, path)


def _mask(path: str) -> Tensor:
    """Return the class number of each pixel (H, W)."""
    values = np.asarray(_opened(path))
    if values.ndim != 2 or values.dtype.kind not in "biu":
        raise InputError(f"{path} is no mask: it should have one channel with the number of a class in each pixel")
    return torch.from_numpy(values.astype(np.int64))
