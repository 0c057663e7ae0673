"""The forms of one network (DESIGN 2): `fuse` gives the dense one."""

from __future__ import annotations

from functools import partial

from torch import nn

from .block import fold_block
from .conv import HarmonicBlock2d, HarmonicMixin, to_dense
from .surgery import exchange, put_in_place


def fuse(model: nn.Module) -> nn.Module:
    """The dense form: a copy of ``model`` with plain convolutions that hold the merged kernels.

    Its state dict has the keys and shapes of the network that was converted. Parts that are not harmonic are copied;
    a `HarmonicBlock2d` folds into one convolution, which gains a bias where the block normalises.

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
    for block in [module for module in dense.modules() if isinstance(module, HarmonicBlock2d)]:
        dense = put_in_place(dense, block, fold_block(block))
    dense.__dict__.pop("harmconvert_calibration", None)  # it tells of coefficients, which are no more
    return dense
