"""verify(): compare an original and a converted network, layer by layer and at the outputs.

There are three separate checks. First, all parts that a conversion does not change are equal bit for bit. Second, each
kernel is the projection of the original's kernel. Third, the difference of the outputs is measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import isnan
from typing import Any, cast

import torch
from torch import nn

from ..calibration import Progress
from ..codecs.codec import Entry
from ..codecs.plain import WEIGHT_DTYPES, tolerance_of
from ..errors import InputError, UsageError, shortened
from ..layers.block import HarmonicBlock2d
from ..layers.harmonic import is_harmonic_layer
from ..network.forms import fold_blocks
from ..network.heads import compared_text
from ..network.layers import converted_layers, state_key, stored_names
from ..network.running import evaluating
from ..network.state import tensors_of
from ..network.values import batch_size, seeded_inputs
from ..plan import Check, LayerPlan, Plan, plan_of_model
from ..storage.checkpoint import Network
from .convert import Conversion
from .layer_check import check_layer
from .showing import reported
from .side_by_side import Comparison, comparisons
from .structure_check import altered_state, as_calibrated, as_coded, as_rounded, differing_modules, pairs_of
from .verification import LayerCheck, Verification

_UNCOPIED = (
    "a copy of the network still calls this layer of the network itself, through a function that refers to it: such a "
    "network cannot be compared"
)

_REWRITTEN = (
    "the network rewrites its weight in each forward pass, and a harmonic layer does not: convert with an example "
    "input, so that the layer is skipped"
)

# A kernel is different if it differs by more than this, relative to the largest weight of its filter.
CHANGED_KERNEL = 1e-3


def verify(
    original: nn.Module,
    converted: nn.Module | Conversion | Network,
    example_input: Any = None,
    *,
    inputs: Any = None,
    tolerance: float | None = None,
    calibrated: Mapping[str, str] | None = None,
    random_inputs: bool = False,
    progress: Progress | bool | None = None,
) -> Verification:
    """Compare ``converted`` with the ``original`` from which it was made; neither is changed.

    >>> import harmconvert
    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()).double()
    >>> check = verify(network, harmconvert.convert(network).model, torch.rand(2, 3, 8, 8))
    >>> check.ok, check.max_relative_error < 1e-12
    (True, True)

    Args:
        converted: a network, or the result of `convert` or `open_source`, which also has the digests of calibration.
        example_input: a tensor, a tuple of arguments, a dict of keywords, or a list (one argument), as for `convert`;
            give several examples in one batch. Default: two seeded random inputs of the model's own size.
        inputs: another name of ``example_input``.
        tolerance: the relative difference of outputs to accept. If it is given, only the structure and the outputs
            decide. By default it depends on the weights' dtype (1e-12 for float64, 1e-5 for float32), top-1 must be the
            same on every input, and tensors that a conversion does not change must be equal.
        calibrated: keys of the tensors that calibration wrote, with their sha256 (`Calibration.changed`); default: read
            from a `Conversion` or a checkpoint. These tensors must be unchanged since the calibration.
        random_inputs: the inputs are noise, so the verdict does not mention the top-1. Always so if no input is given.
        progress: show a progress bar; None: in an interactive session (a Python prompt, IPython, a notebook). Or a
            function of (steps done, steps, name of the step).

    Raises:
        UsageError: no input size is known, the original does not run on the inputs, or the inputs have both names.
        InputError: a network has no values (meta device).
    """
    if inputs is not None and example_input is not None:
        raise UsageError("example_input and inputs are two names of one argument: give one of them")
    inputs = example_input if inputs is None else inputs
    with reported(progress, "verifying") as report:
        return _verified(original, converted, inputs, tolerance, calibrated, random_inputs, report)


def _verified(
    original: nn.Module,
    converted: nn.Module | Conversion | Network,
    inputs: Any,
    tolerance: float | None,
    calibrated: Mapping[str, str] | None,
    random_inputs: bool,
    progress: Progress,
) -> Verification:
    coded = _coded(converted)
    planned = {layer.name: layer for layer in _plan_of(converted).layers if not layer.whole}
    calibrated = _written_by_calibration(converted) if calibrated is None else calibrated
    converted = converted if isinstance(converted, nn.Module) else converted.model
    _check_values(original, converted)
    if inputs is None:
        inputs, random_inputs = seeded_inputs(original, converted), True
    if _blocks(original) != _blocks(converted):  # a block is compared with a convolution in the form of a convolution
        original, converted = fold_blocks(original), fold_blocks(converted)
    dtype = max((_weight_dtype(original), _weight_dtype(converted)), key=tolerance_of)
    with evaluating(original, converted):  # in training mode, reading a weight with spectral normalisation changes it
        pairs, structural = pairs_of(original, converted, planned)
    written = as_calibrated(converted, calibrated) | as_coded(converted, coded)
    if coded:
        written = as_rounded(original, converted) | written
    altered = [] if structural else altered_state(original, converted, pairs, written)
    tick = _ticker(progress, 2 * len(pairs) + 2 * (1 if dtype == torch.float64 else 2))
    kernels = _kernel_checks(pairs, planned, written, tick)
    notes = [note for note in (compared_text(original),) if note is not None]
    results = comparisons(original, converted, inputs, dtype, list(pairs), notes, tick)
    first = next(iter(results.values()))
    rewritten = {name for one in results.values() for name in one.rewritten}
    layers = _layer_checks(kernels, pairs, planned, first, rewritten)
    structural = [*structural, *(f"{name or '(root)'}: {_UNCOPIED}" for name in sorted(first.uncopied))]
    problems = [*structural, *(f"{layer.name}: {layer.problem}" for layer in layers if layer.problem), *altered]
    worst, agreement = _worst(results.values())
    if isnan(worst):
        notes.append("the outputs hold no finite value on these inputs: they cannot be compared")
    without_effect = _cuts_without_effect(layers, worst, problems, notes)
    limit = tolerance_of(dtype, coded) if tolerance is None else tolerance
    within = worst <= limit  # False for NaN
    if not within:  # with equal outputs, other modules are allowed
        problems += differing_modules(original, converted, pairs)
    _report_idle(first.idle, any(layer.cut for layer in layers), within, problems, notes)
    same = not structural if tolerance is not None else not problems and agreement in (None, 1.0)
    ok = within and same and not without_effect
    float64, float32 = (results[p].error if p in results else None for p in (torch.float64, torch.float32))
    return Verification(
        ok, not problems, limit, worst, float64, float32, agreement, batch_size(inputs), layers,
        tuple(problems), tuple(notes), random_inputs, bool(coded),
    )  # fmt: skip


def _worst(comparisons: Collection[Comparison]) -> tuple[float, float | None]:
    """Return the largest error (NaN if any is NaN) and the lowest top-1 agreement (None if any is not known)."""
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
    checks = {}
    for name, pair in pairs.items():
        tick(name)
        with evaluating(*pair):
            known = [written[key] for key in map(partial(state_key, name), stored_names(pair[1])) if key in written]
            checks[name] = check_layer(*pair, planned.get(name), all(known) if known else None)
    return checks


def _layer_checks(
    kernels: Mapping[str, Check],
    pairs: Mapping[str, tuple[nn.Module, nn.Module]],
    planned: Mapping[str, LayerPlan],
    outputs: Comparison,
    rewritten: Collection[str],
) -> tuple[LayerCheck, ...]:
    """Combine the check of each kernel with the comparison of the outputs of its layer."""
    layers = (
        LayerCheck(
            name, check.kept, check.total, check.error, outputs.outputs.get(name),
            _REWRITTEN if name in rewritten else check.problem, check.kept < check.total or name in planned,
        )
        for name, check in kernels.items()
        # If the network rewrites the weight of a plain layer, its value from the last forward pass has no meaning.
        if name not in rewritten or is_harmonic_layer(pairs[name][1])
    )  # fmt: skip
    return tuple(layer if layer.name in outputs.constant else _check_weight_is_used(layer) for layer in layers)


def _kernel_changed(layer: LayerCheck) -> bool:
    return layer.cut and layer.kernel_error > CHANGED_KERNEL


def _check_weight_is_used(layer: LayerCheck) -> LayerCheck:
    """Return the check, with a problem if the kernel has changed but the output has not."""
    if layer.problem is None and _kernel_changed(layer) and layer.output_error == 0:
        return replace(
            layer, problem="its kernel is cut and its output is exactly the same: it does not use its weight"
        )
    return layer


def _cuts_without_effect(layers: Sequence[LayerCheck], worst: float, problems: list[str], notes: list[str]) -> bool:
    """Return whether kernels are cut although the outputs are exactly the same; add notes or a problem about it."""
    changed = [layer for layer in layers if _kernel_changed(layer)]
    if idle := [layer.name or "(root)" for layer in changed if layer.output_error is None]:
        notes.append(f"cut, but not called on these inputs: {shortened(idle, 5)}")
    if not changed or worst != 0:
        return False
    if any(layer.output_error for layer in changed):
        notes.append(
            "the outputs are exactly the same although the outputs of layers differ: these inputs do not show the "
            "effect of the cut (for example, a detector finds no object in them); give other inputs"
        )
    elif not problems:
        problems.append(
            f"the outputs are exactly the same although {len(changed)} kernels are cut: the network does not use their "
            "weights (it may hold copies of them), or these inputs do not reach them"
        )
    return True


def _report_idle(idle: Sequence[str], cut: bool, within: bool, problems: list[str], notes: list[str]) -> None:
    """Report layers that only the original runs.

    A cut network may take another branch. But if the outputs of a cut network are equal, an idle layer is a problem.
    """
    for name in (name or "(root)" for name in idle):
        if not within:
            notes.append(f"{name} runs only in the original on these inputs")
        elif cut:
            problems.append(f"{name}: it runs only in the original, but the outputs are equal")


def _plan_of(converted: nn.Module | Conversion | Network) -> Plan:
    """Return the plan of a converted network, read from its layers if there is no record; empty if there are none."""
    if isinstance(converted, Conversion):
        return converted.plan
    if isinstance(converted, Network) and converted.header:
        return converted.header.plan
    model = converted if isinstance(converted, nn.Module) else converted.model
    return plan_of_model(model) if converted_layers(model) else Plan(())


def _written_by_calibration(converted: nn.Module | Conversion | Network) -> Mapping[str, str]:
    """Return the keys of the tensors that calibration wrote, with their sha256; empty if they are not known."""
    if isinstance(converted, Conversion):
        return converted.calibration.changed if converted.calibration else {}
    header = converted.header if isinstance(converted, Network) else None
    return header.calibrated if header else {}


def _coded(converted: nn.Module | Conversion | Network) -> Mapping[str, Entry]:
    """Return the codec entries of the tensors that a file does not store as plain values."""
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


def _ticker(progress: Progress, total: int) -> Callable[[str], None]:
    done = itertools.count()
    # A layer that runs twice calls this twice.
    return lambda what: progress(min(next(done), total), total, what)
