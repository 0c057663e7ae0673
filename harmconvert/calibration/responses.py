"""Compute the responses of a convolution's input to basis kernels, at all or at sampled positions. Tensors only."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from math import prod

import torch
from torch import Tensor, nn

from .capture import ConvCall


def responses(call: ConvCall, basis_FK: Tensor, picks_NP: Tensor | None = None) -> Tensor:
    """Return the responses of each input channel to each basis kernel (eq. 2), shape (R, G, I F), float64.

    The rows R are the examples times the positions. With coefficients_GON from `kernels.to_groups`, the convolution's
    output at these positions is ``responses @ coefficients`` in each group.

    Args:
        basis_FK: basis kernels (F, K) with K = prod(kernel size).
        picks_NP: P positions for each of the N examples (flat indices into the output map); None for all positions.
    """
    kernel_size = call.weight.shape[2:]
    basis_FK = basis_FK.to(call.input.device, torch.float64)
    if call.transposed:
        # A transposed convolution is a plain convolution with the flipped kernel; its input has zeros between values.
        basis_FK = basis_FK.unflatten(1, kernel_size).flip(*range(1, len(kernel_size) + 1)).flatten(1)
    windows_NIKP = _all_windows(call) if picks_NP is None else _picked_windows(call, picks_NP)
    dtype = torch.promote_types(windows_NIKP.dtype, torch.float32)
    basis_FK = basis_FK.to(dtype)
    windows_NKPI = windows_NIKP.movedim(1, -1)
    if windows_NKPI.is_contiguous():  # if the input is channels_last
        responses_NFR = basis_FK @ windows_NKPI.flatten(2).to(dtype)
        responses_NPIF = responses_NFR.unflatten(2, windows_NKPI.shape[2:]).permute(0, 2, 3, 1)
    else:
        responses_NPIF = (basis_FK @ windows_NIKP.to(dtype)).permute(0, 3, 1, 2)
    responses_NPIF = responses_NPIF.to(torch.float64, memory_format=torch.contiguous_format)
    return responses_NPIF.reshape(len(responses_NPIF) * responses_NPIF.shape[1], call.groups, -1)


def outputs(maps: Tensor, picks_NP: Tensor | None = None) -> Tensor:
    """Return the values (N, P, O) of an output map (N, O, *size) at positions like those of `responses`."""
    flat_NPO = maps.flatten(2).transpose(1, 2)
    if picks_NP is None:
        return flat_NPO
    return flat_NPO[torch.arange(len(maps), device=maps.device)[:, None], picks_NP.to(maps.device)]


def pick_positions(examples: Sequence[int], size: Sequence[int], count: int, seed: int) -> Tensor | None:
    """Choose ``count`` positions on a map of this size for each example: flat indices (N, P), or None for all.

    All examples use the same seeded permutation of the positions; example n uses the n-th part of it. So the choice
    does not depend on how the set is divided into batches, and the examples together cover the map evenly.

    Args:
        examples: the number of each example in the whole calibration set.
    """
    available = prod(size)
    if count >= available:
        return None
    order = _permutation(available, seed)
    first_N1 = torch.tensor(list(examples), dtype=torch.long)[:, None] * count
    return order[(first_N1 + torch.arange(count)) % available]


@lru_cache(maxsize=16)
def _permutation(size: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def _all_windows(call: ConvCall) -> Tensor:
    """Return the input values under the kernel at every position, shape (N, I, K, P)."""
    size, strides, padded = call.output.shape[2:], _steps(call)[0], _padded(call)
    parts = []
    for offset in _offsets(call):
        ends = [o + (n - 1) * s + 1 for o, n, s in zip(offset, size, strides, strict=True)]
        slices = [slice(o, end, s) for o, end, s in zip(offset, ends, strides, strict=True)]
        index = (slice(None), slice(None), *slices)
        parts.append(padded[index])
    return torch.stack(parts, 2).flatten(3)


def _picked_windows(call: ConvCall, picks_NP: Tensor) -> Tensor:
    """Return the same as `_all_windows` at some positions, without copying the padded map."""
    strides, holes = _steps(call)
    offsets, edges, input = torch.tensor(_offsets(call)), _edges(call), call.input
    rest_N1P, inner = picks_NP[:, None], 1
    index_NKP = torch.zeros(1, 1, 1, dtype=torch.long)
    outside_NKP = torch.zeros(1, 1, 1, dtype=torch.bool)
    for axis in reversed(range(len(strides))):
        length, hole = input.shape[2 + axis], holes[axis]
        at = rest_N1P % call.output.shape[2 + axis] * strides[axis] + (offsets[:, axis, None] - edges[axis][0])
        outside_NKP = outside_NKP | (at < 0) | (at > (length - 1) * hole) | (at % hole != 0)
        index_NKP = index_NKP + (at // hole).clamp(0, length - 1) * inner
        rest_N1P, inner = rest_N1P // call.output.shape[2 + axis], inner * length
    index_NKP, outside_NKP = index_NKP.to(input.device), outside_NKP.to(input.device)
    pixels = input.movedim(1, -1)
    if pixels.is_contiguous():
        # All channels of a position are adjacent in memory and are copied together: two to four times faster.
        first_N11 = torch.arange(len(input), device=input.device)[:, None, None] * inner
        windows_RI = pixels.flatten(0, -2).index_select(0, (index_NKP + first_N11).flatten())
        windows_RI.index_fill_(0, outside_NKP.flatten().nonzero().flatten(), 0)
        return windows_RI.unflatten(0, index_NKP.shape).permute(0, 3, 1, 2)
    # One gather with flat indices: indexing a view of all windows was eight times slower.
    flat = index_NKP.flatten(1)[:, None].expand(-1, input.shape[1], -1)
    windows_NIKP = input.flatten(2).gather(2, flat).unflatten(2, index_NKP.shape[1:])
    return windows_NIKP.masked_fill_(outside_NKP[:, None], 0)


def _offsets(call: ConvCall) -> list[tuple[int, ...]]:
    """Return the position in the window of each of the kernel's K weights."""
    size = call.weight.shape[2:]
    return list(itertools.product(*(range(0, k * d, d) for k, d in zip(size, call.dilation, strict=True))))


