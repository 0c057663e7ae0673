"""Calibrated conversion (DESIGN 4): refit what a cut left, so that each layer answers as the original's did.

For each truncated convolution, in the order in which they run: the original network says what the layer should answer,
the converted one, its earlier layers refitted, what it is fed; the coefficients that bring the two together are a
least-squares problem. A part of the inputs is held back from it. They choose the damping, and whether the refit is
taken at all: a layer that generalises no better than the plain cut keeps the plain cut. No labels, no training.

From the whole to the parts: `calibrate` here; refit.py, one layer after the other; layers.py, one layer's kernel and
the choice of a solution; equations.py and solvers.py, the least squares; responses.py, DCT responses; capture.py,
running a network up to a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..conv import HarmonicMixin
from ..plan import Plan
from ..surgery import convolutions
from ..weights import tensors_sha256
from .batch_norm import batch_norms, reestimate_batch_norm
from .divergence import divergence
from .inputs import CalibrationSet, calibration_set
from .records import Calibration, CalibrationSettings, LayerCalibration, Progress
from .refit import Refit
from .sites import Targets, find_sites

__all__ = [
    "Calibration",
    "CalibrationSettings",
    "LayerCalibration",
    "Progress",
    "calibrate",
    "reestimate_batch_norm",
]


def calibrate(
    original: nn.Module,
    converted: nn.Module,
    plan: Plan,
    batches: Iterable[Any],
    settings: CalibrationSettings | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Refit the truncated convolutions of ``converted``, in place, then re-estimate its batch norms.

    Runs ``converted`` once for each truncated layer, up to that layer: the cost is linear in the inputs, and of the
    activations one layer's of one batch are held, and answers at sampled positions. Under torch.distributed the inputs
    are shared out and the sums are taken over all processes.

    Args:
        original: the network that ``converted`` was made from by ``plan``; not changed.
        batches: inputs, read once: tensors, (input, target) pairs whose target is not looked at, dicts of keywords.
        progress: called with (layers done, layers, what is being done).

    Raises:
        UsageError: the networks do not run on the inputs. InputError: there is none, or one with NaN.
    """
    settings = settings or CalibrationSettings()
    data = calibration_set(batches, settings.inputs)
    cut = [layer.name for layer in plan.layers if not layer.whole]
    if not cut:
        return Calibration((), data.total, 0, notes=("nothing was cut, so there is nothing to repair",))
    before = _copied(converted)
    plain = divergence(original, converted, data.held)
    layers = _refit(original, converted, cut, data, settings, progress) if settings.refit else []
    refit = divergence(original, converted, data.held) if layers else plain
    kept, final = _never_worse(original, converted, data, before, plain, refit)
    norms = 0
    if settings.batch_norm and batch_norms(converted):
        norms, final = _batch_norms(original, converted, data, final)
    state = converted.state_dict()
    changed = {k: tensors_sha256({k: t}) for k, t in state.items() if not torch.equal(t, before[k])}
    held = data.total - data.fit_total
    notes = [] if held else ["one input: none can be held back, so nothing is refitted"]
    if data.left:
        notes.append(f"only the first {data.total} inputs were read (settings: inputs={settings.inputs})")
    return Calibration(
        tuple(layers), data.total, held, plain, refit, final, kept, norms, tuple(notes), settings, changed
    )


def _refit(
    original: nn.Module,
    converted: nn.Module,
    cut: list[str],
    data: CalibrationSet,
    settings: CalibrationSettings,
    progress: Progress | None,
) -> list[LayerCalibration]:
    originals, converteds = convolutions(original), convolutions(converted)
    layers = {name: originals[name] for name in cut}
    harmonic = {name: cast(HarmonicMixin, converteds[name]) for name in cut}
    memory = settings.memory or free_memory(next(converted.parameters()).device) // 2
    sites = find_sites(original, harmonic, layers, data, memory)
    targets = Targets(original, layers, sites, settings.seed, memory // 2)
    refit = Refit(converted, harmonic, targets, data, settings, memory)
    records = []
    for done, site in enumerate(sites):
        if progress:
            progress(done, len(sites), site.names[0])
        records.append(refit(site))
    ran = {name for site in sites for name in site.names}
    why = "it does not run on the calibration inputs"
    return records + [LayerCalibration(name, "projection", why=why) for name in cut if name not in ran]


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
    after = _copied(converted)
    for kept in (0.5, 0.25):
        _blend(converted, before, after, kept)
        found = divergence(original, converted, data.held)
        if found is not None and found < plain:
            return kept, found
    _blend(converted, before, after, 0.0)
    return 0.0, plain


def _batch_norms(
    original: nn.Module, converted: nn.Module, data: CalibrationSet, so_far: float | None
) -> tuple[int, float | None]:
    """Re-estimate, and keep that where it is seen to bring the held-back outputs nearer to the original's."""
    before = _copied(converted)
    norms = reestimate_batch_norm(converted, (batch.input for batch in data.fit))
    found = divergence(original, converted, data.held)
    if so_far is None or found is None or not found < so_far:
        _blend(converted, before, before, 0.0)
        return 0, so_far
    return norms, found


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}


@torch.no_grad()
def _blend(model: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor], share: float) -> None:
    for key, tensor in model.state_dict().items():
        if key in before:
            between = tensor.is_floating_point() and share > 0
            tensor.copy_(before[key] + share * (after[key] - before[key]) if between else before[key])


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
