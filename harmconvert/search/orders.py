"""In what order each layer can do without its frequencies: by output error on images, or by energy without them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from ..calibration import CalibrationSettings, Progress, memory_for
from ..calibration.inputs import CalibrationSet
from ..calibration.moments import Moments, response_moments
from ..kernels.basis import Basis, Frequency, all_frequencies
from ..layers.harmonic import HarmonicMixin
from ..network.distributed import from_first_rank
from ..network.layers import convolutions
from .choices import Item
from .elimination import eliminate
from .energy import energy_scores

BY_ERROR = "output error"
APART = "output error, channels taken one by one"
BY_ENERGY = "energy"


@dataclass(frozen=True)
class Order:
    """All frequencies of a layer, the first to be cut first, and what told: the output error, the same with input
    channels taken as uncorrelated, or the energy of the coefficients, and then ``why``."""

    frequencies: tuple[Frequency, ...]
    by: str
    why: str | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict; inverse of `from_json`."""
        return {"frequencies": [list(f) for f in self.frequencies], "by": self.by, "why": self.why}

    @classmethod
    def from_json(cls, data: Any) -> Order:
        """Read what `to_json` wrote; raises KeyError, TypeError or ValueError where it is something else."""
        return cls(tuple(tuple(map(int, f)) for f in data["frequencies"]), str(data["by"]), data["why"])


def orders_by_energy(
    model: nn.Module, items: Sequence[Item], family: Basis, why: str | None = None
) -> Iterator[tuple[Item, Order]]:
    """Orders by the energy that each frequency holds (`energy_scores`): kernels of the basis are orthogonal, so the
    energies of several add up and each set of the chain is the best of its size."""
    for item in items:
        every = all_frequencies(item.kernel_size)
        without = [tuple(f for f in every if f != cut) for cut in every]
        scores = energy_scores(model, item.names, without, family) if len(every) > 1 else [0.0]
        order = sorted(range(len(every)), key=lambda index: (scores[index], -index))
        yield item, Order(tuple(every[index] for index in order), BY_ENERGY, why)


def orders_by_error(
    model: nn.Module,
    whole: nn.Module,
    items: Sequence[Item],
    family: Basis,
    data: CalibrationSet,
    settings: CalibrationSettings,
    progress: Progress,
) -> Iterator[tuple[Item, Order]]:
    """Orders by what each layer's output loses (`eliminate`), all other layers whole; by energy where a layer cannot be
    refitted.

    ``whole`` is ``model`` in harmonic form, nothing cut.
    """
    convs = convolutions(whole)
    layers = {name: cast(HarmonicMixin, convs[name]) for item in items for name in item.names}
    memory = memory_for(whole, settings)
    left = {name: item for item in items for name in item.names}
    progress(0, len(items), "ordering frequencies")
    for names, found in response_moments(whole, layers, data, settings.seed, memory):
        item = left.get(names[0])
        if item is None:
            continue  # another layer with the same coefficients has spoken
        if isinstance(found, Moments):
            every = all_frequencies(item.kernel_size)
            # Rounding may differ between processes, and all must choose from the same sets.
            order = from_first_rank(eliminate(found.gram, found.coefficients, len(every)).order)
            yield item, Order(tuple(every[index] for index in order), APART if found.apart else BY_ERROR)
        else:
            yield from orders_by_energy(model, [item], family, found)
        left = {name: other for name, other in left.items() if other is not item}
        progress(len(items) - len({id(other) for other in left.values()}), len(items), f"ordered {names[0]}")
    rest = list({id(item): item for item in left.values()}.values())
    yield from orders_by_energy(model, rest, family, "it does not run on the calibration inputs")
