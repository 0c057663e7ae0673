"""The factored form of a convolution: responses of each channel to the kept basis kernels, then a product with the
coefficients (DESIGN 2). Of a 3x3 kernel's nine frequencies lambda 2 keeps three: a third of the multiplications.

A factored convolution *is* a harmonic one, with the same parameters and state, whose forward goes another way: by
factored.c in float32 on a CPU, else by one depthwise convolution per frequency and a 1x1 convolution over them all.
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

# Their forward is known to be one convolution with `weight`, so that another way to compute it may stand for it.
FACTORABLE: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2dSame)
_CONVOLVE = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}

Pads = tuple[tuple[int, int], ...]  # before and after each axis


def reason_not_factorable(conv: HarmonicMixin) -> str | None:
    """Why a harmonic convolution has no factored form, or None where it has one."""
    convolution = base_class(conv)
    if convolution not in FACTORABLE:
        return f"{convolution.__name__} computes more than one convolution with its kernel, or another one"
    if replaced := _replaced_method(conv, convolution):
        return f"its method {replaced} is not the one of {convolution.__name__}"
    if len(conv.frequencies) == len(all_frequencies(_sizes(conv, "kernel_size"))):
        return "it keeps the whole basis"
    if conv._forward_pre_hooks or conv._forward_hooks:
        return "it has hooks"
    return None


def _replaced_method(conv: nn.Module, convolution: type[nn.Module]) -> str | None:
    """A method that was replaced, on this convolution alone or on its whole class; None where there is none."""
    for name in vars(conv):
        if callable(getattr(convolution, name, None)):
            return name
    for name in ("forward", "_conv_forward"):
        method = getattr(convolution, name, None)
        if method is not None and not method.__module__.startswith(("torch.nn.", "timm.layers.")):
            return name
    return None


class FactoredMixin(HarmonicMixin):
    """A harmonic convolution that filters its input by the kept basis kernels and mixes what comes out.

    Made by `to_factored`. Parameters, buffers and state dict are those of the harmonic form. What factored.c reads is
    laid out when the parameters have changed, as torch counts changes; one behind its back (``p.data.mul_(2)``), or in
    eval mode under torch.compile, is seen after the next ``eval()``. Derivatives of every order and kind are
    available: factored.c computes the forward, torch's own operators everything that has to be differentiated.
    """

    _packed: tuple[tuple[_Read, ...], native.Packed] | None

    def forward(self, input: Tensor) -> Tensor:
        dimensions = len(_sizes(self, "kernel_size"))
        if input.dim() == dimensions + 1:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        if self.padding_mode != "zeros":
            input = functional.pad(
                input, cast(Any, self)._reversed_padding_repeated_twice, cast(str, self.padding_mode)
            )
        pads = _zeros_around(self, input.shape[2:])
        if not self._natively(input, pads):
            return _factored(input, self.coefficients, self.bias, self._kernels_for(input), self, pads)
        if torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (input, self.coefficients, self.bias)
        ):
            return cast(Tensor, _Differentiable.apply(input, self.coefficients, self.bias, self, pads))
        return self._run(input, pads)

    def _natively(self, input: Tensor, pads: Pads) -> bool:
        """Whether factored.c can compute it."""
        if torch.compiler.is_exporting() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):
            return False
        if not torch.compiler.is_compiling() and (_transformed() or type(input) not in (Tensor, nn.Parameter)):
            return False
        if input.dim() != 4 or input.dtype != torch.float32 or input.device.type != "cpu" or input.numel() == 0:
            return False
        if input.shape[1] != cast(int, self.in_channels) or min(_out_sizes(self, input.shape[2:], pads)) < 1:
            return False  # torch's own operators say what is wrong with it
        if torch.compiler.is_compiling():
            return self._packed is not None and not torch.is_grad_enabled()
        return self._packable()

    def _packable(self) -> bool:
        """Whether factored.c knows layers of this kind, and is at hand."""
        kernel_size, coefficients = _sizes(self, "kernel_size"), self.coefficients
        return (
            len(kernel_size) == 2
            and max(kernel_size) <= 64
            and cast(int, self.groups) == 1
            and not self.basis_spec.fitted
            and coefficients.dtype == torch.float32
            and coefficients.device.type == "cpu"
            and native.unavailable() is None
        )

    def _run(self, input: Tensor, pads: Pads) -> Tensor:
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
        """The layer as factored.c reads it; laid out anew where its parameters have changed since."""
        if torch.compiler.is_compiling() and self._packed is not None:
            return self._packed[1]  # graphs hold parameters as they were: `train` and loading drop it
        bias = cast("Tensor | None", self.bias)
        parameters = (self.coefficients, *(() if bias is None else (bias,)))
        if self._packed is None or not _same(self._packed[0], parameters):
            axes = axis_vectors(self.basis_spec, _sizes(self, "kernel_size"), self.frequencies)
            self._packed = tuple(map(_read, parameters)), native.pack(self.coefficients, bias, *axes)
        return self._packed[1]

    def _kernels_for(self, input: Tensor) -> Tensor:
        stale = self.basis.device != self.coefficients.device or self.basis.dtype.itemsize < input.dtype.itemsize
        return (self.kernels if stale else self.basis).to(input.device, input.dtype)

    def prepare(self) -> None:
        """Lay the layer out for factored.c now, where that knows it: torch.compile takes what is there."""
        if self._packable():
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
        return _empty, (base_class(self),), self.__getstate__()


# A parameter as it was read: an alias of its values, and how often torch had counted a change. The alias keeps the
# memory in use, so that other values cannot come to lie at the same address.
_Read = tuple[Tensor, int]


def _read(parameter: Tensor) -> _Read:
    return parameter.detach(), _changes(parameter)


def _same(read: Sequence[_Read], parameters: Sequence[Tensor]) -> bool:
    """Whether these are the parameters that were read, unchanged."""
    return len(read) == len(parameters) and all(
        p.data_ptr() == alias.data_ptr() and _changes(p) == changes
        for p, (alias, changes) in zip(parameters, read, strict=True)
    )


def _changes(parameter: Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version


def _transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work: factored.c would see plain numbers only."""
    return bool(cast(Any, torch._C)._are_functorch_transforms_active()) or forward_ad._current_level >= 0


