"""Slow, obvious reference maths: the paper's equations in plain float64 loops, sharing no code with the package."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np


def frequencies(kernel_size: Sequence[int], levels: int) -> list[tuple[int, ...]]:
    """Level by level; inside a level in lexicographic order."""
    found = []
    for level in range(levels):
        for index in itertools.product(*(range(size) for size in kernel_size)):
            if sum(index) == level:
                found.append(index)
    return found


def dct_kernel(kernel_size: Sequence[int], frequency: Sequence[int]) -> np.ndarray:
    """psi of one frequency, eq. 1 with the factors that make it orthonormal."""
    psi = np.zeros(tuple(kernel_size))
    for position in itertools.product(*(range(size) for size in kernel_size)):
        value = 1.0
        for size, x, u in zip(kernel_size, position, frequency, strict=True):
            alpha = math.sqrt(1 / size) if u == 0 else math.sqrt(2 / size)
            value *= alpha * math.cos(math.pi / size * (x + 0.5) * u)
        psi[position] = value
    return psi


def coefficient(kernel: np.ndarray, frequency: Sequence[int]) -> float:
    """Inner product of a kernel with psi of one frequency."""
    psi = dct_kernel(kernel.shape, frequency)
    total = 0.0
    for position in itertools.product(*(range(size) for size in kernel.shape)):
        total += kernel[position] * psi[position]
    return total


def convolution2d(
    image: np.ndarray, kernel: np.ndarray, stride: int = 1, padding: int = 0, dilation: int = 1
) -> np.ndarray:
    """One channel, one filter, as deep learning counts it (cross-correlation)."""
    padded = np.pad(image, padding)
    height = (padded.shape[0] - dilation * (kernel.shape[0] - 1) - 1) // stride + 1
    width = (padded.shape[1] - dilation * (kernel.shape[1] - 1) - 1) // stride + 1
    out = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            for i in range(kernel.shape[0]):
                for j in range(kernel.shape[1]):
                    out[y, x] += kernel[i, j] * padded[y * stride + i * dilation, x * stride + j * dilation]
    return out


def harmonic_layer(
    images: np.ndarray,
    weights: np.ndarray,
    kernel_size: Sequence[int],
    kept: Sequence[Sequence[int]],
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    normalize_eps: float | None = None,
) -> np.ndarray:
    """Eq. 2 in loops: images (N, I, H, W), weights (O, I, F); with ``normalize_eps`` eq. 3, batch statistics per
    input channel and frequency."""
    count, channels = images.shape[:2]
    responses: list[list[list[np.ndarray]]] = []
    for n in range(count):
        responses.append([])
        for c in range(channels):
            responses[n].append(
                [convolution2d(images[n, c], dct_kernel(kernel_size, f), stride, padding, dilation) for f in kept]
            )
    stacked = np.array(responses)  # N, I, F, H, W
    if normalize_eps is not None:
        for c in range(channels):
            for f in range(len(kept)):
                values = stacked[:, c, f]
                stacked[:, c, f] = (values - values.mean()) / math.sqrt(values.var() + normalize_eps)
    out = np.zeros((count, len(weights), *stacked.shape[3:]))
    for n in range(count):
        for o in range(len(weights)):
            for c in range(channels):
                for f in range(len(kept)):
                    out[n, o] += weights[o, c, f] * stacked[n, c, f]
    return out
