"""Networks of the paper, registered with timm when this package is imported."""

from .wide_resnet import WideResNet

__all__ = ["WideResNet"]
