"""Images for a network, from folders, timm's data sets or the samples, pre-processed as the network was trained."""

from .calibration import Images, calibration_images
from .preprocessing import preprocessing

__all__ = ["Images", "calibration_images", "preprocessing"]
