"""How far a converted network's outputs are from the original's."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..distributed import sum_over_ranks
from ..surgery import tensors_in
from .capture import forward
from .inputs import Batch


def divergence(original: nn.Module, converted: nn.Module, batches: Iterable[Batch]) -> float | None:
    """Mean KL divergence of class probabilities in nats where the output is logits (N, classes), else the squared
    difference of all floating outputs over their square; None where shapes differ or nothing can be compared."""
    sums = torch.zeros(3, dtype=torch.float64)  # divergence, weight, batches that cannot be compared
    for batch in batches:
        ours, theirs = (
            [t for t in tensors_in(forward(m, batch.input)) if t.is_floating_point()] for m in (original, converted)
        )
        if not ours or [t.shape for t in ours] != [t.shape for t in theirs]:
            sums[2] += 1
        elif len(ours) == 1 and ours[0].dim() == 2 and ours[0].shape[1] > 1:
            sums += torch.tensor([_kl(ours[0], theirs[0]), len(ours[0]), 0.0], dtype=torch.float64)
        else:
            squares = [_squares(b.double() - a.double()) for a, b in zip(ours, theirs, strict=True)]
            sums += torch.tensor([sum(squares), sum(_squares(a.double()) for a in ours), 0.0], dtype=torch.float64)
    device = next((p.device for p in original.parameters()), sums.device)
    total = sums.to(device) if device.type == "cuda" else sums
    sum_over_ranks([total])
    distance, weight, lost = total.tolist()
    return distance / weight if weight > 0 and not lost else None


def _kl(original: Tensor, converted: Tensor) -> float:
    p, q = (torch.log_softmax(logits.double(), 1) for logits in (original, converted))
    return float((p.exp() * (p - q)).sum())


def _squares(tensor: Tensor) -> float:
    return float(tensor.square().sum())