class _Differentiable(torch.autograd.Function):
    """factored.c forward; backward through torch's own operators, from the input alone: no map of responses is kept.

    The backward is differentiable in its turn (gradient penalties, Hessian-vector products).
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        input, coefficients, bias, module, pads = given
        ctx.save_for_backward(input, coefficients, bias)
        ctx.module, ctx.pads = module, pads
        return cast(Tensor, module._run(input, pads))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        needed = ctx.needs_input_grad[:3]
        again = torch.is_grad_enabled()  # by create_graph: then the gradients stay connected to what they depend on
        tensors: list[Any] = [
            tensor if tensor is None or again else tensor.detach().requires_grad_(need)
            for tensor, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        input, coefficients, bias = tensors
        with torch.enable_grad():
            y = _factored(input, coefficients, bias, ctx.module._kernels_for(input), ctx.module, ctx.pads)
        wanted = [tensor for tensor, need in zip(tensors, needed, strict=True) if need]
        found = iter(torch.autograd.grad(y, wanted, grads[0], create_graph=again))
        return (*(next(found) if need else None for need in needed), None, None)


def to_factored(harmonic: HarmonicMixin, memo: dict[int, Any] | None = None) -> nn.Module:
    """The factored counterpart of a harmonic convolution, which is left as it is; for its inverse see `conv.to_dense`.

    ``memo`` is `copy.deepcopy`'s. See `reason_not_factorable` for what has none.
    """
    memo = {} if memo is None else memo
    factored = memo.setdefault(id(harmonic), empty_factored(harmonic))
    factored.__dict__.update(copy.deepcopy(cast(Any, harmonic).__getstate__(), memo), _packed=None)
    factored.prepare()
    return cast(nn.Module, factored)


def empty_factored(harmonic: HarmonicMixin) -> Any:
    """An unfilled factored module, for `to_factored` to find in ``memo`` and fill."""
    return _empty(base_class(harmonic))


def _empty(convolution: type[nn.Module]) -> Any:
    cls = factored_class(cast(Any, convolution))
    return cls.__new__(cls)


@cache
def factored_class(convolution: type[nn.Module]) -> type[nn.Module]:
    """The factored subclass of a convolution class: `FactoredConv2d` for `Conv2d`; the same object at every call."""
    attributes = {"__module__": __name__, "convolution": convolution}
    return type(f"Factored{convolution.__name__}", (FactoredMixin, convolution), attributes)


def axis_vectors(
    basis: Basis, kernel_size: Sequence[int], frequencies: Sequence[tuple[int, ...]]
) -> tuple[Tensor, Tensor, Tensor]:
    """A two-dimensional basis as outer products: vertical (V, rows) and horizontal (F, columns) vectors, float64, and
    which vertical vector (F,) belongs to each frequency."""
    rows, columns = kernel_size
    used = sorted({vertical for vertical, _ in frequencies})
    # A kernel of one column (of one row) is its vertical (horizontal) vector; with l1 norms products stay l1.
    vertical = basis.kernels((rows, 1), [(v, 0) for v in used])
    horizontal = basis.kernels((1, columns), sorted({(0, h) for _, h in frequencies}))
    places = sorted({h for _, h in frequencies})
    return (
        vertical,
        horizontal[[places.index(h) for _, h in frequencies]],
        torch.tensor([used.index(v) for v, _ in frequencies], dtype=torch.int32),
    )


def _factored(
    input: Tensor, coefficients: Tensor, bias: Tensor | None, kernels_FK: Tensor, conv: HarmonicMixin, pads: Pads
) -> Tensor:
    """In torch's own operators: differentiable, exportable, on any device."""
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
    else:  # a group's responses stand together
        apart = [response.unflatten(1, (groups, -1)) for response in responses]
        stacked = torch.stack(apart, 2).flatten(1, 3)
    index = (..., *(None,) * len(kernel_size))
    product = coefficients.transpose(1, 2).flatten(1)[index]
    return convolve(stacked, product.to(input.dtype), bias, 1, 0, 1, groups)


def _zeros_around(conv: nn.Module, size: Sequence[int]) -> Pads:
    """Zeros before and after each axis of a map of that size."""
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
