"""Images for a network, from folders, timm's data sets or the samples, pre-processed as the network expects them.

What belongs here: opening, pre-processing and batching, with the same result for any number of workers. What does not:
the use of the batches (`calibration`, `training`).
"""

from .calibration import Images, calibration_images
from .datasets import Data, DataRequest, Some, Stream, open_data
from .loading import NO_LABEL, Batch, Batches, Loading, evaluation_batches, some_images, training_batches
from .pictures import Pictures, in_mode
from .preprocessing import (
    Transform,
    check_known,
    color_mode,
    described,
    evaluation_transform,
    padded_crop_transform,
    preprocessing,
    record_of,
    training_transform,
)
from .variety import Variety, remark_on

__all__ = [
    "NO_LABEL",
    "Batch",
    "Batches",
    "Data",
    "DataRequest",
    "Images",
    "Loading",
    "Pictures",
    "Some",
    "Stream",
    "Transform",
    "Variety",
    "calibration_images",
    "check_known",
    "color_mode",
    "described",
    "evaluation_batches",
    "evaluation_transform",
    "in_mode",
    "open_data",
    "padded_crop_transform",
    "preprocessing",
    "record_of",
    "remark_on",
    "some_images",
    "training_batches",
    "training_transform",
]
