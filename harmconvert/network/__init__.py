"""Whole networks, of any kind: find their layers, trace a run, copy them, exchange layers, compare outputs.

What belongs here: operations on an `nn.Module` that need no plan. What a layer should keep is decided in `plan`;
files are read and written in `storage`."""

from .checks import check_finite, check_network, check_weights
from .classifier import replace_classifier
from .comparison import close, greatest_difference, relative_difference, top1_agreement
from .copying import deep_copy
from .dataflow import Dataflow, weight_state
from .declared import check_preprocessing, declare, input_sizes, pretrained_config, recorded
from .distributed import (
    all_or_none,
    any_rank,
    from_first_rank,
    gathered,
    joined,
    least_over_ranks,
    local_world_size,
    rank,
    sum_over_ranks,
    world_size,
)
from .exchange import exchange, in_precision, in_sixteen_bits, put_in_place
from .form_check import check_form, comparable, compare, running
from .forms import MARGIN, Factoring, dense_form, factor, factoring, fold_blocks, fuse, layer_inputs, run_times
from .layers import (
    LayerInfo,
    convolutions,
    harmonic_layers,
    is_harmonic_layer,
    kernel_size,
    state_key,
    weighted_layers,
)
from .other_convolutions import other_convolutions
from .running import call, evaluating, unchanged
from .side_effects import RandomStates, Snapshot, random_states_kept, seeded_sources
from .state import (
    fill,
    loads_by_itself,
    state_of,
    take_dtypes,
    tensors_of,
    weights_sha256,
)
from .tracing import Trace, find_layers, run_where_possible, trace
from .values import (
    batch_size,
    channels_last,
    cloned,
    default_input,
    describe_input,
    fitted,
    mapped,
    rebuilt,
    seeded_inputs,
    tensors_in,
)

__all__ = [
    "MARGIN",
    "Dataflow",
    "Factoring",
    "LayerInfo",
    "RandomStates",
    "Snapshot",
    "Trace",
    "all_or_none",
    "any_rank",
    "batch_size",
    "call",
    "channels_last",
    "check_finite",
    "check_form",
    "check_network",
    "check_preprocessing",
    "check_weights",
    "cloned",
    "close",
    "comparable",
    "compare",
    "convolutions",
    "declare",
    "deep_copy",
    "default_input",
    "dense_form",
    "describe_input",
    "evaluating",
    "exchange",
    "factor",
    "factoring",
    "fill",
    "find_layers",
    "fitted",
    "fold_blocks",
    "from_first_rank",
    "fuse",
    "gathered",
    "greatest_difference",
    "harmonic_layers",
    "in_precision",
    "in_sixteen_bits",
    "input_sizes",
    "is_harmonic_layer",
    "joined",
    "kernel_size",
    "layer_inputs",
    "least_over_ranks",
    "loads_by_itself",
    "local_world_size",
    "mapped",
    "other_convolutions",
    "pretrained_config",
    "put_in_place",
    "random_states_kept",
    "rank",
    "rebuilt",
    "recorded",
    "relative_difference",
    "replace_classifier",
    "run_times",
    "run_where_possible",
    "running",
    "seeded_inputs",
    "seeded_sources",
    "state_key",
    "state_of",
    "sum_over_ranks",
    "take_dtypes",
    "tensors_in",
    "tensors_of",
    "top1_agreement",
    "trace",
    "unchanged",
    "weight_state",
    "weighted_layers",
    "weights_sha256",
    "world_size",
]
