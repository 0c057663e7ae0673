"""Calibrate a converted network: refit its truncated layers so that their outputs match those of the original.

The truncated convolutions are refitted one after the other, in the order in which they run. The target is the layer's
output in the original network. The input is that of the layer in the converted network, whose earlier layers are
refitted already. The best coefficients are the solution of a least-squares problem. A part of the inputs is held back:
these inputs choose the damping, and decide whether the refit is kept at all. A layer whose refit is no better on them
keeps the plain cut. No labels and no training are needed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..codecs.codec import Entry
from ..codecs.digests import tensors_sha256
from ..errors import counted, first_line
from ..layers.low_rank import reason_not_splittable
from ..layers.ranked import pair_for
from ..network.heads import compared_text
from ..network.layers import kernel_size, observable_layers, state_key, stored_names, weighted_layers
from ..network.low_rank import at_full_rank, in_one_layer, in_two_layers, ranked_layers
from ..network.running import unchanged
from ..network.state import tensors_of
from ..plan import AXES, Bits, CodedWeight, LayerPlan, Plan, Rank, apply_plan, coded_weights, round_weights
from ..plan.precision import rounded_keys
from .batch_norm import batch_norms, reestimate
from .coding import Coder
from .context import CalibrationContext
from .divergence import Divergence
from .holding import Forwards
from .inputs import CalibrationSet
from .limits import memory_for
from .records import Calibration, CalibrationSettings, LayerCalibration, Progress
from .refit import Reduction, Refit
from .tied_layers import Targets, find_tied_layers, why_not_observed
from .vectors import with_rounded_vectors

# Outputs of the original are stored up to this size: more saves little time and much memory.
MOST_TARGETS = 1 << 29
# Re-estimated batch norms are kept only if they reduce the divergence to this share: with few held-back inputs, smaller
# differences are chance.
BATCH_NORM_GAIN = 0.9
# The layers of `LowRank` that have the two matrices of a layer of low rank.
_PARTS = {"coefficients_in": "first", "coefficients_out": "second"}


def calibrate(
    original: nn.Module,
    converted: nn.Module,
    plan: Plan,
    batches: Iterable[Any] | CalibrationContext,
    settings: CalibrationSettings | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Refit the truncated convolutions of ``converted``, in place, then re-estimate its batch norms.

    The time is linear in the number of inputs. On a CPU, forwards of ``converted`` are held at the layer that is
    refitted and continue to the next layer, as many as fit into memory (at most 1 GB); the others are repeated from the
    start for each layer. Besides these, memory holds one batch of one layer's activations, and outputs at sampled
    positions. With torch.distributed the inputs are divided among the processes and sums are taken over all of them.

    Args:
        original: the network from which ``converted`` was made by ``plan``; it is not changed.
        batches: inputs, read once: tensors, (input, target) pairs whose target is ignored, mappings of keywords, lists
            of single images; or a context that was made from ``original`` and such inputs.
        progress: called with (layers done, number of layers, current step).

    Raises:
        UsageError: the networks do not run on the inputs.
        InputError: there are no inputs, or one has NaN.
    """
    settings = settings or CalibrationSettings()
    context = batches if isinstance(batches, CalibrationContext) else CalibrationContext.of(original, batches, settings)
    cut = [layer.name for layer in plan.layers if any(AXES[k.axis].refits and not k.whole for k in layer.keeps)]
    if plan.on(Bits.axis):
        return _calibrate_and_code(context, converted, plan, settings, progress)
    if plan.whole:
        return Calibration((), context.data.total, 0, notes=("nothing was cut, so there is nothing to repair",))
    before = _copied_tensors(converted)
    runnable = context.runnable(converted)
    ranks = {name: kept for name, kept in plan.on(Rank.axis).items() if not kept.whole}
    # Ranks are reduced after the refit, in a network with whole weights; their matrices follow from the result.
    whole = apply_plan(context.original, plan.without(Rank.axis)) if ranks else runnable
    plain = _copied_tensors(at_full_rank(runnable))

    def calibrated(network: nn.Module, reduction: Reduction) -> Calibration:
        with unchanged(context.original), unchanged(network, set(batch_norms(network).values()), weights=False):
            job = _Job(context.original, network, cut, context, settings, progress, reduction=reduction)
            return _calibrate(job, plain)

    record = calibrated(whole, Reduction(ranks))
    notes: tuple[str, ...] = ()
    if ranks and settings.refit and not context.probe:
        # Which of the two metrics is better depends on the network, so the outputs on held-back inputs decide.
        effects, notes = context.effects_on(ranks, settings.seed)
        other = apply_plan(context.original, plan.without(Rank.axis))
        if effects and _is_nearer(again := calibrated(other, Reduction(ranks, effects)), record):
            record, whole = again, other
    if ranks:
        _write_ranks(runnable, whole)
    if runnable is not converted:
        blend(converted, _copied_tensors(runnable), before, 0.0)
    state = tensors_of(converted)
    changed = [key for key, tensor in before.items() if not torch.equal(state[key], tensor)]
    return replace(record, changed=digests(converted, changed), notes=(*record.notes, *notes))


