"""Networks of the paper, registered with timm when this package is imported."""

from .resnet import NoMaxPoolResNet
from .wide_resnet import WideResNet

__all__ = ["NoMaxPoolResNet", "WideResNet"]
