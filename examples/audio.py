"""Audio: a network of 1-d convolutions tells rising, falling and steady tones apart.

python examples/audio.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import harmconvert as hc

CLASSES, LENGTH = ("falling", "rising", "steady"), 1024


def sound(kind: str, generator: np.random.Generator) -> np.ndarray:
    """Return a noisy tone (1, LENGTH), float32, with a rising, falling or steady frequency."""
    start, change = generator.uniform(0.12, 0.2), generator.uniform(0.05, 0.1)
    times = np.arange(LENGTH)
    bend = {"falling": -1, "rising": 1, "steady": 0}[kind] * change
    phase = 2 * np.pi * (start * times + 0.5 * bend * times**2 / LENGTH) + generator.uniform(0, 6)
    return (np.sin(phase) + generator.normal(0, 0.3, LENGTH)).astype(np.float32)[None]


def write_folder(folder: Path, count: int, seed: int) -> Path:
    """Write one .npy file for each sound, in a folder for each class; .wav files work, too."""
    generator = np.random.default_rng(seed)
    for kind in CLASSES:
        (folder / kind).mkdir(parents=True)
        for number in range(count):
            np.save(folder / kind / f"{number:03}.npy", sound(kind, generator))
    return folder


def batches_of(folder: Path) -> list[tuple[Tensor, Tensor]]:
    files = sorted(folder.glob("*/*.npy"))
    order = np.random.default_rng(0).permutation(len(files))
    sounds = torch.stack([torch.from_numpy(np.load(files[one])) for one in order])
    labels = torch.tensor([CLASSES.index(files[one].parent.name) for one in order])
    return [*zip(sounds.split(32), labels.split(32), strict=True)]


def trained_network(batches: list[tuple[Tensor, Tensor]]) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels, out in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv1d(channels, out, 9, stride=4, padding=4), nn.BatchNorm1d(out), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, len(CLASSES)))
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    for _ in range(15):
        for sounds, labels in batches:
            functional.cross_entropy(network(sounds), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    return network.eval()


def main(folder: Path) -> None:
    train, test = write_folder(folder / "train", 160, seed=0), write_folder(folder / "test", 50, seed=1)
    batches, tested = batches_of(train), batches_of(test)
    network = trained_network(batches)

    conversion = hc.convert(network, {"3": 5, "6": 5}, bits=4, calibration=[sounds for sounds, _ in batches])
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
