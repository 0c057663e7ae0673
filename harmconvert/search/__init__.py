"""Search for a plan within a budget: choices, their scores, and exact dynamic programming over both.

What belongs here: everything between a budget and a plan. What does not: the refit of the layers before their scores
are measured (`calibration`).
"""

from .choices import Choice, Item, costs_of, items_of, plan_of, whole_plan
from .choosing import swaps
from .dropping import Step, smallest_within
from .energy import energy_scores
from .knapsack import frontier
from .orders import APART, BY_ENERGY, BY_ERROR, Order, orders_by_energy, orders_by_error, with_order
from .probes import Probes, key_of, name_of
from .records import Search, SearchSettings
from .searching import Converted, Scope, Searching

__all__ = [
    "APART",
    "BY_ENERGY",
    "BY_ERROR",
    "Choice",
    "Converted",
    "Item",
    "Order",
    "Probes",
    "Scope",
    "Search",
    "SearchSettings",
    "Searching",
    "Step",
    "costs_of",
    "energy_scores",
    "frontier",
    "items_of",
    "key_of",
    "name_of",
    "orders_by_energy",
    "orders_by_error",
    "plan_of",
    "smallest_within",
    "swaps",
    "whole_plan",
    "with_order",
]
