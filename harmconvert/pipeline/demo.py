"""demo(): convert two sample networks without the internet, and measure the results."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.calibration import CalibrationImages, calibration_images
from ..data.datasets import DataRequest, open_data
from ..data.loading import training_batches
from ..data.preprocessing import color_mode, preprocessing
from ..deploy.export import export
from ..errors import OutsideError, counted
from ..network.running import evaluating
from ..plan.cost import Cost
from ..samples import mnist5k_held_back, photographs
from ..sources.opening import load, open_source
from ..training.loop import train
from ..training.recipe import recipe_named
from .convert import convert
from .listener import SILENT, Listener
from .saving import save
from .verification import Verification
from .verify import verify

TRAINING_STEPS, PHOTOGRAPHS, CODED = "calibration and fine-tuning", "efficientnet_lite0", "coded"
CODED_BITS = 3


@dataclass(frozen=True)
class Step:
    """One step of the demo and its measurements; None for a measurement that the step does not have.

    ``accuracy`` is the share of held-back images that are classified correctly, ``agreement`` the share with the same
    prediction as the uncut network, ``images`` the number of images for the test or the calibration, ``bytes`` the size
    of the file. ``why`` is the reason why a step was left out.
    """

    name: str
    accuracy: float | None = None
    agreement: float | None = None
    images: int | None = None
    cost: Cost | None = None
    bytes: int | None = None
    check: Verification | None = None
    epochs: int | None = None
    seconds: float | None = None
    why: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the measurements as JSON values."""
        if self.name == PHOTOGRAPHS and self.check is not None:
            agreement = self.check.top1_agreement
            error = self.check.max_relative_error
            return {"max_relative_error": error, "top1_agreement": agreement, "ok": self.check.ok}
        measurements = {
            "accuracy": self.accuracy,
            "agreement": self.agreement,
            "parameters": self.cost.harmonic_parameters if self.cost else None,
            "bytes": self.bytes if self.cost else None,
            "images": self.images,
            "epochs": self.epochs,
            "seconds": self.seconds,
            "max_relative_error": self.check.max_relative_error if self.check else None,
        }
        return {key: value for key, value in measurements.items() if value is not None}


@dataclass(frozen=True)
class Demo:
    """The steps of the demo in their order."""

    steps: tuple[Step, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the accuracy of the uncut network and the measurements of each later step, by name, as JSON values."""
        uncut, *others = self.steps
        return {"accuracy": uncut.accuracy} | {step.name: step.to_json() for step in others if step.why is None}


def demo(listener: Listener = SILENT) -> Demo:
    """Convert two sample networks; measure the accuracy after the cut, the calibration and the fine-tuning.

    The listener receives each `Step` as a result.

    Raises:
        OutsideError: a package with a sample that the first steps need is not installed.
    """
    steps = []
    for step in _steps(listener):
        listener.result(step)
        steps.append(step)
    return Demo(tuple(steps))


def _steps(listener: Listener) -> Iterator[Step]:
    source = open_source("sample:resnet_mnist5k")
    original, (images, labels) = source.model, mnist5k_held_back()
    yield Step("uncut", _accuracy(original, images, labels), images=len(labels))
    with tempfile.TemporaryDirectory() as folder:
        for lam in ("full", "progressive", 2):
            conversion = convert(original, lam, progress=False)
            path = Path(folder) / f"{lam}.safetensors"
            save(conversion, path, source=source.source)
            converted = load(path)
            yield Step(
                str(lam),
                _accuracy(converted, images, labels),
                _agreement(original, converted, images),
                cost=conversion.cost,
                bytes=path.stat().st_size,
                check=verify(original, converted, images[::10], progress=False) if lam == "full" else None,
            )
    try:
        yield from _calibrate_and_train(original, images, labels, listener)
    except OutsideError as error:
        yield Step(TRAINING_STEPS, why=str(error))
    try:
        yield _photographs()
    except OutsideError as error:
        yield Step(PHOTOGRAPHS, why=str(error))


def _calibrate_and_train(original: nn.Module, images: Tensor, labels: Tensor, listener: Listener) -> Iterator[Step]:
    """Cut with lambda 2, calibrate, fine-tune and export; code the uncut network."""
    inputs = calibration_images("sample:mnist5k", original, 128)
    model = convert(original, 2, calibration=inputs.batches, progress=False).model
    yield Step("calibrated", _accuracy(model, images, labels), _agreement(original, model, images), len(inputs))

    data = open_data(DataRequest("sample:mnist5k"), ("train",))
    recipe = recipe_named("finetune", batch_size=64, crop="padded", hflip=0.0)  # a mirrored digit is not a digit
    config = preprocessing(original, {})
    assert data.train is not None
    listener.say(f"fine-tuning for {counted(recipe.epochs, 'epoch')}")
    batches = training_batches(data.train, recipe.transform(config), color_mode(config), recipe.batch_size)
    rows = train(model, batches, recipe)
    seconds = sum(row["seconds"] for row in rows)
    yield Step("fine-tuned", _accuracy(model, images, labels), epochs=recipe.epochs, seconds=seconds)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dense.safetensors"
        export(model, path)
        exported = open_source("sample:resnet_mnist5k", weights=path).model
        yield Step("exported", agreement=_agreement(model, exported, images), bytes=path.stat().st_size)
    yield _coded(original, images, labels, inputs)


def _coded(original: nn.Module, images: Tensor, labels: Tensor, inputs: CalibrationImages) -> Step:
    """Code all weights, without a cut."""
    conversion = convert(original, bits=CODED_BITS, calibration=inputs.batches, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "coded.safetensors"
        save(conversion, path)
        model, size = load(path, model=original), path.stat().st_size
    agreement = _agreement(original, model, images)
    return Step(CODED, _accuracy(model, images, labels), agreement, len(inputs), conversion.cost, size)


def _photographs() -> Step:
    network, crops = open_source("sample:efficientnet_lite0").model, photographs()
    conversion = convert(network, progress=False)
    return Step(
        PHOTOGRAPHS, images=len(crops), cost=conversion.cost, check=verify(network, conversion, crops, progress=False)
    )


def _predictions(model: nn.Module, images: Tensor) -> Tensor:
    with evaluating(model):
        return torch.cat([model(batch).argmax(1) for batch in images.split(250)])


def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (_predictions(model, images) == labels).double().mean().item()


def _agreement(original: nn.Module, converted: nn.Module, images: Tensor) -> float:
    return (_predictions(original, images) == _predictions(converted, images)).double().mean().item()
