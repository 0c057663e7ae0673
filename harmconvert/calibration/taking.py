"""Take the inputs of several layers in one run of a network in which no refit changes what the later ones are fed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from torch import nn

from ..layers.harmonic import HarmonicMixin
from ..network.distributed import all_or_none, any_rank
from .capture import ConvCall, explained, watch_convolutions
from .equations import Layer
from .inputs import Batch
from .layers import Kernel, refittable_bias
from .responses import outputs, pick_positions
from .sites import Site, rows_of
from .solvers import NormalEquations, Samples

Equations = NormalEquations | Samples


class Taking:
    """One site's equations as the inputs come in, one for each part of them. The layer's own answers are their targets,
    so that their residuals are zero.

    ``hold`` makes equations of a layer; ``bytes`` are what they and what is done with them take; ``wanted`` positions
    are sampled of each row of a map.
    """

    def __init__(
        self,
        site: Site,
        converted: nn.Module,
        layers: Mapping[str, HarmonicMixin],
        seed: int,
        wanted: int,
        hold: Callable[[Layer], Equations],
        bytes: int,
    ) -> None:
        self.site, self.seed, self.wanted, self.hold, self.bytes = site, seed, wanted, hold, bytes
        self.modules = {name: layers[name] for name in site.names}
        self.fits_bias = refittable_bias(converted, list(self.modules.values())) is not None
        self.parts: dict[int, Equations] = {}
        self.why: str | None = None

    def take(self, part: int, name: str, call: ConvCall | None, batch: Batch) -> None:
        """Take in one call."""
        if self.why is not None:
            return
        try:
            if call is None:
                raise ValueError("it convolves otherwise than once in a forward")
            if part not in self.parts:
                layer = Kernel.of(self.modules[name], call).layer(call, self.fits_bias, self.wanted, self.seed)
                self.parts[part] = self.hold(layer)
            examples = rows_of(batch, len(call.input))
            picks = pick_positions(examples, call.output.shape[2:], self.wanted, self.seed)
            self.parts[part].add(call, outputs(call.output, picks), examples)
        except Exception as error:  # one layer's trouble must not cost the others theirs
            self.why = explained(error)

    def taken(self, parts: int) -> list[Equations] | str:
        """The equations of so many parts, summed over the processes; or why there are none."""
        if any_rank(len(self.parts) < parts or self.why is not None):
            return self.why or "another process could not take in its inputs"
        found = [self.parts[part] for part in range(parts)]
        for problem in found:
            problem.reduce()
        if not all(problem.finite for problem in found):
            return "its activations are NaN or infinite on the calibration inputs"
        return found


def taken_together(
    converted: nn.Module, waiting: Sequence[Taking], parts: Sequence[Sequence[Batch]], memory: int, complete: bool
) -> Iterator[tuple[Taking, list[Equations] | str]]:
    """Each site with its equations on each of ``parts`` of the inputs, in the order given; the network is run for as
    many at once as ``memory`` bytes hold, and not interrupted where ``complete``.

    Raises:
        UsageError: the network does not run on the inputs.
    """
    while waiting:
        together = _first(waiting, memory)
        waiting = waiting[len(together) :]
        all_or_none(
            partial(_take_in, converted, together, parts, complete),
            RuntimeError("another process could not take in its inputs"),
        )
        while together:
            taking = together.pop(0)  # and let go, once its equations are used
            yield taking, taking.taken(len(parts))


def _take_in(
    converted: nn.Module, together: Sequence[Taking], parts: Sequence[Sequence[Batch]], complete: bool
) -> None:
    owner = {name: taking for taking in together for name in taking.modules}
    modules = {name: taking.modules[name] for name, taking in owner.items()}
    calls = sum(len(taking.site.calls) for taking in together)
    for part, batches in enumerate(parts):
        for batch in batches:

            def see(name: str, call: ConvCall | None, part: int = part, batch: Batch = batch) -> None:
                owner[name].take(part, name, call, batch)

            watch_convolutions(converted, modules, batch.input, see, None if complete else calls)


def _first(waiting: Sequence[Taking], memory: int) -> list[Taking]:
    """As many of the first as ``memory`` holds the equations of, one at least."""
    used, count = 0, 0
    for taking in waiting:
        used += taking.bytes
        if count and used > memory:
            break
        count += 1
    return list(waiting[:count])
