"""Refit the layers of a network one after the other; each layer's input comes from layers that are refitted already."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..network.distributed import all_or_none
from ..plan import Rank
from .capture import ConvCall, explain_error
from .coding import Coder
from .cuts import WholeLayer
from .equations import Change, Layer, Problem
from .holding import Forwards
from .inputs import Batch, CalibrationSet
from .layers import Choice, Kernel, RefitError, basis_of, choose, in_range, refittable_bias
from .limits import return_freed_memory
from .ranks import reduced
from .records import ENOUGH_POSITIONS, CalibrationSettings, LayerCalibration
from .solvers import Operator
from .tied_layers import Targets, TiedLayers, rows_of

# Relative to the mean square of the responses; strongest first. At 10 a layer hardly changes.
DAMPINGS = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
# The weakest damping is this number divided by the positions per unknown: with fewer positions a fit is less reliable.
DAMPING_TIMES_POSITIONS = 1e-3


@dataclass(frozen=True)
class Reduction:
    """The ranks to which weights are reduced, by layer.

    ``effects``: how much errors of the layers' outputs change those of the network (`effects_of_outputs`), by name.
    """

    ranks: Mapping[str, Rank] = field(default_factory=dict)
    effects: Mapping[str, Tensor] = field(default_factory=dict)

    def effects_of(self, names: Sequence[str]) -> Tensor | None:
        """Return the effects of layers that share a weight together; None if one of them is not known."""
        if any(name not in self.effects for name in names):
            return None
        return torch.stack([self.effects[name] for name in names]).sum(0)


@dataclass
class Refit:
    """Refits truncated layers in place: call it for each of the tied layers, in the order in which they run.

    Args:
        forwards: runs the converted network up to one of the truncated layers.
        targets: the original's outputs.
        memory: bytes that one layer's equations may use.
        whole: equations of uncut layers, which are used instead of new runs.
        coder: codes the weights of the layers after their refit; None: they are not coded.
        reduction: the ranks that the weights get after their refit.
    """

    forwards: Forwards
    targets: Targets
    data: CalibrationSet
    settings: CalibrationSettings
    memory: int
    whole: Mapping[str, WholeLayer]
    coder: Coder | None = None
    reduction: Reduction = field(default_factory=Reduction)

    def __call__(self, tied: TiedLayers) -> LayerCalibration:
        """Refit layers that share coefficients. If this fails, they keep the projection, and the record says why."""
        start = time.perf_counter()
        fit_inputs_needed = ENOUGH_POSITIONS * tied.unknowns / tied.positions_per_input
        record = LayerCalibration(
            ", ".join(tied.names),
            "projection",
            positions=tied.sampled_per_input * self.data.fit_total,
            unknowns=tied.unknowns,
            inputs=self.data.total,
            inputs_enough=math.ceil(fit_inputs_needed * self.data.total / max(self.data.fit_total, 1)),
        )
        try:
            record = self._refit(tied, record)
        except RefitError as error:
            record = replace(record, why=str(error))
        except Exception as error:  # an error in one layer must not prevent the refit of the others
            record = replace(record, decision="failed", why=explain_error(error))
        finally:
            self.targets.forget(tied)
            return_freed_memory()
        if self.coder is not None:
            record = self.coder.finished(tied.names, record)
        return replace(record, seconds=time.perf_counter() - start)

    def _refit(self, tied: TiedLayers, record: LayerCalibration) -> LayerCalibration:
        if self.data.fit_total == self.data.total:
            return replace(record, why=f"{self.data.why_nothing_held} to choose on")
        modules = {name: self.forwards.layers[name] for name in tied.names}
        bias = refittable_bias(self.forwards.model, list(modules.values()))
        kernel, layer = all_or_none(
            lambda: self._kernel_and_layer(tied, modules, bias), RuntimeError("another process could not run it")
        )
        fit, held = self._problems(tied, layer)
        if not (fit.finite and held.finite):
            raise UsageError("its activations are NaN or infinite on the calibration inputs")
        own_dampings = dampings(self.settings, fit.count / layer.unknowns)
        if (rank := self.reduction.ranks.get(tied.names[0])) is None:
            choice = choose(fit, held, own_dampings)
        else:
            choice = reduced(fit, held, own_dampings, rank, self.reduction.effects_of(tied.names))
        bias_before = None if bias is None else bias.detach().clone()
        if choice.change is not None:
            _write(kernel, layer, choice, bias)
        if self.coder is not None and (key := self.coder.key_of(tied.names)) is not None:
            with torch.no_grad():
                self.coder.code_layer(key, fit, held, basis_of(kernel.module).norm(dim=1))
            new, _ = self._kernel_and_layer(tied, modules, bias)
            change = fit.with_best_bias(new.layer_coefficients(layer) - layer.coefficients)
            choice = replace(choice, change=change, error_after=held.error(change))
            _write_bias(bias, bias_before, change)
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
            spectrum=choice.spectrum,
            why=None if choice.change else "nothing lowers its error on held-back inputs",
        )

    def _kernel_and_layer(
        self, tied: TiedLayers, modules: dict[str, nn.Module], bias: nn.Parameter | None
    ) -> tuple[Kernel, Layer]:
        """Find out, in a forward of one example, how the layers compute their kernel."""
        recorded: list[tuple[str, ConvCall | None]] = []
        self.forwards.watch(tied.names, self.data.probe, lambda *call: recorded.append(call), len(tied.calls))
        calls = [(name, call) for name, call in recorded if call is not None]
        kernels = [Kernel.of(modules[name], call) for name, call in calls]
        kinds = {(call.groups, call.transposed, k.factor is None) for k, (_, call) in zip(kernels, calls, strict=True)}
        if len(kinds) != 1 or (len(modules) > 1 and kernels[0].factor is not None):
            raise RefitError("convolutions of different kinds share its coefficients")
        return kernels[0], kernels[0].layer(calls[0][1], bias is not None, tied.sample_count, self.settings.seed)

    def _problems(self, tied: TiedLayers, layer: Layer) -> tuple[Problem, Problem]:
        """Return the equations over the inputs for the fit and over those that are held back."""
        if (whole := self.whole.get(tied.names[0])) is not None:
            return whole.cut(layer, self.forwards.layers[tied.names[0]])
        fit, held = (self._problem(tied, layer, part) for part in (self.data.fit, self.data.held))
        return fit, held

    def _problem(self, tied: TiedLayers, layer: Layer, batches: Sequence[Batch]) -> Problem:
        """Return the equations over some batches, summed over all processes."""
        problem = tied.method(layer)

        def add_batches() -> None:
            for batch in batches:
                self._add_batch(problem, tied, batch)
                if isinstance(problem, Operator) and problem.bytes > self.memory // 2:
                    break  # this method stores whole maps: use fewer inputs if they do not fit into memory

        all_or_none(add_batches, RuntimeError("another process could not process its inputs"))
        problem.reduce()
        return problem

    def _add_batch(self, problem: Problem, tied: TiedLayers, batch: Batch) -> None:
        mismatch = UsageError("its calls in the converted network do not match those in the original")
        targets = iter(self.targets.of(tied, batch))

        def on_call(name: str, call: ConvCall | None) -> None:
            target_name, shape, target = next(targets, ("", (), torch.empty(0)))
            if call is None or (target_name, shape) != (name, tuple(call.output.shape)):
                raise mismatch
            problem.add(call, target, rows_of(batch, len(call.input)))

        self.forwards.watch(tied.names, batch, on_call, len(tied.calls))
        if next(targets, None) is not None:
            raise mismatch
        problem.inputs += len(batch)


def dampings(settings: CalibrationSettings, positions_per_unknown: float) -> tuple[float, ...]:
    """Return the dampings to choose from, the strongest first."""
    if settings.damping is not None:
        return (settings.damping,)
    least = weakest_damping(positions_per_unknown)
    return tuple(damping for damping in DAMPINGS if damping >= least)


def weakest_damping(positions_per_unknown: float) -> float:
    """Return the weakest damping that this number of positions per unknown allows."""
    return min(DAMPING_TIMES_POSITIONS / max(positions_per_unknown, 1e-9), DAMPINGS[0])


@torch.no_grad()
def _write_bias(bias: nn.Parameter | None, before: Tensor | None, change: Change) -> None:
    if bias is not None and before is not None and change.bias is not None:
        bias.copy_(in_range(before + change.bias.flatten().to(bias), bias))


@torch.no_grad()
def _write(kernel: Kernel, layer: Layer, choice: Choice, bias: nn.Parameter | None) -> None:
    assert choice.change is not None
    target = layer.kernel(layer.coefficients + choice.change.coefficients)
    new_bias = None
    if bias is not None and choice.change.bias is not None:
        new_bias = in_range(bias + choice.change.bias.flatten().to(bias), bias)
    kernel.write(target.to(kernel.effective.device))
    if bias is not None and new_bias is not None:
        bias.copy_(new_bias)
