"""The mathematics of kernels, on tensors: bases, the order of frequencies, projection and reconstruction.

What belongs here: functions of tensors that a paper could state as a formula. What does not: modules (`layers`) and
networks (`network`). No function here needs to know that a kernel belongs to a convolution."""

from .basis import (
    BASES,
    NORMALIZATIONS,
    Basis,
    Frequency,
    all_frequencies,
    check_frequencies,
    dct_basis,
    dct_vectors,
    frequencies_below,
    gaussian_vectors,
    haar_vectors,
    klt_vectors,
    largest_of,
    level_count,
    scaled_levels,
)
from .elimination import Elimination, eliminate
from .projection import (
    all_finite,
    check_range,
    energy_kept,
    merge,
    merge_channels_last,
    project,
    reconstruct,
    relative_error,
)
from .quantisation import Metric, metric_at, quantise, row_bits, shrunk, steps_at

__all__ = [
    "BASES",
    "NORMALIZATIONS",
    "Basis",
    "Elimination",
    "Frequency",
    "Metric",
    "all_finite",
    "all_frequencies",
    "check_frequencies",
    "check_range",
    "dct_basis",
    "dct_vectors",
    "eliminate",
    "energy_kept",
    "frequencies_below",
    "gaussian_vectors",
    "haar_vectors",
    "klt_vectors",
    "largest_of",
    "level_count",
    "merge",
    "merge_channels_last",
    "metric_at",
    "project",
    "quantise",
    "reconstruct",
    "relative_error",
    "row_bits",
    "scaled_levels",
    "shrunk",
    "steps_at",
]
