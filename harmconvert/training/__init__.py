"""Training and evaluation: recipe, loop, state to resume from, distillation, evaluation by a metric.

What belongs here: training and evaluation of any network. What does not: the stages of fine-tuning a converted network
(`pipeline`).
"""

from .evaluation import Evaluation, evaluate
from .harmonize import harmonize
from .interrupts import SignalError, StopRequest
from .loop import Callbacks, StepProgress, train
from .metrics import TensorBoardEvents, write_metrics
from .objective import distillation
from .recipe import RECIPES, Recipe, recipe_named
from .state import Position, StateFile, read_identity, read_record
from .trainer import MachineSettings, Trainer, autocast, number_of_classes

__all__ = [
    "RECIPES",
    "Callbacks",
    "Evaluation",
    "MachineSettings",
    "Position",
    "Recipe",
    "SignalError",
    "StateFile",
    "StepProgress",
    "StopRequest",
    "TensorBoardEvents",
    "Trainer",
    "autocast",
    "distillation",
    "evaluate",
    "harmonize",
    "number_of_classes",
    "read_identity",
    "read_record",
    "recipe_named",
    "train",
    "write_metrics",
]
