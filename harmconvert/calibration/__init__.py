"""Calibrated conversion (DESIGN 4): refit what a cut left, so that each layer answers as the original's did.

For each truncated convolution, in the order in which they run: the original network says what the layer should answer,
the converted one, its earlier layers refitted, what it is fed; the coefficients that bring the two together are a
least-squares problem. A part of the inputs is held back from it. They choose the damping, and whether the refit is
taken at all: a layer that generalises no better than the plain cut keeps the plain cut. No labels, no training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..conv import HarmonicMixin
from ..distributed import world_size
from ..errors import UsageError, first_line
from ..plan import Plan
from ..surgery import convolutions
from ..weights import tensors_sha256
from .batch_norm import batch_norms, reestimate_batch_norm
from .capture import ConvCall, conv_calls
from .divergence import divergence
from .equations import Layer, Problem, solver
from .inputs import Batch, CalibrationSet, calibration_set
from .layers import Choice, Kernel, RefitError, choose, refittable_bias

__all__ = ["Calibration", "CalibrationSettings", "LayerCalibration", "calibrate", "reestimate_batch_norm"]

# Relative to the mean square of the responses; strongest first. At 10 hardly anything moves.
DAMPINGS = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
# No damping below this over the positions per unknown: the fewer there are, the less the fit is believed.
DAMPING_TIMES_POSITIONS = 1e-3
# Fitted on ten positions per unknown, a linear model's error is about a tenth over the best one's.
ENOUGH_POSITIONS = 10
# Positions sampled of each layer: this many per unknown, and no fewer than that many in all.
POSITIONS_PER_UNKNOWN = 64
LEAST_POSITIONS = 1 << 15

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class CalibrationSettings:
    """``damping``: fixed, relative to the mean square of a layer's responses; None chooses on held-back inputs.
    ``memory``: bytes that one layer's equations may take; None takes half of what is free. ``batch_norm``: re-estimate
    batch-norm statistics where that helps. ``refit``: False leaves the coefficients alone. ``seed``: of the positions
    sampled."""

    damping: float | None = None
    memory: int | None = None
    batch_norm: bool = True
    refit: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.damping is not None and not (math.isfinite(self.damping) and self.damping >= 0):
            raise UsageError(f"damping (={self.damping}) must be zero or more; leave it out to have it chosen")
        if self.memory is not None and self.memory < 1 << 20:
            raise UsageError(f"calibration memory (={self.memory} bytes) must be at least a megabyte")


@dataclass(frozen=True)
class LayerCalibration:
    """What calibration made of one truncated convolution (or of several that share their coefficients).

    ``decision``: ``refit``; ``rescaled`` (each channel's mean and variance repaired); ``projection`` (neither lowered
    the held-back error, so the plain cut stays); ``failed`` (the plain cut stays because something is wrong). Errors
    are relative output errors on held-back inputs, Frobenius norms. ``damping`` is relative to the mean square of the
    responses; ``condition`` that of their second moments. ``positions`` were fitted on, of ``unknowns`` per output
    channel; ``inputs_enough`` would have given ten positions per unknown. ``why`` explains what was not done.
    """

    name: str
    decision: str
    solver: str | None = None
    damping: float | None = None
    condition: float | None = None
    error_before: float | None = None
    error_after: float | None = None
    positions: int = 0
    unknowns: int = 0
    inputs: int = 0
    inputs_enough: int = 0
    seconds: float = 0.0
    why: str | None = None

    @property
    def positions_per_unknown(self) -> float:
        """How well the fit was determined."""
        return self.positions / max(self.unknowns, 1)


@dataclass(frozen=True)
class Calibration:
    """What was done to a whole network. Divergences are of its outputs from the original's on held-back inputs: mean
    KL divergence of the class probabilities (nats), or for other outputs the relative squared difference; None where
    outputs cannot be compared. ``kept`` is the share of the refit's change that was taken (1 unless that made the
    outputs worse than the plain cut). ``changed`` has the keys of the tensors written, each with the
    sha256 of what was written."""

    layers: tuple[LayerCalibration, ...]
    inputs: int
    held_back: int
    plain_divergence: float | None = None
    refit_divergence: float | None = None
    divergence: float | None = None
    kept: float = 1.0
    batch_norms: int = 0
    notes: tuple[str, ...] = ()
    settings: CalibrationSettings = field(default_factory=CalibrationSettings)
    changed: Mapping[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> tuple[LayerCalibration, ...]:
        """Layers that something is wrong with."""
        return tuple(layer for layer in self.layers if layer.decision == "failed")

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return asdict(self)


def calibrate(
    original: nn.Module,
    converted: nn.Module,
    plan: Plan,
    batches: Iterable[Any],
    settings: CalibrationSettings | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Refit the truncated convolutions of ``converted``, in place, then re-estimate its batch norms.

    Runs each network once per truncated layer, up to that layer, so the cost is linear in the inputs; no activations
    but one layer's of one batch are held. Under torch.distributed the inputs are shared out and the sums are taken
    over all processes.

    Args:
        original: the network that ``converted`` was made from by ``plan``; not changed.
        batches: inputs, read once: tensors, (input, target) pairs whose target is not looked at, dicts of keywords.
        progress: called with (layers done, layers, what is being done).

    Raises:
        UsageError: the networks do not run on the inputs. InputError: there is none, or one with NaN.
    """
    settings = settings or CalibrationSettings()
    data = calibration_set(batches)
    cut = [layer.name for layer in plan.layers if not layer.whole]
    if not cut:
        return Calibration((), data.total, 0, notes=("nothing was cut, so there is nothing to repair",))
    work = _Work(original, converted, data, settings, cut)
    before = {key: tensor.clone() for key, tensor in converted.state_dict().items()}
    plain = divergence(original, converted, data.held)
    groups = work.groups() if settings.refit else []
    layers: list[LayerCalibration] = []
    for done, names in enumerate(groups):
        if progress:
            progress(done, len(groups), names[0])
        layers.append(work.refit(names))
    seen = {name for names in groups for name in names}
    if settings.refit:
        why = "it does not run on the calibration inputs"
        layers += [LayerCalibration(name, "projection", why=why) for name in cut if name not in seen]
    refit = divergence(original, converted, data.held) if layers else plain
    kept, final = _never_worse(original, converted, data, before, plain, refit)
    norms = 0
    if settings.batch_norm and batch_norms(converted):
        if progress:
            progress(len(groups), len(groups), "batch norms")
        norms, final = _batch_norms(original, converted, data, final)
    after = converted.state_dict()
    changed = {k: tensors_sha256({k: t}) for k, t in after.items() if not torch.equal(t, before[k])}
    held = data.total - data.fit_total
    notes = () if held else ("one input: none can be held back, so nothing is refitted",)
    return Calibration(tuple(layers), data.total, held, plain, refit, final, kept, norms, notes, settings, changed)


