"""Entropy coding of integers: probability tables in fixed point, and one stream for many blocks of integers.

A table gives each integer from -m to m a weight, and the weights sum to 2^24. Only integer arithmetic touches the
stream, and the weights are computed in decimal arithmetic, so a stream means the same on every machine. The coder is
the asymmetric numeral system (Duda 2013) of the ``constriction`` library, with words of 32 bits and a state of 64.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import ROUND_HALF_EVEN, Context, Decimal
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import OutsideError

Integers = npt.NDArray[np.int32]

PRECISION = 24
TOTAL = 1 << PRECISION
# The largest magnitude of an integer, which bounds the size of a table.
MOST_MAGNITUDE = 8191
# A scale index k stands for the scale 2^((k - ZERO_SCALE) / PER_OCTAVE) of a distribution.
PER_OCTAVE = 4
ZERO_SCALE = 24
SCALES = 128
# The exponents of generalised Gaussian distributions, in quarters: 4 is a Laplace, 8 is a Gaussian distribution.
SHAPES = (2, 3, 4, 5, 6, 7, 8)
LAPLACE = 4

# 34 digits: two correct implementations could differ only where a weight is within 1e-26 of an integer.
_CONTEXT = Context(prec=34, rounding=ROUND_HALF_EVEN)


@lru_cache(maxsize=4096)
def table(scale: int, shape: int, largest: int) -> npt.NDArray[np.int64]:
    """Return the weights of the integers 0 to ``largest``; negative integers have the weights of their magnitudes.

    The weight of v > 0 is 1 + floor(p(v) (2^24 - n)) with n = 2 largest + 1 and p(v) = g(v) / (g(0) + 2 g(1) + ...),
    where g(v) = exp(-(v / s)^b), b = shape / 4 and s = 2^((scale - 24) / 4), and g(v) = 0 where the power is above 40.
    Zero has what is left of 2^24.

    >>> table(24, 4, 2).tolist()
    [8361728, 3076107, 1131637]

    Args:
        scale: index of the scale, from 0 to 127.
        shape: four times the exponent b, from 2 to 8.
        largest: the largest magnitude.
    """
    powers = [Decimal(1)]  # g(v)
    exponent = Decimal(shape) / 4
    log_scale = _CONTEXT.multiply(_log(2), Decimal(scale - ZERO_SCALE) / PER_OCTAVE)
    for value in range(1, largest + 1):
        power = _CONTEXT.exp(_CONTEXT.multiply(exponent, _CONTEXT.subtract(_log(value), log_scale)))
        if power > 40:
            break
        powers.append(_CONTEXT.exp(-power))
    whole = powers[0]
    for power in powers[1:]:
        whole = _CONTEXT.add(whole, _CONTEXT.multiply(2, power))
    free = _CONTEXT.divide(Decimal(TOTAL - (2 * largest + 1)), whole)
    weights = np.ones(largest + 1, np.int64)
    weights[1 : len(powers)] += np.array([int(_CONTEXT.multiply(power, free)) for power in powers[1:]], np.int64)
    weights[0] = TOTAL - 2 * int(weights[1:].sum())
    weights.flags.writeable = False
    return weights


@lru_cache(maxsize=MOST_MAGNITUDE + 1)
def _log(value: int) -> Decimal:
    return _CONTEXT.ln(Decimal(value))


def table_of_counts(counts: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return weights in proportion to counts: 1 + floor(count (2^24 - n) / sum); the first largest has the rest.

    >>> table_of_counts([1, 2, 1]).tolist()
    [4194304, 8388608, 4194304]
    """
    free, whole = TOTAL - len(counts), max(int(sum(map(int, counts))), 1)
    weights = np.array([1 + int(count) * free // whole for count in counts], np.int64)
    weights[int(weights.argmax())] += TOTAL - int(weights.sum())
    return weights


def both_signs(weights: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the weights of -m to m for weights of 0 to m."""
    return np.concatenate([weights[:0:-1], weights])


def bits(weights: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the length of the code of each integer of a table, in bits."""
    return PRECISION - np.log2(weights)


class Encoder:
    """Codes blocks of integers; `words` returns the stream, from which `Decoder` reads the blocks in the same order."""

    def __init__(self) -> None:
        self._blocks: list[tuple[Integers, npt.NDArray[np.int64]]] = []

    def add(self, values: Integers, weights: npt.NDArray[np.int64]) -> None:
        """Add a block of integers from -m to m, for weights of -m to m."""
        self._blocks.append((values, weights))

    def words(self) -> bytes:
        """Return the stream: words of 32 bits, little-endian."""
        stream = _stream()
        coder = stream.stack.AnsCoder()
        for values, weights in reversed(self._blocks):  # the coder is a stack
            if values.size and len(weights) > 1:  # a single possible integer needs no bits
                symbols = np.ascontiguousarray(values, np.int32).ravel() + len(weights) // 2
                coder.encode_reverse(symbols.astype(np.int32), _model(stream, weights))
        return bytes(coder.get_compressed().astype("<u4").tobytes())


class Decoder:
    """Decodes the blocks of a stream of `Encoder`.

    Raises:
        ValueError: the number of bytes is not that of whole words, or they are no stream.
    """

    def __init__(self, words: bytes) -> None:
        if len(words) % 4:
            raise ValueError(f"{len(words)} bytes are not whole words of 32 bits")
        self._stream = _stream()
        self._coder = self._stream.stack.AnsCoder(np.frombuffer(words, "<u4").astype(np.uint32))

    def take(self, count: int, weights: npt.NDArray[np.int64]) -> Integers:
        """Return the next block: ``count`` integers from -m to m, for weights of -m to m."""
        if not count or len(weights) == 1:
            return np.zeros(count, np.int32)
        symbols = self._coder.decode(_model(self._stream, weights), count)
        return np.asarray(symbols - len(weights) // 2, np.int32)

    def end(self) -> None:
        """Raise ValueError if the stream does not end here."""
        if not self._coder.is_empty():
            raise ValueError("the stream does not end where its last integer ends")


def _model(stream: Any, weights: npt.NDArray[np.int64]) -> Any:
    # constriction gives each symbol one part of 2^24 and divides the rest in proportion; these numbers make it exact.
    return stream.model.Categorical((weights - 1).astype(np.float64), perfect=False)


def _stream() -> Any:
    try:
        import constriction
    except ImportError as error:
        raise OutsideError(
            "quantised weights need the package constriction, which is not installed: pip install constriction"
        ) from error
    return constriction.stream
