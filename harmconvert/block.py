"""The paper's block (eq. 3) in a network: put in the place of a convolution, and folded back into one."""

from __future__ import annotations

from typing import Any, cast

import timm
import torch
import torchvision
from torch import Tensor, nn

from .conv import HarmonicBlock2d
from .errors import UsageError
from .projection import project, reconstruct


def to_block(conv: nn.Module, normalize: bool = True, normalization: str = "ortho") -> HarmonicBlock2d:
    """The whole-basis block (eq. 3) in the place of a 2-d convolution; its mixing weights are that kernel, projected.

    Without ``normalize`` it computes what `to_harmonic`'s counterpart does.

    Raises:
        UsageError: a convolution of another class, one that does not pad with zeros, or an unknown normalisation.
    """
    if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise UsageError(f"a block can take the place of a plain Conv2d padded with zeros, not of this {conv}")
    block = HarmonicBlock2d(
        conv.in_channels,
        conv.out_channels,
        _pair(conv.kernel_size),
        _pair(conv.stride),
        _pair(conv.padding),
        _pair(conv.dilation),
        conv.groups,
        conv.bias is not None,
        normalize=normalize,
        normalization=normalization,
    ).to(conv.weight.device, conv.weight.dtype)
    with torch.no_grad():
        coefficients_OIF = project(conv.weight, block.kernels)
        block.mix.weight.copy_(coefficients_OIF.flatten(1)[..., None, None])
        if conv.bias is not None and block.mix.bias is not None:
            block.mix.bias.copy_(conv.bias)
    return block.train(conv.training)


def fold_block(block: HarmonicBlock2d) -> nn.Conv2d:
    """The plain convolution that computes what a block computes in eval mode: its batch norm is affine there, so it
    goes into the kernel and a bias (exact, also at the padding, which comes before it)."""
    mix_OX = block.mix.weight.detach().double().flatten(1)
    bias = torch.zeros(len(mix_OX), dtype=torch.float64, device=mix_OX.device)
    if block.mix.bias is not None:
        bias += block.mix.bias.detach()
    if isinstance(block.norm, nn.BatchNorm2d):
        mean, variance = cast(Tensor, block.norm.running_mean), cast(Tensor, block.norm.running_var)
        scale_GX = (variance.double() + block.norm.eps).rsqrt().view(block.groups, -1)
        mix_GOX = mix_OX.view(block.groups, -1, mix_OX.shape[1]) * scale_GX[:, None]
        bias -= torch.einsum("gox,gx->go", mix_GOX, mean.double().view(block.groups, -1)).flatten()
        mix_OX = mix_GOX.flatten(0, 1)
    coefficients_OIF = mix_OX.unflatten(1, (-1, len(block.frequencies)))
    biased = block.mix.bias is not None or isinstance(block.norm, nn.BatchNorm2d)
    conv = nn.Conv2d(
        block.in_channels,
        block.out_channels,
        _pair(block.kernel_size),
        block.stride,
        block.padding,
        block.dilation,
        block.groups,
        bias=biased,
    ).to(block.mix.weight.device, block.mix.weight.dtype)
    with torch.no_grad():
        conv.weight.copy_(reconstruct(coefficients_OIF, block.kernels, _pair(block.kernel_size)))
        if conv.bias is not None:
            conv.bias.copy_(bias)
    return conv.train(block.training)


def absorb_bias(model: nn.Module, name: str) -> None:
    """Take the bias of the convolution ``name`` into the batch norms that alone read it, where it is known which do.

    So the dense form of a network that has no such bias has none either, and stock code loads it. Exact but for the
    rounding of the running means; in training mode a batch norm does not see a constant anyway.
    """
    conv, norms = cast(nn.Conv2d, model.get_submodule(name)), _norms_reading(model, name)
    bias = conv.bias
    if bias is None or not norms or not all(isinstance(norm.running_mean, Tensor) for norm in norms):
        return
    for norm in norms:
        mean = cast(Tensor, norm.running_mean)
        mean.copy_((mean.double() - bias.detach().double()).to(mean.dtype))
    conv.bias = None


def _norms_reading(model: nn.Module, name: str) -> list[nn.BatchNorm2d]:
    """The batch norms whose inputs are the output of a layer, or that plus something else; none where unknown."""
    place, _, child = name.rpartition(".")
    parent: Any = model.get_submodule(place)
    after: Any = None
    if isinstance(parent, nn.Sequential):
        after = dict(zip(parent._modules, [*parent][1:], strict=False)).get(child)
    elif isinstance(parent, timm.models.resnet.ResNet | torchvision.models.ResNet) and child == "conv1":
        after = parent.bn1
    elif child == "stem" and hasattr(parent, "norms_reading_the_stem"):
        return list(parent.norms_reading_the_stem())
    return [after] if isinstance(after, nn.BatchNorm2d) else []


def _pair(value: Any) -> tuple[int, int]:
    first, second = value
    return first, second
