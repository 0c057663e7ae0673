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
    """Layers whose inputs differ, call by call. The order of different layers may vary: threads may run them."""
    runs = [{name: [call for call in run if call[0] == name] for name, *_ in run} for run in (one, other)]
    return {
        name
        for name in {*runs[0], *runs[1]}
        if len(runs[0].get(name, ())) != len(runs[1].get(name, ())) or not all(map(_close, *(r[name] for r in runs)))
    }


def _close(one: Fed, other: Fed) -> bool:
    if one[:2] != other[:2]:
        return False
    close = math.isclose(one[3], other[3], rel_tol=_TOLERANCE) or math.isnan(one[3])
    return close and not abs(one[2] - other[2]) > _TOLERANCE * one[3] * math.sqrt(math.prod(one[1]))
