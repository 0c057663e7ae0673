"""Refit the layers of a network one after the other, each fed by those already refitted."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from ..errors import UsageError
from ..layers.harmonic import HarmonicMixin
from ..network.distributed import all_or_none
from .capture import ConvCall, explained
from .cuts import WholeLayer
from .equations import Layer, Problem
from .holding import Forwards
from .inputs import Batch, CalibrationSet
from .layers import Choice, Kernel, RefitError, choose, in_range, refittable_bias
from .records import ENOUGH_POSITIONS, CalibrationSettings, LayerCalibration
from .sites import Site, Targets, rows_of
from .solvers import Operator

# Relative to the mean square of the responses; strongest first. At 10 hardly anything moves.
DAMPINGS = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
# No damping below this over the positions per unknown: the fewer there are, the less the fit is believed.
DAMPING_TIMES_POSITIONS = 1e-3


class Refit:
    """Refits sites of ``converted`` in place, in the order given, on what ``forwards`` shows that they are fed; layers
    in ``whole`` from what is known of them."""

    def __init__(
        self,
        converted: nn.Module,
        layers: dict[str, HarmonicMixin],
        targets: Targets,
        data: CalibrationSet,
        settings: CalibrationSettings,
        memory: int,
        forwards: Forwards,
        whole: Mapping[str, WholeLayer],
    ) -> None:
        self.converted, self.layers, self.targets = converted, layers, targets
        self.data, self.settings, self.memory = data, settings, memory
        self.forwards, self.whole, self.probe = forwards, whole, data.probe

    def __call__(self, site: Site) -> LayerCalibration:
        """Refit one site; one that cannot be keeps the projection and says why."""
        start = time.perf_counter()
        enough = ENOUGH_POSITIONS * site.unknowns / site.positions * self.data.total / max(self.data.fit_total, 1)
        record = LayerCalibration(
            ", ".join(site.names),
            "projection",
            positions=site.sampled * self.data.fit_total,
            unknowns=site.unknowns,
            inputs=self.data.total,
            inputs_enough=math.ceil(enough),
        )
        try:
            record = self._refit(site, record)
        except RefitError as error:
            record = replace(record, why=str(error))
        except Exception as error:  # one layer's trouble must not cost the others their refit
            record = replace(record, decision="failed", why=explained(error))
        finally:
            self.targets.forget(site)
        return replace(record, seconds=time.perf_counter() - start)

    def _refit(self, site: Site, record: LayerCalibration) -> LayerCalibration:
        if self.data.fit_total == self.data.total:
            return replace(record, why=f"{self.data.nothing_held} to choose on")
        modules = {name: self.layers[name] for name in site.names}
        bias = refittable_bias(self.converted, list(modules.values()))
        kernel, layer = all_or_none(
            lambda: self._layer(site, modules, bias), RuntimeError("another process could not look at it")
        )
        fit, held = self._problems(site, layer)
        if not (fit.finite and held.finite):
            raise UsageError("its activations are NaN or infinite on the calibration inputs")
        choice = choose(fit, held, dampings(self.settings, fit.count / layer.unknowns))
        if choice.change is not None:
            _write(kernel, layer, choice, bias)
        return replace(
            record,
            decision=choice.decision,
            solver=fit.name,
            damping=choice.change.damping if choice.change else None,
            condition=fit.condition,
            error_before=choice.error_before,
            error_after=choice.error_after,
            positions=fit.count,
            inputs=fit.inputs + held.inputs,
            why=None if choice.change else "nothing lowers its error on held-back inputs",
        )

    def _layer(self, site: Site, modules: dict[str, HarmonicMixin], bias: nn.Parameter | None) -> tuple[Kernel, Layer]:
        """How the layer makes its kernel, seen in one forward of one example."""
        seen: list[tuple[str, ConvCall | None]] = []
        self.forwards.watch(site.names, self.probe, lambda *call: seen.append(call), len(site.calls))
        calls = [(name, call) for name, call in seen if call is not None]
        kernels = [Kernel.of(modules[name], call) for name, call in calls]
        kinds = {(call.groups, call.transposed, k.factor is None) for k, (_, call) in zip(kernels, calls, strict=True)}
        if len(kinds) != 1 or (len(modules) > 1 and kernels[0].factor is not None):
            raise RefitError("convolutions of different kinds share its coefficients")
        return kernels[0], kernels[0].layer(calls[0][1], bias is not None, site.wanted, self.settings.seed)

    def _problems(self, site: Site, layer: Layer) -> tuple[Problem, Problem]:
        """One layer's equations over the inputs fitted on and those held back."""
        if (whole := self.whole.get(site.names[0])) is not None:
            return whole.cut(layer, self.layers[site.names[0]].frequencies)
        fit, held = (self._problem(site, layer, part) for part in (self.data.fit, self.data.held))
        return fit, held

    def _problem(self, site: Site, layer: Layer, batches: Sequence[Batch]) -> Problem:
        """One layer's equations over some batches, of all processes."""
        problem = site.method(layer)

        def take_in() -> None:
            for batch in batches:
                self._take_in(problem, site, batch)
                if isinstance(problem, Operator) and problem.bytes > self.memory // 2:
                    break  # it holds whole maps: fewer inputs are better than none

        all_or_none(take_in, RuntimeError("another process could not take in its inputs"))
        problem.reduce()
        return problem

    def _take_in(self, problem: Problem, site: Site, batch: Batch) -> None:
        answers = self.targets.of(site, batch)
        unpaired = UsageError("the converted network runs it otherwise than the original: their calls do not pair")
        waiting = iter(answers)

        def see(name: str, call: ConvCall | None) -> None:
            wanted, shape, target = next(waiting, ("", (), torch.empty(0)))
            if call is None or (wanted, shape) != (name, tuple(call.output.shape)):
                raise unpaired
            problem.add(call, target, rows_of(batch, len(call.input)))

        self.forwards.watch(site.names, batch, see, len(site.calls))
        if next(waiting, None) is not None:
            raise unpaired
        problem.inputs += len(batch)


def dampings(settings: CalibrationSettings, positions_per_unknown: float) -> tuple[float, ...]:
    """Those to choose from, the strongest first."""
    if settings.damping is not None:
        return (settings.damping,)
    least = weakest_damping(positions_per_unknown)
    return tuple(damping for damping in DAMPINGS if damping >= least)


def weakest_damping(positions_per_unknown: float) -> float:
    """The least pull towards the projection that so many positions allow."""
    return min(DAMPING_TIMES_POSITIONS / max(positions_per_unknown, 1e-9), DAMPINGS[0])


@torch.no_grad()
def _write(kernel: Kernel, layer: Layer, choice: Choice, bias: nn.Parameter | None) -> None:
    assert choice.change is not None
    target = layer.kernel(layer.coefficients + choice.change.coefficients)
    shifted = None
    if bias is not None and choice.change.bias is not None:
        shifted = in_range(bias + choice.change.bias.flatten().to(bias), bias)
    kernel.write(target.to(kernel.effective.device))
    if bias is not None and shifted is not None:
        bias.copy_(shifted)
