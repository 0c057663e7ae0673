"""Operations on whole networks of any kind: find layers, trace a run, copy, replace layers, compare outputs.

What belongs here: operations on an `nn.Module` that need no plan. What does not: deciding what a layer keeps (`plan`),
and reading and writing files (`storage`)."""

from .checks import check_finite, check_network, check_weights
from .classifier import replace_classifier
from .comparison import close, greatest_difference, relative_difference, top1_agreement
from .copying import deep_copy
from .dataflow import Dataflow, weight_state
from .declared import (
    check_preprocessing,
    declare_preprocessing,
    input_sizes,
    preprocessing_record,
    pretrained_config,
)
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
from .exchange import exchange, in_precision, in_sixteen_bits, replace_module
from .form_check import check_form, compare_outputs, comparison_inputs, make_runnable
from .forms import MARGIN, Factoring, dense_form, factor, factoring, fold_blocks, fuse, layer_inputs, run_times
from .heads import compared_outputs, compared_text, floating_tensors, heads_of, run_with_heads
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
from .side_effects import RandomStates, Snapshot, fixed_random_seed, preserve_random_states
from .state import (
    fill,
    loads_by_itself,
    state_of,
    take_dtypes,
    tensors_of,
    weights_sha256,
)
from .tracing import Trace, find_layers, trace, trace_if_possible
from .values import (
    batch_size,
    clone_tensors,
    default_input,
    describe_input,
    images_to_channels_last,
    map_tensors,
    match_dtype,
    rebuild_sequence,
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
    "check_finite",
    "check_form",
    "check_network",
    "check_preprocessing",
    "check_weights",
    "clone_tensors",
    "close",
    "compare_outputs",
    "compared_outputs",
    "compared_text",
    "comparison_inputs",
    "convolutions",
    "declare_preprocessing",
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
    "fixed_random_seed",
    "floating_tensors",
    "fold_blocks",
    "from_first_rank",
    "fuse",
    "gathered",
    "greatest_difference",
    "harmonic_layers",
    "heads_of",
    "images_to_channels_last",
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
    "make_runnable",
    "map_tensors",
    "match_dtype",
    "other_convolutions",
    "preprocessing_record",
    "preserve_random_states",
    "pretrained_config",
    "rank",
    "rebuild_sequence",
    "relative_difference",
    "replace_classifier",
    "replace_module",
    "run_times",
    "run_with_heads",
    "seeded_inputs",
    "state_key",
    "state_of",
    "sum_over_ranks",
    "take_dtypes",
    "tensors_in",
    "tensors_of",
    "top1_agreement",
    "trace",
    "trace_if_possible",
    "unchanged",
    "weight_state",
    "weighted_layers",
    "weights_sha256",
    "world_size",
]
