"""The small network that most of the version 1 checkpoints in this folder were converted from."""

from __future__ import annotations

from torch import nn


def make() -> nn.Module:
    """Return a classifier of MNIST digits (1x28x28) with 3x3, depthwise 5x5 and 1x1 convolutions."""
    network = nn.Sequential()
    network.add_module("stem", nn.Conv2d(1, 8, 3, stride=2, padding=1))
    network.add_module("stem_norm", nn.BatchNorm2d(8))
    network.add_module("relu1", nn.ReLU())
    network.add_module("depthwise", nn.Conv2d(8, 8, 5, padding=2, groups=8))
    network.add_module("pointwise", nn.Conv2d(8, 12, 1))
    network.add_module("norm", nn.BatchNorm2d(12))
    network.add_module("relu2", nn.ReLU())
    network.add_module("last", nn.Conv2d(12, 16, 3, stride=2, padding=1))
    network.add_module("relu3", nn.ReLU())
    network.add_module("pool", nn.AdaptiveAvgPool2d(1))
    network.add_module("flatten", nn.Flatten())
    network.add_module("head", nn.Linear(16, 10))
    network.pretrained_cfg = {"input_size": (1, 28, 28), "mean": (0.13,), "std": (0.31,)}  # type: ignore[assignment]
    return network
