"""Make the inputs on which a flow runs a network, from sizes or from what the network declares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..calibration.inputs import HELD_BACK
from ..data.pictures import CLASSES
from ..data.preprocessing import (
    check_preprocessing,
    describe_preprocessing,
    preprocessing,
    preprocessing_record,
    task_preprocessing,
)
from ..errors import Argument, UsageError, counted
from ..layers.block import HarmonicBlock2d
from ..layers.harmonic import CONVOLUTIONS
from ..network.declared import declare_preprocessing, pretrained_config
from ..network.values import default_input, match_dtype, tensors_in
from ..samples import SAMPLES
from ..storage.source import Source
from .listener import Listener

Sizes = Sequence[tuple[int, ...]]


def zeros_of(sizes: Sizes, model: nn.Module, batch: int = 1) -> Any:
    """Return ``batch`` examples of zeros for each size, in the dtype and on the device of the network.

    Without sizes, the size that the network declares is used; return None if it declares none.
    """
    if not sizes:
        return default_input(model, batch)
    return _one_or_all([match_dtype(torch.zeros(batch, *size), model) for size in sizes])


def random_of(sizes: Sizes, model: nn.Module) -> Any:
    """Return one seeded random example of each size; without sizes, of the size that the network declares.

    Raises:
        UsageError: there are no sizes, and the network declares none.
    """
    sizes = sizes or [tuple(t.shape[1:]) for t in tensors_in(zeros_of((), model))]
    if not sizes:
        raise UsageError("this network does not declare its input size: give ", Argument("example_input"))
    generator = torch.Generator().manual_seed(0)
    return _one_or_all([match_dtype(torch.randn(1, *size, generator=generator), model) for size in sizes])


def verification_inputs(sizes: Sizes, source: Source, images: Sequence[Any] = ()) -> dict[str, Any]:
    """Return arguments for `verify`: the inputs, and whether they are random.

    The inputs are the first of these that is available: some of the held-back calibration ``images``, two random inputs
    of each size, the images of a sample network, or None. For None, `verify` makes two random inputs.
    """
    if images and isinstance(images[0], list):
        return {"inputs": [image for batch in images for image in batch][-1:]}
    if images:
        alike = [batch for batch in images if batch.shape[1:] == images[0].shape[1:]]
        return {"inputs": torch.cat(alike)[HELD_BACK - 1 :: HELD_BACK][:16]}
    if sizes:
        generator = torch.Generator().manual_seed(0)
        inputs = _one_or_all([torch.randn(2, *size, generator=generator) for size in sizes])
        return {"inputs": inputs, "random_inputs": True}
    return {"inputs": SAMPLES[source.name].images() if source.scheme == "sample" else None}


def image_config(
    model: nn.Module, overrides: Mapping[str, Any], listener: Listener, size: Sequence[int] | None = None,
    task: str = CLASSES,
    prepared: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Return the pre-processing of images, and send it to the listener.

    ``size`` replaces the network's own size, ``task`` is the kind of the data. An ``input_size`` of one
    number is the side of a square image.

    Raises:
        UsageError: neither the network nor the caller defines the pre-processing, or the inputs are not images.
    """
    options = {**overrides, "input_size": size_of(model, {"input_size": size, **overrides})}
    config = task_preprocessing(model, options, task, input_channels(model), prepared)
    if task == CLASSES and not prepared:
        check_preprocessing(config)
    listener.say(f"preprocessing: {describe_preprocessing(config)}")
    return config


def declare_inputs(model: nn.Module, overrides: Mapping[str, Any], sizes: Sizes) -> None:
    """Write sizes and pre-processing into a network's declaration, so that its checkpoint records them.

    Raises:
        UsageError: pre-processing is set, but the inputs are not images.
    """
    record: dict[str, Any] = {"input_sizes": sizes} if sizes else {}
    if any(value is not None for key, value in overrides.items() if key != "trust_code"):
        if len(sizes) > 1:
            raise UsageError(
                f"this network has {counted(len(sizes), 'input')}: ", Argument("mean"), ", ", Argument("std"),
                " and ", Argument("preprocess"), " are for networks with one input, an image: leave them out",
            )  # fmt: skip
        config = preprocessing(model, {"input_size": sizes[0] if sizes else None, **overrides})
        check_preprocessing(config)
        record |= preprocessing_record(config)
    declare_preprocessing(model, record)


def size_of(model: nn.Module, overrides: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return the input size in overrides of the pre-processing; one number is the side of a square image."""
    size = overrides.get("input_size")
    return (input_channels(model), size, size) if isinstance(size, int) else size


def input_channels(model: nn.Module) -> int:
    """Return the input channels of the first convolution, else those that the network declares, else 3."""
    size = pretrained_config(model).get("input_size")
    first = next((module for module in model.modules() if isinstance(module, (HarmonicBlock2d, *CONVOLUTIONS))), None)
    return int(getattr(first, "in_channels", size[0] if size else 3))


def _one_or_all(inputs: list[Any]) -> Any:
    return inputs[0] if len(inputs) == 1 else tuple(inputs)
