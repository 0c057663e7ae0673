"""Single layers in their other forms (harmonic, factored, the paper's block), and measuring how long one layer takes.

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
    reason_not_convertible,
    to_dense,
    to_harmonic,
)
from .layer_times import LayerInput, kernels_to_channels_last, layer_times, read_times
from .timing import Times, in_turns

__all__ = [
    "CONVOLUTIONS",
    "FACTORABLE",
    "SEPARABLE_FROM",
    "FactoredMixin",
    "HarmonicBlock2d",
    "HarmonicMixin",
    "LayerInput",
    "Times",
    "absorb_bias",
    "base_class",
    "coefficients_to_channels_last",
    "empty_counterpart",
    "empty_factored",
    "fold_block",
    "harmonic_class",
    "in_turns",
    "kernels_to_channels_last",
    "layer_times",
    "read_times",
    "reason_not_convertible",
    "reason_not_factorable",
    "to_block",
    "to_dense",
    "to_factored",
    "to_harmonic",
]
