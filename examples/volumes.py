"""Volumes: a network of 3-d convolutions tells balls and cubes apart.

python examples/volumes.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import harmconvert as hc

CLASSES, SIZE = ("ball", "cube"), 16


def solid(kind: str, generator: np.random.Generator) -> np.ndarray:
    """Return a noisy volume (1, SIZE, SIZE, SIZE), float32, with one solid."""
    radius, centre = generator.uniform(3, 5), generator.uniform(5, SIZE - 6, 3)
    distances = abs(np.stack(np.mgrid[:SIZE, :SIZE, :SIZE]) - centre[:, None, None, None])
    inside = distances.max(0) < 0.8 * radius if kind == "cube" else np.sqrt((distances**2).sum(0)) < radius
    return (inside + generator.normal(0, 0.3, inside.shape)).astype(np.float32)[None]


def write_folder(folder: Path, count: int, seed: int) -> Path:
    """Write one .npy file for each volume, in a folder for each class."""
    generator = np.random.default_rng(seed)
    for kind in CLASSES:
        (folder / kind).mkdir(parents=True)
        for number in range(count):
            np.save(folder / kind / f"{number:03}.npy", solid(kind, generator))
    return folder


def batches_of(folder: Path) -> list[tuple[Tensor, Tensor]]:
    files = sorted(folder.glob("*/*.npy"))
    order = np.random.default_rng(0).permutation(len(files))
    volumes = torch.stack([torch.from_numpy(np.load(files[one])) for one in order])
    labels = torch.tensor([CLASSES.index(files[one].parent.name) for one in order])
    return [*zip(volumes.split(32), labels.split(32), strict=True)]


def trained_network(batches: list[tuple[Tensor, Tensor]]) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels, out, stride in ((1, 8, 1), (8, 16, 2), (16, 32, 2)):
        layers += [nn.Conv3d(channels, out, 3, stride, padding=1), nn.BatchNorm3d(out), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveMaxPool3d(1), nn.Flatten(), nn.Linear(32, len(CLASSES)))
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    for _ in range(12):
        for volumes, labels in batches:
            functional.cross_entropy(network(volumes), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    return network.eval()


def main(folder: Path) -> None:
    train, test = write_folder(folder / "train", 120, seed=0), write_folder(folder / "test", 100, seed=1)
    batches, tested = batches_of(train), batches_of(test)
    network = trained_network(batches)

    conversion = hc.convert(network, {"3": 2, "6": 2}, bits=4, calibration=[volumes for volumes, _ in batches])
    hc.save(conversion, folder / "small.safetensors")
    tuned = hc.finetune(conversion, train, loss="distillation", batch_size=16, teacher=network)
    for name, model in {"network": network, "small": conversion.model, "fine-tuned": tuned.model}.items():
        print(f"{name}: {hc.evaluate(model, tested)}")
    exported = hc.export(tuned.model, folder / "small.onnx", "onnx", example_input=tested[0][0][:1])
    print(f"ONNX Runtime: outputs differ by {exported.check.difference:.1e} of the largest")
    before = sum(4 * parameter.numel() for parameter in network.parameters())
    print(f"{before:,} bytes of weights, {(folder / 'small.safetensors').stat().st_size:,} bytes in the coded file")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
