"""DCT responses of a convolution's input, and where on the map they are taken. Tensors only."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from math import prod

import torch
from torch import Tensor, nn

from .capture import ConvCall


def responses(call: ConvCall, basis_FK: Tensor, picks_NP: Tensor | None = None) -> Tensor:
    """What each basis kernel answers to each input channel, shape (R, G, I F), rows = examples x positions.

    ``basis_FK`` (F, K), K = prod(kernel size); ``picks_NP`` chooses P positions (flat indices into the output map) of
    each of the N examples, all of them where None. With coefficients_GON from `to_groups`, the convolution's output at
    those positions is ``responses @ coefficients`` per group (sec. 3, eq. 2). In float64.
    """
    kernel_size = call.weight.shape[2:]
    basis_FK = basis_FK.to(call.input.device, torch.float64)
    if call.transposed:
        # A transposed convolution is a plain one of the input with zeros in between, its kernel turned round.
        basis_FK = basis_FK.unflatten(1, kernel_size).flip(*range(1, len(kernel_size) + 1)).flatten(1)
    windows_NIKP = _windows(call, kernel_size, picks_NP)
    dtype = torch.promote_types(windows_NIKP.dtype, torch.float32)
    responses_NIFP = basis_FK.to(dtype) @ windows_NIKP.to(dtype)
    responses_NPIF = responses_NIFP.permute(0, 3, 1, 2).to(torch.float64, memory_format=torch.contiguous_format)
    return responses_NPIF.reshape(len(responses_NPIF) * responses_NPIF.shape[1], call.groups, -1)


def outputs(maps: Tensor, picks_NP: Tensor | None = None) -> Tensor:
    """An output map (N, O, *size) at the same positions, shape (N, P, O)."""
    flat_NPO = maps.flatten(2).transpose(1, 2)
    if picks_NP is None:
        return flat_NPO
    return flat_NPO[torch.arange(len(maps), device=maps.device)[:, None], picks_NP.to(maps.device)]


def pick_positions(examples: Sequence[int], size: Sequence[int], wanted: int, seed: int) -> Tensor | None:
    """Flat positions (N, P) to sample on a map of that size; None where ``wanted`` is all of them.

    Each example, known by its number in the whole set, takes the next stretch of one seeded permutation: the choice is
    the same however the set is cut into batches, and examples together cover the map evenly.
    """
    available = prod(size)
    if wanted >= available:
        return None
    order = _permutation(available, seed)
    first_N1 = torch.tensor(list(examples), dtype=torch.long)[:, None] * wanted
    return order[(first_N1 + torch.arange(wanted)) % available]


@lru_cache(maxsize=16)
def _permutation(size: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def to_groups(coefficients_OIF: Tensor, groups: int, transposed: bool) -> Tensor:
    """Coefficients (O, I per group, F), of transposed ones (I, O per group, F), as (G, O per group, I F)."""
    blocks = coefficients_OIF.unflatten(0, (groups, -1))
    return (blocks.transpose(1, 2) if transposed else blocks).flatten(2)


def from_groups(coefficients_GON: Tensor, frequencies: int, transposed: bool) -> Tensor:
    """Inverse of `to_groups`."""
    blocks = coefficients_GON.unflatten(2, (-1, frequencies))
    return (blocks.transpose(1, 2) if transposed else blocks).flatten(0, 1)


def _windows(call: ConvCall, kernel_size: Sequence[int], picks_NP: Tensor | None) -> Tensor:
    """What the kernel sees at each position, shape (N, I, K, P); copies only what was picked."""
    size = call.output.shape[2:]
    strides = (1,) * len(size) if call.transposed else call.stride
    padded = _padded(call, kernel_size)
    offsets = list(itertools.product(*(range(0, k * d, d) for k, d in zip(kernel_size, call.dilation, strict=True))))
    if picks_NP is None:
        parts = []
        for offset in offsets:
            ends = [o + (n - 1) * s + 1 for o, n, s in zip(offset, size, strides, strict=True)]
            slices = [slice(o, end, s) for o, end, s in zip(offset, ends, strides, strict=True)]
            index = (slice(None), slice(None), *slices)
            parts.append(padded[index])
        return torch.stack(parts, 2).flatten(3)
    # Flat indices into the padded map and one gather: indexing a view of windows was measured eight times slower.
    first_NP, rest, step = torch.zeros_like(picks_NP), picks_NP, 1
    shift_K = torch.zeros(len(offsets), dtype=torch.long)
    for axis in reversed(range(len(size))):
        first_NP = first_NP + rest % size[axis] * strides[axis] * step
        shift_K += torch.tensor([offset[axis] for offset in offsets]) * step
        rest, step = rest // size[axis], step * padded.shape[2 + axis]
    index_N1KP = (first_NP[:, None, :] + shift_K[:, None])[:, None].to(padded.device)
    flat = index_N1KP.flatten(2).expand(-1, padded.shape[1], -1)
    return padded.flatten(2).gather(2, flat).unflatten(2, (len(offsets), -1))


def _padded(call: ConvCall, kernel_size: Sequence[int]) -> Tensor:
    input, edges = call.input, []
    if call.transposed:
        for axis, stride in enumerate(call.stride):
            if stride > 1:
                length = (input.shape[2 + axis] - 1) * stride + 1
                spread = input.new_zeros(*input.shape[: 2 + axis], length, *input.shape[3 + axis :])
                spread[(slice(None),) * (2 + axis) + (slice(None, None, stride),)] = input
                input = spread
        assert not isinstance(call.padding, str)  # torch knows no 'same' for these
        for k, d, p, extra in zip(kernel_size, call.dilation, call.padding, call.output_padding, strict=True):
            edges.append((d * (k - 1) - p, d * (k - 1) - p + extra))
    elif call.padding == "same":
        for k, d in zip(kernel_size, call.dilation, strict=True):
            edges.append((d * (k - 1) // 2, d * (k - 1) - d * (k - 1) // 2))
    elif not isinstance(call.padding, str):
        edges = [(p, p) for p in call.padding]
    return nn.functional.pad(input, [edge for pair in reversed(edges) for edge in pair])
