"""Plans: what each layer of a network keeps on each axis; making a plan by a policy, its cost, and applying it.

What belongs here: the axes (`space`, `channels`, `precision`), plans as data, and cost computed from shapes. What does
not: everything that needs data (`calibration`), searches (`search`) and files (`storage`).
"""

from .applying import apply_plan, fits, plan_of_model
from .axes import AXES, Axis, Check, Kept, LayerCost, WeightShape, projections, register
from .channels import ChannelAxis, Rank, RankSetting
from .cost import Cost, layer_costs, network_cost, parameter_count, tensor_bytes
from .making import make_plan, plannable
from .plan import LayerPlan, Plan, Skip
from .precision import (
    Bits,
    BitsSetting,
    CodedWeight,
    PrecisionAxis,
    coded_weights,
    round_vectors,
    round_weights,
    rounded_vectors,
    vector_bits,
    with_coded_bits,
)
from .space import Frequencies, SpaceAxis, bases_of, bases_text, cut_layer, energies_kept, normalizations_text

__all__ = [
    "AXES",
    "Axis",
    "Bits",
    "BitsSetting",
    "ChannelAxis",
    "Check",
    "CodedWeight",
    "Cost",
    "Frequencies",
    "Kept",
    "LayerCost",
    "LayerPlan",
    "Plan",
    "PrecisionAxis",
    "Rank",
    "RankSetting",
    "Skip",
    "SpaceAxis",
    "WeightShape",
    "apply_plan",
    "bases_of",
    "bases_text",
    "coded_weights",
    "cut_layer",
    "energies_kept",
    "fits",
    "layer_costs",
    "make_plan",
    "network_cost",
    "normalizations_text",
    "parameter_count",
    "plan_of_model",
    "plannable",
    "projections",
    "register",
    "round_vectors",
    "round_weights",
    "rounded_vectors",
    "tensor_bytes",
    "vector_bits",
    "with_coded_bits",
]

register(SpaceAxis())
register(ChannelAxis())
register(PrecisionAxis())
