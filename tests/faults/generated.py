"""Small random networks: every class of convolution, in every position that networks have.

A random network runs on its input and has a convolution that can be converted; others are tested separately.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from hypothesis import strategies as st
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NAMES = (
    "conv", "a b", "é漢字", "[x]*?", "weight", "bias", "coefficients", "basis", "<script>alert(1)</script>", "n" * 500,
    "\x1b[31mred\x1b[0m", "two\nlines", "nul\0", "__metadata__", "/etc/passwd", "\u202eleft", "%s{0}", "0", "'\"\\",
)  # fmt: skip
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
# Settings with which the map has the size of the output of a padded 3x3 convolution with the same stride.
PAIRABLE = (
    "plain", "strided, no bias", "dilated", "grouped", "same", "reflect", "replicate", "StdConv2d", "ScaledStdConv2d",
    "StdConv2dSame", "masked", "max norm", "weight norm", "spectral norm",
)  # fmt: skip
SIZES = {1: (40,), 2: (16, 14), 3: (6, 7, 6)}


class Masked(nn.Conv2d):
    """A user-defined class whose forward method reads the weight twice."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.register_buffer("mask", (torch.rand(self.weight.shape) > 0.2).float())

    def forward(self, input: Tensor) -> Tensor:
        kernel = self.weight * self.mask.to(self.weight.dtype) + 0.1 * self.weight
        return functional.conv2d(input, kernel, self.bias, self.stride, self.padding, self.dilation, self.groups)


class MaxNorm(nn.Conv2d):
    """A convolution that limits the norm of its weight in place in each forward pass, as in EEGNet."""

    def forward(self, input: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 5.0)
        return super().forward(input)


Maker = Callable[[int, int, int], nn.Module]
# Name -> (dimensions, function of dimensions, in_channels, out_channels); channels are even, maps stay 4 or larger.
MAKERS: dict[str, tuple[tuple[int, ...], Maker]] = {
    "plain": ((1, 2, 3), lambda d, i, o: CONVS[d](i, o, 3, padding=1)),
    "strided, no bias": ((1, 2, 3), lambda d, i, o: CONVS[d](i, o, 3, stride=2, padding=1, bias=False)),
    "dilated": ((1, 2, 3), lambda d, i, o: CONVS[d](i, o, 3, dilation=2, padding=2)),
    "grouped": ((1, 2, 3), lambda d, i, o: CONVS[d](i, o, 3, padding=1, groups=2)),
    "depthwise": ((1, 2, 3), lambda d, i, o: CONVS[d](i, 2 * i, 5, padding=2, groups=i)),
    "same": ((1, 2, 3), lambda d, i, o: CONVS[d](i, o, 5, padding="same")),
    "1x1": ((1, 2, 3), lambda d, i, o: CONVS[d](i, o, 1)),
    "2x2": ((1, 2, 3), lambda d, i, o: CONVS[d](i, o, 2, padding=1)),
    "reflect": ((1, 2), lambda d, i, o: CONVS[d](i, o, 3, padding=1, padding_mode="reflect")),
    "replicate": ((1, 2, 3), lambda d, i, o: CONVS[d](i, o, 3, padding=1, padding_mode="replicate")),
    "circular": ((1, 2, 3), lambda d, i, o: CONVS[d](i, o, 3, padding=2, padding_mode="circular")),
    "transposed": ((1, 2, 3), lambda d, i, o: TRANSPOSED[d](i, o, 3, stride=2, output_padding=1, groups=2)),
    "64": ((1,), lambda d, i, o: nn.Conv1d(i, o, 64, padding=32)),
    "1x7": ((2,), lambda d, i, o: nn.Conv2d(i, o, (1, 7), padding=(0, 3))),
    "16x16": ((2,), lambda d, i, o: nn.Conv2d(i, o, 16, padding=8)),
    "Conv2dSame": ((2,), lambda d, i, o: Conv2dSame(i, o, 3, stride=2)),
    "StdConv2d": ((2,), lambda d, i, o: StdConv2d(i, o, 3, padding=1)),
    "StdConv2dSame": ((2,), lambda d, i, o: StdConv2dSame(i, o, 3, stride=2)),
    "ScaledStdConv2d": ((2,), lambda d, i, o: ScaledStdConv2d(i, o, 3, padding=1)),
    "ScaledStdConv2dSame": ((2,), lambda d, i, o: ScaledStdConv2dSame(i, o, 5)),
    "masked": ((2,), lambda d, i, o: Masked(i, o, 3, padding=1)),
    "max norm": ((2,), lambda d, i, o: MaxNorm(i, o, 3, padding=1)),
    "weight norm": ((1, 2, 3), lambda d, i, o: weight_norm(CONVS[d](i, o, 3, padding=1))),
    "spectral norm": ((1, 2, 3), lambda d, i, o: spectral_norm(CONVS[d](i, o, 3, padding=1))),
}  # fmt: skip


