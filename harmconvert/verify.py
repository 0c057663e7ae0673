"""verify(): an original and a converted network side by side, per layer and end to end.

Three questions, answered apart: is every part that was not to change the same, bit for bit? Is every kernel the
projection of the original's onto the frequencies kept? And how far are the outputs from the original's?
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import isnan
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .block import HarmonicBlock2d
from .comparison import relative_difference, top1_agreement
from .errors import InputError, UsageError, first_line, one_line, shortened
from .forms import fold_blocks
from .kernel_check import check_kernel
from .structure_check import altered_state, as_calibrated, built_otherwise, pairs_of, written_by_calibration
from .surgery import (
    batch_size,
    call,
    cloned,
    convolutions,
    default_input,
    evaluating,
    fitted,
    in_precision,
    state_key,
    tensors_in,
)

# Relative difference of the outputs with the whole basis, by the dtype of the weights: float64 and float32 as promised
# in the documentation; the 16-bit ones are bounded by the rounding of their coefficients, amplified layer by layer.
OUTPUT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}

_STRAY = "a copy of the network still runs the layer that it was copied from, by a function that copies do not follow"

# Weights above which copies of two networks are no longer made, in float64 or at all: 4 to 8 GB would go into them.
MOST_IN_FLOAT64 = 2**28


@dataclass(frozen=True)
class LayerCheck:
    """One convolution over 1x1, original against converted.

    ``kernel_error``: largest difference over the largest weight of the same filter. ``output_error``: relative
    difference of the layer's outputs in float64, both fed the original's input (None where it did not run). ``problem``
    says what is not as the plan has it, or is None.
    """

    name: str
    kept: int
    total: int
    kernel_error: float
    output_error: float | None
    problem: str | None


@dataclass(frozen=True)
class Verification:
    """The verdict and the figures behind it.

    ``ok``: the converted network computes what the original does, within ``tolerance``. A cut network does not, and
    says so; ``as_planned`` tells that it is, kernel by kernel, the projection that its plan asks for. Relative errors
    are largest difference over largest output; ``float64_error`` isolates the rounding of the coefficients,
    ``float32_error`` adds that of float32 arithmetic (each None where that pass was not run; the notes say why).
    ``top1_agreement`` is the share of inputs with the same top-1 class, logits that the weights' dtype cannot tell
    apart being tied (None where outputs are no logits).
    """

    ok: bool
    as_planned: bool
    tolerance: float
    max_relative_error: float
    float64_error: float | None
    float32_error: float | None
    top1_agreement: float | None
    inputs: int
    layers: tuple[LayerCheck, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return asdict(self)

    @property
    def verdict(self) -> str:
        """One line: what holds, or what does not and where."""
        return one_line(self._verdict)

    @property
    def _verdict(self) -> str:
        outputs = f"outputs differ by {self.max_relative_error:.1e} of the largest, tolerance {self.tolerance:.0e}"
        if self.top1_agreement is not None:
            outputs += f"; same top-1 on {self.top1_agreement:.1%} of {self.inputs} inputs"
        if self.ok:
            return f"verified: {outputs}"
        if isnan(self.max_relative_error) and not self.problems:
            return "not verified: the outputs hold no finite value on these inputs, so there is nothing to compare"
        cut = [layer for layer in self.layers if layer.kept < layer.total]
        if self.problems:
            return f"not the same: {shortened(list(self.problems), 3)} ({outputs})"
        if cut and self.as_planned:
            return f"cut as planned in {len(cut)} of {len(self.layers)} layers, so not the same network: {outputs}"
        return f"not the same: {outputs}"


def verify(
    original: nn.Module,
    converted: nn.Module,
    inputs: Any = None,
    *,
    tolerance: float | None = None,
    calibrated: Mapping[str, str] | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Verification:
    """Compare ``converted`` with the ``original`` it was made from; neither is changed.

    >>> from harmconvert.convert import convert
    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()).double()
    >>> check = verify(network, convert(network).model, torch.rand(2, 3, 8, 8))
    >>> check.ok, check.max_relative_error < 1e-12
    (True, True)

    Args:
        inputs: a tensor, a tuple of arguments, a dict of keywords, or a list (one argument); two seeded random inputs
            of the model's own size where None.
        tolerance: the relative difference of outputs to accept. Where given, it alone decides (structure aside);
            otherwise it follows the weights' dtype (1e-12 for float64, 1e-5 for float32), top-1 must be the same on
            every input, and nothing may differ that was not converted.
        calibrated: keys of the tensors that calibration wrote, with their sha256 (`Calibration.changed`); known of a
            network that `convert` or `load` returned. Those are as planned where they are what calibration wrote.
        progress: called with (steps done, steps, what is looked at).

    Raises:
        UsageError: no input size is known, or the original does not run on the inputs.
        InputError: a network without values (meta device).
    """
    _check_values(original, converted)
    inputs = seeded_inputs(original) if inputs is None else inputs
    if _blocks(original) != _blocks(converted):  # what a block computes is compared with a convolution as one
        original, converted = fold_blocks(original), fold_blocks(converted)
    dtype = max((_weight_dtype(original), _weight_dtype(converted)), key=lambda d: OUTPUT_TOLERANCE[d])
    with evaluating(original, converted):  # reading a spectrally normalised weight in training mode would change it
        pairs, structural = pairs_of(original, converted)
    written = as_calibrated(converted, written_by_calibration(converted) if calibrated is None else calibrated)
    altered = [] if structural else altered_state(original, converted, pairs, written)
    tick = _ticker(progress, 2 * len(pairs) + 2 * (1 if dtype == torch.float64 else 2))
    kernels = {}
    for name, pair in pairs.items():
        tick(name)
        with evaluating(*pair):
            kernels[name] = check_kernel(*pair, written.get(state_key(name, "coefficients")))
    notes: list[str] = []
    errors: dict[str, float | None] = {"float64": None, "float32": None}
    outputs, astray, idle = dict[str, float](), list[str](), list[str]()
    agreement: float | None = None
    for precision in (torch.float64, torch.float32):
        key = str(precision).removeprefix("torch.")
        if precision == torch.float32 and dtype == torch.float64:
            continue
        if precision != dtype and precision == torch.float64 and _weights(original) > MOST_IN_FLOAT64:
            notes.append(f"not compared in float64: copies of {_weights(original) / 1e6:,.0f}M weights are too large")
            continue
        try:
            # Per-layer outputs once, in the precision that shows a wrong layer and not the arithmetic.
            error, same, layer_outputs, gone, left = _compare(
                original, converted, inputs, precision, dtype, not outputs, list(pairs), tick
            )
        except _NoRunError as problem:
            if precision == torch.float64 and dtype != torch.float64:
                notes.append(f"not compared in float64: {problem}")
                continue
            raise UsageError(str(problem)) from problem
        errors[key], outputs, astray, idle = error, outputs or layer_outputs, astray or gone, idle or left
        agreement = same if agreement is None or same is None else min(agreement, same)
    layers = tuple(
        LayerCheck(name, kept, total, kernel_error, outputs.get(name), problem)
        for name, (kept, total, kernel_error, problem) in kernels.items()
    )
    structural = [*structural, *(f"{name or '(root)'}: {_STRAY}" for name in astray)]
    problems = [*structural, *(f"{layer.name}: {layer.problem}" for layer in layers if layer.problem), *altered]
    measured = [error for error in errors.values() if error is not None]
    worst = next((error for error in measured if isnan(error)), max(measured))
    if isnan(worst):
        notes.append("the outputs hold no finite value on these inputs: nothing to compare")
    limit = OUTPUT_TOLERANCE[dtype] if tolerance is None else tolerance
    within = worst <= limit  # False for NaN
    if not within:  # else it comes to the same, however it is built
        problems += built_otherwise(original, converted, pairs)
    _passed_over(idle, any(layer.kept < layer.total for layer in layers), within, problems, notes)
    ok = within and not structural if tolerance is not None else within and not problems and agreement in (None, 1.0)
    size = batch_size(inputs)
    return Verification(
        ok, not problems, limit, worst, errors["float64"], errors["float32"], agreement, size, layers,
        tuple(problems), tuple(notes),
    )  # fmt: skip


def _passed_over(idle: Sequence[str], cut: bool, within: bool, problems: list[str], notes: list[str]) -> None:
    """Tell of layers that the original runs and the converted network does not: what is cut may take another branch,
    but nothing that is cut comes to the same."""
    for name in (name or "(root)" for name in idle):
        if not within:
            notes.append(f"{name} runs in the original alone on these inputs")
        elif cut:
            problems.append(f"{name}: it runs in the original alone, and yet nothing changes")


def _check_values(*models: nn.Module) -> None:
    for model in models:
        for key, tensor in model.state_dict().items():
            if isinstance(tensor, Tensor) and tensor.is_meta:
                raise InputError(f"{key} has no values to compare (meta device): load weights first")


def _blocks(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, HarmonicBlock2d)]


class _NoRunError(Exception):
    """The network does not run on the inputs in this precision."""


def seeded_inputs(model: nn.Module) -> Tensor:
    """Two seeded random inputs of the network's own size.

    Raises:
        UsageError: it names none.
    """
    size = default_input(model, batch=2)
    if size is None:
        raise UsageError("no input size is known for this network: give inputs (inputs=, --input-size C,H,W)")
    return torch.randn(size.shape, generator=torch.Generator().manual_seed(0))


def _weight_dtype(model: nn.Module) -> torch.dtype:
    dtypes = [p.dtype for p in model.parameters() if p.dtype in OUTPUT_TOLERANCE]
    return max(dtypes, key=lambda d: OUTPUT_TOLERANCE[d], default=torch.float32)


def _ticker(progress: Callable[[int, int, str], None], total: int) -> Callable[[str], None]:
    done = itertools.count()
    # A layer may run twice, and is then looked at twice.
    return lambda what: progress(min(next(done), total), total, what)


def _weights(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _compare(
    original: nn.Module,
    converted: nn.Module,
    inputs: Any,
    precision: torch.dtype,
    dtype: torch.dtype,
    per_layer: bool,
    names: list[str],
    tick: Callable[[str], None],
) -> tuple[float, float | None, dict[str, float], list[str], list[str]]:
    """Relative output error, top-1 agreement (to the rounding of ``dtype``, the weights') and, where asked for,
    per-layer output errors in one precision; layers of the given networks that their copies run, and layers that only
    the original's copy runs."""
    with _default_dtype(precision):
        shared = _weights(original) > MOST_IN_FLOAT64
        models = [in_precision(model, precision, shared) for model in (original, converted)]
        inputs = fitted(inputs, models[0])
        ours, theirs = convolutions(models[0]), convolutions(models[1])
        outputs: dict[str, float] = {}

        def watch(name: str) -> Callable[..., None]:
            def hook(conv: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
                tick(name)
                try:
                    answer = theirs[name](*args, **kwargs)
                except Exception as failure:
                    raise _NoRunError(
                        f"layer {name or '(root)'} of the converted network does not run in {precision}: "
                        f"{type(failure).__name__}: {first_line(failure)}"
                    ) from failure
                error = relative_difference(answer, output)
                outputs[name] = max(error, outputs.get(name, 0.0))

            return hook

        given = [(n, convs[n]) for convs in map(convolutions, (original, converted)) for n in names if n in convs]
        with evaluating(*models), _calls(given) as strays:
            with _hooks([ours[n].register_forward_hook(watch(n), with_kwargs=True) for n in names if per_layer]):
                results = [_outputs("original", models[0], inputs, precision, tick)]
            with _calls([(n, theirs[n]) for n in names]) as ran:
                results.append(_outputs("converted", models[1], inputs, precision, tick))
        idle = [name for name in outputs if name not in ran]
    if [t.shape for t in results[0]] != [t.shape for t in results[1]]:
        return float("inf"), 0.0, outputs, sorted(strays), idle
    pairs = list(zip(*results, strict=True))
    error = max((relative_difference(b, a) for a, b in pairs), default=float("nan"))
    return error, top1_agreement(pairs, torch.finfo(dtype).eps), outputs, sorted(strays), idle


def _outputs(
    which: str, model: nn.Module, inputs: Any, precision: torch.dtype, tick: Callable[[str], None]
) -> list[Tensor]:
    tick(f"outputs in {str(precision).removeprefix('torch.')}")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
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
