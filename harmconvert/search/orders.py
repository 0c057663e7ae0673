"""Order the frequencies of each layer by how much it needs them: by output error on images, or by energy without them.

This is the only part of the search that knows the space axis: it adds sets of frequencies that are not the lowest to a
layer's choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import nn

from ..calibration import CalibrationSettings, Progress, memory_for
from ..calibration.inputs import CalibrationSet
from ..calibration.moments import Moments, response_moments
from ..errors import Argument, InputError
from ..kernels.basis import Frequency
from ..kernels.elimination import eliminate
from ..network.distributed import from_first_rank
from ..network.layers import harmonic_layers
from ..plan import Frequencies
from .choices import Choice, Item
from .energy import energy_scores

BY_ERROR = "output error"
APART = "output error, channels taken one by one"
BY_ENERGY = "energy"
# Most sizes of the sets that are chosen frequency by frequency: each set needs a probe, and large kernels have dozens.
MOST_SIZES = 12


@dataclass(frozen=True)
class Order:
    """All frequencies of a layer, in the order in which they are cut.

    ``by`` names the criterion: the output error, the output error with input channels taken as uncorrelated, or the
    energy of the coefficients. In the last case, ``why`` says why the output error was not used.
    """

    frequencies: tuple[Frequency, ...]
    by: str
    why: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict; inverse of `from_json`."""
        return {"frequencies": [list(f) for f in self.frequencies], "by": self.by, "why": self.why}

    @classmethod
    def from_json(cls, data: Any) -> Order:
        """Return the order that `to_json` wrote; raise KeyError, TypeError or ValueError for other data."""
        return cls(tuple(tuple(map(int, f)) for f in data["frequencies"]), str(data["by"]), data["why"])


def whole_of(item: Item) -> Frequencies | None:
    """Return all frequencies of an item's layers; None where the layers have no space axis."""
    return cast("Frequencies | None", next((kept for kept in item.choices[0] if kept.axis == "space"), None))


def with_order(item: Item, order: Sequence[Frequency]) -> Item:
    """Return the item with more choices: the sets that are left when the first frequencies of ``order`` are cut.

    There is one set for each size; for large kernels, at most `MOST_SIZES` sets.

    Raises:
        InputError: the order (it may come from a file) does not have each frequency of the item exactly once.
    """
    whole = whole_of(item)
    if whole is None:
        return item
    every = whole.frequencies
    if sorted(order) != sorted(every):
        what = f"the order of the frequencies of {item.names[0]} lacks some or has others"
        raise InputError(what, ": remove ", Argument("probes"))
    count = len(order)
    steps = range(MOST_SIZES)
    sizes = (
        {round(1 + (count - 1) * step / (MOST_SIZES - 1)) for step in steps} if count > MOST_SIZES else range(1, count)
    )
    chain = [replace(whole, frequencies=tuple(sorted(order[count - size :], key=every.index))) for size in sizes]
    # Where the share of another axis is known, these sets are tried only with everything of that axis.
    others = [c for c in item.choices if all(k.whole or k.share is None for k in c if k.axis != whole.axis)]
    choices = [_with_frequencies(choice, kept) for kept in chain for choice in others]
    # The sort is stable, so the choice that keeps everything stays the first.
    distinct = dict.fromkeys([*item.choices, *choices])
    return replace(item, choices=tuple(sorted(distinct, key=_frequency_count, reverse=True)))


def _with_frequencies(choice: Choice, frequencies: Frequencies) -> Choice:
    return tuple(frequencies if kept.axis == frequencies.axis else kept for kept in choice)


def _frequency_count(choice: Choice) -> int:
    return next(len(cast(Frequencies, kept).frequencies) for kept in choice if kept.axis == "space")


def orders_by_energy(model: nn.Module, items: Sequence[Item], why: str | None = None) -> Iterator[tuple[Item, Order]]:
    """Yield each item with the order of its frequencies by energy (`energy_scores`).

    The functions of a basis are orthogonal, so energies add up: each set of the order is the best one of its size.
    """
    for item in items:
        whole = cast(Frequencies, whole_of(item))
        every = whole.frequencies
        without = [
            _with_frequencies(item.choices[0], replace(whole, frequencies=tuple(f for f in every if f != cut)))
            for cut in every
        ] if len(every) > 1 else []  # fmt: skip
        scores = energy_scores(model, item.names, without) if without else [0.0]
        order = sorted(range(len(every)), key=lambda index: (scores[index], -index))
        yield item, Order(tuple(every[index] for index in order), BY_ENERGY, why)


def orders_by_error(
    model: nn.Module,
    whole: nn.Module,
    items: Sequence[Item],
    data: CalibrationSet,
    settings: CalibrationSettings,
    progress: Progress,
) -> Iterator[tuple[Item, Order]]:
    """Yield each item with the order of its frequencies by output error (`eliminate`); all other layers are whole.

    Layers that cannot be refitted are ordered by energy instead.

    Args:
        whole: ``model`` in harmonic form, with all frequencies.
    """
    harmonic = harmonic_layers(whole)
    layers = {name: harmonic[name] for item in items for name in item.names}
    memory = memory_for(whole, settings)
    left = {name: item for item in items for name in item.names}
    progress(0, len(items), "ordering frequencies")
    for names, moments in response_moments(whole, layers, data, settings.seed, memory):
        item = left.get(names[0])
        if item is None:
            continue  # another layer with the same coefficients gave the order
        if isinstance(moments, Moments):
            every = cast(Frequencies, whole_of(item)).frequencies
            # Rounding may differ between processes, but all must choose from the same sets.
            order = from_first_rank(eliminate(moments.gram, moments.coefficients, len(every)).order)
            yield item, Order(tuple(every[index] for index in order), APART if moments.apart else BY_ERROR)
        else:
            yield from orders_by_energy(model, [item], moments)
        left = {name: other for name, other in left.items() if other is not item}
        progress(len(items) - len({id(other) for other in left.values()}), len(items), f"ordered {names[0]}")
    rest = list({id(item): item for item in left.values()}.values())
    yield from orders_by_energy(model, rest, "it does not run on the calibration inputs")
