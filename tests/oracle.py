"""Slow and simple reference mathematics: the paper's equations as float64 loops that share no code with the package."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


def frequencies(kernel_size: Sequence[int], levels: int) -> list[tuple[int, ...]]:
    """Return the frequencies of the lowest levels, sorted by level, then lexicographically."""
    found = []
    for level in range(levels):
        for index in itertools.product(*(range(size) for size in kernel_size)):
            if sum(index) == level:
                found.append(index)
    return found


def dct_kernel(kernel_size: Sequence[int], frequency: Sequence[int]) -> np.ndarray:
    """Return psi of one frequency: eq. 1, with the factors that make it orthonormal."""
    psi = np.zeros(tuple(kernel_size))
    for position in itertools.product(*(range(size) for size in kernel_size)):
        value = 1.0
        for size, x, u in zip(kernel_size, position, frequency, strict=True):
            alpha = math.sqrt(1 / size) if u == 0 else math.sqrt(2 / size)
            value *= alpha * math.cos(math.pi / size * (x + 0.5) * u)
        psi[position] = value
    return psi


def haar_matrix(size: int) -> np.ndarray:
    """Return the Haar matrix of a power of two by its Kronecker recursion, with rows of norm 1."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.vstack([np.kron(matrix, [1, 1]), np.kron(np.eye(len(matrix)), [1, -1])])
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def gaussian_derivative(size: int, order: int) -> np.ndarray:
    """Return the order-th derivative of exp(-x^2 / 2 s^2), with s = size / 4, at the middle of each position.

    It is computed by its polynomial: if g = p exp(..) then g' = (p' - x p / s^2) exp(..).
    """
    variance = (size / 4) ** 2
    polynomial = np.polynomial.Polynomial([1.0])
    for _ in range(order):
        polynomial = polynomial.deriv() - np.polynomial.Polynomial([0, 1 / variance]) * polynomial
    x = np.arange(size) - (size - 1) / 2
    return polynomial(x) * np.exp(-(x**2) / (2 * variance))


def coefficient(kernel: np.ndarray, frequency: Sequence[int]) -> float:
    """Return the inner product of a kernel with psi of one frequency."""
    psi = dct_kernel(kernel.shape, frequency)
    total = 0.0
    for position in itertools.product(*(range(size) for size in kernel.shape)):
        total += kernel[position] * psi[position]
    return total


def mean_magnitudes(kernels: np.ndarray, kept: Sequence[Sequence[int]]) -> list[float]:
    """Return, for each frequency, the mean of |coefficient| over filters and channels; kernels (O, I, *kernel_size)."""
    means = []
    for f in kept:
        values = [abs(coefficient(kernel, f)) for filters in kernels for kernel in filters]
        means.append(sum(values) / len(values))
    return means


def wilson(count: int, total: int) -> tuple[float, float]:
    """Return the interval of p in which |count / total - p| is at most 1.96 standard deviations, by bisection."""
    seen = count / total

    def bound(outside: float) -> float:
        inside = seen
        for _ in range(200):
            p = (inside + outside) / 2
            near = abs(seen - p) <= 1.959963984540054 * math.sqrt(p * (1 - p) / total)
            inside, outside = (p, outside) if near else (inside, p)
        return inside

    return bound(0.0), bound(1.0)


def convolution2d(
    image: np.ndarray, kernel: np.ndarray, stride: int = 1, padding: int = 0, dilation: int = 1
) -> np.ndarray:
    """Convolve one channel with one filter, as in deep learning (cross-correlation)."""
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


