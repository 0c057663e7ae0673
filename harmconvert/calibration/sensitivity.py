"""Measure how much errors of the weights, or of a layer's outputs, change the network's outputs.

Errors of a coded weight are spread over all directions in proportion to the inverse of the layer's metric. The mean
squared change of the outputs by such errors, to first order, is a quadratic form of the gradients of the outputs.
It is estimated with random errors and random directions of the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.ranked import channels_of, groups_of
from ..network.distributed import all_or_none, rank, sum_over_ranks
from ..network.heads import compared_outputs
from ..network.layers import kernel_size
from ..network.running import call, evaluating, unchanged
from ..network.side_effects import fixed_random_seed
from ..network.values import clone_tensors, match_dtype, tensors_in
from .divergence import class_count
from .inputs import Batch

# Forwards with gradients, and examples in each; random directions of the outputs of each forward.
_FORWARDS, _EXAMPLES, _DIRECTIONS = 16, 4, 2


def squared_changes(
    network: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batches: Sequence[Batch],
    changes: Callable[[str, Tensor], Tensor],
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """Return, by key, the mean of squared changes of the outputs, in the unit of the network's divergence.

    With torch.distributed, the mean is over the inputs of all processes.

    Args:
        changes: for a key and the gradient of one direction of the outputs with respect to this parameter, the squared
            changes in this direction, one for each row of the weight.
        temperature: the probabilities of a classifier are those of its logits divided by this.

    Raises:
        RuntimeError: the outputs have no gradients, here or in another process.
    """

    sums: dict[str, Tensor] = {}

    def own() -> float:
        total = 0.0
        tensors = list(parameters.values())
        for power, gradients in _random_gradients(
            network, tensors, lambda: tensors, batches, seed, progress, temperature
        ):
            total += power
            for key, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    change = changes(key, gradient)
                    sums[key] = sums[key] + change if key in sums else change
        return total

    total = torch.tensor([all_or_none(own, _no_gradients())], dtype=torch.float64)
    # All processes must sum the same tensors, also those without gradients on their own inputs.
    ordered = {
        key: sums[key] if key in sums else changes(key, torch.zeros_like(parameter)).zero_()
        for key, parameter in parameters.items()
    }
    sum_over_ranks([total, *ordered.values()])
    return {key: changed / (_DIRECTIONS * max(float(total), 1e-300)) for key, changed in ordered.items()}


def effects_of_outputs(
    network: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Batch], seed: int
) -> dict[str, Tensor]:
    """Return by name how much errors of a layer's outputs change those of the network: quadratic forms (groups, O, O).

    Each is the second moment of gradients with respect to the layer's outputs, over examples, positions and random
    directions of the network's outputs. Layers without finite gradients are left out. With torch.distributed, the
    inputs are those of all processes.

    Raises:
        RuntimeError: the outputs have no gradients, here or in another process.
    """
    sums: dict[str, Tensor] = {
        name: torch.zeros(groups_of(layer), *(2 * [channels_of(layer)[1] // groups_of(layer)]))
        for name, layer in layers.items()
    }
    seen: list[tuple[str, Tensor]] = []
    picked: list[tuple[str, Tensor]] = []  # those of a whole forward; parts of it may run again for the gradients

    def tensors() -> list[Tensor]:
        picked[:] = seen
        return [tensor for _, tensor in picked]

    def watch(name: str) -> Callable[..., Tensor]:
        def hook(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
            seen.append((name, output))
            return output.clone()  # what follows may change the clone in place

        return hook

    def own() -> None:
        parameters = [parameter for layer in layers.values() for parameter in layer.parameters()]
        for _, gradients in _random_gradients(network, parameters, tensors, batches, seed):
            for (name, _), gradient in zip(picked, gradients, strict=True):
                if gradient is not None:
                    sums[name] += _moments(layers[name], gradient).to(sums[name])

    start = network.register_forward_pre_hook(lambda *_: seen.clear())
    handles = [start, *(layer.register_forward_hook(watch(name)) for name, layer in layers.items())]
    try:
        all_or_none(own, _no_gradients())
    finally:
        for handle in handles:
            handle.remove()
    sum_over_ranks(list(sums.values()))
    return {name: moments for name, moments in sums.items() if bool(moments.isfinite().all()) and bool(moments.any())}


def _moments(layer: nn.Module, gradient: Tensor) -> Tensor:
    """Return the second moments of the channels of a layer's output (groups, O, O), summed over all else."""
    channels_last = gradient.movedim(gradient.dim() - len(kernel_size(layer)) - 1, -1)
    rows_GPO = channels_last.flatten(0, -2).float().unflatten(1, (groups_of(layer), -1)).movedim(1, 0)
    return rows_GPO.mT @ rows_GPO


