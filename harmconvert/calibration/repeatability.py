"""Test whether repeated runs of a network give the same results.

A network may keep state that a snapshot cannot restore (in globals or in C code), so that one run changes the next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from .capture import ConvCall, watch_convolutions
from .inputs import Batch, Repeatability

# A GPU may add in another order in each run. State that matters changes the inputs by more than this.
_TOLERANCE = 1e-3

InputSummary = tuple[str, tuple[int, ...], float, float]  # name of a layer; shape, sum and norm of its input


def check_repeatability(model: nn.Module, layers: Mapping[str, nn.Module], probe: Batch) -> Repeatability:
    """Compare the layers' inputs in a few runs on one example; one of the runs is interrupted after the first layer.

    Raises:
        UsageError: the network does not run on the example.
    """
    first = input_summaries(model, layers, probe)
    varying = _differing_layers(first, input_summaries(model, layers, probe))
    watch_convolutions(model, layers, probe.input, lambda name, call: None, 1)
    if not _differing_layers(first, input_summaries(model, layers, probe)) - varying:
        return Repeatability(False, frozenset(varying))
    return Repeatability(True, frozenset(varying | _differing_layers(first, input_summaries(model, layers, probe))))


def input_summaries(model: nn.Module, layers: Mapping[str, nn.Module], batch: Batch) -> list[InputSummary]:
    """Return summaries of the layers' inputs in one run, in order."""
    summaries: list[InputSummary] = []
    watch_convolutions(model, layers, batch.input, lambda name, call: summaries.append(input_summary(name, call)))
    return summaries


def input_summary(name: str, call: ConvCall | None) -> InputSummary:
    """Return the numbers by which two inputs of a layer are compared."""
    if call is None:
        return (name, (), 0.0, 0.0)
    x = call.input
    norm = torch.linalg.vector_norm(x, dtype=torch.float64)
    return (name, tuple(x.shape), float(x.sum(dtype=torch.float64)), float(norm))


def _differing_layers(one: list[InputSummary], other: list[InputSummary]) -> set[str]:
    """Return the layers whose inputs differ, call by call. The order of layers may differ, because of threads."""
    runs = [{name: [call for call in run if call[0] == name] for name, *_ in run} for run in (one, other)]
    return {
        name
        for name in {*runs[0], *runs[1]}
        if len(runs[0].get(name, ())) != len(runs[1].get(name, ())) or not all(map(_is_close, *(r[name] for r in runs)))
    }


def _is_close(one: InputSummary, other: InputSummary) -> bool:
    if one[:2] != other[:2]:
        return False
    close = math.isclose(one[3], other[3], rel_tol=_TOLERANCE) or math.isnan(one[3])
    return close and not abs(one[2] - other[2]) > _TOLERANCE * one[3] * math.sqrt(math.prod(one[1]))
