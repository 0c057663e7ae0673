"""Measure how much errors of the weights change the network's outputs.

Errors of a coded weight are spread over all directions in proportion to the inverse of the layer's metric. The mean
squared change of the outputs by such errors, to first order, is a quadratic form of the gradients of the outputs.
It is estimated with random errors and random directions of the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ..network.distributed import all_or_none, rank, sum_over_ranks
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
) -> dict[str, Tensor]:
    """Return, by key, the mean of squared changes of the outputs, in the unit of the network's divergence.

    With torch.distributed, the mean is over the inputs of all processes.

    Args:
        changes: for a key and the gradient of one direction of the outputs with respect to this parameter, the squared
            changes in this direction, one for each row of the weight.

    Raises:
        RuntimeError: the outputs have no gradients, here or in another process.
    """

    def own() -> tuple[dict[str, Tensor], float]:
        return _own_sums(network, parameters, batches, changes, seed, progress)

    sums, power = all_or_none(own, RuntimeError("another process could not compute gradients"))
    total = torch.tensor([power], dtype=torch.float64)
    sum_over_ranks([total, *sums.values()])
    return {key: changed / (_DIRECTIONS * max(float(total), 1e-300)) for key, changed in sums.items()}


def _own_sums(
    network: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batches: Sequence[Batch],
    changes: Callable[[str, Tensor], Tensor],
    seed: int,
    progress: Callable[[int, int], None],
) -> tuple[dict[str, Tensor], float]:
    """Return the sums of squared changes on this process's inputs, and by what they are divided."""
    generator = torch.Generator().manual_seed(seed + rank())
    classes = class_count(network)
    sums: dict[str, Tensor] = {}
    power = 0.0
    picked = list(_examples(batches))
    # On a GPU, cuDNN computes gradients of recurrent layers only in training mode.
    recurrent = any(isinstance(module, nn.RNNBase) for module in network.modules())
    without_cudnn = torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()
    with without_cudnn, evaluating(network), _with_gradients(network, parameters.values()), unchanged(network):
        for number, batch in enumerate(picked):
            progress(number, len(picked))
            with torch.enable_grad(), fixed_random_seed():
                output = call(network, match_dtype(clone_tensors(batch.input), network))
            outputs = [tensor for tensor in tensors_in(output) if tensor.is_floating_point() and tensor.requires_grad]
            if not outputs:
                raise RuntimeError("the outputs have no gradients")
            logits = len(outputs) == 1 and outputs[0].dim() == 2 and outputs[0].shape[1] == classes
            power += len(batch) if logits else sum(float(o.detach().double().square().sum()) for o in outputs)
            for last in range(_DIRECTIONS - 1, -1, -1):
                directions = [_direction(one.detach(), logits, generator) for one in outputs]
                gradients = torch.autograd.grad(
                    outputs, list(parameters.values()), directions, retain_graph=last > 0, allow_unused=True
                )
                for key, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        change = changes(key, gradient.detach().to_dense())  # an embedding may have sparse ones
                        sums[key] = sums[key] + change if key in sums else change
    return sums, power


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


def _direction(output: Tensor, logits: bool, generator: torch.Generator) -> Tensor:
    """Return a random direction whose mean square is the divergence: the Fisher metric of logits, else all the same."""
    noise = torch.randn(output.shape, generator=generator).to(output)
    if not logits:
        return noise
    p = output.softmax(1)
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
