"""Whether runs of a network repeat: state that no snapshot reaches (globals, C code) may carry over from run to run."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from .capture import ConvCall, watch_convolutions
from .inputs import Batch, Runs

# Kernels of a GPU may add in another order each time; state that matters changes more than this.
_TOLERANCE = 1e-3

Fed = tuple[str, tuple[int, ...], float, float]  # a layer, and its input: shape, sum, norm


def repeating(model: nn.Module, layers: Mapping[str, nn.Module], probe: Batch) -> Runs:
    """Find out by a few runs on one example, one of them interrupted after the first layer.

    Raises:
        UsageError: the network does not run on it.
    """
    first = fed_in_a_run(model, layers, probe)
    varying = _differing(first, fed_in_a_run(model, layers, probe))
    watch_convolutions(model, layers, probe.input, lambda name, call: None, 1)
    if not _differing(first, fed_in_a_run(model, layers, probe)) - varying:
        return Runs(False, frozenset(varying))
    return Runs(True, frozenset(varying | _differing(first, fed_in_a_run(model, layers, probe))))


def fed_in_a_run(model: nn.Module, layers: Mapping[str, nn.Module], batch: Batch) -> list[Fed]:
    """The inputs of the layers in one run, in order."""
    found: list[Fed] = []
    watch_convolutions(model, layers, batch.input, lambda name, call: found.append(fed(name, call)))
    return found


def fed(name: str, call: ConvCall | None) -> Fed:
    """What is compared of a layer's input."""
    if call is None:
        return (name, (), 0.0, 0.0)
    x = call.input
    norm = torch.linalg.vector_norm(x, dtype=torch.float64)
    return (name, tuple(x.shape), float(x.sum(dtype=torch.float64)), float(norm))


def _differing(one: list[Fed], other: list[Fed]) -> set[str]:
    """Layers whose inputs differ; all of them from the first on whose calls do not pair."""
    found: set[str] = set()
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a[:2] != b[:2]:
            return found | {name for name, *_ in (*one[index:], *other[index:])}
        close = math.isclose(a[3], b[3], rel_tol=_TOLERANCE) or math.isnan(a[3])
        if not close or abs(a[2] - b[2]) > _TOLERANCE * a[3] * math.sqrt(math.prod(a[1])):
            found.add(a[0])
    return found | {name for name, *_ in (*one[len(other) :], *other[len(one) :])}
