"""Transforms of a picture together with its mask, its boxes or its target picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from .pictures import BOXES, IMAGES, MASKS, convert_mode


class JointTransform:
    """Resize (if the network has an input size) and normalise a picture; its target follows.

    Args:
        config: from `harmconvert.data.task_preprocessing`.
        scale, ratio: of a random crop of pictures with masks; None: no crop.
        hflip, vflip: shares of pictures that are mirrored.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        scale: tuple[float, float] | None = None,
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.0,
        vflip: float = 0.0,
    ) -> None:
        self.task = config["task"]
        steps: list[Any] = []
        size, interpolation = config["input_size"][1:], InterpolationMode(config.get("interpolation", "bilinear"))
        if config["resize"] and scale is not None and self.task == MASKS:
            steps.append(v2.RandomResizedCrop(size, scale, ratio, interpolation, antialias=True))
        elif config["resize"]:
            steps.append(v2.Resize(size, interpolation, antialias=True))
        steps += [v2.RandomHorizontalFlip(hflip)] if hflip else []
        steps += [v2.RandomVerticalFlip(vflip)] if vflip else []
        self.geometry = v2.Compose(steps) if steps else None
        self.scaling = v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)
        self.normalise = v2.Normalize(list(config["mean"]), list(config["std"])) if config.get("mean") else None
        self.mode = "L" if config["input_size"][0] == 1 else "RGB"

    def __call__(self, picture: Image.Image, target: Any) -> tuple[Tensor, Any]:
        """Return the input (C, H, W) of the network and the target: masks (H, W), boxes, or an image (C, H, W)."""
        image = v2.functional.to_image(picture)
        wrapped: Any = target
        if self.task == MASKS:
            wrapped = tv_tensors.Mask(target)
        elif self.task == BOXES:
            boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=tuple(image.shape[1:]))
            wrapped = {**target, "boxes": boxes}
        elif self.task == IMAGES:
            wrapped = v2.functional.to_image(convert_mode(target, self.mode))
        if self.geometry is not None:
            image, wrapped = self.geometry(image, wrapped)
        image, wrapped = self.scaling(image, wrapped)
        if self.normalise is not None:
            image = self.normalise(image)
        return image.as_subclass(Tensor), _plain(wrapped)


def _plain(value: Any) -> Any:
    """Return tensors of torchvision's classes as plain tensors."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return value.as_subclass(Tensor) if isinstance(value, Tensor) else value
