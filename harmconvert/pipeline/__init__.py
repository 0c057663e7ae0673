"""The flows that commands and Python users call: convert, verify, save, inspect, fine-tune.

What belongs here: one public function for each flow, which returns its result as a dataclass. Parsing of arguments and
printing belong to `cli`; the steps of a flow belong to the folders that this one imports.
"""

from .benchmark import benchmark
from .convert import RECORD_KEY, Conversion, LayerRecord, convert
from .convert_to_file import ConvertedFile, Rounding, convert_to_file
from .demo import Demo, Step, demo
from .evaluate import Evaluated, evaluate
from .export import ExportedFile, export
from .finetune import finetune
from .finetuning import (
    CutNetwork,
    FineTuning,
    Stage,
    TrainingSetup,
    check_classes,
    evaluator,
    new_classifier,
    recorded_stages,
    run_finetuning,
    train_loading,
)
from .inspect import LAMBDAS, Inspection, inspect
from .listener import Listener, TrainingProgress
from .precision import in_fewer_bits
from .saving import save
from .train import Trained, train
from .verification import Verification
from .verify import verify

__all__ = [
    "LAMBDAS",
    "RECORD_KEY",
    "Conversion",
    "ConvertedFile",
    "CutNetwork",
    "Demo",
    "Evaluated",
    "ExportedFile",
    "FineTuning",
    "Inspection",
    "LayerRecord",
    "Listener",
    "Rounding",
    "Stage",
    "Step",
    "Trained",
    "TrainingProgress",
    "TrainingSetup",
    "Verification",
    "benchmark",
    "check_classes",
    "convert",
    "convert_to_file",
    "demo",
    "evaluate",
    "evaluator",
    "export",
    "finetune",
    "in_fewer_bits",
    "inspect",
    "new_classifier",
    "recorded_stages",
    "run_finetuning",
    "save",
    "train",
    "train_loading",
    "verify",
]