def _is_nearer(one: Calibration, other: Calibration) -> bool:
    """Return whether the outputs of one network are nearer to those of the original."""
    return one.divergence is not None and other.divergence is not None and one.divergence < other.divergence


def _calibrate_and_code(
    context: CalibrationContext,
    converted: nn.Module,
    plan: Plan,
    settings: CalibrationSettings,
    progress: Progress | None,
) -> Calibration:
    """Refit the layers that are cut, then refit and code all layers with bits, one after the other."""
    cut, first = plan.without(Bits.axis), None
    if not cut.whole:
        first = calibrate(context.original, converted, cut, context, settings, progress)
    before = _copied_tensors(converted)
    runnable = context.runnable(converted)
    # The two matrices of a layer of low rank are coded as two layers: the second one then repairs errors of the first.
    split = [name for name, layer in ranked_layers(runnable).items() if not reason_not_splittable(layer)]
    working, original = runnable, context.original
    if split:
        working, original = (in_two_layers(runnable, split, harmonic=True) for _ in range(2))
    parts = _in_parts(plan, working, split)
    uncoded = _copied_tensors(working)
    entries = round_weights(working, parts, attempts=1)
    rounded = _copied_tensors(working)
    blend(working, uncoded, uncoded, 0.0)
    names = [layer.name for layer in parts.layers if layer.on(Bits.axis)]
    with unchanged(original), unchanged(working, set(batch_norms(working).values()), weights=False):
        coder = Coder.measured(
            working, parts, context.data, settings.seed, memory_for(working, settings),
            progress or (lambda done, total, what: None),
        )  # fmt: skip
        record = _calibrate(_Job(original, working, names, context, settings, progress, coder), rounded)
    if record.kept > 0:
        entries = coder.entries
    if split:
        entries = _joined_entries(coded_weights(working, parts), coded_weights(runnable, plan), entries)
        blend(runnable, _copied_tensors(in_one_layer(working)), {}, 0.0)
    if runnable is not converted:
        blend(converted, _copied_tensors(runnable), before, 0.0)
    entries = {w.key: w.restore(entries[w.key]) for w in coded_weights(converted, plan) if w.key in entries}
    notes = tuple(dict.fromkeys((*(first.notes if first else ()), *record.notes, *coder.notes)))
    # The reduction of ranks has records of its own: those of the coding are about the two matrices.
    ranked = [layer for layer in first.layers if layer.spectrum is not None] if first else []
    record = replace(record, layers=(*ranked, *record.layers))
    record = with_rounded_vectors(context, converted, plan, record)
    state = tensors_of(converted)
    changed = {key for key, tensor in before.items() if not torch.equal(state[key], tensor)}
    # The streams of coded tensors have their values, and vectors that are only rounded follow from the original.
    changed = (changed - rounded_keys(context.original, converted) | set(first.changed if first else ())) - set(entries)
    return replace(record, changed=digests(converted, sorted(changed)), coded=entries, notes=notes)


def _in_parts(plan: Plan, network: nn.Module, split: Collection[str]) -> Plan:
    """Return the plan of a network in which the layers of low rank named in ``split`` are two layers.

    Other layers of low rank are not coded.
    """
    ranked, layers = set(plan.on(Rank.axis)), weighted_layers(network)
    parts: list[LayerPlan] = []
    for layer in plan.layers:
        if layer.name not in ranked:
            parts.append(layer)
        elif layer.name in split and (bits := layer.on(Bits.axis)) is not None:
            for name in (state_key(layer.name, part) for part in _PARTS.values()):
                parts.append(LayerPlan(name, kernel_size(layers[name]), (bits,)))
    return replace(plan, layers=tuple(parts))


