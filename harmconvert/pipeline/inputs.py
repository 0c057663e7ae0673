"""Inputs that a flow runs a network on, made from sizes or found in what is known of the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.inputs import HELD_BACK
from ..data.preprocessing import check_preprocessing, describe_preprocessing, preprocessing, preprocessing_record
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
    """``batch`` examples of zeros of each size, or of the network's own size (None where it names none), in its dtype
    and on its device."""
    if not sizes:
        return default_input(model, batch)
    return _one_or_all([match_dtype(torch.zeros(batch, *size), model) for size in sizes])


def random_of(sizes: Sizes, model: nn.Module) -> Any:
    """One seeded random example of each size, or of the network's own size.

    Raises:
        UsageError: no size is given and the network names none.
    """
    sizes = sizes or [tuple(t.shape[1:]) for t in tensors_in(zeros_of((), model))]
    if not sizes:
        raise UsageError("this network does not say what it takes: give ", Argument("example_input"))
    generator = torch.Generator().manual_seed(0)
    return _one_or_all([match_dtype(torch.randn(1, *size, generator=generator), model) for size in sizes])


def verification_inputs(sizes: Sizes, source: Source, images: Sequence[Tensor] = ()) -> dict[str, Any]:
    """Arguments of `verify`: the inputs to compare two networks on, and whether they are random.

    The inputs are some of the held-back calibration images; or two random inputs of each size; or images that belong to
    a sample network; or None, for which `verify` makes two random inputs of the network's own size.
    """
    if images:
        return {"inputs": torch.cat(list(images))[HELD_BACK - 1 :: HELD_BACK][:16]}
    if sizes:
        generator = torch.Generator().manual_seed(0)
        inputs = _one_or_all([torch.randn(2, *size, generator=generator) for size in sizes])
        return {"inputs": inputs, "random_inputs": True}
    return {"inputs": SAMPLES[source.name].images() if source.scheme == "sample" else None}


def image_config(
    model: nn.Module, overrides: Mapping[str, Any], listener: Listener, size: Sequence[int] | None = None
) -> dict[str, Any]:
    """What is done to each image, which the listener is told; ``size`` replaces the network's own. An ``input_size`` of
    one number is that of a square image.

    Raises:
        UsageError: neither the network nor the caller says it, or the network takes no images.
    """
    config = preprocessing(model, {**overrides, "input_size": size_of(model, {"input_size": size, **overrides})})
    check_preprocessing(config)
    listener.say(f"preprocessing: {describe_preprocessing(config)}")
    return config


def declare_inputs(model: nn.Module, overrides: Mapping[str, Any], sizes: Sizes) -> None:
    """Make a network declare the given sizes and pre-processing, for its checkpoint to record.

    Raises:
        UsageError: pre-processing of what is no image.
    """
    record: dict[str, Any] = {"input_sizes": sizes} if sizes else {}
    if any(value is not None for key, value in overrides.items() if key != "trust_code"):
        if len(sizes) > 1:
            raise UsageError(
                f"this network takes {counted(len(sizes), 'input')}: ", Argument("mean"), ", ", Argument("std"),
                " and ", Argument("preprocess"), " are of one image",
            )  # fmt: skip
        config = preprocessing(model, {"input_size": sizes[0] if sizes else None, **overrides})
        check_preprocessing(config)
        record |= preprocessing_record(config)
    declare_preprocessing(model, record)


def size_of(model: nn.Module, overrides: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The input size that overrides of the pre-processing give; one number is the side of a square image."""
    size = overrides.get("input_size")
    return (_input_channels(model), size, size) if isinstance(size, int) else size


def _input_channels(model: nn.Module) -> int:
    """What the network's first convolution reads, else what its configuration says, else 3."""
    size = pretrained_config(model).get("input_size")
    first = next((module for module in model.modules() if isinstance(module, (HarmonicBlock2d, *CONVOLUTIONS))), None)
    return int(getattr(first, "in_channels", size[0] if size else 3))


def _one_or_all(inputs: list[Any]) -> Any:
    return inputs[0] if len(inputs) == 1 else tuple(inputs)
