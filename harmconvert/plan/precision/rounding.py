"""Code weights without inputs: every coefficient is rounded to the nearest multiple of a step.

Without inputs, the errors of all coefficients of a layer count the same. So a layer has one step, in proportion to the
root mean square of its coefficients. The channels of a depthwise convolution are independent layers in effect, often
with very different weights: there, each channel has its own step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ...codecs.codec import Entry
from ...codecs.entropy import PER_OCTAVE
from ...codecs.integers import Quantised, step_indices, step_sizes
from ...codecs.plain import stored_bytes
from ..plan import Plan
from .weights import CodedWeight, coded_weights

# The search for the steps ends when the bits per weight are this near.
_NEAR = 0.005
_STEPS = 40
# About this many weights of a layer are enough to estimate their entropy.
_SAMPLE = 1 << 16
# Largest distortion relative to the mean square of a row: all integers are zero above it.
_LARGEST = 64.0
_SMALLEST = 2.0**-20


def round_weights(model: nn.Module, plan: Plan, attempts: int = 3) -> dict[str, Entry]:
    """Code the weights of a converted network, in place; return their entries by key.

    Args:
        attempts: how often the bits of the streams may correct the estimate.
    """
    weights = coded_weights(model, plan)
    shared = [weight for weight in weights if weight.bits.shared]
    entries: dict[str, Entry] = {}
    for together in [*([shared] if shared else []), *([weight] for weight in weights if weight not in shared)]:
        for weight, quantised in zip(together, _rounded_to(together, together[0].bits.bits, attempts), strict=True):
            weight.write(quantised)
            entries[weight.key] = weight.entry(quantised)
    return entries


def _rounded_to(weights: Sequence[CodedWeight], bits: float, attempts: int) -> list[Quantised]:
    """Return the weights, rounded with one relative distortion for all, that have this number of bits on average."""
    count = sum(weight.count for weight in weights)
    target = bits
    for attempt in range(attempts):
        distortion = _distortion_for(weights, target)
        quantised = [_rounded(weight.matrices(), distortion) for weight in weights]
        if attempt == attempts - 1:
            break
        lengths = [8 * stored_bytes(w.parameter, w.entry(one)) for w, one in zip(weights, quantised, strict=True)]
        excess = sum(lengths) / count - bits
        if abs(excess) < _NEAR * max(bits, 1):
            break
        target = max(target - excess, 0.01)
    return quantised


def _distortion_for(weights: Sequence[CodedWeight], bits: float) -> float:
    """Return the relative distortion at which the entropy of the integers is this number of bits, by bisection."""
    total = sum(weight.count for weight in weights)
    samples = [_sample(weight) for weight in weights]
    low, high = math.log(_SMALLEST), math.log(_LARGEST)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        entropies = (_entropy(_rounded(sample, math.exp(middle)).integers_GON) for sample in samples)
        entropy = sum(e * weight.count for e, weight in zip(entropies, weights, strict=True)) / total
        if abs(entropy - bits) < _NEAR / 4:
            return math.exp(middle)
        low, high = (middle, high) if entropy > bits else (low, middle)
    return math.exp((low + high) / 2)


def _sample(weight: CodedWeight) -> Tensor:
    """Return some rows of a weight, evenly spread: enough to estimate the entropy."""
    values_GON = weight.matrices()
    groups, rows, columns = values_GON.shape
    step = max(1, groups * rows * columns // _SAMPLE)
    return values_GON[::step] if rows == 1 else values_GON[:, :: min(step, rows // 2)]


def _rounded(values_GON: Tensor, distortion: float) -> Quantised:
    """Round coefficients; ``distortion``: the mean squared error of a coefficient, relative to its mean square.

    The distortion is that of a uniform distribution within each step.
    """
    mean_squares_GO = values_GON.square().mean(-1)
    if values_GON.shape[1] > 1:
        mean_squares_GO = mean_squares_GO.mean().expand(mean_squares_GO.shape)
    steps_GO = (12 * distortion * mean_squares_GO).sqrt()
    # A step between two of the grid is the larger one in some rows and the smaller one in the others.
    parts_O = (np.arange(values_GON.shape[1]) + 0.5) / values_GON.shape[1] - 0.5
    indices_GO = step_indices(torch.where(steps_GO > 0, steps_GO, 1.0).numpy() * 2 ** (parts_O / PER_OCTAVE))
    grid_GO: Tensor = torch.from_numpy(step_sizes(indices_GO))
    integers_GON = (values_GON / grid_GO[..., None]).round().numpy().astype(np.int32)
    zeros_GN = np.zeros((len(integers_GON), integers_GON.shape[2]), np.int32)
    return Quantised(integers_GON, zeros_GN, indices_GO)


def _entropy(integers: np.ndarray) -> float:
    """Return the empirical entropy of integers, in bits."""
    counts = np.bincount((integers - integers.min()).ravel())
    shares = counts[counts > 0] / integers.size
    return float(-(shares * np.log2(shares)).sum())
