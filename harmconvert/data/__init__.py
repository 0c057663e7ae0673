"""Inputs and targets for a network, from folders, files, timm's data sets or the samples, pre-processed as it expects.

What belongs here: opening, pre-processing and batching, with the same result for any number of workers. What does not:
the use of the batches (`calibration`, `training`).
"""

from .calibration import CalibrationImages, calibration_images
from .datasets import Data, DataRequest, Stream, Subset, open_data, user_loader
from .joint import JointTransform
from .loading import (
    NO_LABEL,
    Batch,
    Batches,
    BatchLoader,
    choose_inputs,
    evaluation_batches,
    input_batches,
    training_batches,
)
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
    sample_transform,
    task_preprocessing,
    training_transform,
)
from .recognising import recognised
from .tensor_files import tensor_in
from .variety import Variety, uniform_output_warning

__all__ = [
    "NO_LABEL",
    "Batch",
    "BatchLoader",
    "Batches",
    "CalibrationImages",
    "Data",
    "DataRequest",
    "JointTransform",
    "Pictures",
    "Stream",
    "Subset",
    "Transform",
    "Variety",
    "calibration_images",
    "check_preprocessing",
    "choose_inputs",
    "color_mode",
    "convert_mode",
    "describe_preprocessing",
    "evaluation_batches",
    "evaluation_transform",
    "input_batches",
    "open_data",
    "padded_crop_transform",
    "preprocessing",
    "preprocessing_record",
    "recognised",
    "sample_transform",
    "task_preprocessing",
    "tensor_in",
    "training_batches",
    "training_transform",
    "uniform_output_warning",
    "user_loader",
]
