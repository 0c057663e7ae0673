"""Mean average precision of boxes, as COCO defines it."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import InputError, OutsideError, counted
from .metric import Metric, Outcome
from .outputs import describe

# The most boxes of an image that count, and the levels of recall, as in COCO.
MOST_BOXES = 100
_RECALLS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True)
class Matches:
    """The boxes that a network found in one image, of one class, matched with those of the annotation.

    ``scores`` (D,); ``matched``, ``ignored`` (10 thresholds, D); ``wanted``: annotated boxes that count.
    """

    scores: np.ndarray
    matched: np.ndarray
    ignored: np.ndarray
    wanted: int


# The state of an image: its matches by class.
Image = dict[int, Matches]


def _matches(outcome: Outcome) -> list[Image]:
    outputs, targets = _checked(outcome.outputs, ("boxes", "scores", "labels"), "outputs"), outcome.targets
    targets = _checked(targets, ("boxes", "labels"), "targets")
    if len(outputs) != len(targets):
        raise InputError(f"the network has {counted(len(outputs), 'output')} for {counted(len(targets), 'target')}")
    evaluation = _coco_evaluation(outputs, targets)
    images: list[Image] = [{} for _ in targets]
    for one in evaluation.evalImgs:
        if one is not None:
            ignored = np.asarray(one["gtIgnore"]).astype(bool)
            images[one["image_id"] - 1][one["category_id"]] = Matches(
                np.asarray(one["dtScores"], dtype=np.float64), np.asarray(one["dtMatches"]) > 0,
                np.asarray(one["dtIgnore"]).astype(bool), int((~ignored).sum()),
            )  # fmt: skip
    return images


def _checked(value: Any, keys: Sequence[str], what: str) -> list[Mapping[str, Tensor]]:
    """Return a list of dicts of tensors, one for each image."""
    needed = f"map needs {what} that are a list with a dict of {', '.join(keys)} for each image"
    if isinstance(value, Mapping) or not isinstance(value, list | tuple):
        raise InputError(f"{needed}: these are {describe(value)}")
    for one in value:
        if not isinstance(one, Mapping) or not all(isinstance(one.get(key), Tensor) for key in keys):
            has = ", ".join(map(str, one)) if isinstance(one, Mapping) else describe(one)
            raise InputError(f"{needed}: one has {has}")
    return list(value)


def _coco_evaluation(outputs: Sequence[Mapping[str, Tensor]], targets: Sequence[Mapping[str, Tensor]]) -> Any:
    """Match the boxes of each image with pycocotools, for all sizes of boxes together."""
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise OutsideError("map needs pycocotools: pip install 'harmconvert[metrics]'") from error
    wanted = [box for image, one in enumerate(targets, 1) for box in _boxes(one, image)]
    found = [box for image, one in enumerate(outputs, 1) for box in _boxes(one, image)]
    categories = sorted({box["category_id"] for box in (*wanted, *found)})
    sets = []
    with redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        for boxes in (wanted, found):
            coco = COCO()
            coco.dataset = {
                "images": [{"id": image} for image in range(1, len(targets) + 1)],
                "categories": [{"id": category} for category in categories],
                "annotations": [{**box, "id": number} for number, box in enumerate(boxes, 1)],
            }
            coco.createIndex()
            sets.append(coco)
        evaluation = COCOeval(*sets, iouType="bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [MOST_BOXES]
        evaluation.evaluate()
    return evaluation


def _boxes(one: Mapping[str, Tensor], image: int) -> list[dict[str, Any]]:
    """Return the boxes of an image in the form of COCO: x, y, width, height."""
    corners = one["boxes"].detach().double().cpu().reshape(-1, 4)
    sizes = corners[:, 2:] - corners[:, :2]
    labels = one["labels"].tolist()
    scores = one["scores"].tolist() if "scores" in one else [1.0] * len(labels)
    crowds = one["iscrowd"].tolist() if "iscrowd" in one else [0] * len(labels)
    areas = one["area"].tolist() if "area" in one else sizes.prod(1).tolist()
    if not len(corners) == len(labels) == len(scores):
        raise InputError(f"image {image} has {counted(len(corners), 'box')} and {counted(len(labels), 'label')}")
    return [
        {"image_id": image, "category_id": int(label), "bbox": [*corner, *size], "score": score, "iscrowd": int(crowd),
         "area": area}
        for corner, size, label, score, crowd, area in zip(
            corners[:, :2].tolist(), sizes.tolist(), labels, scores, crowds, areas, strict=True
        )
    ]  # fmt: skip


def _precision_of(images: Sequence[Image]) -> Callable[[np.ndarray], float]:
    """Return the mean average precision over the annotated classes, as a function of how often each image counts."""
    categories = sorted({category for image in images for category in image})
    prepared = [_sorted_boxes(images, category) for category in categories]

    def value(counts: np.ndarray) -> float:
        precisions = [one for boxes in prepared if (one := _average_precision(*boxes, counts)) is not None]
        return float(np.mean(precisions)) if precisions else 0.0

    return value


def _sorted_boxes(images: Sequence[Image], category: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return, for a class, the boxes of all images by falling score.

    These are the image of each box (D,), whether it is right and whether it is wrong (10, D), and the number of wanted
    boxes of each image (N,).
    """
    wanted = np.zeros(len(images))
    parts = []
    for number, image in enumerate(images):
        if category in image:
            one = image[category]
            wanted[number] = one.wanted
            parts.append((np.full(len(one.scores), number), one.scores, one.matched, one.ignored))
    origin, scores = (np.concatenate([part[place] for part in parts]) for place in (0, 1))
    matched, ignored = (np.concatenate([part[place] for part in parts], axis=1) for place in (2, 3))
    order = np.argsort(-scores, kind="mergesort")  # as pycocotools, so that boxes of equal score have the same order
    matched, ignored = matched[:, order], ignored[:, order]
    return origin[order], matched & ~ignored, ~matched & ~ignored, wanted


def _average_precision(
    origin: np.ndarray, right: np.ndarray, wrong: np.ndarray, wanted: np.ndarray, counts: np.ndarray
) -> float | None:
    """Return the mean over the thresholds of the average precision of a class; None if no box is wanted."""
    total = counts @ wanted
    if not total:
        return None
    often = counts[origin]
    used = often > 0
    often, right, wrong = often[used], right[:, used], wrong[:, used]
    if not len(often):
        return 0.0
    hits, misses = np.cumsum(right * often, axis=1), np.cumsum(wrong * often, axis=1)
    recall, precision = hits / total, hits / np.maximum(hits + misses, np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    levels = [np.searchsorted(one, _RECALLS, side="left") for one in recall]
    padded = np.concatenate([precision, np.zeros((len(precision), 1))], axis=1)
    return float(np.mean([row[places] for row, places in zip(padded, levels, strict=True)]))


METRICS = (Metric("map", "mAP", _matches, _precision_of, unit="%", scale=100),)
