"""Run a network once and record its convolutions and linear layers: order, input, output size, cost, and problems."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.flop_counter import FlopCounterMode

from ..errors import UsageError, UserCodeError
from ..layers.harmonic import CONVOLUTIONS, reason_not_convertible
from ..layers.ranked import channels_of, groups_of, is_transposed
from .classifier import classifier_of
from .copying import deep_copy, uncopyable_member
from .dataflow import Dataflow, Findings, fixed_parameters
from .exchange import in_precision, in_sixteen_bits
from .layers import (
    LayerInfo,
    all_layers,
    convolutions,
    is_harmonic_layer,
    kernel_size,
    matrix_names,
    observable_layers,
    state_key,
    weighted_layers,
)
from .other_convolutions import other_convolutions
from .running import call, evaluating, unchanged, usage_errors
from .side_effects import preserve_random_states
from .values import batch_size, clone_tensors, default_input, describe_input, first_tensor, match_dtype, tensors_in


@dataclass(frozen=True)
class LayerRun:
    """How one convolution ran: its position in the order, output size of its largest call, calls, MACs of all calls."""

    order: int
    output_size: tuple[int, ...]
    reads_input: bool
    calls: int
    macs: int


@dataclass(frozen=True)
class Trace:
    """One run of a network on an example input: its convolutions by name, and the MACs of the whole network.

    MACs are the multiply-adds of all matrix products and convolutions of the run, for the whole batch. Element-wise
    operations, normalisation and pooling are not counted. ``findings``: layers that the run showed to be unfit for
    conversion, and modules that convolve by calling functions.
    """

    layers: Mapping[str, LayerRun]
    macs: int
    batch: int
    findings: Findings = field(default_factory=Findings)


class _NoModules:
    """Replaces torch's tracker of modules in `FlopCounterMode`; counting the whole network does not need it.

    Torch's tracker fails without gradients if a module's input is a view of a parameter, such as a position embedding.
    """

    parents = ("Global",)

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, *_: object) -> None:
        """Do nothing."""


def find_layers(model: nn.Module, trace: Trace | None = None) -> list[LayerInfo]:
    """Return the facts that a plan needs about each layer of `all_layers`, and about other modules that convolve.

    Layers that cannot be converted have a reason (``skip``). Without a trace, the first convolution of the network is
    assumed to be the one that reads its input.
    """
    layers: list[LayerInfo] = []
    other_users, fixed = _weights_used_elsewhere(model), fixed_parameters(model)
    first_with: dict[int, str] = {}
    first_convolution, classifier = next(iter(convolutions(model)), None), classifier_of(model)
    observable = observable_layers(model)
    for name, layer in all_layers(model).items():
        run = trace.layers.get(name) if trace else None
        if matrices := matrix_names(layer):
            layers.append(_with_matrices(name, layer, matrices, first_with))
            continue
        weight = layer._parameters.get("weight")
        groups, (inputs, outputs) = groups_of(layer), channels_of(layer)
        tied_to = first_with.setdefault(id(weight), name) if weight is not None else name
        layers.append(
            LayerInfo(
                name,
                type(layer).__name__,
                kernel_size(layer),
                depthwise=groups > 1 and groups == layer.in_channels,
                reads_input=run.reads_input if run else trace is None and name == first_convolution,
                fixed=id(weight) in fixed,
                output_size=run.output_size if run else None,
                tied_to=tied_to if tied_to != name else None,
                skip=_reason_to_skip(name, layer, other_users if name in observable else {}, trace),
                groups=groups,
                inputs=inputs,
                outputs=outputs,
                transposed=is_transposed(layer),
                classifier=layer is classifier,
                matrices=() if name in observable else ("weight",),
            )
        )
    others = other_convolutions(model, trace.findings.others if trace else None)
    layers += [LayerInfo(name, other.kind, other.kernel_size, skip=other.reason) for name, other in others.items()]
    return layers


def _with_matrices(name: str, layer: nn.Module, matrices: tuple[str, ...], first_with: dict[int, str]) -> LayerInfo:
    """Return the facts about a layer of `matrix_names`; ``first_with`` has the first layer with each weight, by id."""
    keys = [id(layer._parameters[matrix]) for matrix in matrices]
    first = next((first_with[key] for key in keys if key in first_with), name)
    for key in keys:
        first_with.setdefault(key, first)
    skip = "it changes its weight in each forward pass (max_norm)" if getattr(layer, "max_norm", None) else None
    kind, tied_to = type(layer).__name__, first if first != name else None
    return LayerInfo(name, kind, (), tied_to=tied_to, skip=skip, matrices=matrices)


def _reason_to_skip(name: str, layer: nn.Module, other_users: Mapping[int, str], trace: Trace | None) -> str | None:
    """Return why a layer cannot be converted, or None if it can be."""
    if reason := reason_not_convertible(layer):
        return reason
    user = other_users.get(id(layer._parameters.get("weight")))
    if user and user != state_key(name, "weight"):  # a linear layer is itself one of the other users of its weight
        return f"its weight is also used by {user}"
    return (trace.findings.unfit.get(name) if trace else None) or uncopyable_member(layer)


def trace(model: nn.Module, example_input: Any) -> Trace:
    """Run the network once, in eval mode and without gradients, and record its convolutions and linear layers.

    If tensors of the network are stored in 16 bits and it does not run, a float32 copy is run instead.

    Args:
        example_input: a tensor, a tuple of arguments, a dict of keyword arguments, or a list (one argument).

    Raises:
        UsageError: the network does not run on this input.
    """
    try:
        return _trace(model, example_input)
    except (UsageError, UserCodeError):
        if not in_sixteen_bits(model):
            raise
        precise = in_precision(model, torch.float32)
        return _trace(precise, match_dtype(example_input, precise))


def _trace(model: nn.Module, example_input: Any) -> Trace:
    example_input = clone_tensors(example_input)  # a forward may normalise its input in place
    batch = batch_size(example_input)
    if not batch:
        raise UsageError(f"the example input of {describe_input(example_input)} is empty: give at least one example")
    if any(map(is_lazy, model.parameters())):
        model = deep_copy(model)  # a run would initialise the lazy layers of the original
    flow = Dataflow(model, tensors_in(example_input))
    runs: dict[str, LayerRun] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(conv: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            input, result = first_tensor((args, kwargs)), first_tensor(output)
            if input is None or result is None:
                return
            run = runs.get(name) or LayerRun(len(runs), (), False, 0, 0)
            if isinstance(conv, nn.Linear):
                size = tuple(result.shape[1:-1])
            else:
                size = tuple(result.shape[2:]) if result.dim() > len(kernel_size(conv)) + 1 else tuple(result.shape[1:])
            runs[name] = LayerRun(
                run.order,
                max(size, run.output_size, key=lambda s: (len(s), prod(s))),
                run.reads_input or flow.reads_input(input),
                run.calls + 1,
                run.macs + _macs(conv, input, result),
            )

        return hook

    handles = [c.register_forward_hook(watch(n), with_kwargs=True) for n, c in weighted_layers(model).items()]
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = cast(Any, _NoModules())
    try:
        with ExitStack() as stack:
            for context in (unchanged(model), usage_errors(example_input), evaluating(model), counter, flow.watching()):
                stack.enter_context(context)
            stack.enter_context(preserve_random_states())
            call(model, example_input)
    finally:
        for handle in handles:
            handle.remove()
    with evaluating(model):
        flow.finish()
    if runs and not flow.input_was_read and not any(run.reads_input for run in runs.values()):
        # The input first went through functions that cannot be followed: assume that the first convolution reads it.
        first = next(iter(runs))
        runs[first] = replace(runs[first], reads_input=True)
    return Trace(runs, counter.get_total_flops() // 2, batch, flow.findings)


def _weights_used_elsewhere(model: nn.Module) -> dict[int, str]:
    """Return the parameters with a use other than a plain convolution's weight: id -> name of the use."""
    elsewhere: dict[int, str] = {}
    for name, module in model.named_modules():
        is_conv = isinstance(module, CONVOLUTIONS) and not is_harmonic_layer(module)
        for key, parameter in module._parameters.items():
            if parameter is not None and not (is_conv and key == "weight"):
                elsewhere[id(parameter)] = state_key(name, key)
    return elsewhere


def _macs(conv: nn.Module, input: Tensor, output: Tensor) -> int:
    """Return the multiply-adds of one call: one per weight and output position (input position if transposed)."""
    if isinstance(conv, nn.Linear):
        return output.numel() * conv.in_features
    per_position = prod(kernel_size(conv)) * cast(int, conv.in_channels) // cast(int, conv.groups)
    if cast(bool, conv.transposed):
        per_position = prod(kernel_size(conv)) * cast(int, conv.out_channels) // cast(int, conv.groups)
        return input.numel() * per_position
    return output.numel() * per_position


def trace_if_possible(model: nn.Module, lam: Any, example_input: Any) -> Trace | None:
    """Trace the network on ``example_input``, or on its default input unless ``lam`` is "full"; None without an input.

    An error on the default input is raised only if ``lam`` is "progressive", which needs the trace; else the result is
    None.
    """
    if example_input is not None:
        return trace(model, example_input)
    if lam == "full" or (example_input := default_input(model)) is None:
        return None
    try:
        return trace(model, example_input)
    except (UsageError, UserCodeError):
        if lam == "progressive":
            raise
        return None
