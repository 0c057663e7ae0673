"""Calibrated conversion (DESIGN 4): refit what a cut left, so that each layer answers as the original's did.

For each truncated convolution, in the order in which they run: the original network says what the layer should answer,
the converted one, its earlier layers refitted, what it is fed; the coefficients that bring the two together are a
least-squares problem. A part of the inputs is held back from it. They choose the damping, and whether the refit is
taken at all: a layer that generalises no better than the plain cut keeps the plain cut. No labels, no training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..codecs.digests import tensors_sha256
from ..errors import counted, first_line
from ..network.exchange import in_precision, in_sixteen_bits
from ..network.layers import convolutions, harmonic_layers, state_key
from ..network.running import unchanged
from ..network.state import tensors_of
from ..plan import AXES, Plan
from .batch_norm import batch_norms, reestimated
from .cuts import WholeLayer
from .divergence import Divergence
from .holding import Forwards
from .inputs import CalibrationSet, calibration_set
from .layout import laid_out
from .limits import memory_for
from .reading import in_running_precision
from .records import Calibration, CalibrationSettings, LayerCalibration, Progress
from .refit import Refit
from .repeating import repeating
from .sites import Targets, running_sites

# Re-estimated batch norms must bring this much: on a handful of held-back inputs, a few per cent are chance.
BATCH_NORM_GAIN = 0.9


@dataclass(frozen=True)
class Known:
    """What is known of an original network on a calibration set, kept from one calibration of it to the next: the set,
    the outputs on what is held back, and by name the inputs of layers, for calibrations of a cut of one of them.

    ``original``: the network, or where ``precise`` a float32 copy, because it is stored in 16 bits and runs only so."""

    original: nn.Module
    data: CalibrationSet
    compare: Divergence
    whole: Mapping[str, WholeLayer] = field(default_factory=dict)
    precise: bool = False

    @classmethod
    def of(cls, original: nn.Module, batches: Iterable[Any], settings: CalibrationSettings) -> Known:
        """Nothing yet but the set; raises what `calibrate` does."""
        running, batches = in_running_precision(original, batches)
        precise, original = running is not original, running
        with unchanged(original):
            data = laid_out(original, calibration_set(batches, settings.inputs, original))
            data = replace(data, runs=repeating(original, convolutions(original), data.probe))
            return cls(original, data, Divergence(original, data.held, undo=True), precise=precise)

    def running(self, network: nn.Module) -> nn.Module:
        """A network made from the original, or a float32 copy where the original runs only so."""
        return in_precision(network, torch.float32) if self.precise and in_sixteen_bits(network) else network


def calibrate(
    original: nn.Module,
    converted: nn.Module,
    plan: Plan,
    batches: Iterable[Any] | Known,
    settings: CalibrationSettings | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Refit the truncated convolutions of ``converted``, in place, then re-estimate its batch norms.

    On a CPU runs of ``converted`` are held at the truncated layer that is refitted and go on to the next, as many as
    memory allows (1 GB at most); others run up to each layer anew. The cost is linear in the inputs. Of all other
    activations one layer's of one batch are kept, and answers at sampled positions. Under torch.distributed the inputs
    are shared out and the sums are taken over all processes.

    Args:
        original: the network that ``converted`` was made from by ``plan``; not changed.
        batches: inputs, read once: tensors, (input, target) pairs whose target is ignored, mappings of keywords, lists
            of single images; or what is known of ``original`` on them.
        progress: called with (layers done, layers, what is being done).

    Raises:
        UsageError: the networks do not run on the inputs. InputError: there is none, or one with NaN.
    """
    settings = settings or CalibrationSettings()
    known = batches if isinstance(batches, Known) else Known.of(original, batches, settings)
    cut = [layer.name for layer in plan.layers if any(AXES[k.axis].refits and not k.whole for k in layer.keeps)]
    if plan.whole:
        return Calibration((), known.data.total, 0, notes=("nothing was cut, so there is nothing to repair",))
    before = _copied(converted)
    running = known.running(converted)
    with unchanged(known.original), unchanged(running, set(batch_norms(running).values()), weights=False):
        found = _calibrated(known.original, running, cut, _copied(running), known, settings, progress)
    if running is not converted:
        blend(converted, _copied(running), before, 0.0)
    state = tensors_of(converted)
    changed = [key for key, tensor in before.items() if not torch.equal(state[key], tensor)]
    return replace(found, changed=digests(converted, changed))