class Block(nn.Module):
    """A way to use convolutions: one, one used twice, the sum of two, or the concatenation of two."""

    def __init__(self, kind: str, holder: str, names: list[str], convs: list[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.kind, self.norm = kind, norm
        self.order = list(range(len(convs)))
        if holder == "list":
            self.held: Any = nn.ModuleList(convs)
        elif holder == "dict":
            self.held = nn.ModuleDict(dict(zip(names, convs, strict=True)))
        else:
            self.held = nn.Module()
            for name, conv in zip(names, convs, strict=True):
                self.held.add_module(name, conv)

    def forward(self, x: Tensor) -> Tensor:
        first = next(p for p in self.parameters() if p.is_floating_point())
        x = x.to(first.dtype)  # a network may have mixed dtypes
        one, *others = self.held._modules.values()
        if self.kind == "twice":
            x = one(one(x).relu())
        elif self.kind == "sum" or self.kind == "tied":
            x = one(x) + others[0](x)
        elif self.kind == "cat":
            x = torch.cat([one(x), others[0](x)], 1)
        else:
            x = one(x)
        return self.norm(x).relu()


class Head(nn.Module):
    """A classifier: the mean over the map, and a linear layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(2).mean(2).to(self.linear.weight.dtype))


@dataclass(frozen=True)
class Case:
    """A network, an input for it, the coarsest dtype of its weights, and its name."""

    network: nn.Module
    x: Tensor
    dtype: torch.dtype
    label: str


def case(seed: int) -> Case:
    """Return the network of a seed and its input."""
    rng = random.Random(seed)
    torch.manual_seed(rng.getrandbits(32))
    dimensions = rng.choice((2, 2, 2, 1, 3))
    kinds = [name for name, (which, _) in MAKERS.items() if dimensions in which]
    x = torch.randn(2, 4, *SIZES[dimensions])
    blocks: list[nn.Module] = []
    labels = []
    h = x
    for number in range(rng.randint(1, 4)):
        # The first convolution can be converted, so that each network has at least one.
        usable = [kind for kind in kinds if number or kind not in ("1x1", "weight norm", "spectral norm")]
        block, label = _block(rng, dimensions, h.shape[1], usable)
        blocks.append(block.eval())
        labels.append(label)
        with torch.no_grad():
            h = block(h)
        if min(h.shape[2:]) < 5 or h.shape[1] > 64:
            break
    if rng.random() < 0.5:
        blocks.append(Head(h.shape[1]))
    if len(blocks) == 1 and labels[0].startswith("one:") and rng.random() < 0.5:
        network = next(iter(cast(Any, blocks[0]).held._modules.values()))  # the network is a single convolution
        labels.append("root")
        blocks = [network]
    else:
        network = _together(rng, blocks)
    dtype, how = _finished(rng, network, blocks)
    x = x.to(torch.float32 if how == "mixed" and network is not blocks[0] else dtype)
    return Case(network, x, dtype, f"{', '.join(labels)} ({how}, seed {seed})")


# A seed, because hypothesis would vary only a small part of a network.
cases = st.integers(0, 2**32 - 1).map(case)


def _block(rng: random.Random, dimensions: int, channels: int, kinds: list[str]) -> tuple[Block, str]:
    how = rng.choice(("one", "one", "one", "twice", "sum", "tied", "cat"))
    out = rng.choice((4, 6, 8))
    name = rng.choice(kinds)
    if how in ("twice", "tied"):  # both convolutions have one shape
        name, out = "plain", channels
    if how in ("sum", "cat") and name not in PAIRABLE:
        name = "plain"
    convs: list[Any] = [MAKERS[name][1](dimensions, channels, out)]
    if how in ("sum", "cat"):
        convs.append(CONVS[dimensions](channels, out, 3, stride=convs[0].stride, padding=1))
    elif how == "tied":
        convs.append(CONVS[dimensions](channels, out, 3, padding=2, dilation=2))
        convs[1].weight = convs[0].weight
    total = convs[0].out_channels * (2 if how == "cat" else 1)
    norm: nn.Module = nn.Identity()
    if rng.random() < 0.5:
        norm = NORMS[dimensions](total)
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    names = rng.sample(NAMES, len(convs))
    return Block(how, rng.choice(("module", "list", "dict")), names, convs, norm), f"{how}: {name}"


def _together(rng: random.Random, blocks: list[nn.Module]) -> nn.Module:
    """Return blocks in sequence, with unusual names, nested to a random depth, with buffers of all kinds."""
    network: nn.Module = nn.Sequential()
    for name, block in zip(rng.sample(NAMES, len(blocks)), blocks, strict=True):
        network.add_module(name, block)
    for _ in range(rng.choice((0, 0, 1, 20))):
        network = nn.Sequential(network)
    buffers = {
        "integers": torch.arange(3), "flag": torch.tensor(True), "complex": torch.randn(3, dtype=torch.complex64),
        "expanded": torch.randn(1).expand(4), "masked": torch.tensor([0.0, -torch.inf]), "empty": torch.zeros(0),
        "transposed": torch.randn(3, 2).T, "bytes": torch.zeros(2, dtype=torch.uint8),
    }  # fmt: skip
    for name in rng.sample(sorted(buffers), rng.randint(0, 3)):
        network.register_buffer(name, buffers[name], persistent=rng.random() < 0.7)
    return network


def _finished(rng: random.Random, network: nn.Module, blocks: list[nn.Module]) -> tuple[torch.dtype, str]:
    """Set dtypes, frozen parameters and training flags; return the coarsest dtype and a description."""
    how = rng.choice(("float32", "float32", "float64", "float16", "bfloat16", "mixed"))
    for block in blocks:
        _cast(block, rng.choice(DTYPES) if how == "mixed" else getattr(torch, how))
    if how != "mixed":
        _cast(network, getattr(torch, how))
    for parameter in network.parameters() if rng.random() < 0.5 else ():
        parameter.requires_grad_(rng.random() < 0.5)
    network.train(rng.random() < 0.5)
    for module in network.modules() if rng.random() < 0.5 else ():
        module.training = rng.random() < 0.5
    found = [parameter.dtype for parameter in network.parameters()]
    return max(found, key=lambda dtype: torch.finfo(dtype).eps), how


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    module._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
