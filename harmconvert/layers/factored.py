"""The factored form of a convolution (eq. 2): fixed filters, one per kept frequency, then a 1x1 convolution.

With lambda 2 a 3x3 kernel keeps three of its nine frequencies, so that the 1x1 convolution needs a third of the
multiplications. A factored convolution is a subclass of the harmonic one with the same parameters and state. Only its
forward differs: factored.c computes it in float32 and, with torch's matrix product, in bfloat16 on a CPU; else there is
one depthwise convolution per frequency and a 1x1 convolution over all responses.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from ..kernels.basis import Basis, all_frequencies
from . import native
from .harmonic import HarmonicMixin, base_class

# Classes whose forward is known to be one convolution with `weight`, so that it can be computed in another way.
FACTORABLE: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2dSame)
_CONVOLVE = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}

Pads = tuple[tuple[int, int], ...]  # number of zeros before and after each axis


def reason_not_factorable(conv: HarmonicMixin) -> str | None:
    """Return why a harmonic convolution has no factored form, or None if it has one."""
    convolution = base_class(conv)
    if convolution not in FACTORABLE:
        return f"{convolution.__name__} computes more than one convolution with its kernel, or another one"
    if replaced := replaced_method(conv, convolution):
        return f"its method {replaced} is not the one of {convolution.__name__}"
    if len(conv.frequencies) == len(all_frequencies(_sizes(conv, "kernel_size"))):
        return "it keeps the whole basis"
    if conv._forward_pre_hooks or conv._forward_hooks:
        return "it has hooks"
    return None


def replaced_method(conv: nn.Module, convolution: type[nn.Module]) -> str | None:
    """Return the name of a method that was replaced on this convolution or on its class, or None."""
    for name in vars(conv):
        if callable(getattr(convolution, name, None)):
            return name
    for name in ("forward", "_conv_forward"):
        method = getattr(convolution, name, None)
        if method is not None and not method.__module__.startswith(("torch.nn.", "timm.layers.")):
            return name
    return None


class FactoredMixin(HarmonicMixin):
    """A harmonic convolution that filters its input with the kept basis kernels and mixes the responses (eq. 2).

    Made by `to_factored`. Parameters, buffers and state dict are those of the harmonic form. factored.c reads a packed
    copy of the parameters. The copy is renewed when torch's version counter of a parameter has changed. Two changes are
    noticed only after the next ``eval()``: one that torch does not count (``p.data.mul_(2)``), and one in eval mode
    under torch.compile. Derivatives of every order and kind are available: factored.c computes the forward, and torch's
    own operators compute everything that is differentiated.
    """

    _packed: tuple[tuple[_Snapshot, ...], native.Packed] | None

    def forward(self, input: Tensor) -> Tensor:
        dimensions = len(_sizes(self, "kernel_size"))
        if input.dim() == dimensions + 1:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        if self.padding_mode != "zeros":
            input = functional.pad(
                input, cast(Any, self)._reversed_padding_repeated_twice, cast(str, self.padding_mode)
            )
        pads = _zeros_around(self, input.shape[2:])
        if not self._native_fits_input(input, pads):
            return _factored_by_torch(input, self.coefficients, self.bias, self._kernels_for(input), self, pads)
        if torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (input, self.coefficients, self.bias)
        ):
            return cast(Tensor, _NativeWithGradient.apply(input, self.coefficients, self.bias, self, pads))
        return self._run_native(input, pads)

    def _native_fits_input(self, input: Tensor, pads: Pads) -> bool:
        """Return whether factored.c can compute the output of this layer for this input."""
        if torch.compiler.is_exporting() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):
            return False
        if not torch.compiler.is_compiling() and (_inside_torch_func() or type(input) not in (Tensor, nn.Parameter)):
            return False
        if input.dim() != 4 or input.device.type != "cpu" or input.numel() == 0:
            return False
        if input.dtype not in native.DTYPES or input.dtype != self.coefficients.dtype:
            return False
        if input.shape[1] != cast(int, self.in_channels) or min(_out_sizes(self, input.shape[2:], pads)) < 1:
            return False  # torch's own operators raise an error that says what is wrong with the input
        if torch.compiler.is_compiling():
            return self._packed is not None and not torch.is_grad_enabled()
        return self._native_fits_layer()

    def _native_fits_layer(self) -> bool:
        """Return whether factored.c is available and supports layers of this kind."""
        kernel_size, coefficients = _sizes(self, "kernel_size"), self.coefficients
        return (
            len(kernel_size) == 2
            and max(kernel_size) <= 64
            and cast(int, self.groups) == 1
            and not self.basis_spec.fitted
            and coefficients.dtype in native.DTYPES
            and coefficients.device.type == "cpu"
            and native.reason_unavailable() is None
        )

    def _run_native(self, input: Tensor, pads: Pads) -> Tensor:
        packed = self._pack()
        (top, _), (left, _) = pads
        stride, dilation = _sizes(self, "stride"), _sizes(self, "dilation")
        out = _out_sizes(self, input.shape[2:], pads)
        return cast(
            Tensor,
            torch.ops.harmconvert.factored(
                input, packed.vertical, packed.horizontal, packed.vertical_of, packed.weights, packed.bias,
                self.coefficients.shape[0], [top, left, *stride, *dilation, *out],
            ),
        )  # fmt: skip

    def _pack(self) -> native.Packed:
        """Return the layer in the memory layout of factored.c; repack it if its parameters have changed."""
        if torch.compiler.is_compiling() and self._packed is not None:
            return self._packed[1]  # a compiled graph cannot repack; `train` and loading a state drop the packed copy
        bias = cast("Tensor | None", self.bias)
        parameters = (self.coefficients, *(() if bias is None else (bias,)))
        if self._packed is None or not _unchanged(self._packed[0], parameters):
            axes = axis_vectors(self.basis_spec, _sizes(self, "kernel_size"), self.frequencies)
            self._packed = tuple(map(_snapshot, parameters)), native.pack(self.coefficients, bias, *axes)
        return self._packed[1]

    def _kernels_for(self, input: Tensor) -> Tensor:
        stale = self.basis.device != self.coefficients.device or self.basis.dtype.itemsize < input.dtype.itemsize
        return (self.kernels if stale else self.basis).to(input.device, input.dtype)

    def prepare(self) -> None:
        """Pack the layer for factored.c now, if it supports the layer: under torch.compile packing is not possible."""
        if self._native_fits_layer():
            self._pack()

    def train(self, mode: bool = True) -> Any:
        self._packed = None
        super().train(mode)
        if not mode:
            self.prepare()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._packed = None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._packed = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> Any:
        return {**super().__getstate__(), "_packed": None}

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty_factored, (base_class(self),), self.__getstate__()


# A parameter when it was packed: an alias of its values and torch's version counter. The alias keeps the memory in use,
# so that no other tensor can get the same address.
_Snapshot = tuple[Tensor, int]


def _snapshot(parameter: Tensor) -> _Snapshot:
    return parameter.detach(), _version(parameter)


def _unchanged(snapshots: Sequence[_Snapshot], parameters: Sequence[Tensor]) -> bool:
    """Return whether the parameters are those of the snapshots, with the same values."""
    return len(snapshots) == len(parameters) and all(
        p.data_ptr() == alias.data_ptr() and _version(p) == version
        for p, (alias, version) in zip(parameters, snapshots, strict=True)
    )


def _version(parameter: Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version


def _inside_torch_func() -> bool:
    """Return whether torch.func or forward-mode differentiation is active; factored.c cannot take part in these."""
    return bool(cast(Any, torch._C)._are_functorch_transforms_active()) or forward_ad._current_level >= 0


class _NativeWithGradient(torch.autograd.Function):
    """Forward by factored.c; backward by torch's own operators, which recompute the responses from the input.

    No responses are stored. The backward can be differentiated again (gradient penalties, Hessian-vector products).
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        input, coefficients, bias, module, pads = args
        ctx.save_for_backward(input, coefficients, bias)
        ctx.module, ctx.pads = module, pads
        return cast(Tensor, module._run_native(input, pads))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        needed = ctx.needs_input_grad[:3]
        create_graph = torch.is_grad_enabled()  # then the gradients must stay connected to the saved tensors
        tensors: list[Any] = [
            tensor if tensor is None or create_graph else tensor.detach().requires_grad_(need)
            for tensor, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        input, coefficients, bias = tensors
        with torch.enable_grad():
            y = _factored_by_torch(input, coefficients, bias, ctx.module._kernels_for(input), ctx.module, ctx.pads)
        variables = [tensor for tensor, need in zip(tensors, needed, strict=True) if need]
        gradients = iter(torch.autograd.grad(y, variables, grads[0], create_graph=create_graph))
        return (*(next(gradients) if need else None for need in needed), None, None)


def to_factored(harmonic: HarmonicMixin, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return the factored counterpart of a harmonic convolution, which is not changed. The inverse is `to_dense`.

    ``memo``: as for `copy.deepcopy`. See `reason_not_factorable` for convolutions without a factored form.
    """
    memo = {} if memo is None else memo
    factored = memo.setdefault(id(harmonic), empty_factored(harmonic))
    factored.__dict__.update(copy.deepcopy(cast(Any, harmonic).__getstate__(), memo), _packed=None)
    factored.prepare()
    return cast(nn.Module, factored)


def empty_factored(harmonic: HarmonicMixin) -> Any:
    """Return a factored module without state; `to_factored` finds it in ``memo`` and fills it."""
    return _empty_factored(base_class(harmonic))


def _empty_factored(convolution: type[nn.Module]) -> Any:
    cls = factored_class(cast(Any, convolution))
    return cls.__new__(cls)


@cache
def factored_class(convolution: type[nn.Module]) -> type[nn.Module]:
    """Return the factored subclass of a convolution class (`FactoredConv2d` for `Conv2d`), always the same object."""
    attributes = {"__module__": __name__, "convolution": convolution}
    return type(f"Factored{convolution.__name__}", (FactoredMixin, convolution), attributes)


def axis_vectors(
    basis: Basis, kernel_size: Sequence[int], frequencies: Sequence[tuple[int, ...]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a two-dimensional basis into the factors of its outer products.

    Returns the vertical vectors (V, rows) and the horizontal vectors (F, columns), float64, and for each frequency the
    index (F,) of its vertical vector, int32.
    """
    rows, columns = kernel_size
    vertical_indices = sorted({v for v, _ in frequencies})
    horizontal_indices = sorted({h for _, h in frequencies})
    # The basis kernels of a kernel with one column (row) are the vertical (horizontal) vectors. The outer product of
    # vectors of unit l1 norm has unit l1 norm.
    vertical = basis.kernels((rows, 1), [(v, 0) for v in vertical_indices])
    horizontal = basis.kernels((1, columns), [(0, h) for h in horizontal_indices])
    return (
        vertical,
        horizontal[[horizontal_indices.index(h) for _, h in frequencies]],
        torch.tensor([vertical_indices.index(v) for v, _ in frequencies], dtype=torch.int32),
    )


def _factored_by_torch(
    input: Tensor, coefficients: Tensor, bias: Tensor | None, kernels_FK: Tensor, conv: HarmonicMixin, pads: Pads
) -> Tensor:
    """Compute the factored convolution with torch's own operators: differentiable, exportable, on any device."""
    kernel_size = _sizes(conv, "kernel_size")
    stride, dilation = _sizes(conv, "stride"), _sizes(conv, "dilation")
    convolve = _CONVOLVE[len(kernel_size)]
    padding = [before for before, _ in pads]
    if any(before != after for before, after in pads):
        input = functional.pad(input, [amount for pair in reversed(pads) for amount in pair])
        padding = [0] * len(pads)
    channels, groups = input.shape[1], cast(int, conv.groups)
    responses = [
        convolve(
            input, kernel.reshape(1, 1, *kernel_size).expand(channels, 1, *kernel_size), None, stride, padding,
            dilation, channels,
        )
        for kernel in kernels_FK.to(input.dtype)
    ]  # fmt: skip
    if groups == 1:
        stacked = torch.cat(responses, 1)
    else:  # the responses of one group must be adjacent
        by_group = [response.unflatten(1, (groups, -1)) for response in responses]
        stacked = torch.stack(by_group, 2).flatten(1, 3)
    index = (..., *(None,) * len(kernel_size))
    mixing_weight = coefficients.transpose(1, 2).flatten(1)[index]
    return convolve(stacked, mixing_weight.to(input.dtype), bias, 1, 0, 1, groups)


def _zeros_around(conv: nn.Module, size: Sequence[int]) -> Pads:
    """Return the number of zeros that are padded before and after each axis of a map of this size."""
    kernel, stride, dilation = (_sizes(conv, name) for name in ("kernel_size", "stride", "dilation"))
    if isinstance(conv, Conv2dSame):
        totals = [
            max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
            for n, k, s, d in zip(size, kernel, stride, dilation, strict=True)
        ]
        return tuple((total // 2, total - total // 2) for total in totals)
    if cast(Any, conv).padding_mode != "zeros" or conv.padding == "valid":
        return ((0, 0),) * len(kernel)
    if conv.padding == "same":
        totals = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((amount, amount) for amount in _sizes(conv, "padding"))


def _out_sizes(conv: nn.Module, size: Sequence[int], pads: Pads) -> list[int]:
    kernel, stride, dilation = (_sizes(conv, name) for name in ("kernel_size", "stride", "dilation"))
    return [
        (n + before + after - (k - 1) * d - 1) // s + 1
        for n, (before, after), k, s, d in zip(size, pads, kernel, stride, dilation, strict=True)
    ]


def _sizes(conv: nn.Module, name: str) -> tuple[int, ...]:
    return cast("tuple[int, ...]", getattr(conv, name))


torch.library.define(
    "harmconvert::factored",
    "(Tensor x, Tensor vertical, Tensor horizontal, Tensor vertical_of, Tensor weights, Tensor bias, int out_channels, "
    "SymInt[] geometry) -> Tensor",
)


@torch.library.impl("harmconvert::factored", "CPU")
def _on_cpu(
    x: Tensor, vertical: Tensor, horizontal: Tensor, vertical_of: Tensor, weights: Tensor, bias: Tensor,
    out_channels: int, geometry: Sequence[int],
) -> Tensor:  # fmt: skip
    top, left, *rest = geometry
    stride, dilation, out = tuple(rest[:2]), tuple(rest[2:4]), tuple(rest[4:])
    layer = native.Packed(vertical, horizontal, vertical_of, weights, bias)
    return native.run(
        x, layer, out_channels, native.Geometry(top, left, cast(Any, stride), cast(Any, dilation), cast(Any, out))
    )


@torch.library.register_fake("harmconvert::factored")
def _fake(x: Tensor, *rest: Any) -> Tensor:
    out_channels, geometry = rest[-2:]
    shape = (x.shape[0], out_channels, *geometry[6:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
