"""Segmentation: torchvision's FCN with the first half of ResNet-18 on drawn shapes.

python examples/segmentation.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.segmentation.fcn import FCN, FCNHead

import harmconvert as hc

CLASSES, SIZE = 3, 64  # background, discs, squares


def drawing(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return an image (H, W, 3) and its mask (H, W), uint8."""
    image = generator.integers(0, 90, (SIZE, SIZE, 3)).astype(np.uint8)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    for label in (1, 2):
        y, x, radius = *generator.integers(12, SIZE - 12, 2), generator.integers(8, 14)
        distance = np.maximum(abs(rows - y), abs(columns - x)) if label == 2 else np.hypot(rows - y, columns - x)
        mask[distance < radius] = label
        image[distance < radius] = (220, 120, 60) if label == 1 else (80, 160, 230)
    return image, mask


def write_folder(folder: Path, count: int, seed: int) -> Path:
    """Write images/ and masks/ with the same names: this is how harmconvert recognises segmentation."""
    generator = np.random.default_rng(seed)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for number in range(count):
        image, mask = drawing(generator)
        Image.fromarray(image).save(folder / "images" / f"{number:03}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number:03}.png")
    return folder


def batches_of(folder: Path) -> list[tuple[Tensor, Tensor]]:
    """Return (images, masks) batches with values from 0 to 1."""
    names = sorted(path.name for path in (folder / "images").iterdir())
    images = torch.stack([torch.from_numpy(np.array(Image.open(folder / "images" / name))) for name in names])
    masks = torch.stack([torch.from_numpy(np.array(Image.open(folder / "masks" / name))) for name in names])
    return [*zip((images.permute(0, 3, 1, 2) / 255).split(16), masks.long().split(16), strict=True)]


def trained_network(batches: list[tuple[Tensor, Tensor]]) -> nn.Module:
    torch.manual_seed(0)
    network = FCN(create_feature_extractor(resnet18(), {"layer2": "out"}), FCNHead(128, CLASSES))
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    for _ in range(6):
        for images, masks in batches:
            functional.cross_entropy(network(images)["out"], masks).backward()
            optimizer.step()
            optimizer.zero_grad()
    return network.eval()


def main(folder: Path) -> None:
    train, test = write_folder(folder / "train", 96, seed=0), write_folder(folder / "test", 32, seed=1)
    batches, tested = batches_of(train), batches_of(test)
    network = trained_network(batches)

    conversion = hc.convert(network, 2, bits=4, calibration=[images for images, _ in batches])
    hc.save(conversion, folder / "small.safetensors")
    drawn = {"input_size": (3, SIZE, SIZE), "preprocess": "none"}
    tuned = hc.finetune(conversion, train, preprocessing=drawn, metric="miou", epochs=2, teacher=network)
    for name, model in {"network": network, "small": conversion.model, "fine-tuned": tuned.model}.items():
        print(f"{name}: {hc.evaluate(model, tested, metric='miou')}")
    exported = hc.export(tuned.model, folder / "small.onnx", "onnx", example_input=tested[0][0][:1])
    print(f"ONNX Runtime: outputs differ by {exported.check.difference:.1e} of the largest")
    before = sum(4 * parameter.numel() for parameter in network.parameters())
    print(f"{before:,} bytes of weights, {(folder / 'small.safetensors').stat().st_size:,} bytes in the coded file")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