def _joined_entries(
    parts: Sequence[CodedWeight], weights: Sequence[CodedWeight], entries: Mapping[str, Entry]
) -> dict[str, Entry]:
    """Return the entries of the weights of a network, from those of a network whose layers of low rank are split."""
    key_of = {name: part.key for part in parts for name in part.names}
    joined_entries = {}
    for weight in weights:
        stored = _PARTS.get(weight.key.rpartition(".")[2])
        key = weight.key if stored is None else key_of.get(state_key(weight.names[0], stored))
        if key is not None and key in entries:
            joined_entries[weight.key] = weight.adopted(entries[key])
    return joined_entries


@dataclass(frozen=True)
class _Job:
    """What is calibrated: the layers of ``converted`` named in ``cut``.

    ``coder`` codes the weights of layers after their refit; ``reduction`` has the ranks to which weights are reduced:
    ``converted`` has these weights whole.
    """

    original: nn.Module
    converted: nn.Module
    cut: Sequence[str]
    context: CalibrationContext
    settings: CalibrationSettings
    progress: Progress | None
    coder: Coder | None = None
    reduction: Reduction = field(default_factory=Reduction)


def _calibrate(job: _Job, before: Mapping[str, Tensor]) -> Calibration:
    """Calibrate and return the record, without digests of the changed tensors.

    Args:
        before: the tensors of the plain cut; with a coder, those of plain rounding.
    """
    converted, settings, data, compare = job.converted, job.settings, job.context.data, job.context.compare
    layers, fallbacks = _refit(job)
    after = _copied_tensors(converted)
    blend(converted, before, before, 0.0)
    plain, why = compare(converted)
    agreements = {0.0: compare.agreement}  # by the share of the refit that is kept
    blend(converted, after, after, 0.0)
    refit, why_refit = compare(converted) if settings.refit else (plain, why)
    agreements[1.0] = compare.agreement
    # Neither coded weights nor weights of a low rank have values between two of their kind.
    shares = () if job.coder or job.reduction.ranks else (0.5, 0.25)
    kept, final = never_worse(compare, converted, before, plain, refit, shares)
    agreement = agreements.get(kept, compare.agreement)
    norms = 0
    notes: list[str] = []
    if settings.batch_norm and batch_norms(converted):
        norms, final, notes = _batch_norms(compare, converted, data, final)
        agreement = compare.agreement if norms else agreement
    held = data.total - data.fit_total
    incomparable = why or why_refit if held else data.why_nothing_held
    if not held:
        notes.append(f"{incomparable}, so nothing is refitted")
    elif why and why_refit:
        notes.append(f"the outputs cannot be compared ({why}), so the layers' own errors alone decided")
    elif incomparable:
        which = "of the plain cut" if why else "after the refit"
        notes.append(f"the outputs {which} cannot be compared ({incomparable})")
    notes += [note for note in (compared_text(job.original),) if note is not None]
    if data.more_available:
        read = f"{counted(data.total, 'input')} {'was' if data.total == 1 else 'were'} read"
        notes.append(f"only the first {read} (settings: inputs={settings.inputs})")
    return Calibration(
        tuple(layers), data.total, held, plain, refit, final, kept, norms, tuple(notes), settings, {}, incomparable,
        agreements[0.0], agreement, (*data.fallbacks, *fallbacks),
    )  # fmt: skip


