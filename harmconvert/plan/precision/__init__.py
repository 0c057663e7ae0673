"""The precision axis: how many bits per weight the coefficients of a layer have in a file.

What belongs here: everything that only this axis needs (values, settings, cost, JSON and check), and coding without
inputs. What does not: rounding with feedback (`kernels`), entropy coding (`codecs`), and coding on inputs
(`calibration`).
"""

from .axis import PrecisionAxis
from .bits import MOST_BITS, Bits, BitsSetting
from .rounding import round_weights
from .vectors import VECTOR_BITS, round_vectors, rounded_keys, rounded_vectors, suiting, vector_bits
from .weights import CodedWeight, coded_weights, with_coded_bits

__all__ = [
    "MOST_BITS",
    "VECTOR_BITS",
    "Bits",
    "BitsSetting",
    "CodedWeight",
    "PrecisionAxis",
    "coded_weights",
    "round_vectors",
    "round_weights",
    "rounded_keys",
    "rounded_vectors",
    "suiting",
    "vector_bits",
    "with_coded_bits",
]
