"""The story of `harmconvert demo`: real weights, no hub, every number measured while it is told."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import calibration_images, preprocessing
from ..data.datasets import DataRequest, open_data
from ..data.loading import training_batches
from ..data.preprocessing import color_mode
from ..deploy.export import export
from ..errors import OutsideError, counted
from ..network.running import evaluating
from ..pipeline.convert import convert
from ..pipeline.saving import save
from ..pipeline.verify import Verification, verify
from ..samples import mnist5k_held_back, photographs
from ..sources.opening import load, open_source
from ..training import recipe_named, train
from .tables import file_size, millions


def tell(say: Callable[[str], None]) -> dict[str, Any]:
    """Run the demo, one line at a time to ``say``; returns the figures."""
    facts: dict[str, Any] = {}
    source = open_source("sample:resnet_mnist5k")
    images, labels = mnist5k_held_back()
    with tempfile.TemporaryDirectory() as folder:
        original = source.model
        facts["accuracy"] = _accuracy(original, images, labels)
        right = f"{facts['accuracy']:.1%} of {len(labels):,} held-back images right"
        say(f"sample:resnet_mnist5k, trained on real handwriting: {right}")
        for lam in ("full", "progressive", 2):
            conversion = convert(original, lam)
            path = Path(folder) / f"{lam}.safetensors"
            save(conversion, path, source=source.source)
            converted = load(path)
            accuracy, agreement = _accuracy(converted, images, labels), _agreement(original, converted, images)
            cost = conversion.cost
            facts[str(lam)] = {
                "accuracy": accuracy,
                "agreement": agreement,
                "parameters": cost.harmonic_parameters,
                "bytes": path.stat().st_size,
            }
            size = f"{millions(cost.harmonic_parameters)} of {millions(cost.parameters)} parameters, {file_size(path)}"
            if lam == "full":
                check = verify(original, converted, images[::10])
                facts["full"]["max_relative_error"] = check.max_relative_error
                say(f"  whole basis: {size}; the same prediction on {agreement:.1%} of the images,")
                say(f"    {_exactness(check)}")
            else:
                points = (accuracy - facts["accuracy"]) * 100
                say(f"  lambda {lam}: {size} ({cost.harmonic_parameters / cost.parameters:.0%});")
                plain = f"{accuracy:.1%} right ({points:+.1f} points), {agreement:.1%} predicted as before"
                say(f"    a plain cut, nothing repaired: {plain}")
        try:
            _repaired(original, images, labels, facts, say)
        except OutsideError as error:
            say(f"  calibration and fine-tuning: left out: {error}")
    try:
        facts["efficientnet_lite0"] = _photographs(say)
    except OutsideError as error:
        say(f"sample:efficientnet_lite0: left out: {error}")
    return facts


def _repaired(
    original: nn.Module, images: Tensor, labels: Tensor, facts: dict[str, Any], say: Callable[[str], None]
) -> None:
    """The cut of lambda 2 calibrated, fine-tuned, exported."""
    seen = calibration_images("sample:mnist5k", original, 128)
    model = convert(original, 2, calibration=seen.batches).model
    accuracy, agreement = _accuracy(model, images, labels), _agreement(original, model, images)
    say(f"    the same cut calibrated on {len(seen)} other images, no labels, no training: {accuracy:.1%} right,")
    say(f"    {agreement:.1%} predicted as before")
    facts["calibrated"] = {"accuracy": accuracy, "agreement": agreement, "images": len(seen)}

    data = open_data(DataRequest("sample:mnist5k"), ("train",))
    recipe = recipe_named("finetune", batch_size=64, crop="padded", hflip=0.0)  # digits have no mirror images
    config = preprocessing(original, {})
    assert data.train is not None
    batches = training_batches(data.train, recipe.transform(config), color_mode(config), recipe.batch_size)
    rows = train(model, batches, recipe)
    accuracy, seconds = _accuracy(model, images, labels), sum(row["seconds"] for row in rows)
    say(
        f"    and fine-tuned for {counted(recipe.epochs, 'epoch')} on 4,000 images, {seconds:.0f} s: "
        f"{accuracy:.1%} right"
    )
    facts["fine-tuned"] = {"accuracy": accuracy, "epochs": recipe.epochs, "seconds": seconds}

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dense.safetensors"
        export(model, path)
        plain = open_source("sample:resnet_mnist5k", weights=path).model
        agreement = _agreement(model, plain, images)
        say(f"    exported as plain convolutions, {file_size(path)}: the same prediction on {agreement:.1%}")
    facts["exported"] = {"agreement": agreement}


def _photographs(say: Callable[[str], None]) -> dict[str, Any]:
    network, crops = open_source("sample:efficientnet_lite0").model, photographs()
    conversion = convert(network)
    check = verify(network, conversion, crops)
    cost = conversion.cost
    share = f"{cost.over_1x1_parameters / cost.parameters:.1%} in kernels over 1x1"
    say(f"sample:efficientnet_lite0, ImageNet weights, {millions(cost.parameters)} parameters, {share}")
    say(f"  whole basis, {len(crops)} crops of two photographs: same top-1 on {check.top1_agreement:.0%},")
    say(f"    {_exactness(check)}")
    return {"max_relative_error": check.max_relative_error, "top1_agreement": check.top1_agreement, "ok": check.ok}


def _exactness(check: Verification) -> str:
    verdict = "exact" if check.ok else "NOT EXACT"
    return f"logits within {check.max_relative_error:.1e} of the original's: {verdict}"


def _predictions(model: nn.Module, images: Tensor) -> Tensor:
    with evaluating(model):
        return torch.cat([model(batch).argmax(1) for batch in images.split(250)])


def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (_predictions(model, images) == labels).double().mean().item()


def _agreement(original: nn.Module, converted: nn.Module, images: Tensor) -> float:
    return (_predictions(original, images) == _predictions(converted, images)).double().mean().item()
