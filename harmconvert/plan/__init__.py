"""What each layer keeps, as data: plans, the policies that make them, and what a plan costs.

What belongs here: decisions and their cost, before anything is converted. Carrying a plan out belongs to `pipeline`,
and the search for the best plan under a budget to `search`."""

from .cost import Cost, LayerCost, layer_costs, network_cost, parameter_count, tensor_bytes
from .plan import LayerPlan, Plan, Skip, make_plan

__all__ = [
    "Cost",
    "LayerCost",
    "LayerPlan",
    "Plan",
    "Skip",
    "layer_costs",
    "make_plan",
    "network_cost",
    "parameter_count",
    "tensor_bytes",
]