def digests(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """Return the sha256 of tensors in a network's state, by key.

    The digest of coefficients includes their frequencies and basis (`Kept.contexts`).
    """
    state = tensors_of(model)
    contexts: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for axis in AXES.values():
            for tensor, text in () if (kept := axis.read(module)) is None else kept.contexts.items():
                stored = stored_names(module) if tensor == "coefficients" else (tensor,)
                contexts |= {state_key(name, one): text for one in stored}
    return {key: tensors_sha256({key + contexts.get(key, ""): state[key]}) for key in keys if key in state}


def _refit(job: _Job) -> tuple[list[LayerCalibration], tuple[str, ...]]:
    """Refit layers; return their records and the fallbacks of the runs."""
    original, converted, cut, settings, progress = job.original, job.converted, job.cut, job.settings, job.progress
    coder, data, layers = job.coder, job.context.data, observable_layers(converted)
    harmonic = {name: layers[name] for name in cut if name in layers}
    memory = memory_for(converted, settings)
    if not cut:
        return [], ()
    tied_layers, not_refittable = find_tied_layers(original, harmonic, data, memory)
    if not settings.refit and coder is None:
        return [], ()
    targets = Targets(original, tied_layers, data, settings.seed, min(memory // 2, MOST_TARGETS))
    whole = job.context.whole if len(cut) == 1 else {}  # if two layers are cut, one of them changes the other's input
    records = []
    batches = (*data.fit, *data.held)
    with Forwards(converted, harmonic, memory // 4, batches, data.probes, data.runs.complete) as forwards:
        refit = Refit(forwards, targets, data, settings, memory, whole, coder, job.reduction)
        for done, tied in enumerate(tied_layers):
            if progress:
                progress(done, len(tied_layers), tied.names[0])
            records.append(refit(tied))
    if progress:
        progress(len(tied_layers), len(tied_layers), "checking the outputs")
    for name in cut:
        if not any(name in tied.names for tied in tied_layers):
            why = not_refittable.get(name) or why_not_observed(name, layers)
            record = LayerCalibration(name, "projection", why=why)
            records.append(coder.finished([name], record) if coder else record)
    return records, forwards.fallbacks


def never_worse(
    compare: Divergence,
    converted: nn.Module,
    before: Mapping[str, Tensor],
    plain: float | None,
    refit: float | None,
    shares: Sequence[float] = (0.5, 0.25),
) -> tuple[float, float | None]:
    """Reduce the refit's change to a half, a quarter or nothing if the network's outputs are worse than before it.

    This can happen although every layer is better.

    Args:
        before: the tensors of the plain cut.
        plain: the divergence of the plain cut.
        refit: the divergence after the refit.
        shares: the shares of the change that are tried; coded weights have none between 0 and 1.

    Returns:
        The share of the change that is kept, and the divergence with it.
    """
    if plain is None or (refit is not None and refit <= plain):
        return 1.0, refit
    after = _copied_tensors(converted)
    for kept in shares:
        blend(converted, before, after, kept)
        divergence, _ = compare(converted)
        if divergence is not None and divergence < plain:
            return kept, divergence
    blend(converted, before, after, 0.0)
    return 0.0, plain


def _batch_norms(
    compare: Divergence, converted: nn.Module, data: CalibrationSet, divergence_before: float | None
) -> tuple[int, float | None, list[str]]:
    """Re-estimate batch norms; restore them unless the held-back outputs come clearly nearer to the original's.

    Returns the number of batch norms, the divergence, and notes.
    """
    before, notes, norms = _copied_tensors(converted), [], 0
    try:
        norms = reestimate(converted, (batch.input for batch in data.fit))
    except Exception as error:  # an error in this last step must not lose the refit
        notes.append(f"batch norms were not re-estimated: {first_line(error)}")
    divergence, why = compare(converted)
    if divergence_before is not None and why:
        notes.append(f"with batch norms re-estimated the outputs cannot be compared ({why})")
    if divergence_before is None or divergence is None or not divergence < BATCH_NORM_GAIN * divergence_before:
        blend(converted, before, before, 0.0)
        return 0, divergence_before, notes
    return norms, divergence, notes


@torch.no_grad()
def _write_ranks(ranked: nn.Module, whole: nn.Module) -> None:
    """Set a network's tensors to those of one with whole weights, whose ranks are reduced already."""
    state, layers = tensors_of(whole), weighted_layers(whole)
    for key, tensor in tensors_of(ranked).items():
        if key in state:
            tensor.copy_(state[key])
    for name, layer in ranked_layers(ranked).items():
        layer.write(pair_for(layers[name], layer.rank, layer.kernel_second))


def _copied_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in tensors_of(model).items()}


@torch.no_grad()
def blend(model: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor], share: float) -> None:
    """Set the network's tensors to ``before`` plus a share of their change; integer tensors are set to ``before``."""
    for key, tensor in tensors_of(model).items():
        if key in before:
            between = tensor.is_floating_point() and share > 0
            tensor.copy_(before[key] + share * (after[key] - before[key]) if between else before[key])
