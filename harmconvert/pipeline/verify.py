"""verify(): an original and a converted network side by side, per layer and end to end.

Three questions, answered apart: is every part that was not to change the same, bit for bit? Is every kernel the
projection of the original's onto the frequencies kept? And how far are the outputs from the original's?
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from math import isnan
from typing import Any, cast

import torch
from torch import nn

from ..codecs.codec import Entry
from ..codecs.plain import WEIGHT_DTYPES, tolerance_of
from ..errors import InputError, shortened
from ..layers.block import HarmonicBlock2d
from ..network.forms import fold_blocks
from ..network.layers import is_harmonic_layer, state_key
from ..network.running import evaluating
from ..network.state import tensors_of
from ..network.values import batch_size, seeded_inputs
from ..plan import Check, LayerPlan, Plan
from ..storage.checkpoint import Network
from .convert import Conversion
from .layer_check import check_layer
from .side_by_side import Comparison, comparisons
from .structure_check import altered_state, as_calibrated, built_otherwise, pairs_of
from .verification import LayerCheck, Verification

_STRAY = "a copy of the network still runs the layer that it was copied from, by a function that copies do not follow"

_LOST = (
    "the network rewrites its weight in each forward, which a harmonic layer does not follow: convert with an example "
    "input, so that it is skipped"
)

# A kernel is a different one where it differs by more than this of its filter's largest weight.
CHANGED_KERNEL = 1e-3


def verify(
    original: nn.Module,
    converted: nn.Module | Conversion | Network,
    inputs: Any = None,
    *,
    tolerance: float | None = None,
    calibrated: Mapping[str, str] | None = None,
    random_inputs: bool = False,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Verification:
    """Compare ``converted`` with the ``original`` it was made from; neither is changed.

    >>> import harmconvert
    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()).double()
    >>> check = verify(network, harmconvert.convert(network).model, torch.rand(2, 3, 8, 8))
    >>> check.ok, check.max_relative_error < 1e-12
    (True, True)

    Args:
        converted: a network, or what `convert` or `open_source` returned, which also says what calibration wrote.
        inputs: a tensor, a tuple of arguments, a dict of keywords, or a list (one argument); two seeded random inputs
            of the model's own size where None.
        tolerance: the relative difference of outputs to accept. Where given, it alone decides (structure aside);
            otherwise it follows the weights' dtype (1e-12 for float64, 1e-5 for float32), top-1 must be the same on
            every input, and nothing may differ that was not converted.
        calibrated: keys of the tensors that calibration wrote, with their sha256 (`Calibration.changed`); known of a
            `Conversion` and a checkpoint. Those are as planned where they are what calibration wrote.
        random_inputs: ``inputs`` are noise, as they are where None is given; the verdict then names no top-1.
        progress: called with (steps done, steps, what is looked at).

    Raises:
        UsageError: no input size is known, or the original does not run on the inputs.
        InputError: a network without values (meta device).
    """
    coded = _coded(converted)
    planned = {layer.name: layer for layer in _plan_of(converted).layers if not layer.whole}
    calibrated = _written_by_calibration(converted) if calibrated is None else calibrated
    converted = converted if isinstance(converted, nn.Module) else converted.model
    _check_values(original, converted)
    if inputs is None:
        inputs, random_inputs = seeded_inputs(original, converted), True
    if _blocks(original) != _blocks(converted):  # what a block computes is compared with a convolution as one
        original, converted = fold_blocks(original), fold_blocks(converted)
    dtype = max((_weight_dtype(original), _weight_dtype(converted)), key=tolerance_of)
    with evaluating(original, converted):  # reading a spectrally normalised weight in training mode would change it
        pairs, structural = pairs_of(original, converted, planned)
    written = as_calibrated(converted, calibrated)
    altered = [] if structural else altered_state(original, converted, pairs, written)
    tick = _ticker(progress, 2 * len(pairs) + 2 * (1 if dtype == torch.float64 else 2))
    kernels = _kernel_checks(pairs, planned, written, tick)
    notes: list[str] = []
    found = comparisons(original, converted, inputs, dtype, list(pairs), notes, tick)
    first = next(iter(found.values()))
    rewritten = {name for one in found.values() for name in one.rewritten}
    layers = _layer_checks(kernels, pairs, planned, first, rewritten)
    structural = [*structural, *(f"{name or '(root)'}: {_STRAY}" for name in sorted(first.strays))]
    problems = [*structural, *(f"{layer.name}: {layer.problem}" for layer in layers if layer.problem), *altered]
    worst, agreement = _worst(found.values())
    if isnan(worst):
        notes.append("the outputs hold no finite value on these inputs: nothing to compare")
    hidden = _without_effect(layers, worst, problems, notes)
    limit = tolerance_of(dtype, coded) if tolerance is None else tolerance
    within = worst <= limit  # False for NaN
    if not within:  # else it comes to the same, however it is built
        problems += built_otherwise(original, converted, pairs)
    _passed_over(first.idle, any(layer.cut for layer in layers), within, problems, notes)
    same = not structural if tolerance is not None else not problems and agreement in (None, 1.0)
    ok = within and same and not hidden
    float64, float32 = (found[p].error if p in found else None for p in (torch.float64, torch.float32))
    return Verification(
        ok, not problems, limit, worst, float64, float32, agreement, batch_size(inputs), layers,
        tuple(problems), tuple(notes), random_inputs,
    )  # fmt: skip


def _worst(comparisons: Collection[Comparison]) -> tuple[float, float | None]:
    """The largest error of some comparisons (NaN where any is), and their least top-1 agreement (None: not known)."""
    errors = [one.error for one in comparisons]
    agreements = [one.agreement for one in comparisons]
    agreement = None if None in agreements else min(cast("list[float]", agreements))
    return next((error for error in errors if isnan(error)), max(errors)), agreement


def _kernel_checks(
    pairs: Mapping[str, tuple[nn.Module, nn.Module]],
    planned: Mapping[str, LayerPlan],
    written: Mapping[str, bool],
    tick: Callable[[str], None],
) -> dict[str, Check]:
    """The check of each layer's kernel, by name."""
    checks = {}
    for name, pair in pairs.items():
        tick(name)
        with evaluating(*pair):
            checks[name] = check_layer(*pair, planned.get(name), written.get(state_key(name, "coefficients")))
    return checks


