"""Wide residual networks for small images (Zagoruyko and Komodakis), the baseline of the paper's Table 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, cast

from timm.models import register_model
from torch import Tensor, nn


class PreActivationBlock(nn.Module):
    """A residual block: BN, ReLU, 3x3, BN, ReLU, (dropout,) 3x3, added to the input or to its 1x1 projection."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = (
            nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            if stride != 1 or in_channels != out_channels
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        activated = self.norm1(x).relu()
        residual = self.conv2(self.dropout(self.norm2(self.conv1(activated)).relu()))
        return cast(Tensor, residual + (x if self.shortcut is None else self.shortcut(activated)))


class WideResNet(nn.Module):
    """WRN-depth-width: three stages at full, half and quarter size, (depth - 4) / 6 blocks each.

    Input (N, in_chans, H, W), output (N, num_classes). ``drop_rate`` is the rate of the dropout between the two
    convolutions of a block (0.3 in Table 1). ``img_size``, ``mean`` and ``std`` describe the images for this network.

    Raises:
        ValueError: ``depth`` is not 6 n + 4.
    """

    def __init__(
        self,
        depth: int = 28,
        width: int = 10,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        img_size: int = 32,
        architecture: str = "",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth (={depth}) must be 6 n + 4, such as 16, 22 or 28")
        self.num_classes, self.in_chans, self.num_features = num_classes, in_chans, 64 * width
        self.pretrained_cfg = {
            "architecture": architecture,
            "input_size": (in_chans, img_size, img_size),
            "num_classes": num_classes,
            "mean": tuple(mean or (0.5,) * in_chans),
            "std": tuple(std or (0.5,) * in_chans),
            "crop_pct": 1.0,
            "fixed_input_size": False,
            "first_conv": "stem",
            "classifier": "head",
        }
        self.stem = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        blocks = (depth - 4) // 6
        self.stage1 = _stage(16, 16 * width, 1, blocks, drop_rate)
        self.stage2 = _stage(16 * width, 32 * width, 2, blocks, drop_rate)
        self.stage3 = _stage(32 * width, 64 * width, 2, blocks, drop_rate)
        self.norm = nn.BatchNorm2d(64 * width)
        self.head = nn.Linear(64 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.head.bias)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by an untrained one for ``num_classes`` classes (the method's name is timm's)."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes).to(self.head.weight.device)

    def norms_reading_the_stem(self) -> list[nn.BatchNorm2d]:
        """Return all batch norms whose input contains the stem's output as a summand.

        A constant added to the stem's output has the same effect as the same constant subtracted from their running
        means.
        """
        stage1 = cast("list[PreActivationBlock]", list(self.stage1))
        if stage1[0].shortcut is not None:
            return [stage1[0].norm1]
        # At width 1, identity shortcuts pass the stem's output on to the first projection.
        return [block.norm1 for block in (*stage1, cast(PreActivationBlock, self.stage2[0]))]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        return cast(Tensor, self.head(self.norm(x).relu().mean((2, 3))))


def _stage(in_channels: int, out_channels: int, stride: int, blocks: int, dropout: float) -> nn.Sequential:
    first = PreActivationBlock(in_channels, out_channels, stride, dropout)
    rest = [PreActivationBlock(out_channels, out_channels, 1, dropout) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


def _wide_resnet(pretrained: bool, **kwargs: Any) -> WideResNet:
    if pretrained:
        raise RuntimeError("no pretrained weights are published for wide residual networks of this size")
    # timm's factory also passes arguments of its own (pretrained_cfg, cache_dir and others). In older releases of timm,
    # the number of classes of a folder is only in pretrained_cfg.
    declared = kwargs.get("pretrained_cfg")
    classes = declared.get("num_classes") if isinstance(declared, Mapping) else getattr(declared, "num_classes", None)
    if classes is not None:
        kwargs.setdefault("num_classes", classes)
    own = {key: value for key, value in kwargs.items() if key in signature(WideResNet).parameters and value is not None}
    return WideResNet(**own)


@register_model
def wrn(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """Build a WRN of any size; the defaults are depth=28 and width=10."""
    return _wide_resnet(pretrained, architecture="wrn", **kwargs)


@register_model
def wrn28_10(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """Build WRN-28-10, 36.5M parameters with 10 classes."""
    return _wide_resnet(pretrained, depth=28, width=10, architecture="wrn28_10", **kwargs)


@register_model
def wrn28_8(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """Build WRN-28-8, 23.4M parameters with 10 classes."""
    return _wide_resnet(pretrained, depth=28, width=8, architecture="wrn28_8", **kwargs)


@register_model
def wrn28_6(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """Build WRN-28-6, 13.1M parameters with 10 classes."""
    return _wide_resnet(pretrained, depth=28, width=6, architecture="wrn28_6", **kwargs)


@register_model
def wrn16_8(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """Build WRN-16-8, 11.0M parameters with 10 classes."""
    return _wide_resnet(pretrained, depth=16, width=8, architecture="wrn16_8", **kwargs)


@register_model
def wrn16_4(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """Build WRN-16-4, 2.7M parameters with 10 classes."""
    return _wide_resnet(pretrained, depth=16, width=4, architecture="wrn16_4", **kwargs)


@register_model
def wrn22_1(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """Build WRN-22-1, 0.27M parameters; the sample network in this package has this size."""
    return _wide_resnet(pretrained, depth=22, width=1, architecture="wrn22_1", **kwargs)
