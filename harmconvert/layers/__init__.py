"""Single layers in their other forms (harmonic, factored, low rank, the paper's block), and timing one layer.

What belongs here: modules that replace one convolution, and the functions that make them or turn them back. What does
not: finding the layers of a network and replacing many at once (`network`)."""

from .block import SEPARABLE_FROM, HarmonicBlock2d, absorb_bias, fold_block, to_block
from .factored import FACTORABLE, FactoredMixin, empty_factored, reason_not_factorable, to_factored
from .harmonic import (
    CONVOLUTIONS,
    HarmonicMixin,
    base_class,
    coefficients_to_channels_last,
    empty_counterpart,
    harmonic_class,
    is_harmonic_layer,
    reason_not_convertible,
    to_dense,
    to_harmonic,
)
from .layer_times import LayerInput, kernels_to_channels_last, layer_times, read_times
from .low_rank import LowRank, from_low_rank, reason_not_splittable, to_low_rank
from .ranked import RankedMixin, is_ranked, pair_for, reason_not_rankable, to_full_rank, to_ranked
from .timing import Times, in_turns

__all__ = [
    "CONVOLUTIONS",
    "FACTORABLE",
    "SEPARABLE_FROM",
    "FactoredMixin",
    "HarmonicBlock2d",
    "HarmonicMixin",
    "LayerInput",
    "LowRank",
    "RankedMixin",
    "Times",
    "absorb_bias",
    "base_class",
    "coefficients_to_channels_last",
    "empty_counterpart",
    "empty_factored",
    "fold_block",
    "from_low_rank",
    "harmonic_class",
    "in_turns",
    "is_harmonic_layer",
    "is_ranked",
    "kernels_to_channels_last",
    "layer_times",
    "pair_for",
    "read_times",
    "reason_not_convertible",
    "reason_not_factorable",
    "reason_not_rankable",
    "reason_not_splittable",
    "to_block",
    "to_dense",
    "to_factored",
    "to_full_rank",
    "to_harmonic",
    "to_low_rank",
    "to_ranked",
]
