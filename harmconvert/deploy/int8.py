"""Prepare a network for 8-bit integers: round its weights with feedback, correct its biases, find sensitive layers.

Runtimes round weights and activations themselves. Here this is simulated in torch: a weight gets 8 bits and a scale for
each output channel, the input of its layer 8 bits and one scale, which is measured on calibration inputs.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..calibration import (
    Batch,
    CalibrationContext,
    CalibrationSettings,
    Divergence,
    Shrinkage,
    measured_moments,
    memory_for,
    pooled,
)
from ..kernels.quantisation import Metric, quantise
from ..network.copying import deep_copy
from ..network.layers import weighted_layers
from ..network.running import call, evaluating, unchanged
from ..network.tracing import find_layers
from ..network.values import clone_tensors, first_tensor
from ..plan import BitsSetting, coded_weights, make_plan

# Biases are corrected on at most so many values of the first input: 96 images of 224 pixels.
_MOST_VALUES = 96 * 3 * 224 * 224
_LEVELS = 255
_BITS = 8
# Relative to the mean power of a layer's responses.
_LEAST_POWER = 1e-4


@dataclass(frozen=True)
class Range:
    """The smallest and the largest value of a layer's input; zero is between them."""

    low: float = 0.0
    high: float = 0.0

    def with_values(self, input: Tensor) -> Range:
        """Return the range that also has the values of a tensor."""
        return Range(min(self.low, float(input.amin())), max(self.high, float(input.amax())))

    def rounded(self, input: Tensor) -> Tensor:
        """Return a tensor rounded to 256 values, of which zero is one."""
        scale = (self.high - self.low) / _LEVELS
        if not scale > 0:
            return input
        zero = round(-self.low / scale)
        return ((input / scale).round() + zero).clamp(0, _LEVELS).sub(zero) * scale


@cache
def sums_overflow() -> bool:
    """Return whether sums of products of 8 bits can overflow 16 bits: on x86 processors without VNNI."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        return "vnni" not in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True


def largest_integer() -> int:
    """Return the largest integer of a weight: of 8 bits, or of 7 bits where sums could overflow."""
    return 64 if sums_overflow() else 127


def plain_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Return the convolutions and linear layers whose weight is a parameter; that of factored layers is not."""
    return {n: layer for n, layer in weighted_layers(network).items() if layer._parameters.get("weight") is not None}


def rounded_weight(layer: nn.Module) -> Tensor:
    """Return a layer's weight with 8 bits and a scale for each output channel.

    >>> layer = nn.Linear(2, 1)
    >>> layer.weight.data = torch.tensor([[1.27, 0.0001]])
    >>> rounded_weight(layer)
    tensor([[1.2700, 0.0000]])
    """
    weight = cast(Tensor, layer.weight).detach()
    channels = 1 if getattr(layer, "transposed", False) else 0
    others = [axis for axis in range(weight.dim()) if axis != channels]
    scale = (weight.abs().amax(others, keepdim=True) / largest_integer()).clamp_min(torch.finfo(weight.dtype).tiny)
    return (weight / scale).round() * scale


@contextmanager
def simulated(
    layers: Mapping[str, nn.Module], ranges: Mapping[str, Range], weights: Mapping[str, Tensor]
) -> Iterator[None]:
    """Round the inputs of layers and let them have other weights inside the context, in place."""

    def round_input(name: str) -> Callable[..., Any]:
        def hook(layer: nn.Module, args: Any) -> Any:
            return (ranges[name].rounded(args[0]), *args[1:]) if args and isinstance(args[0], Tensor) else None

        return hook

    before = {name: layer.weight for name, layer in layers.items()}
    handles = [layer.register_forward_pre_hook(round_input(name)) for name, layer in layers.items()]
    try:
        for name, layer in layers.items():
            layer.weight = nn.Parameter(weights[name], requires_grad=False)
        yield
    finally:
        for name, layer in layers.items():
            layer.weight = cast(nn.Parameter, before[name])
        for handle in handles:
            handle.remove()


def input_ranges(network: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Batch]) -> dict[str, Range]:
    """Return the range of the input of each layer that runs; layers that do not run are left out."""
    ranges: dict[str, Range] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any) -> None:
            if (input := first_tensor(args)) is not None and input.is_floating_point():
                ranges[name] = ranges.get(name, Range()).with_values(input)

        return hook

    with _hooks([layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]):
        for batch in batches:
            _run(network, batch.input)
    return ranges


def with_rounded_weights(network: nn.Module, context: CalibrationContext) -> nn.Module:
    """Return a copy whose weights are multiples of the scales that runtimes choose for 8 bits.

    They are rounded with feedback in the metric of the layer's inputs (`kernels.quantisation`), so that a runtime,
    which rounds each weight alone, finds nothing to round. Layers whose inputs are not observed keep their weights.
    """
    copied = deep_copy(network)
    weights = coded_weights(copied, make_plan(find_layers(copied), "full", bits=BitsSetting.of(_BITS)))
    memory = memory_for(copied, CalibrationSettings())
    for weight, moments in measured_moments(copied, weights, context.data, 0, memory):
        if isinstance(moments, str) or weight.key.rpartition(".")[2] != "weight":
            continue
        fit, held = moments
        metric = fit if held is None else pooled(fit, held)
        target_GON = weight.matrices()
        scales_GO1 = (target_GON.abs().amax(2, keepdim=True) / largest_integer()).clamp_min(1e-30)
        blocks_BON = metric.blocks(target_GON / scales_GO1)
        gram_BNN = Shrinkage().of(metric.gram_BNN.double())
        # Responses that were always zero must count a little, because they may not be zero on other inputs.
        powers_BN = gram_BNN.diagonal(dim1=1, dim2=2)
        powers_BN.add_(_LEAST_POWER * float(powers_BN.mean()) + 1e-30)
        form = Metric(blocks_BON, torch.linalg.cholesky(gram_BNN, upper=True))
        # The largest weight of a row decides the scale that a runtime chooses, so it must stay the largest.
        integers_BON = quantise(form, torch.ones_like(form.lengths_GN), largest=largest_integer())
        rounded_GON = metric.from_blocks(integers_BON, weight.layout.groups)
        values = weight.layout.from_matrices((rounded_GON * scales_GO1).numpy())
        with torch.no_grad():
            weight.parameter.copy_(torch.from_numpy(values).to(weight.parameter))
    return copied