def _no_gradients() -> RuntimeError:
    return RuntimeError("another process could not compute gradients")


def _random_gradients(
    network: nn.Module,
    parameters: Sequence[nn.Parameter],
    tensors: Callable[[], Sequence[Tensor]],
    batches: Sequence[Batch],
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    temperature: float = 1.0,
) -> Iterator[tuple[float, Sequence[Tensor | None]]]:
    """Yield gradients of random directions of the network's outputs, on few examples, and the power of these outputs.

    Args:
        parameters: those that have gradients.
        tensors: called after each forward; returns the tensors with respect to which the gradients are.
        temperature: the probabilities of a classifier are those of its logits divided by this.
    """
    generator = torch.Generator().manual_seed(seed + rank())
    classes = class_count(network)
    picked = list(_examples(batches))
    # On a GPU, cuDNN computes gradients of recurrent layers only in training mode.
    recurrent = any(isinstance(module, nn.RNNBase) for module in network.modules())
    without_cudnn = torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()
    with without_cudnn, evaluating(network), _with_gradients(network, parameters), unchanged(network):
        for number, batch in enumerate(picked):
            progress(number, len(picked))
            with torch.enable_grad(), fixed_random_seed():
                input = match_dtype(clone_tensors(batch.input), network)
                output = compared_outputs(network, partial(call, network, input))
            outputs = [tensor for tensor in tensors_in(output) if tensor.is_floating_point() and tensor.requires_grad]
            if not outputs:
                raise RuntimeError("the outputs have no gradients")
            logits = len(outputs) == 1 and outputs[0].dim() == 2 and outputs[0].shape[1] == classes
            power = len(batch) if logits else sum(float(one.detach().double().square().sum()) for one in outputs)
            wanted = [tensor if tensor.requires_grad else None for tensor in tensors()]
            for last in range(_DIRECTIONS - 1, -1, -1):
                directions = [_direction(one.detach(), logits, generator, temperature) for one in outputs]
                known = iter(
                    torch.autograd.grad(
                        outputs,
                        [one for one in wanted if one is not None],
                        directions,
                        retain_graph=last > 0,
                        allow_unused=True,
                    )
                )
                gradients = [None if one is None else next(known) for one in wanted]
                # An embedding may have sparse gradients.
                dense = [None if one is None else one.detach().to_dense() for one in gradients]
                yield (power if last == 0 else 0.0), dense


def _examples(batches: Sequence[Batch]) -> Iterator[Batch]:
    """Yield small batches with examples from the whole set."""
    total = sum(map(len, batches))
    step = max(1, total // (_FORWARDS * _EXAMPLES))
    left = _FORWARDS
    for batch in batches:
        rows = list(range(0, len(batch), step))
        for start in range(0, len(rows), _EXAMPLES):
            if left == 0:
                return
            left -= 1
            some = rows[start : start + _EXAMPLES]
            yield batch if len(some) == len(batch) else batch.rows(some)


def _direction(output: Tensor, logits: bool, generator: torch.Generator, temperature: float) -> Tensor:
    """Return a random direction whose mean square is the divergence: the Fisher metric of logits, else all the same."""
    noise = torch.randn(output.shape, generator=generator).to(output)
    if not logits:
        return noise
    p = (output / temperature).softmax(1)
    return (p.sqrt() * noise - p * (p.sqrt() * noise).sum(1, keepdim=True)) * 0.5**0.5


@contextmanager
def _with_gradients(network: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let ``parameters``, and no others of the network, have gradients inside."""
    needs = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    own = {id(parameter) for parameter in parameters}
    try:
        for parameter, _ in needs:
            parameter.requires_grad_(id(parameter) in own)
        yield
    finally:
        for parameter, value in needs:
            parameter.requires_grad_(value)
