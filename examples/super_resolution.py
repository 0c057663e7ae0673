"""Super-resolution: a network of 3x3 layers doubles the size of photographs.

python examples/super_resolution.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn import functional

import harmconvert as hc


class Doubling(nn.Module):
    """Adds details to an image that was enlarged by bicubic interpolation."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        convolution = nn.Conv2d(width, width, 3, padding=1)
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), convolution, nn.ReLU(),
            nn.Conv2d(width, 12, 3, padding=1), nn.PixelShuffle(2),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return functional.interpolate(x, scale_factor=2, mode="bicubic", align_corners=False) + self.body(x)


def write_folder(folder: Path, photograph: np.ndarray, count: int, seed: int) -> Path:
    """Write input/ and target/ with the same names: this is how harmconvert recognises restoration."""
    generator = np.random.default_rng(seed)
    for part in ("input", "target"):
        (folder / part).mkdir(parents=True)
    for number in range(count):
        y, x = (int(generator.integers(0, length - 64)) for length in photograph.shape[:2])
        target = Image.fromarray(photograph[y : y + 64, x : x + 64])
        target.save(folder / "target" / f"{number:03}.png")
        target.resize((32, 32), Image.Resampling.BICUBIC).save(folder / "input" / f"{number:03}.png")
    return folder


def batches_of(folder: Path) -> list[tuple[Tensor, Tensor]]:
    def images(part: str) -> Tensor:
        files = sorted((folder / part).iterdir())
        return torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files]).permute(0, 3, 1, 2) / 255

    return [*zip(images("input").split(16), images("target").split(16), strict=True)]


def trained_network(batches: list[tuple[Tensor, Tensor]]) -> nn.Module:
    torch.manual_seed(0)
    network = Doubling()
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    for _ in range(12):
        for inputs, targets in batches:
            functional.mse_loss(network(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
    return network.eval()


def main(folder: Path) -> None:
    temple, flower = load_sample_images().images
    train, test = write_folder(folder / "train", temple, 160, 0), write_folder(folder / "test", flower, 32, 1)
    batches, tested = batches_of(train), batches_of(test)
    network = trained_network(batches)

    conversion = hc.convert(network, {"body.2": 2}, bits=4, calibration=[inputs for inputs, _ in batches])
    hc.save(conversion, folder / "small.safetensors")
    tuned = hc.finetune(conversion, train, preprocessing={"preprocess": "none"}, metric="psnr", teacher=network)
    for name, model in {"network": network, "small": conversion.model, "fine-tuned": tuned.model}.items():
        print(f"{name}: {hc.evaluate(model, tested, metric='psnr')}")
    exported = hc.export(tuned.model, folder / "small.onnx", "onnx", example_input=tested[0][0][:1])
    print(f"ONNX Runtime: outputs differ by {exported.check.difference:.1e} of the largest")
    before = sum(4 * parameter.numel() for parameter in network.parameters())
    print(f"{before:,} bytes of weights, {(folder / 'small.safetensors').stat().st_size:,} bytes in the coded file")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
