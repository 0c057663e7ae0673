"""What a layer keeps on the precision axis, and the setting from which a plan is made."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...errors import Argument, UsageError, shortened
from ...network.layers import LayerInfo
from ..axes import Kept

# With more bits, integers could be too large for the tables of the entropy coder, and float16 is as small.
MOST_BITS = 10.0


@dataclass(frozen=True)
class Bits(Kept):
    """The number of bits per weight that the coded weights of a layer have on average.

    ``shared``: the number is the average over all layers with this setting, and the conversion chooses that of each
    layer. The plan of a finished conversion has no shared numbers.
    """

    axis: ClassVar[str] = "precision"
    bits: float
    shared: bool = False

    @property
    def whole(self) -> bool:
        return False

    @property
    def key(self) -> str:
        return f"{self.bits:g}"

    def to_json(self) -> dict[str, Any]:
        return {"bits": self.bits, **({"shared": True} if self.shared else {})}

    def __str__(self) -> str:
        return f"{self.bits:.3g} bits"


@dataclass(frozen=True)
class BitsSetting:
    """The setting of the precision axis: the average for all layers, or numbers by pattern (the last match decides).

    >>> BitsSetting.of(3), BitsSetting.of({"layer4.*": 2.5})
    (BitsSetting(average=3.0, patterns={}), BitsSetting(average=None, patterns={'layer4.*': 2.5}))
    """

    average: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, bits: float | Mapping[str, float]) -> BitsSetting:
        """Return the setting for the argument ``bits`` of `convert`.

        Raises:
            UsageError: a number is not above 0, or above `MOST_BITS`.
        """
        if isinstance(bits, Mapping):
            if not bits:
                raise UsageError(Argument("bits"), " names no pattern: give a number, or 'PATTERN=N'")
            return cls(None, {str(pattern): _checked(number, f"of {pattern!r} ") for pattern, number in bits.items()})
        return cls(_checked(bits, ""))

    def planned(self, layers: Sequence[LayerInfo]) -> dict[str, Kept]:
        """Return what each layer keeps, by name. Layers that share a weight keep the same.

        Raises:
            UsageError: a pattern matches no layer.
        """
        if self.average is not None:
            return {layer.name: Bits(self.average, shared=True) for layer in layers}
        first = {layer.name: layer.tied_to or layer.name for layer in layers}
        names, planned = list(first), dict[str, Kept]()
        for pattern, number in self.patterns.items():
            if not (matches := fnmatch.filter(names, pattern)):
                known = shortened(names, 5) or "none"
                raise UsageError(f"{pattern!r} matches no layer with weights to code (there are: {known})")
            planned.update(dict.fromkeys((first[name] for name in matches), Bits(number)))
        return {layer.name: planned[first[layer.name]] for layer in layers if first[layer.name] in planned}

    def __str__(self) -> str:
        if self.average is not None:
            return f"{self.average:g}"
        return ",".join(f"{pattern}={number:g}" for pattern, number in self.patterns.items())


def _checked(bits: Any, where: str) -> float:
    number = isinstance(bits, int | float) and not isinstance(bits, bool)
    if not (number and math.isfinite(bits) and 0 < bits <= MOST_BITS):
        what = f" {where}must be above 0 and at most {MOST_BITS:g} bits per weight; for 16 bits, give a dtype instead"
        raise UsageError(Argument("bits", bits), what)
    return float(bits)