def with_corrected_biases(network: nn.Module, original: nn.Module, batches: Sequence[Batch]) -> nn.Module:
    """Return a copy whose biases make up for the shift of the mean outputs by rounding.

    The means are those of the layers of ``original``, which have the same names. The layers are corrected in one run,
    in the order in which they run: the input of each comes from layers that are rounded and corrected already. Layers
    that run more than once, or share their weight, are not corrected.
    """
    copied = deep_copy(network)
    layers = plain_layers(copied)
    input = _examples(batches)
    means: dict[str, list[Tensor]] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, output: Tensor) -> None:
            means.setdefault(name, []).append(_channel_means(layer, output))

        return hook

    originals = plain_layers(original)
    with _hooks([originals[name].register_forward_hook(remember(name)) for name in layers if name in originals]):
        _run(original, input)
    ranges = input_ranges(copied, layers, batches)
    users: dict[int, int] = {}
    for layer in layers.values():
        users[id(layer.weight)] = users.get(id(layer.weight), 0) + 1
    correctable = {
        name: layer
        for name, layer in layers.items()
        if len(means.get(name, ())) == 1 and name in ranges and users[id(layer.weight)] == 1
    }

    biases: dict[str, Tensor] = {}

    def correct(name: str) -> Callable[..., Tensor]:
        def hook(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
            shift = means[name][0] - _channel_means(layer, output)
            biases[name] = shift if layer.bias is None else cast(Tensor, layer.bias).detach() + shift
            return output + shift.view(_channel_shape(layer, output)).to(output)

        return hook

    rounded = {name: layer for name, layer in layers.items() if name in ranges}
    handles = [layer.register_forward_hook(correct(name)) for name, layer in correctable.items()]
    with simulated(rounded, ranges, {n: rounded_weight(layer) for n, layer in rounded.items()}), _hooks(handles):
        _run(copied, input)
    for name, bias in biases.items():
        layer = layers[name]
        layer.bias = nn.Parameter(bias.to(cast(Tensor, layer.weight)), requires_grad=False)
    return copied


def layers_by_harm(original: nn.Module, better: nn.Module, batches: Sequence[Batch]) -> list[str]:
    """Return the names of the layers, first that whose rounding alone changes the network's outputs most.

    Args:
        better: the network whose weights will be rounded: the original, or a copy of it from `prepared`.
    """
    layers, own = plain_layers(original), plain_layers(better)
    ranges = input_ranges(original, layers, batches)
    compare = Divergence(original, [max(batches, key=len)])
    compare(original)  # the outputs are known before the first layer is rounded
    harms: dict[str, float] = {}
    for name in ranges:
        with simulated({name: layers[name]}, ranges, {name: rounded_weight(own[name])}):
            divergence, _ = compare(original)
        harms[name] = float("inf") if divergence is None else divergence
    return sorted(harms, key=lambda name: -harms[name])


def prepared(network: nn.Module, context: CalibrationContext) -> nn.Module:
    """Return a copy of a network that loses less by 8 bits: with rounded weights, and then corrected biases."""
    return with_corrected_biases(with_rounded_weights(network, context), network, context.data.fit)


def with_layers_of(network: nn.Module, original: nn.Module, names: Collection[str]) -> nn.Module:
    """Return a copy in which some layers have the weights and biases of another network."""
    copied = deep_copy(network)
    layers, originals = plain_layers(copied), plain_layers(original)
    for name in names:
        for key in ("weight", "bias"):
            parameter = originals[name]._parameters.get(key)
            layers[name]._parameters[key] = None if parameter is None else nn.Parameter(parameter.detach().clone())
    return copied


def _examples(batches: Sequence[Batch]) -> Any:
    """Return as many examples as fit into one run: those of several batches if inputs are single tensors."""
    first = batches[0].input
    if not isinstance(first, Tensor):
        return first
    parts, values = [first], first.numel()
    for batch in batches[1:]:
        values += batch.input.numel()
        if values > _MOST_VALUES or batch.input.shape[1:] != first.shape[1:]:
            break
        parts.append(batch.input)
    return torch.cat(parts)


def _channel_shape(layer: nn.Module, output: Tensor) -> list[int]:
    shape = [1] * output.dim()
    axis = output.dim() - 1 if isinstance(layer, nn.Linear) else output.dim() - 1 - _dimensions(layer)
    shape[axis] = -1
    return shape


def _channel_means(layer: nn.Module, output: Tensor) -> Tensor:
    """Return the mean of each output channel, float64."""
    axis = _channel_shape(layer, output).index(-1)
    return output.detach().double().movedim(axis, 0).flatten(1).mean(1)


def _dimensions(layer: nn.Module) -> int:
    return len(cast("tuple[int, ...]", layer.kernel_size))


@contextmanager
def _hooks(handles: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(network: nn.Module, input: Any) -> None:
    with torch.no_grad(), evaluating(network), unchanged(network):
        call(network, clone_tensors(input))