def _steps(call: ConvCall) -> tuple[Sequence[int], Sequence[int]]:
    """Return the distance between positions and the distance between input values, for each axis.

    A transposed convolution is a plain convolution of an input with zeros between its values.
    """
    ones = (1,) * len(call.stride)
    return (ones, call.stride) if call.transposed else (call.stride, ones)


def _padded(call: ConvCall) -> Tensor:
    """Return the input with the zeros that the convolution adds between its values and around them."""
    input, edges = call.input, _edges(call)
    for axis, hole in enumerate(_steps(call)[1]):
        if hole > 1:
            length = (input.shape[2 + axis] - 1) * hole + 1
            with_zeros = input.new_zeros(*input.shape[: 2 + axis], length, *input.shape[3 + axis :])
            with_zeros[(slice(None),) * (2 + axis) + (slice(None, None, hole),)] = input
            input = with_zeros
    return nn.functional.pad(input, [edge for pair in reversed(edges) for edge in pair])


def _edges(call: ConvCall) -> list[tuple[int, int]]:
    """Return the number of zeros before and after the input, for each axis."""
    kernel_size = call.weight.shape[2:]
    edges = []
    if call.transposed:
        assert not isinstance(call.padding, str)  # torch has no 'same' for transposed convolutions
        for k, d, p, extra in zip(kernel_size, call.dilation, call.padding, call.output_padding, strict=True):
            edges.append((d * (k - 1) - p, d * (k - 1) - p + extra))
    elif call.padding == "same":
        for k, d in zip(kernel_size, call.dilation, strict=True):
            edges.append((d * (k - 1) // 2, d * (k - 1) - d * (k - 1) // 2))
    else:
        edges = [(p, p) for p in call.padding] if not isinstance(call.padding, str) else [(0, 0)] * len(kernel_size)
    return edges
