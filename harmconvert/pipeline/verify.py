"""verify(): an original and a converted network side by side, per layer and end to end.

Three questions, answered apart: is every part that was not to change the same, bit for bit? Is every kernel the
projection of the original's onto the frequencies kept? And how far are the outputs from the original's?
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import isnan
from threading import get_ident
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..codecs.codec import Entry
from ..codecs.plain import WEIGHT_DTYPES, tolerance_of
from ..errors import InputError, UsageError, first_line, shortened
from ..layers.block import HarmonicBlock2d
from ..layers.harmonic import HarmonicMixin
from ..network.comparison import greatest_difference, relative_difference, top1_agreement
from ..network.dataflow import weight_state
from ..network.exchange import in_precision
from ..network.forms import fold_blocks
from ..network.layers import convolutions, state_key
from ..network.running import call, evaluating, unchanged
from ..network.side_effects import seeded_sources
from ..network.state import tensors_of
from ..network.values import batch_size, cloned, fitted, seeded_inputs, tensors_in
from ..plan.cost import parameter_count
from ..storage.checkpoint import Network
from .convert import Conversion
from .kernel_check import check_kernel
from .structure_check import altered_state, as_calibrated, built_otherwise, pairs_of
from .verification import LayerCheck, Verification

_STRAY = "a copy of the network still runs the layer that it was copied from, by a function that copies do not follow"

_LOST = (
    "the network rewrites its weight in each forward, which a harmonic layer does not follow: convert with an example "
    "input, so that it is skipped"
)

# A kernel is a different one where it differs by more than this of its filter's largest weight.
CHANGED_KERNEL = 1e-3

# Weights above which copies of two networks are no longer made, in float64 or at all: 4 to 8 GB would go into them.
MOST_IN_FLOAT64 = 2**28


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
    if not isinstance(converted, nn.Module):
        calibrated = _written_by_calibration(converted) if calibrated is None else calibrated
        converted = converted.model
    _check_values(original, converted)
    if inputs is None:
        inputs, random_inputs = seeded_inputs(original, converted), True
    if _blocks(original) != _blocks(converted):  # what a block computes is compared with a convolution as one
        original, converted = fold_blocks(original), fold_blocks(converted)
    dtype = max((_weight_dtype(original), _weight_dtype(converted)), key=tolerance_of)
    with evaluating(original, converted):  # reading a spectrally normalised weight in training mode would change it
        pairs, structural = pairs_of(original, converted)
    written = as_calibrated(converted, calibrated or {})
    altered = [] if structural else altered_state(original, converted, pairs, written)
    tick = _ticker(progress, 2 * len(pairs) + 2 * (1 if dtype == torch.float64 else 2))
    kernels = {}
    for name, pair in pairs.items():
        tick(name)
        with evaluating(*pair):
            kernels[name] = check_kernel(*pair, written.get(state_key(name, "coefficients")))
    notes: list[str] = []
    found = _comparisons(original, converted, inputs, dtype, list(pairs), notes, tick)
    first = next(iter(found.values()))
    rewritten = {name for one in found.values() for name in one.rewritten}
    layers = tuple(
        LayerCheck(name, kept, total, kernel_error, first.outputs.get(name), _LOST if name in rewritten else problem)
        for name, (kept, total, kernel_error, problem) in kernels.items()
        # A plain layer whose weight the network rewrites holds what the last forward left: that says nothing.
        if name not in rewritten or isinstance(pairs[name][1], HarmonicMixin)
    )
    layers = tuple(layer if layer.name in first.constant else _stale(layer) for layer in layers)
    structural = [*structural, *(f"{name or '(root)'}: {_STRAY}" for name in sorted(first.strays))]
    problems = [*structural, *(f"{layer.name}: {layer.problem}" for layer in layers if layer.problem), *altered]
    measured = [one.error for one in found.values()]
    worst = next((error for error in measured if isnan(error)), max(measured))
    agreements = [one.agreement for one in found.values()]
    agreement = None if None in agreements else min(cast("list[float]", agreements))
    if isnan(worst):
        notes.append("the outputs hold no finite value on these inputs: nothing to compare")
    hidden = _without_effect(layers, worst, problems, notes)
    limit = tolerance_of(dtype, coded) if tolerance is None else tolerance
    within = worst <= limit  # False for NaN
    if not within:  # else it comes to the same, however it is built
        problems += built_otherwise(original, converted, pairs)
    _passed_over(first.idle, any(layer.kept < layer.total for layer in layers), within, problems, notes)
    same = not structural if tolerance is not None else not problems and agreement in (None, 1.0)
    ok = within and same and not hidden
    float64, float32 = (found[p].error if p in found else None for p in (torch.float64, torch.float32))
    return Verification(
        ok, not problems, limit, worst, float64, float32, agreement, batch_size(inputs), layers,
        tuple(problems), tuple(notes), random_inputs,
    )  # fmt: skip


@dataclass
class _Comparison:
    """Two networks side by side in one precision: relative difference of the outputs, top-1 agreement, and by layer the
    relative difference of its outputs, both on the original's input (only where asked for).

    Layers by name: ``strays`` of the given networks ran although copies were called; ``idle`` ran in the original
    alone; ``constant`` read constant inputs; the original rewrites the weight of ``rewritten`` in its forward.
    """

    error: float
    agreement: float | None
    outputs: dict[str, float] = field(default_factory=dict)
    strays: set[str] = field(default_factory=set)
    idle: list[str] = field(default_factory=list)
    constant: set[str] = field(default_factory=set)
    rewritten: set[str] = field(default_factory=set)


def _comparisons(
    original: nn.Module,
    converted: nn.Module,
    inputs: Any,
    dtype: torch.dtype,
    names: list[str],
    notes: list[str],
    tick: Callable[[str], None],
) -> dict[torch.dtype, _Comparison]:
    """Compare in float64 where that can be done, and in float32 unless the weights have more; the first comparison
    looks at the layers, because float64 shows a wrong layer and not the arithmetic.

    Raises:
        UsageError: the networks do not run on the inputs.
    """
    found: dict[torch.dtype, _Comparison] = {}
    for precision in (torch.float64, torch.float32):
        if precision == torch.float32 and dtype == torch.float64:
            continue
        count = parameter_count(original)
        if precision != dtype and precision == torch.float64 and count > MOST_IN_FLOAT64:
            notes.append(f"not compared in float64: copies of {count / 1e6:,.0f}M weights are too large")
            continue
        try:
            found[precision] = _compare(original, converted, inputs, precision, dtype, names, not found, tick)
        except _NoRunError as problem:
            if precision != torch.float64 or dtype == torch.float64:
                raise UsageError(str(problem)) from problem
            notes.append(f"not compared in float64: {problem}")
    return found


def _changed(layer: LayerCheck) -> bool:
    """Whether the kernel of a layer is another one, beyond rounding."""
    return layer.kept < layer.total and layer.kernel_error > CHANGED_KERNEL


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


def _written_by_calibration(converted: Conversion | Network) -> Mapping[str, str]:
    """Keys of the tensors that calibration wrote, with their sha256."""
    if isinstance(converted, Conversion):
        return converted.calibration.changed if converted.calibration else {}
    return converted.header.calibrated if converted.header else {}


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


class _NoRunError(Exception):
    """The network does not run on the inputs in this precision."""


def _weight_dtype(model: nn.Module) -> torch.dtype:
    dtypes = [p.dtype for p in model.parameters() if p.dtype in WEIGHT_DTYPES]
    return max(dtypes, key=tolerance_of, default=torch.float32)


def _ticker(progress: Callable[[int, int, str], None], total: int) -> Callable[[str], None]:
    done = itertools.count()
    # A layer may run twice, and is then looked at twice.
    return lambda what: progress(min(next(done), total), total, what)


def _compare(
    original: nn.Module,
    converted: nn.Module,
    inputs: Any,
    precision: torch.dtype,
    dtype: torch.dtype,
    names: list[str],
    per_layer: bool,
    tick: Callable[[str], None],
) -> _Comparison:
    """Compare copies of both networks in one precision; top-1 is compared to the rounding of
    ``dtype``, that of the weights."""
    with _default_dtype(precision):
        shared = parameter_count(original) > MOST_IN_FLOAT64
        models = [in_precision(model, precision, shared) for model in (original, converted)]
        inputs = fitted(inputs, models[0])
        ours, theirs = convolutions(models[0]), convolutions(models[1])
        found = _Comparison(float("inf"), 0.0)
        given = [(n, convs[n]) for convs in map(convolutions, (original, converted)) for n in names if n in convs]
        watched = {name: ours[name] for name in names if per_layer}
        # Hooks of the copies may keep what they see in places that the given networks share.
        with unchanged(models[0]), unchanged(models[1]), evaluating(*models), _calls(given) as strays:
            before = {name: weight_state(conv) for name, conv in ours.items()}
            with _compared(watched, theirs, found, precision, tick), unchanged(models[1]):
                results = [_outputs("original", models[0], inputs, precision, tick)]
            found.rewritten = {name for name, conv in ours.items() if weight_state(conv) != before[name]}
            with _calls([(n, theirs[n]) for n in names]) as ran:
                results.append(_outputs("converted", models[1], inputs, precision, tick))
    found.strays, found.idle = strays, [name for name in found.outputs if name not in ran]
    if [t.shape for t in results[0]] == [t.shape for t in results[1]]:
        pairs = list(zip(*results, strict=True))
        found.error = max((relative_difference(b, a) for a, b in pairs), default=float("nan"))
        found.agreement = top1_agreement(pairs, torch.finfo(dtype).eps)
    return found


@contextmanager
def _compared(
    ours: Mapping[str, nn.Module],
    theirs: Mapping[str, nn.Module],
    found: _Comparison,
    precision: torch.dtype,
    tick: Callable[[str], None],
) -> Iterator[None]:
    """Compare each layer with its counterpart when it has run, on the same input."""

    def watch(name: str) -> Callable[..., None]:
        def hook(conv: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            tick(name)
            expected = [tensor.clone() for tensor in tensors_in(output)]  # the layer may keep its map and change it
            try:
                answer = tensors_in(theirs[name](*args, **kwargs))
            except Exception as failure:
                raise _NoRunError(
                    f"layer {name or '(root)'} of the converted network does not run in {precision}: "
                    f"{type(failure).__name__}: {first_line(failure)}"
                ) from failure
            found.outputs[name] = max(greatest_difference(answer, expected), found.outputs.get(name, 0.0))
            if all(map(_constant, tensors_in((args, kwargs)))):
                found.constant.add(name)

        return hook

    with _hooks([conv.register_forward_hook(watch(name), with_kwargs=True) for name, conv in ours.items()]):
        yield


def _constant(tensor: Tensor) -> bool:
    return not tensor.numel() or bool((tensor == tensor.flatten()[0]).all())


def _outputs(
    which: str, model: nn.Module, inputs: Any, precision: torch.dtype, tick: Callable[[str], None]
) -> list[Tensor]:
    tick(f"outputs in {str(precision).removeprefix('torch.')}")
    try:
        with seeded_sources():
            return tensors_in(call(model, cloned(inputs)))
    except _NoRunError:
        raise
    except Exception as failure:
        raise _NoRunError(
            f"the {which} network does not run on these inputs in {precision}: "
            f"{type(failure).__name__}: {first_line(failure)}"
        ) from failure


@contextmanager
def _calls(layers: Iterable[tuple[str, nn.Module]]) -> Iterator[set[str]]:
    """The names of those layers that this thread runs meanwhile."""
    ran: set[str] = set()
    here = get_ident()

    def note(name: str) -> Callable[..., None]:
        return lambda *_: ran.add(name) if get_ident() == here else None

    with _hooks([layer.register_forward_pre_hook(note(name)) for name, layer in layers]):
        yield ran


@contextmanager
def _hooks(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Networks that make tensors in their forward make them in this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
