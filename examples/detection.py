"""Detection: torchvision's SSD with a small backbone on drawn squares.

python examples/detection.py
"""

from __future__ import annotations

import json
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD, SSDHead

import harmconvert as hc

CLASSES, SIZE = 2, 96  # background, squares


class Features(nn.Module):
    """Returns maps of an eighth and a sixteenth of the image's size."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, out in ((3, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(channels, out, 3, stride=2, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
        self.eighth = nn.Sequential(*layers, nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())
        self.sixteenth = nn.Sequential(nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        eighth = self.eighth(x)
        return OrderedDict({"eighth": eighth, "sixteenth": self.sixteenth(eighth)})


def write_folder(folder: Path, count: int, seed: int) -> Path:
    """Write images/ and annotations.json in COCO's format: this is how harmconvert recognises detection."""
    generator = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    images: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    for number in range(count):
        image = generator.integers(0, 90, (SIZE, SIZE, 3)).astype(np.uint8)
        side = int(generator.integers(20, 44))
        x, y = map(int, generator.integers(0, SIZE - side, 2))
        image[y : y + side, x : x + side] = (230, 140, 60)
        Image.fromarray(image).save(folder / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": SIZE, "height": SIZE})
        boxes.append({"id": number + 1, "image_id": number, "category_id": 1, "bbox": [x, y, side, side],
                      "area": side * side, "iscrowd": 0})  # fmt: skip
    known = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "square"}]}
    (folder / "annotations.json").write_text(json.dumps(known))
    return folder


def samples_of(folder: Path) -> list[tuple[list[Tensor], list[dict[str, Tensor]]]]:
    """Return batches of images and of their boxes, as torchvision's detectors take them."""
    samples = []
    for box in json.loads((folder / "annotations.json").read_text())["annotations"]:
        pixels = np.array(Image.open(folder / "images" / f"{box['image_id']}.png"))
        x, y, width, height = box["bbox"]
        target = {"boxes": torch.tensor([[x, y, x + width, y + height]]).float(), "labels": torch.tensor([1])}
        samples.append((torch.from_numpy(pixels).permute(2, 0, 1) / 255, target))
    parts = [samples[start : start + 8] for start in range(0, len(samples), 8)]
    return [([image for image, _ in part], [target for _, target in part]) for part in parts]


def trained_network(batches: list[tuple[list[Tensor], list[dict[str, Tensor]]]]) -> nn.Module:
    torch.manual_seed(0)
    boxes = DefaultBoxGenerator([[], []], scales=[0.25, 0.4, 0.6])
    network = SSD(Features(), boxes, (SIZE, SIZE), CLASSES, head=SSDHead([64, 64], boxes.num_anchors_per_location(), 2))
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    for _ in range(25):
        for images, targets in batches:
            torch.stack([*network(images, targets).values()]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return network.eval()


def main(folder: Path) -> None:
    train, test = write_folder(folder / "train", 64, seed=0), write_folder(folder / "test", 16, seed=1)
    batches, tested = samples_of(train), samples_of(test)
    network = trained_network(batches)

    conversion = hc.convert(network, 2, bits=6, calibration=[images for images, _ in batches])
    hc.save(conversion, folder / "small.safetensors")
    tuned = hc.finetune(conversion, train, metric="map", epochs=1, teacher=network)
    for name, model in {"network": network, "small": conversion.model, "fine-tuned": tuned.model}.items():
        print(f"{name}: {hc.evaluate(model, tested, metric='map')}")
    hc.export(tuned.model, folder / "dense.safetensors")  # for torchvision: a plain state dict
    network.load_state_dict(hc.fuse(tuned.model).state_dict())
    before = sum(4 * parameter.numel() for parameter in network.parameters())
    print(f"{before:,} bytes of weights, {(folder / 'small.safetensors').stat().st_size:,} bytes in the coded file")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
