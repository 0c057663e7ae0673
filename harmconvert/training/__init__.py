"""Training and evaluation: recipe, loop, state to resume from, distillation, accuracy on labelled images.

What belongs here: training and evaluation of any network. What does not: the stages of fine-tuning a converted network
(`pipeline`).
"""

from .evaluation import Evaluation, evaluate, wilson_interval
from .harmonize import harmonize
from .interrupts import Request, SignalError
from .learner import Learner, Machine, autocast, number_of_classes
from .loop import Told, train
from .metrics import Events, write_metrics
from .objective import distillation
from .recipe import RECIPES, Recipe, recipe_named
from .state import Keeper, Position, identity_of, record_of

__all__ = [
    "RECIPES",
    "Evaluation",
    "Events",
    "Keeper",
    "Learner",
    "Machine",
    "Position",
    "Recipe",
    "Request",
    "SignalError",
    "Told",
    "autocast",
    "distillation",
    "evaluate",
    "harmonize",
    "identity_of",
    "number_of_classes",
    "recipe_named",
    "record_of",
    "train",
    "wilson_interval",
    "write_metrics",
]
