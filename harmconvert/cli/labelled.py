"""Labelled images of one option: half of them to choose on, the other half to say what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import images

Judge = Callable[[Any], float]
Report = Callable[[Any, Any], dict[str, Any]]


def halves(
    data: str, model: Any, given: Mapping[str, Any], sizes: Sequence[tuple[int, ...]] = ()
) -> tuple[Judge, Report]:
    """Top-1 in % of a network on every second test image; and what two networks, the uncut and the converted one, are
    worth on the others, by name. ``sizes``: of the network's inputs (C, H, W), of one where any is given.

    Raises:
        UsageError, InputError: no such images, without labels, or of other classes than the network's.
    """
    import numpy as np

    from ..data.datasets import DataRequest, Some, open_data
    from ..data.loading import evaluation_batches
    from ..data.pictures import Pictures
    from ..data.preprocessing import color_mode, evaluation_transform
    from ..errors import InputError, UsageError
    from ..pipeline.finetuning import check_classes
    from ..training.evaluation import Evaluation, evaluate

    own = Path(data).is_dir() or data.endswith(".tar")
    request = DataRequest("" if own else data, data if own else given["data_dir"], holdout=0.0)
    found = open_data(request, ("test",))
    pictures = found.test
    if not isinstance(pictures, Pictures):
        raise UsageError(f"--labelled {data} is a stream, which cannot be halved: give a folder or another data set")
    unlabelled = InputError(f"--labelled {data} has no labels: give a folder with a folder for each class")
    if not pictures.labelled:
        raise unlabelled
    if len(pictures) < 2:
        raise InputError(f"--labelled {data} holds {len(pictures)} image: give two or more, of which half choose")
    config = images.image_config(given, model, sizes[0] if sizes else None)
    parts = [Some(pictures, np.arange(start, len(pictures), 2)) for start in (0, 1)]
    check_classes(found, model, "give images of the network's classes")

    def on(part: Some, network: Any) -> Evaluation:
        loading = evaluation_batches(part, evaluation_transform(config), color_mode(config), 256)
        evaluation = evaluate(network, loading.epoch(0))
        if evaluation.top1 is None:
            raise unlabelled
        return evaluation

    def worth(network: Any) -> float:
        return 100 * (on(parts[0], network).top1 or 0.0)

    def report(uncut: Any, converted: Any) -> dict[str, Any]:
        return {"uncut": on(parts[1], uncut), "converted": on(parts[1], converted)}

    return worth, report
