"""Images for a network, from folders, timm's data sets or the samples, pre-processed as the network expects them.

What belongs here: opening, pre-processing and batching, with the same result for any number of workers. What does not:
the use of the batches (`calibration`, `training`).
"""

from .calibration import CalibrationImages, calibration_images
from .datasets import Data, DataRequest, Stream, Subset, open_data
from .loading import NO_LABEL, Batch, Batches, BatchLoader, choose_images, evaluation_batches, training_batches
from .pictures import Pictures, convert_mode
from .preprocessing import (
    Transform,
    check_preprocessing,
    color_mode,
    describe_preprocessing,
    evaluation_transform,
    padded_crop_transform,
    preprocessing,
    preprocessing_record,
    training_transform,
)
from .variety import Variety, uniform_output_warning

__all__ = [
    "NO_LABEL",
    "Batch",
    "BatchLoader",
    "Batches",
    "CalibrationImages",
    "Data",
    "DataRequest",
    "Pictures",
    "Stream",
    "Subset",
    "Transform",
    "Variety",
    "calibration_images",
    "check_preprocessing",
    "choose_images",
    "color_mode",
    "convert_mode",
    "describe_preprocessing",
    "evaluation_batches",
    "evaluation_transform",
    "open_data",
    "padded_crop_transform",
    "preprocessing",
    "preprocessing_record",
    "training_batches",
    "training_transform",
    "uniform_output_warning",
]
