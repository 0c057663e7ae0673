"""The value of the space axis: the frequencies that a layer keeps, and their basis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar

from ...documents import check, count
from ...kernels.basis import Basis, Frequency, all_frequencies, check_frequencies, frequencies_below
from ..axes import Kept
from ..plan import LayerPlan, Plan


@dataclass(frozen=True)
class Frequencies(Kept):
    """The frequencies of its kernel that a layer keeps, in the order of `all_frequencies`, and their basis.

    >>> Frequencies((3, 3), ((0, 0), (0, 1), (1, 0))).levels
    2

    Raises:
        UsageError: a frequency is outside the kernel, or the frequencies are not distinct and in order.
    """

    axis: ClassVar[str] = "space"

    kernel_size: tuple[int, ...]
    frequencies: tuple[Frequency, ...]
    basis: Basis = field(default_factory=Basis)

    def __post_init__(self) -> None:
        check_frequencies(self.kernel_size, self.frequencies)

    @classmethod
    def below(cls, kernel_size: tuple[int, ...], levels: int, basis: Basis) -> Frequencies:
        """Return the frequencies of the lowest ``levels``."""
        return cls(kernel_size, frequencies_below(kernel_size, levels), basis)

    @property
    def whole(self) -> bool:
        """Return whether every frequency is kept."""
        return len(self.frequencies) == prod(self.kernel_size)

    @property
    def levels(self) -> int | None:
        """Return the literal lambda that keeps exactly these frequencies, or None if there is none."""
        levels = sum(self.frequencies[-1]) + 1
        return levels if self.frequencies == frequencies_below(self.kernel_size, levels) else None

    @property
    def key(self) -> str:
        """Return the frequencies in the notation of score files: ``0-0 0-1``."""
        return " ".join("-".join(map(str, f)) for f in self.frequencies)

    def part_of(self, total: int) -> int:
        """Return the number of kept frequencies."""
        return len(self.frequencies)

    @property
    def share(self) -> float:
        return len(self.frequencies) / prod(self.kernel_size)

    @property
    def contexts(self) -> Mapping[str, str]:
        """Return the context of the coefficients: with other frequencies or another basis they make another kernel."""
        return {"coefficients": f" of {self.basis}, {self.frequencies}"}

    def to_json(self) -> dict[str, Any]:
        """Return a dict for JSON."""
        return {
            "frequencies": [list(f) for f in self.frequencies],
            "basis": self.basis.name,
            "normalization": self.basis.normalization,
        }

    @classmethod
    def from_json(cls, data: Any, kernel_size: tuple[int, ...]) -> Frequencies:
        """Read the result of `to_json`; raise ValueError, KeyError or UsageError if it is not valid."""
        check(data, {"frequencies": [[count]], "basis": str, "normalization": str}, "space")
        basis = Basis(str(data.get("basis", "dct")), str(data.get("normalization", "ortho")))
        return cls(kernel_size, tuple(map(tuple, data["frequencies"])), basis)

    def __str__(self) -> str:
        return f"keeps {len(self.frequencies)} of {prod(self.kernel_size)}"


def from_version_1(layer: Mapping[str, Any], plan: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a layer of a plan of format version 1, which has one basis for the whole plan, to version 2."""
    basis = {key: plan[key] for key in ("basis", "normalization") if key in plan}
    rest = {key: value for key, value in layer.items() if key != "frequencies"}
    return {**rest, "space": {"frequencies": layer["frequencies"], **basis}}


def cut_layer(
    name: str,
    kernel_size: tuple[int, ...],
    frequencies: tuple[Frequency, ...] | None = None,
    basis: Basis | None = None,
) -> LayerPlan:
    """Return the plan of one layer that keeps these frequencies (None: all)."""
    every = all_frequencies(kernel_size)
    kept = Frequencies(kernel_size, every if frequencies is None else frequencies, basis or Basis())
    return LayerPlan(name, kernel_size, (kept,))


def bases_of(plan: Plan) -> tuple[Basis, ...]:
    """Return the different bases of a plan's layers, in order; the default basis if no layer has one."""
    return tuple(dict.fromkeys(kept.basis for kept in plan.on("space").values())) or (Basis(),)


def normalizations_text(plan: Plan) -> str:
    """Return the normalizations of a plan's bases, for tables."""
    return ", ".join(dict.fromkeys(basis.normalization for basis in bases_of(plan)))


def bases_text(plan: Plan) -> str:
    """Return the names of a plan's bases, for tables.

    >>> bases_text(Plan((cut_layer("a", (3, 3), basis=Basis("haar")), cut_layer("b", (3, 3)))))
    'haar, dct'
    """
    return ", ".join(dict.fromkeys(basis.name for basis in bases_of(plan)))
