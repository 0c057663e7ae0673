"""Training: recipe, loop, state to resume from, distillation."""

from .learner import Machine, number_of_classes
from .loop import Told, train
from .recipe import RECIPES, Recipe, recipe_named
from .state import Keeper

__all__ = ["RECIPES", "Keeper", "Machine", "Recipe", "Told", "number_of_classes", "recipe_named", "train"]