class _Work:
    """What refitting one layer after the other needs to know."""

    def __init__(
        self,
        original: nn.Module,
        converted: nn.Module,
        data: CalibrationSet,
        settings: CalibrationSettings,
        cut: list[str],
    ) -> None:
        self.original, self.converted, self.data, self.settings = original, converted, data, settings
        originals, harmonics = convolutions(original), convolutions(converted)
        self.originals = {name: originals[name] for name in cut}
        self.harmonics = {name: cast(HarmonicMixin, harmonics[name]) for name in cut}
        first = (*data.fit, *data.held)[0]
        self.order = [(name, call.output.shape) for name, call in conv_calls(original, self.originals, first.input)]
        self.first = first

    def groups(self) -> list[tuple[str, ...]]:
        """Names of the layers that run, those that share their coefficients together, in the order of running."""
        shared: dict[int, dict[str, None]] = {}
        for name, _ in self.order:
            shared.setdefault(id(self.harmonics[name].coefficients), {})[name] = None
        return [tuple(names) for names in shared.values()]

    def refit(self, names: tuple[str, ...]) -> LayerCalibration:
        """Refit one set of coefficients; a layer that cannot be keeps the projection and says why."""
        start = time.perf_counter()
        label = ", ".join(names)
        try:
            record = self._refit(names)
        except RefitError as error:
            record = LayerCalibration(label, "projection", why=str(error))
        except (torch.OutOfMemoryError, MemoryError, torch.linalg.LinAlgError, UsageError, RuntimeError) as error:
            record = LayerCalibration(label, "failed", why=_explained(error))
        return replace(record, name=label, seconds=time.perf_counter() - start)

    def _refit(self, names: tuple[str, ...]) -> LayerCalibration:
        calls = [(name, shape) for name, shape in self.order if name in names]
        kernel, layer, call = self._layer(names, len(calls))
        bias = refittable_bias(self.converted, [self.harmonics[name] for name in names])
        per_input = sum(math.prod(shape[2:]) * shape[0] for _, shape in calls) / len(self.first)
        sampled = sum(min(layer.wanted, math.prod(s[2:])) * s[0] for _, s in calls) / len(self.first)
        fit_inputs = self.data.fit_total
        held_inputs = self.data.total - fit_inputs
        enough = math.ceil(ENOUGH_POSITIONS * layer.unknowns / per_input * self.data.total / max(fit_inputs, 1))
        record = LayerCalibration(names[0], "projection", unknowns=layer.unknowns, inputs=self.data.total)
        record = replace(record, positions=round(sampled * fit_inputs), inputs_enough=enough)
        if not held_inputs:
            return replace(record, why="one input: none can be held back to choose on")
        values = (call.input.numel() + call.output.numel()) * len(calls) // len(self.first) * self.data.total
        memory = self.settings.memory or free_memory(layer.coefficients.device) // 2
        alone = world_size() == 1
        held_positions = round(sampled * held_inputs)
        make = solver(layer, record.positions, held_positions, values, memory, alone)
        fit, held = self._fill(make, layer, names, len(calls), self.data.fit), None
        held = self._fill(make, layer, names, len(calls), self.data.held)
        if not (fit.finite and held.finite):
            raise UsageError("its activations are NaN or infinite on the calibration inputs")
        choice = choose(fit, held, self._dampings(fit.count / layer.unknowns))
        if choice.change is not None:
            self._write(kernel, layer, choice, call, bias)
        return replace(
            record,
            decision=choice.decision,
            solver=fit.name,
            damping=choice.change.damping if choice.change else None,
            condition=fit.condition,
            error_before=choice.error_before,
            error_after=choice.error_after,
            positions=fit.count,
            why=None if choice.change else "nothing lowers its error on held-back inputs",
        )

    def _layer(self, names: tuple[str, ...], calls: int) -> tuple[Kernel, Layer, ConvCall]:
        modules = {name: self.harmonics[name] for name in names}
        found = conv_calls(self.converted, modules, self.first.input, calls)
        kernels = [Kernel.of(modules[name], call) for name, call in found]
        if (
            len(
                {
                    (call.groups, call.transposed, kernel.factor is None)
                    for kernel, (_, call) in zip(kernels, found, strict=True)
                }
            )
            > 1
        ):
            raise RefitError("convolutions of different kinds share its coefficients")
        if len(names) > 1 and kernels[0].factor is not None:
            raise RefitError("several standardised convolutions share its coefficients")
        bias = refittable_bias(self.converted, list(modules.values()))
        kernel, call = kernels[0], found[0][1]
        layer = kernel.layer(call, bias is not None, 0, self.settings.seed)
        total = max(POSITIONS_PER_UNKNOWN * layer.unknowns, LEAST_POSITIONS)
        per_call = total / max(self.data.fit_total, 1) / sum(c.output.shape[0] for _, c in found) * len(self.first)
        return kernel, replace(layer, wanted=math.ceil(per_call)), call

    def _fill(
        self, make: type[Problem], layer: Layer, names: tuple[str, ...], calls: int, batches: Iterable[Batch]
    ) -> Problem:
        problem = make(layer)
        originals = {name: self.originals[name] for name in names}
        harmonics = {name: self.harmonics[name] for name in names}
        for batch in batches:
            targets = conv_calls(self.original, originals, batch.input, calls)
            fed = conv_calls(self.converted, harmonics, batch.input, calls)
            if [(n, c.output.shape) for n, c in targets] != [(n, c.output.shape) for n, c in fed]:
                raise UsageError(
                    "the converted network runs it otherwise than the original, so their calls do not pair"
                )
            for (_, target), (_, call) in zip(targets, fed, strict=True):
                rows = len(call.input)
                examples = [batch.examples[row * len(batch) // rows] for row in range(rows)]
                problem.add(call, target.output, examples)
        problem.reduce()
        return problem

    def _dampings(self, positions_per_unknown: float) -> tuple[float, ...]:
        if self.settings.damping is not None:
            return (self.settings.damping,)
        least = DAMPING_TIMES_POSITIONS / max(positions_per_unknown, 1e-9)
        return tuple(damping for damping in DAMPINGS if damping >= min(least, DAMPINGS[0]))

    @torch.no_grad()
    def _write(self, kernel: Kernel, layer: Layer, choice: Choice, call: ConvCall, bias: nn.Parameter | None) -> None:
        change = choice.change
        assert change is not None
        target = layer.kernel(layer.coefficients + change.coefficients)
        kernel.write(target.to(kernel.effective.device))
        if bias is not None and change.bias is not None:
            bias.add_(change.bias.flatten().to(bias.device, bias.dtype))


def _never_worse(
    original: nn.Module,
    converted: nn.Module,
    data: CalibrationSet,
    before: Mapping[str, Tensor],
    plain: float | None,
    refit: float | None,
) -> tuple[float, float | None]:
    """Where layer by layer better is worse at the end, take half the change, a quarter, none; which, and the result."""
    if plain is None or refit is None or refit <= plain:
        return 1.0, refit
    after = {key: tensor.clone() for key, tensor in converted.state_dict().items()}
    for kept in (0.5, 0.25):
        _blend(converted, before, after, kept)
        found = divergence(original, converted, data.held)
        if found is not None and found < plain:
            return kept, found
    _blend(converted, before, after, 0.0)
    return 0.0, plain


@torch.no_grad()
def _blend(model: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor], share: float) -> None:
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(before[key] + share * (after[key] - before[key]) if share else before[key])


def _batch_norms(
    original: nn.Module, converted: nn.Module, data: CalibrationSet, so_far: float | None
) -> tuple[int, float | None]:
    """Re-estimate, and keep that where the held-back outputs come no further from the original's."""
    before = {key: tensor.clone() for key, tensor in converted.state_dict().items()}
    norms = reestimate_batch_norm(converted, (batch.input for batch in data.fit))
    found = divergence(original, converted, data.held)
    if so_far is not None and (found is None or not found <= so_far):
        _blend(converted, before, before, 0.0)
        return 0, so_far
    return norms, found


def free_memory(device: torch.device) -> int:
    """Bytes free on a device: of a GPU as its driver says, of the machine as its kernel does (8 GB if it does not)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 8 << 30


def _explained(error: Exception) -> str:
    text = first_line(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "memory" in text:
        return f"out of memory ({text}): lower --calibration-memory, --calibration-batch-size or --calibration-images"
    return text