def _calibrated(
    original: nn.Module,
    converted: nn.Module,
    cut: list[str],
    before: Mapping[str, Tensor],
    known: Known,
    settings: CalibrationSettings,
    progress: Progress | None,
) -> Calibration:
    """All but what tells the tensors that were changed."""
    data, compare = known.data, known.compare
    layers = _refit(original, converted, cut, known, settings, progress)
    after = _copied(converted)
    blend(converted, before, before, 0.0)
    plain, why = compare(converted)
    agreements = {0.0: compare.agreement}  # by the share of the refit that is kept
    blend(converted, after, after, 0.0)
    refit, why_refit = compare(converted) if settings.refit else (plain, why)
    agreements[1.0] = compare.agreement
    kept, final = never_worse(compare, converted, before, plain, refit)
    agreement = agreements.get(kept, compare.agreement)
    norms = 0
    notes: list[str] = []
    if settings.batch_norm and batch_norms(converted):
        norms, final, notes = _batch_norms(compare, converted, data, final)
        agreement = compare.agreement if norms else agreement
    held = data.total - data.fit_total
    incomparable = why or why_refit if held else data.nothing_held
    if not held:
        notes.append(f"{incomparable}, so nothing is refitted")
    elif why and why_refit:
        notes.append(f"the outputs cannot be compared ({why}), so the layers' own errors alone decided")
    elif incomparable:
        which = "of the plain cut" if why else "after the refit"
        notes.append(f"the outputs {which} cannot be compared ({incomparable})")
    if data.left:
        read = f"{counted(data.total, 'input')} {'was' if data.total == 1 else 'were'} read"
        notes.append(f"only the first {read} (settings: inputs={settings.inputs})")
    return Calibration(
        tuple(layers), data.total, held, plain, refit, final, kept, norms, tuple(notes), settings, {}, incomparable,
        agreements[0.0], agreement,
    )  # fmt: skip


def digests(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """sha256 of tensors in a network's state, by key; of coefficients together with what they are coefficients of
    (`Kept.contexts`)."""
    state = tensors_of(model)
    contexts = {
        state_key(name, tensor): text
        for name, module in model.named_modules(remove_duplicate=False)
        for axis in AXES.values()
        if (kept := axis.read(module)) is not None
        for tensor, text in kept.contexts.items()
    }
    return {key: tensors_sha256({key + contexts.get(key, ""): state[key]}) for key in keys if key in state}


def _refit(
    original: nn.Module,
    converted: nn.Module,
    cut: list[str],
    known: Known,
    settings: CalibrationSettings,
    progress: Progress | None,
) -> list[LayerCalibration]:
    data, layers = known.data, harmonic_layers(converted)
    harmonic = {name: layers[name] for name in cut}
    memory = memory_for(converted, settings)
    if not cut:
        return []
    sites, odd = running_sites(original, harmonic, data, memory)
    if not settings.refit:
        return []
    targets = Targets(original, sites, data, settings.seed, memory // 2)
    whole = known.whole if len(cut) == 1 else {}  # what two cut layers are fed is another matter
    records = []
    batches = (*data.fit, *data.held)
    with Forwards(converted, harmonic, memory // 4, batches, data.probes, data.runs.complete) as forwards:
        refit = Refit(converted, harmonic, targets, data, settings, memory, forwards, whole)
        for done, site in enumerate(sites):
            if progress:
                progress(done, len(sites), site.names[0])
            records.append(refit(site))
    if progress:
        progress(len(sites), len(sites), "checking the outputs")
    for name in cut:
        if not any(name in site.names for site in sites):
            why = odd.get(name, "it does not run on the calibration inputs")
            records.append(LayerCalibration(name, "projection", why=why))
    return records


def never_worse(
    compare: Divergence,
    converted: nn.Module,
    before: Mapping[str, Tensor],
    plain: float | None,
    refit: float | None,
) -> tuple[float, float | None]:
    """Where layer by layer better is worse at the end, take half the change, a quarter, none; which, and the result."""
    if plain is None or (refit is not None and refit <= plain):
        return 1.0, refit
    after = _copied(converted)
    for kept in (0.5, 0.25):
        blend(converted, before, after, kept)
        found, _ = compare(converted)
        if found is not None and found < plain:
            return kept, found
    blend(converted, before, after, 0.0)
    return 0.0, plain


def _batch_norms(
    compare: Divergence, converted: nn.Module, data: CalibrationSet, so_far: float | None
) -> tuple[int, float | None, list[str]]:
    """Re-estimate, and keep that where it is seen to bring the held-back outputs nearer to the original's."""
    before, notes, norms = _copied(converted), [], 0
    try:
        norms = reestimated(converted, (batch.input for batch in data.fit))
    except Exception as error:  # nothing that comes last may cost what was done before
        notes.append(f"batch norms were not re-estimated: {first_line(error)}")
    found, why = compare(converted)
    if so_far is not None and why:
        notes.append(f"with batch norms re-estimated the outputs cannot be compared ({why})")
    if so_far is None or found is None or not found < BATCH_NORM_GAIN * so_far:
        blend(converted, before, before, 0.0)
        return 0, so_far, notes
    return norms, found, notes


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in tensors_of(model).items()}


@torch.no_grad()
def blend(model: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor], share: float) -> None:
    for key, tensor in tensors_of(model).items():
        if key in before:
            between = tensor.is_floating_point() and share > 0
            tensor.copy_(before[key] + share * (after[key] - before[key]) if between else before[key])
