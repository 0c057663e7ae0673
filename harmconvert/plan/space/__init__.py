"""The space axis: which frequencies of its kernel a layer keeps, and in which basis.

What belongs here: everything that only this axis needs (values, policies, choices, cost, JSON and check). What does
not: mathematics on tensors (`kernels`) and modules (`layers`).
"""

from .axis import SpaceAxis
from .frequencies import Frequencies, bases_of, bases_text, cut_layer, normalizations_text
from .policies import Lambda, energies_kept, stays_whole

__all__ = [
    "Frequencies",
    "Lambda",
    "SpaceAxis",
    "bases_of",
    "bases_text",
    "cut_layer",
    "energies_kept",
    "normalizations_text",
    "stays_whole",
]
