"""The integers and steps of a quantised tensor."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from .entropy import PER_OCTAVE, Integers

# The steps of a stream are 2^(index / PER_OCTAVE). The range holds every float64.
MOST_INDEX = PER_OCTAVE * 1100
_ROOTS = np.array([2.0 ** (quarter / PER_OCTAVE) for quarter in range(PER_OCTAVE)])


@dataclass(frozen=True)
class Layout:
    """How the values of a tensor are arranged in groups, rows (output channels) and columns (inputs).

    A tensor of shape (A, B, K1, K2, ...) has F = K1 K2 ... frequencies. It has A / groups rows and B F columns in each
    group; if ``transposed``, B rows and A / groups F columns.
    """

    shape: tuple[int, ...]
    groups: int = 1
    transposed: bool = False

    @property
    def frequencies(self) -> int:
        """Return the number F of columns of each input channel."""
        return prod(self.shape[2:])

    @property
    def rows(self) -> int:
        """Return the number of rows in each group."""
        return self._second if self.transposed else self.shape[0] // self.groups

    @property
    def channels(self) -> int:
        """Return the number of input channels in each group."""
        return self.shape[0] // self.groups if self.transposed else self._second

    @property
    def columns(self) -> int:
        """Return the number of columns in each group."""
        return self.channels * self.frequencies

    @property
    def _second(self) -> int:
        return self.shape[1] if len(self.shape) > 1 else 1

    def to_matrices(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return values of the tensor's shape as (groups, rows, columns).

        >>> Layout((4, 3, 2), groups=2).to_matrices(np.zeros((4, 3, 2))).shape
        (2, 2, 6)
        """
        if self.transposed:
            blocks = values.reshape(self.groups, self.channels, self.rows, self.frequencies).swapaxes(1, 2)
            return blocks.reshape(self.groups, self.rows, self.columns)
        return values.reshape(self.groups, self.rows, self.columns)

    def from_matrices(self, matrices: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return (groups, rows, columns) in the tensor's shape; inverse of `to_matrices`."""
        if self.transposed:
            blocks = matrices.reshape(self.groups, self.rows, self.channels, self.frequencies).swapaxes(1, 2)
            return blocks.reshape(self.shape)
        return matrices.reshape(self.shape)


@dataclass(frozen=True)
class Quantised:
    """A quantised tensor: value = integer * 2^(column step / 4) * 2^(row step / 4) * row scale.

    Args:
        integers_GON: int32, (groups, rows, columns).
        column_steps_GN: indices of the steps of the columns.
        row_steps_GO: indices of the steps of the rows; None: 0.
        scales_GO: float32, a factor for each row; None: 1.
    """

    integers_GON: Integers
    column_steps_GN: Integers
    row_steps_GO: Integers | None = None
    scales_GO: npt.NDArray[np.float32] | None = None

    def steps(self) -> npt.NDArray[np.float64]:
        """Return the step of each integer, without the scales: (groups, rows, columns)."""
        steps_GON = np.repeat(step_sizes(self.column_steps_GN)[:, None], self.integers_GON.shape[1], 1)
        return steps_GON if self.row_steps_GO is None else steps_GON * step_sizes(self.row_steps_GO)[..., None]

    def values(self) -> npt.NDArray[np.float64]:
        """Return the values (groups, rows, columns). Each product is rounded once, in the order of the formula."""
        values_GON = self.integers_GON * step_sizes(self.column_steps_GN)[:, None]
        if self.row_steps_GO is not None and self.row_steps_GO.any():
            values_GON *= step_sizes(self.row_steps_GO)[..., None]
        if self.scales_GO is not None:
            values_GON *= self.scales_GO.astype(np.float64)[..., None]
        return values_GON


def step_sizes(indices: Integers) -> npt.NDArray[np.float64]:
    """Return 2^(index / 4).

    >>> step_sizes(np.array([-4, 0, 2])).tolist()
    [0.5, 1.0, 1.4142135623730951]
    """
    return np.ldexp(_ROOTS[indices % PER_OCTAVE], indices // PER_OCTAVE)


def step_indices(steps: npt.NDArray[np.float64]) -> Integers:
    """Return the indices of the nearest steps on the logarithmic grid."""
    return np.rint(PER_OCTAVE * np.log2(steps)).astype(np.int32)
