"""Convolutions and small networks that several tests use."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD

# Name -> (function that makes it, input shape): every class of convolution, with every unusual setting.
CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (lambda: nn.Conv2d(3, 8, 3), (2, 3, 9, 9)),
    "strided, padded, no bias": (lambda: nn.Conv2d(3, 8, 3, stride=(2, 1), padding=1, bias=False), (2, 3, 9, 9)),
    "dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2), (2, 4, 9, 9)),
    "grouped": (lambda: nn.Conv2d(6, 9, 3, groups=3), (2, 6, 9, 9)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 5, padding=2, groups=6), (2, 6, 9, 9)),
    "1x7": (lambda: nn.Conv2d(3, 4, (1, 7), padding=(0, 3)), (2, 3, 9, 9)),
    "3x5": (lambda: nn.Conv2d(3, 4, (3, 5)), (2, 3, 9, 9)),
    "2x2": (lambda: nn.Conv2d(3, 4, 2, stride=2), (2, 3, 8, 8)),
    "16x16 patches": (lambda: nn.Conv2d(3, 12, 16, stride=16), (2, 3, 32, 32)),
    "reflect": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 9, 9)),
    "replicate": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="replicate"), (2, 3, 9, 9)),
    "circular": (lambda: nn.Conv2d(3, 4, 3, padding=2, padding_mode="circular"), (2, 3, 9, 9)),
    "padding='same'": (lambda: nn.Conv2d(3, 4, (3, 5), padding="same"), (2, 3, 9, 9)),
    "Conv1d": (lambda: nn.Conv1d(3, 4, 64, padding=32), (2, 3, 80)),
    "Conv3d": (lambda: nn.Conv3d(2, 4, (3, 2, 3), padding=1), (2, 2, 5, 6, 7)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 4, stride=2), (2, 4, 9)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1), (2, 4, 5, 5)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 4, 3), (1, 2, 3, 4, 3)),
    "Conv2dSame": (lambda: Conv2dSame(3, 8, 3, stride=2), (2, 3, 9, 9)),
    "StdConv2d": (lambda: StdConv2d(3, 8, 3), (2, 3, 9, 9)),
    "StdConv2dSame": (lambda: StdConv2dSame(3, 8, 3, stride=2), (2, 3, 9, 9)),
    "ScaledStdConv2d": (lambda: ScaledStdConv2d(3, 8, 3), (2, 3, 9, 9)),
    "ScaledStdConv2dSame": (lambda: ScaledStdConv2dSame(3, 8, 3, stride=2), (2, 3, 9, 9)),
}


class _Features(nn.Module):
    """The backbone of a tiny detector: one map of features, at an eighth of the size."""

    out_channels = (8,)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 8, 3, stride=4, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"0": self.second(self.first(x).relu()).relu()}


def tiny_detector() -> nn.Module:
    """Return torchvision's SSD with two small convolutions, for two classes and the background."""
    return SSD(
        _Features(), DefaultBoxGenerator([[2]], scales=[0.2, 0.5]), (64, 64), 3, score_thresh=0.3,
        detections_per_img=20, topk_candidates=20,
    )  # fmt: skip


class Branches(nn.Module):
    """A stem, a convolution used twice, two with a shared weight, a grouped one, one that never runs, unusual names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.alias = self.shared
        self.tied_a = nn.Conv2d(8, 8, 3, padding=1)
        self.tied_b = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.tied_b.weight = self.tied_a.weight
        self.deep = nn.ModuleDict({"odd name [x]": nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=4)})
        self.unused = nn.Conv2d(8, 8, 5)
        self.norm = nn.BatchNorm2d(16)
        self.point = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = self.alias(self.shared(x).relu())
        x = self.tied_a(x) + self.tied_b(x)
        return self.point(self.norm(self.deep["odd name [x]"](x))).mean((2, 3))


def seeded(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """Return a network in eval mode, with random weights from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().to(dtype).eval()


def random_input(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Return a normally distributed input from a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
