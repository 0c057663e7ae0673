"""Training and evaluation: recipe, loop, state to resume from, distillation, evaluation by a metric.

What belongs here: training and evaluation of any network. What does not: the stages of fine-tuning a converted network
(`pipeline`).
"""

from .evaluation import Evaluation, evaluate
from .harmonize import harmonize
from .interrupts import SignalError, StopRequest
from .loop import Callbacks, StepProgress, train
from .losses import LOSSES, Loss, distillation, loss_of, output_distillation
from .metrics import TensorBoardEvents, write_metrics
from .recipe import RECIPES, Recipe, recipe_named
from .state import Position, StateFile, read_identity, read_record
from .trainer import MachineSettings, Trainer, autocast, number_of_classes

__all__ = [
    "LOSSES",
    "RECIPES",
    "Callbacks",
    "Evaluation",
    "Loss",
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
    "loss_of",
    "number_of_classes",
    "output_distillation",
    "read_identity",
    "read_record",
    "recipe_named",
    "train",
    "write_metrics",
]
