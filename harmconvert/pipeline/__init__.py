"""The flows that commands and Python users call: convert, verify, save, inspect, fine-tune.

What belongs here: one public function for each flow, which returns its result as a dataclass. Parsing of arguments and
printing belong to `cli`; what a flow is made of belongs to the folders before this one."""

from .convert import RECORD_KEY, Conversion, LayerRecord, convert
from .finetuning import (
    FineTuning,
    Setting,
    Stage,
    check_classes,
    evaluator,
    finetune,
    new_classifier,
    recorded_stages,
    train_loading,
)
from .inspect import LAMBDAS, Inspection, inspect
from .precision import in_fewer_bits
from .saving import save
from .verification import Verification
from .verify import verify

__all__ = [
    "LAMBDAS",
    "RECORD_KEY",
    "Conversion",
    "FineTuning",
    "Inspection",
    "LayerRecord",
    "Setting",
    "Stage",
    "Verification",
    "check_classes",
    "convert",
    "evaluator",
    "finetune",
    "in_fewer_bits",
    "inspect",
    "new_classifier",
    "recorded_stages",
    "save",
    "train_loading",
    "verify",
]