def convolution(
    images: np.ndarray,
    kernel: np.ndarray,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> np.ndarray:
    """Convolve images (N, I, H, W) with a kernel (O, I, A, B), with one sum for every output position."""
    padded = np.pad(images, ((0, 0), (0, 0), (padding[0], padding[0]), (padding[1], padding[1])))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel.shape[2:], strict=True)]
    height, width = ((n - r) // s + 1 for n, r, s in zip(padded.shape[2:], reach, stride, strict=True))
    out = np.zeros((len(images), len(kernel), height, width))
    for y in range(height):
        for x in range(width):
            top, left = y * stride[0], x * stride[1]
            seen = padded[:, :, top : top + reach[0] : dilation[0], left : left + reach[1] : dilation[1]]
            out[:, :, y, x] = np.einsum("nckl,ockl->no", seen, kernel)
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
    """Compute eq. 2 in loops, from images (N, I, H, W) and weights (O, I, F).

    With ``normalize_eps``, compute eq. 3 instead, with batch statistics of each input channel and frequency.
    """
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


def design_matrix(conv: torch.nn.Module, kept: Sequence[Sequence[int]], inputs: torch.Tensor) -> list[np.ndarray]:
    """Return one matrix for each group of a convolution: output positions x (input channels x kept frequencies).

    Each column is the output of the convolution itself when its kernel is that one DCT kernel.
    """
    probe = copy.deepcopy(conv)
    groups, transposed = conv.groups, conv.transposed
    inside = conv.in_channels // groups
    matrices = []
    for group in range(groups):
        columns = []
        for channel in range(inside):
            for f in kept:
                with torch.no_grad():
                    probe.weight.zero_()
                    psi = torch.from_numpy(dct_kernel(conv.kernel_size, f))
                    first_output = group * (conv.out_channels // groups)
                    if transposed:
                        probe.weight[group * inside + channel, 0] = psi
                    else:
                        probe.weight[first_output, channel] = psi
                    if probe.bias is not None:
                        probe.bias.zero_()
                    columns.append(probe(inputs)[:, first_output].flatten().numpy())
        matrices.append(np.stack(columns, 1))
    return matrices


def standardised(conv: torch.nn.Module) -> torch.nn.Conv2d:
    """Return the plain convolution that is equal to one of timm's weight-standardised convolutions.

    The mean of each filter is subtracted, and the filter is divided by its standard deviation. With a gain, it is also
    multiplied by the gain and divided by the square root of its size.
    """
    weight = conv.weight.detach().double().numpy()
    kernel = np.zeros_like(weight)
    for o, filters in enumerate(weight):
        kernel[o] = (filters - filters.mean()) / math.sqrt(filters.var() + conv.eps)
        if hasattr(conv, "gain"):
            kernel[o] *= float(conv.gain.detach()[o]) / math.sqrt(filters.size)
    plain = torch.nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
        conv.groups, conv.bias is not None,
    ).double()  # fmt: skip
    with torch.no_grad():
        plain.weight.copy_(torch.from_numpy(kernel))
        if conv.bias is not None:
            plain.bias.copy_(conv.bias)
    return plain


def refit(
    conv: torch.nn.Module,
    kept: Sequence[Sequence[int]],
    inputs: torch.Tensor,
    start: np.ndarray,
    centred_kernels: bool = False,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return coefficients (groups, out per group, columns) and bias (out,) with least squared output error.

    They come from lstsq on the design matrix. If there are several solutions, the one nearest to ``start`` is returned.
    With ``centred_kernels``, only kernels whose sum is zero are allowed.
    """
    with torch.no_grad():
        target = conv(inputs).numpy()
    found, biases = [], []
    per_group = conv.out_channels // conv.groups
    for group, matrix in enumerate(design_matrix(conv, kept, inputs)):
        outputs = target[:, group * per_group : (group + 1) * per_group]
        rows = np.moveaxis(outputs, 1, -1).reshape(-1, per_group)
        if conv.bias is not None:
            middle, level = matrix.mean(0), rows.mean(0)
        else:
            middle, level = np.zeros(matrix.shape[1]), np.zeros(per_group)
        centred = matrix - middle
        rest = rows - level - centred @ start[group].T
        allowed = np.eye(matrix.shape[1])
        if centred_kernels:
            sums = [dct_kernel(conv.kernel_size, f).sum() for f in kept] * (matrix.shape[1] // len(kept))
            allowed = np.linalg.svd(np.array([sums]))[2][1:].T  # the directions orthogonal to the sums
        coefficients = start[group] + (allowed @ np.linalg.lstsq(centred @ allowed, rest, rcond=None)[0]).T
        found.append(coefficients)
        biases.append(level - coefficients @ middle)
    return np.stack(found), np.concatenate(biases) if conv.bias is not None else None


def elimination(problems: Sequence[tuple[np.ndarray, np.ndarray]], frequencies: int) -> tuple[list[int], list[float]]:
    """Eliminate frequencies one by one: each time the one without which lstsq fits the whole output best.

    Each problem is a design matrix (positions, channels x frequencies) and coefficients (out, columns). A frequency is
    removed from all problems at once. Return the order, and the squared error after each step except the last.
    """
    left, order, errors = list(range(frequencies)), [], []
    while len(left) > 1:
        squares = []
        for candidate in left:
            total = 0.0
            for matrix, coefficients in problems:
                columns = [
                    c for c in range(matrix.shape[1]) if c % frequencies in left and c % frequencies != candidate
                ]
                answer = matrix @ coefficients.T
                fitted = matrix[:, columns] @ np.linalg.lstsq(matrix[:, columns], answer, rcond=None)[0]
                total += float(((answer - fitted) ** 2).sum())
            squares.append(total)
        errors.append(min(squares))
        order.append(left.pop(squares.index(min(squares))))
    return order + left, errors


def sgd(
    parameters: list[torch.Tensor],
    loss: Callable[[], torch.Tensor],
    steps: int,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """Do gradient descent with momentum and weight decay, for each parameter: v = m v + (g + d p), p = p - lr v."""
    velocity = [torch.zeros_like(p) for p in parameters]
    for _ in range(steps):
        gradients = torch.autograd.grad(loss(), parameters)
        with torch.no_grad():
            for p, g, v in zip(parameters, gradients, velocity, strict=True):
                v.copy_(momentum * v + g + weight_decay * p)
                p.copy_(p - lr * v)


def softened_kl(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    """Return the mean over images of sum over classes of p log(p / q), p and q softened, times temperature^2."""
    total = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        q = [math.exp(value / temperature) for value in ours]
        p = [math.exp(value / temperature) for value in theirs]
        q, p = [value / sum(q) for value in q], [value / sum(p) for value in p]
        total += sum(b * math.log(b / a) for a, b in zip(q, p, strict=True))
    return total / len(student) * temperature**2


def quantise_with_feedback(target: Tensor, factor: Tensor, steps: Tensor) -> Tensor:
    """Round the columns of each row from the last to the first, each corrected by the errors so far."""
    groups, rows, columns = target.shape
    integers = torch.zeros_like(target)
    for g in range(groups):
        for o in range(rows):
            error = [0.0] * columns
            for i in reversed(range(columns)):
                feedback = sum(float(factor[g, i, j]) * error[j] for j in range(i + 1, columns))
                corrected = float(target[g, o, i]) + feedback / float(factor[g, i, i])
                integers[g, o, i] = round(corrected / float(steps[g, i]))
                error[i] = float(target[g, o, i]) - float(integers[g, o, i]) * float(steps[g, i])
    return integers


def quantise_with_survivors(target: Tensor, factor: Tensor, steps: Tensor, survivors: int) -> Tensor:
    """Keep the best partial roundings of each row: two candidates for each column of each survivor."""
    groups, rows, columns = target.shape
    integers = torch.zeros_like(target)
    for g in range(groups):
        for o in range(rows):
            states: list[tuple[float, dict[int, int]]] = [(0.0, {})]
            for i in reversed(range(columns)):
                step, length = float(steps[g, i]), float(factor[g, i, i])
                following = []
                for cost, chosen in states:
                    error = {j: float(target[g, o, j]) - n * float(steps[g, j]) for j, n in chosen.items()}
                    feedback = sum(float(factor[g, i, j]) * e for j, e in error.items()) / length
                    x = (float(target[g, o, i]) + feedback) / step
                    nearest = round(x)
                    for n in (nearest, nearest + (1 if x >= nearest else -1)):
                        following.append((cost + (length * step * (x - n)) ** 2, {**chosen, i: n}))
                states = sorted(following, key=lambda state: state[0])[:survivors]
            for i, n in states[0][1].items():
                integers[g, o, i] = n
    return integers


def gaussian_rate(variances: Tensor, distortion: float) -> float:
    """Return the fewest bits per component of a Gaussian vector at a total squared error: reverse water filling."""
    low, high = 0.0, float(variances.max())
    for _ in range(200):
        level = (low + high) / 2
        low, high = (level, high) if float(variances.clamp_max(level).sum()) < distortion else (low, level)
    return float((variances / level).log2().clamp_min(0).mean()) / 2


def best_low_rank(coefficients: np.ndarray, moments: np.ndarray, rank: int) -> np.ndarray:
    """Return the map of a rank with the least error E|(C - X) z|^2, by the singular values of C times a root of G.

    ``coefficients``: (rows, columns). ``moments``: G, positive definite.
    """
    values, vectors = np.linalg.eigh(moments)
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    left, sizes, right = np.linalg.svd(coefficients @ root, full_matrices=False)
    total = np.zeros_like(coefficients)
    for index in range(rank):
        total = total + sizes[index] * np.outer(left[:, index], right[index])
    return total @ np.linalg.inv(root)


def product_of_pair(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the map (rows, channels, frequencies) of first (rank, channels, F) and second (rows, rank, F), by loops.

    One of the two has a single frequency, which serves for all of the other.
    """
    rows, rank, own = second.shape
    channels, other = first.shape[1:]
    result = np.zeros((rows, channels, max(own, other)))
    for o in range(rows):
        for i in range(channels):
            for f in range(max(own, other)):
                for r in range(rank):
                    result[o, i, f] += second[o, r, min(f, own - 1)] * first[r, i, min(f, other - 1)]
    return result
