"""The mathematics of kernels, on tensors: bases, frequencies, projection, low ranks, and quantisation with feedback.

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
    from_groups,
    merge,
    merge_channels_last,
    project,
    reconstruct,
    relative_error,
    to_groups,
)
from .quantisation import Metric, metric_at, quantise, row_bits, shrunk, steps_at
from .ranks import Pair, full_rank, low_rank, low_rank_of_channels, power_outside, product

__all__ = [
    "BASES",
    "NORMALIZATIONS",
    "Basis",
    "Elimination",
    "Frequency",
    "Metric",
    "Pair",
    "all_finite",
    "all_frequencies",
    "check_frequencies",
    "check_range",
    "dct_basis",
    "dct_vectors",
    "eliminate",
    "energy_kept",
    "frequencies_below",
    "from_groups",
    "full_rank",
    "gaussian_vectors",
    "haar_vectors",
    "klt_vectors",
    "largest_of",
    "level_count",
    "low_rank",
    "low_rank_of_channels",
    "merge",
    "merge_channels_last",
    "metric_at",
    "power_outside",
    "product",
    "project",
    "quantise",
    "reconstruct",
    "relative_error",
    "row_bits",
    "scaled_levels",
    "shrunk",
    "steps_at",
    "to_groups",
]
