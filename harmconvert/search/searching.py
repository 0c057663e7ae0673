"""Run the search on a network: list the choices, score them, and try whole plans."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from ..arguments import UNITS, Budget
from ..calibration import Calibration, CalibrationContext, CalibrationSettings, Progress, calibrate, memory_for
from ..calibration.cuts import whole_layers
from ..errors import Argument, InputError, UsageError, shortened
from ..kernels.basis import Basis
from ..network.distributed import from_first_rank
from ..network.forms import run_times
from ..network.layers import LayerInfo, weighted_layers
from ..network.running import unchanged
from ..network.tracing import Trace
from ..plan import AXES, Plan, apply_plan, make_plan
from .choices import Choice, Item, costs_of, items_of, whole_plan, without_unused_axes
from .choosing import SearchSpace, choose, limit_of
from .energy import energy_scores
from .latency import latency_costs
from .orders import BY_ERROR, Order, orders_by_energy, orders_by_error, whole_of, with_order
from .probes import Probes, key_of, name_of, name_of_plan
from .records import Search, SearchSettings

OTHERS: tuple[str | int, ...] = ("progressive", 4, 3, 2, 1)


@dataclass(frozen=True)
class Scope:
    """Which layers a search may cut, and in which basis; the same arguments as those of `convert`."""

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    basis: Basis = field(default_factory=Basis)


@dataclass(frozen=True)
class Converted:
    """A network converted by a plan, and the record of its calibration (None: it was not calibrated)."""

    plan: Plan
    model: nn.Module
    calibration: Calibration | None = None


@dataclass
class Searching:
    """One search for a plan within a budget.

    ``images`` are the batches on which cuts are scored; without them (None), cuts are scored by their energy.
    """

    model: nn.Module
    budget: Budget
    layers: Sequence[LayerInfo]
    trace: Trace | None
    scope: Scope
    images: Sequence[Any] | None
    settings: CalibrationSettings
    search: SearchSettings
    example_input: Any = None
    progress: Progress = lambda done, total, what: None

    def __call__(self) -> tuple[Converted, Search]:
        """Return the network converted by the best plan, and the record of the search.

        Raises:
            UsageError: the budget cannot be met, or the file of probes belongs to other weights, inputs or settings.
            InputError: no layer may be cut, or the outputs cannot be compared.
        """
        with unchanged(self.model, weights=False):  # the latency budget runs the network here
            return self._search()

    def _search(self) -> tuple[Converted, Search]:
        counted = {"macs": "counts multiply-adds", "latency": "is measured"}.get(self.budget.unit)
        if counted and self.trace is None:
            what = f"the budget {self.budget} {counted}: give an example input ("
            raise UsageError(what, Argument("example_input"), ")")
        whole, items = self._choices()
        costs = self._costs(whole, items)
        limit, smallest = limit_of(self.budget, *costs)
        self.search.say(
            f"{UNITS[self.budget.unit]}: {costs[0]:,} now, {smallest:,} ({smallest / costs[0]:.1%}) at least; "
            f"{self.budget} is {limit:,} ({limit / costs[0]:.1%})"
        )
        probes = None
        if self.images is not None:
            path = Path(self.search.probes) if self.search.probes else None
            probes = Probes.opened(path, key_of(self.model, self.images, self.settings, self.scope.basis))
        notes: tuple[str, ...] = ()
        if self.search.frequencies == "best":
            items, notes = self._with_orders(whole, items, probes)
            costs = self._costs(whole, items)
        if probes is None:
            scores = [energy_scores(self.model, item.names, item.choices) for item in items]
            search_space = SearchSpace(whole, items, *costs, scores, "energy")
            plan, record = choose(self.budget, search_space, self._policies(), None, 0)
            converted = self._convert(plan, None, self.settings)
        else:
            scores = self._measured_scores(whole, items, probes)
            converted, record = self._try_plans(SearchSpace(whole, items, *costs, scores, "divergence"), probes)
        return converted, replace(record, frequencies=self.search.frequencies, notes=notes)

    def least_share(self) -> float:
        """Return the smallest share that can be met, rounded up to 1e-6; raise InputError if no layer may be cut."""
        whole, changes = self._costs(*self._choices())
        return math.ceil(1e6 * limit_of(self.budget, whole, changes)[1] / whole) / 1e6

    def _convert(self, plan: Plan, known: CalibrationContext | None, settings: CalibrationSettings) -> Converted:
        """Return the network converted by a plan, and calibrated where ``known`` has calibration inputs."""
        converted = apply_plan(self.model, plan)
        if known is None:
            return Converted(plan, converted)
        return Converted(plan, converted, calibrate(self.model, converted, plan, known, settings))

    def _policies(self) -> dict[str, Plan]:
        """Return the plans of some lambda policies, which are tried as well."""
        plans: dict[str, Plan] = {}
        for policy in OTHERS:
            with suppress(UsageError):  # "progressive" needs map sizes, which only a trace has
                plans[f"lambda {policy}"] = make_plan(
                    self.layers, policy, self.scope.include, self.scope.exclude, self.scope.basis
                )
        return plans

    def _choices(self) -> tuple[Plan, tuple[Item, ...]]:
        axes = tuple(AXES) if self.search.axes is None else self.search.axes
        whole = whole_plan(self.layers, self.scope.include, self.scope.exclude, self.scope.basis, axes)
        ties = {layer.name: layer.tied_to for layer in self.layers if layer.tied_to}
        items = items_of(whole, ties, self.budget.unit, axes)
        if not items:
            what = f"no layer of this {type(self.model).__name__} may be cut: "
            raise InputError(what, Argument("include"), " names those that should")
        return whole, items

    @cached_property
    def _known(self) -> CalibrationContext:
        """Return what all calibrations of this search share."""
        assert self.images is not None
        return CalibrationContext.of(self.model, self.images, self.settings)

    @cached_property
    def _whole_seconds(self) -> float:
        """Measure a forward pass in the faster memory format; measure it once, because the budget is a share of it."""
        return min(run_times(self.model, self.example_input).values())

    def _costs(self, whole: Plan, items: Sequence[Item]) -> tuple[int, list[list[int]]]:
        """Return the cost of the whole network and the change by each choice of each item, in the budget's unit."""
        if self.budget.unit == "latency":
            assert self.trace is not None
            costs = latency_costs(self.model, items, self.example_input, self.trace, self._whole_seconds, self.progress)
            return from_first_rank(costs)
        return costs_of(self.model, whole, items, self.budget.unit, self.trace)

    def _with_orders(
        self, whole: Plan, items: Sequence[Item], probes: Probes | None
    ) -> tuple[tuple[Item, ...], tuple[str, ...]]:
        """Return the items with more sets of frequencies to choose from, and notes on orders not by output error.

        Orders that the file of probes has are not computed again.
        """
        known = probes.orders if probes is not None else {}
        missing = [item for item in items if item.names[0] not in known and whole_of(item)]
        orders: Iterable[tuple[Item, Order]] = ()
        if self.images is None:
            orders = orders_by_energy(self.model, missing, "there are no images")
        elif missing:
            uncut = self._known.runnable(apply_plan(self.model, whole))
            orders = orders_by_error(
                self._known.original, uncut, missing, self._known.data, self.settings, self.progress
            )
        for item, order in orders:
            known[item.names[0]] = order
            if probes is not None:
                probes.keep()
        more = [with_order(i, known[i.names[0]].frequencies) if i.names[0] in known else i for i in items]
        return tuple(more), _order_notes(items, known)

    def _measured_scores(self, whole: Plan, items: Sequence[Item], probes: Probes) -> list[list[float]]:
        """Return the divergence of each choice of each item, all other layers whole; measure what the file lacks."""
        names = [[name_of(item.names, choice) for choice in item.choices[1:]] for item in items]
        missing = [item for item, row in zip(items, names, strict=True) if not probes.single.keys() >= set(row)]
        total, done = sum(map(len, names)), sum(name in probes.single for row in names for name in row)
        if missing:
            self.progress(done, total, "recording the inputs of layers")
        for item, known in self._with_inputs(whole, missing):
            for choice in item.choices[1:]:
                if (name := name_of(item.names, choice)) in probes.single:
                    continue
                self.progress(done, total, f"probing {item.names[0]}")
                done += 1
                probes.single[name] = self._divergence(_plan_of_item(whole, item, choice), known, batch_norm=False)[1]
                probes.keep()
        self.progress(total, total, "all layers probed")
        return [[0.0, *(probes.single[name] for name in row)] for row in names]

    def _with_inputs(self, whole: Plan, items: Sequence[Item]) -> Iterator[tuple[Item, CalibrationContext]]:
        """Yield each item with the data from which all its probes are refitted.

        One pass over the uncut network gives the data of all items that are a single layer.
        """
        if not items:
            return
        uncut = self._known.runnable(apply_plan(self.model, whole))
        left = {item.names[0]: item for item in items}
        alone = {name for name, item in left.items() if len(item.names) == 1}
        layers = {name: layer for name, layer in weighted_layers(uncut).items() if name in alone}
        memory = memory_for(uncut, self.settings)
        for name, layer in whole_layers(uncut, layers, self._known.data, self.settings.seed, memory):
            yield left.pop(name), replace(self._known, whole={name: layer}, probe=True)
        yield from ((item, replace(self._known, probe=True)) for item in left.values())

    def _try_plans(self, search_space: SearchSpace, probes: Probes) -> tuple[Converted, Search]:
        """Return the network converted by the best of the plans that are measured as a whole, and a record of it."""
        best: tuple[float, Converted | None] = (math.inf, None)
        done = 0

        def measure(plan: Plan) -> float:
            nonlocal best, done
            self.progress(done, self.search.trials, "trying whole plans")
            done += 1
            name = name_of_plan(plan)
            if name not in probes.whole:
                converted, divergence = self._divergence(plan, self._known, self.settings.batch_norm)
                if divergence < best[0]:
                    best = (divergence, converted)  # only the best network stays in memory
                probes.whole[name] = divergence
                probes.keep()
            return probes.whole[name]

        plan, record = choose(self.budget, search_space, self._policies(), measure, self.search.trials)
        self.progress(self.search.trials, self.search.trials, "plan found")
        converted = best[1]
        if converted is None or converted.plan.layers != plan.layers:
            converted = self._convert(plan, self._known, self.settings)
        return replace(converted, plan=plan), record

    def _divergence(self, plan: Plan, known: CalibrationContext, batch_norm: bool) -> tuple[Converted, float]:
        converted = self._convert(plan, known, replace(self.settings, batch_norm=batch_norm))
        calibration = converted.calibration
        assert calibration is not None
        if plan.whole:
            return converted, 0.0
        if calibration.divergence is None:
            raise InputError(
                f"the outputs of this network cannot be compared on these images ({calibration.incomparable}), so "
                "plans cannot be compared: give two images or more, or leave the images out (then plans are compared "
                "by the energy that they cut)"
            )
        return converted, calibration.divergence


def _plan_of_item(whole: Plan, item: Item, choice: Choice) -> Plan:
    """Return a plan that has only the layers of one item."""
    layers = tuple(layer.keeping(*choice) for layer in whole.layers if layer.name in item.names)
    return without_unused_axes(replace(whole, layers=layers))


def _order_notes(items: Sequence[Item], orders: Mapping[str, Order]) -> tuple[str, ...]:
    """Return notes that name the layers whose frequencies were not ordered by output error, and say why."""
    layers: dict[str, list[str]] = {}
    for item in items:
        order = orders.get(item.names[0])
        if order is not None and order.by != BY_ERROR:
            layers.setdefault(order.by + (f" ({order.why})" if order.why else ""), []).append(item.names[0])
    return tuple(f"frequencies by {how}: {shortened(names, 3)}" for how, names in layers.items())
