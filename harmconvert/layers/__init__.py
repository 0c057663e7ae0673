"""Single layers in their other forms: harmonic, factored, the paper's block; and how long one layer takes.

What belongs here: a module that takes the place of one convolution, and the functions that make it or turn it back.
The search for layers in a network, and the exchange of many at once, belong to `network`."""

from .block import SEPARABLE_FROM, HarmonicBlock2d, absorb_bias, fold_block, to_block
from .factored import FACTORABLE, FactoredMixin, empty_factored, reason_not_factorable, to_factored
from .harmonic import (
    CONVOLUTIONS,
    HarmonicMixin,
    base_class,
    empty_counterpart,
    harmonic_class,
    lay_out_channels_last,
    reason_not_convertible,
    to_dense,
    to_harmonic,
)
from .layer_times import Site, lay_out, layer_times, read_times
from .timing import Times, in_turns

__all__ = [
    "CONVOLUTIONS",
    "FACTORABLE",
    "SEPARABLE_FROM",
    "FactoredMixin",
    "HarmonicBlock2d",
    "HarmonicMixin",
    "Site",
    "Times",
    "absorb_bias",
    "base_class",
    "empty_counterpart",
    "empty_factored",
    "fold_block",
    "harmonic_class",
    "in_turns",
    "lay_out",
    "lay_out_channels_last",
    "layer_times",
    "read_times",
    "reason_not_convertible",
    "reason_not_factorable",
    "to_block",
    "to_dense",
    "to_factored",
    "to_harmonic",
]
