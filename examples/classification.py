"""Classification: a network of timm on handwritten digits.

python examples/classification.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import timm
import torch
from torch.nn import functional

import harmconvert as hc
from harmconvert.samples import mnist5k, mnist5k_held_back_pixels


def trained_network(images: torch.Tensor, labels: torch.Tensor) -> torch.nn.Module:
    """Train for two epochs; in practice, take pretrained weights."""
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    for _ in range(2):
        for batch in torch.randperm(len(images)).split(64):
            functional.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return network.eval()


def main(folder: Path) -> None:
    (images, labels), (test, answers) = mnist5k(), mnist5k_held_back_pixels()
    images, test = images[:, None] / 255, test[:, None] / 255
    network = trained_network(images, labels)
    batches = [*images[:256].split(32)]

    conversion = hc.convert(network, 2, bits=4, calibration=batches)
    hc.save(conversion, folder / "small.safetensors")
    digits = {"input_size": (1, 28, 28), "preprocess": "none"}
    tuned = hc.finetune(conversion, "sample:mnist5k", preprocessing=digits, epochs=1, crop="none", teacher=network)
    for name, model in {"network": network, "small": conversion.model, "fine-tuned": tuned.model}.items():
        print(f"{name}: {hc.evaluate(model, [(test, answers)])}")
    exported = hc.export(tuned.model, folder / "small.onnx", "onnx", example_input=test[:1])
    print(f"ONNX Runtime: outputs differ by {exported.check.difference:.1e} of the largest")
    before = sum(4 * parameter.numel() for parameter in network.parameters())
    print(f"{before:,} bytes of weights, {(folder / 'small.safetensors').stat().st_size:,} bytes in the coded file")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