def _layer_checks(
    kernels: Mapping[str, Check],
    pairs: Mapping[str, tuple[nn.Module, nn.Module]],
    planned: Mapping[str, LayerPlan],
    outputs: Comparison,
    rewritten: Collection[str],
) -> tuple[LayerCheck, ...]:
    """The check of each layer's kernel, with what the run of both networks showed of the layer."""
    layers = (
        LayerCheck(
            name, check.kept, check.total, check.error, outputs.outputs.get(name),
            _LOST if name in rewritten else check.problem, check.kept < check.total or name in planned,
        )
        for name, check in kernels.items()
        # A plain layer whose weight the network rewrites holds what the last forward left: that says nothing.
        if name not in rewritten or is_harmonic_layer(pairs[name][1])
    )  # fmt: skip
    return tuple(layer if layer.name in outputs.constant else _stale(layer) for layer in layers)


def _changed(layer: LayerCheck) -> bool:
    """Whether the kernel of a layer is another one, beyond rounding."""
    return layer.cut and layer.kernel_error > CHANGED_KERNEL


def _stale(layer: LayerCheck) -> LayerCheck:
    """The layer, with a problem where it computes the same with another kernel."""
    if layer.problem is None and _changed(layer) and layer.output_error == 0:
        return replace(
            layer, problem="its kernel is cut and its output is exactly the same: it does not use its weight"
        )
    return layer


def _without_effect(layers: Sequence[LayerCheck], worst: float, problems: list[str], notes: list[str]) -> bool:
    """Whether kernels are cut and the outputs are exactly the same; says why that may be, and which cut layers did not
    run."""
    changed = [layer for layer in layers if _changed(layer)]
    if idle := [layer.name or "(root)" for layer in changed if layer.output_error is None]:
        notes.append(f"cut, but not run on these inputs: {shortened(idle, 5)}")
    if not changed or worst != 0:
        return False
    if any(layer.output_error for layer in changed):
        notes.append(
            "the outputs are exactly the same although the outputs of layers differ: these inputs show nothing of the "
            "cut (a detector that finds nothing, say); give others"
        )
    elif not problems:
        problems.append(
            f"the outputs are exactly the same although {len(changed)} kernels are cut: the network does not use their "
            "weights (it may hold copies of them), or these inputs do not reach them"
        )
    return True


def _passed_over(idle: Sequence[str], cut: bool, within: bool, problems: list[str], notes: list[str]) -> None:
    """Tell of layers that the original runs and the converted network does not: what is cut may take another branch,
    but nothing that is cut comes to the same."""
    for name in (name or "(root)" for name in idle):
        if not within:
            notes.append(f"{name} runs in the original alone on these inputs")
        elif cut:
            problems.append(f"{name}: it runs in the original alone, and yet nothing changes")


def _plan_of(converted: nn.Module | Conversion | Network) -> Plan:
    """The plan that a converted network follows, as far as it is known."""
    if isinstance(converted, Conversion):
        return converted.plan
    header = converted.header if isinstance(converted, Network) else None
    return header.plan if header else Plan(())


def _written_by_calibration(converted: nn.Module | Conversion | Network) -> Mapping[str, str]:
    """Keys of the tensors that calibration wrote, with their sha256; none are known of a bare network."""
    if isinstance(converted, Conversion):
        return converted.calibration.changed if converted.calibration else {}
    header = converted.header if isinstance(converted, Network) else None
    return header.calibrated if header else {}


def _coded(converted: nn.Module | Conversion | Network) -> Mapping[str, Entry]:
    """How a file holds those tensors of a network that it does not hold as they are."""
    if isinstance(converted, Conversion):
        return converted.coded
    return converted.header.codecs.coded if isinstance(converted, Network) and converted.header else {}


def _check_values(*models: nn.Module) -> None:
    for model in models:
        for key, tensor in tensors_of(model).items():
            if tensor.is_meta:
                raise InputError(f"{key} has no values to compare (meta device): load weights first")


def _blocks(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, HarmonicBlock2d)]


def _weight_dtype(model: nn.Module) -> torch.dtype:
    dtypes = [p.dtype for p in model.parameters() if p.dtype in WEIGHT_DTYPES]
    return max(dtypes, key=tolerance_of, default=torch.float32)


def _ticker(progress: Callable[[int, int, str], None], total: int) -> Callable[[str], None]:
    done = itertools.count()
    # A layer may run twice, and is then looked at twice.
    return lambda what: progress(min(next(done), total), total, what)
