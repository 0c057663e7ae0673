"""The paper's ResNets for ImageNet without max pooling (Table 2): timm's ResNet whose 7x7 stem has a stride of 4."""

from __future__ import annotations

from typing import Any, cast

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

# Trained at 224 and tested on the central 224 of 256, with torchvision's normalisation (sec. 4).
_CFG = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.875,
    "interpolation": "bilinear",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "first_conv": "conv1",
    "classifier": "fc",
}
default_cfgs = generate_default_cfgs({f"resnet{depth}_nomaxpool": _CFG for depth in (50, 101, 152)})


class NoMaxPoolResNet(ResNet):
    """timm's ResNet without max pooling: the stem has a stride of 4, or, with ``pool="avg"``, average pooling follows.

    Raises:
        ValueError: ``pool`` is neither None nor "avg", or the stem is not a single convolution.
    """

    def __init__(self, *args: Any, pool: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if pool not in (None, "avg"):
            raise ValueError(f"pool (={pool!r}) must be None or 'avg'")
        if not isinstance(self.conv1, nn.Conv2d):
            raise ValueError("a stem of several convolutions cannot have a stride of 4: leave stem_type out")
        self.maxpool: nn.Module = nn.AvgPool2d(3, stride=2, padding=1) if pool == "avg" else nn.Identity()
        if pool is None:
            self.conv1.stride = (4, 4)
            self.feature_info[0]["reduction"] = 4


def _no_max_pool(depth: int, layers: tuple[int, ...], pretrained: bool, **kwargs: Any) -> NoMaxPoolResNet:
    if pretrained:
        raise RuntimeError(f"no pretrained weights are published for resnet{depth}_nomaxpool")
    model = build_model_with_cfg(
        NoMaxPoolResNet, f"resnet{depth}_nomaxpool", False, block=Bottleneck, layers=layers, **kwargs
    )
    return cast(NoMaxPoolResNet, model)


@register_model
def resnet50_nomaxpool(pretrained: bool = False, **kwargs: Any) -> NoMaxPoolResNet:
    """Build ResNet-50 (no maxpool), 25.6M parameters."""
    return _no_max_pool(50, (3, 4, 6, 3), pretrained, **kwargs)


@register_model
def resnet101_nomaxpool(pretrained: bool = False, **kwargs: Any) -> NoMaxPoolResNet:
    """Build ResNet-101 (no maxpool), 44.5M parameters."""
    return _no_max_pool(101, (3, 4, 23, 3), pretrained, **kwargs)


@register_model
def resnet152_nomaxpool(pretrained: bool = False, **kwargs: Any) -> NoMaxPoolResNet:
    """Build ResNet-152 (no maxpool), 60.2M parameters."""
    return _no_max_pool(152, (3, 8, 36, 3), pretrained, **kwargs)
