"""The forms of one network (DESIGN 2): `fuse` gives the dense one."""

from __future__ import annotations

from functools import partial

from torch import nn

from .block import HarmonicBlock2d, absorb_bias, fold_block
from .conv import HarmonicMixin, to_dense
from .surgery import exchange, put_in_place


def fuse(model: nn.Module) -> nn.Module:
    """The dense form: a copy of ``model`` with plain convolutions that hold the merged kernels.

    Its state dict has the keys and shapes of the network that was converted. Parts that are not harmonic are copied;
    a `HarmonicBlock2d` folds into one convolution, which gains a bias where the block normalises and no batch norm
    behind it can take that.

    >>> from harmconvert.conv import to_harmonic
    >>> fuse(nn.Sequential(to_harmonic(nn.Conv2d(1, 2, 3))))
    Sequential(
      (0): Conv2d(1, 2, kernel_size=(3, 3), stride=(1, 1))
    )

    Raises:
        InputError: the network cannot be copied.
    """
    harmonic = [module for module in model.modules() if isinstance(module, HarmonicMixin)]
    dense = exchange(model, {conv: partial(to_dense, conv) for conv in harmonic})
    dense.__dict__.pop("harmconvert_calibration", None)  # it tells of coefficients, which are no more
    return _folded(dense)


def fold_blocks(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with a convolution in the place of each `HarmonicBlock2d`, all else as it is."""
    return _folded(exchange(model, {}))


def _folded(model: nn.Module) -> nn.Module:
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, HarmonicBlock2d)}
    for name, block in blocks.items():
        conv = fold_block(block)
        # Where the block replaced a convolution with a bias, the network has a place for one.
        model = put_in_place(model, block, conv)
        if block.mix.bias is None:
            absorb_bias(model, name)
    return model
