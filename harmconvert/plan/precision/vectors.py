"""Round the vectors of a network, such as batch norms and biases, to grids on which a file needs few bits for them.

The rounding errors are far below those of coded weights. In float32, each value of a vector would need 32 bits beside
weights of a few bits.
"""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from ...codecs.entropy import PER_OCTAVE
from ...codecs.packed import LEAST_VALUES
from ...network.state import tensors_of
from ..plan import Plan
from .bits import Bits

# The step of a vector is at most 2^-8 or 2^-12 of its root mean square. The first one is enough for weights of up to 5
# bits.
VECTOR_BITS = (8, 12)
_MOST_FOR_FIRST = 5.0
# The steps of running means are larger, because the biases make up for them, and relative to the standard deviations.
_MEAN_BITS_LESS = 2
# A variance below this part of eps has hardly an effect beside it.
_LEAST_VARIANCE = 2.0**-8
_ROUNDED = (_NormBase, _ConvNd, nn.Linear, nn.GroupNorm, nn.LayerNorm, nn.PReLU)
_VECTORS = ("weight", "bias", "running_mean", "running_var")


def vector_bits(plan: Plan) -> tuple[int, ...]:
    """Return the precisions of vectors that suit a plan, coarse ones first; none if it has bits for single layers only.

    >>> vector_bits(Plan(()))
    ()
    """
    shared = [kept.bits for kept in plan.on(Bits.axis).values() if isinstance(kept, Bits) and kept.shared]
    return VECTOR_BITS[VECTOR_BITS.index(suiting(max(shared))) :] if shared else ()


def suiting(bits: float) -> int:
    """Return the precision of vectors that suits so many bits per weight."""
    return VECTOR_BITS[bits > _MOST_FOR_FIRST]


@torch.no_grad()
def round_vectors(model: nn.Module, bits: int) -> dict[str, Tensor]:
    """Round the vectors of a network in place, see `rounded_vectors`; return their values before it, by key."""
    tensors, rounded = tensors_of(model, keep_vars=True), rounded_vectors(model, bits)
    before = {key: tensors[key].clone() for key in rounded}
    for key, values in rounded.items():
        tensors[key].copy_(values)
    return before


@torch.no_grad()
def rounded_vectors(model: nn.Module, bits: int) -> dict[str, Tensor]:
    """Return the vectors of a network after rounding, in their own dtypes, by key.

    These are the weights and biases of norms, and the biases of convolutions and linear layers, if they are long enough
    to be packed. The running variances of a batch norm become powers of 2^(1/4), and its weight is changed so that the
    output stays the same in evaluation mode; so is its bias for the running means.

    >>> norm = nn.BatchNorm1d(32)
    >>> norm.running_var[:] = 9
    >>> rounded = rounded_vectors(norm, 8)
    >>> float(4 * rounded["running_var"][0].log2()), float(rounded["weight"][0])
    (13.0, 1.02734375)

    Args:
        bits: a vector has steps of at most 2^-bits of its root mean square.
    """
    uses = Counter(id(tensor) for module in model.modules() for tensor in _own(module).values())
    rounded: dict[int, Tensor] = {}
    for module in model.modules():
        vectors = {name: t for name, t in _own(module).items() if name in _VECTORS and _is_vector(t)}
        values = {name: tensor.to("cpu", torch.float64) for name, tensor in vectors.items()}
        alone = all(uses[id(tensor)] == 1 for tensor in vectors.values())
        if isinstance(module, _NormBase) and len(vectors) == len(_VECTORS) and alone:
            values = _rounded_norm(values, module.eps, bits)
        elif isinstance(module, _ROUNDED):
            values = {name: _on_grid(v, v, bits) for name, v in values.items() if name in ("weight", "bias")}
        else:
            continue
        stored = {name: value.to(vectors[name].dtype) for name, value in values.items()}
        # The vectors of a batch norm make up for each other, so all of them are rounded or none.
        if all(bool(torch.isfinite(value).all()) for value in stored.values()):
            rounded |= {id(vectors[name]): value for name, value in stored.items()}
    tensors = tensors_of(model, keep_vars=True)
    return {key: rounded[id(tensor)] for key, tensor in tensors.items() if id(tensor) in rounded}


def rounded_keys(original: nn.Module, converted: nn.Module) -> set[str]:
    """Return the keys of the tensors of a converted network that are vectors of the original after rounding."""
    tensors = tensors_of(converted)
    return {
        key
        for bits in VECTOR_BITS
        for key, values in rounded_vectors(original, bits).items()
        if key in tensors and torch.equal(values.to(tensors[key]), tensors[key])
    }


def _own(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module itself, by their names in it."""
    own = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in own.items() if tensor is not None}


def _is_vector(tensor: Tensor) -> bool:
    if is_lazy(tensor) or tensor.is_meta or tensor.dim() != 1 or tensor.numel() < LEAST_VALUES:
        return False
    return tensor.is_floating_point()


def _rounded_norm(values: dict[str, Tensor], eps: float, bits: int) -> dict[str, Tensor]:
    """Return the vectors of a batch norm after rounding: the same output in evaluation mode, apart from steps."""
    mean, variance = values["running_mean"], values["running_var"]
    variance = variance.clamp_min(_LEAST_VARIANCE * eps)
    rounded_variance = 2 ** ((variance.log2() * PER_OCTAVE).round() / PER_OCTAVE)
    deviation, rounded_deviation = ((one + eps).sqrt() for one in (variance, rounded_variance))
    weight = values["weight"] * rounded_deviation / deviation
    weight = _on_grid(weight, weight, bits)
    rounded_mean = _on_grid(mean, deviation, bits - _MEAN_BITS_LESS)
    bias = values["bias"] + weight / rounded_deviation * (rounded_mean - mean)
    return {
        "weight": weight, "bias": _on_grid(bias, bias, bits),
        "running_mean": rounded_mean, "running_var": rounded_variance,
    }  # fmt: skip


def _on_grid(values: Tensor, sizes: Tensor, bits: int) -> Tensor:
    """Return values rounded to a power of two: at most 2^-bits of the root mean square of ``sizes``."""
    power = float(sizes.square().mean())
    if not power > 0 or not math.isfinite(power):
        return values
    step = 2.0 ** (math.floor(math.log2(power) / 2) - bits)
    return (values / step).round() * step + 0.0  # not -0.0, which a file would not keep
