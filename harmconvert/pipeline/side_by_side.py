"""Run an original and a converted network side by side and compare their outputs, layer by layer and at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import UsageError, first_line
from ..network.comparison import greatest_difference, relative_difference, top1_agreement
from ..network.dataflow import weight_state
from ..network.exchange import in_precision
from ..network.faults import user_code_error
from ..network.layers import weighted_layers
from ..network.running import call, evaluating, unchanged
from ..network.side_effects import fixed_random_seed
from ..network.values import clone_tensors, match_dtype, tensors_in
from ..plan.cost import parameter_count

# Weights above which copies of two networks are no longer made, in float64 or at all: 4 to 8 GB would go into them.
MOST_IN_FLOAT64 = 2**28


@dataclass
class Comparison:
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


def comparisons(
    original: nn.Module,
    converted: nn.Module,
    inputs: Any,
    dtype: torch.dtype,
    names: list[str],
    notes: list[str],
    tick: Callable[[str], None],
) -> dict[torch.dtype, Comparison]:
    """Compare in float64 where that can be done, and in float32 unless the weights have more; the first comparison
    looks at the layers, because float64 shows a wrong layer and not the arithmetic.

    Raises:
        UsageError: the networks do not run on the inputs.
    """
    found: dict[torch.dtype, Comparison] = {}
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
                raise user_code_error(problem.__cause__ or problem) or UsageError(str(problem)) from problem
            notes.append(f"not compared in float64: {problem}")
    return found


class _NoRunError(Exception):
    """The network does not run on the inputs in this precision."""


def _compare(
    original: nn.Module,
    converted: nn.Module,
    inputs: Any,
    precision: torch.dtype,
    dtype: torch.dtype,
    names: list[str],
    per_layer: bool,
    tick: Callable[[str], None],
) -> Comparison:
    """Compare copies of both networks in one precision; top-1 is compared to the rounding of
    ``dtype``, that of the weights."""
    with _default_dtype(precision):
        shared = parameter_count(original) > MOST_IN_FLOAT64
        models = [in_precision(model, precision, shared) for model in (original, converted)]
        inputs = match_dtype(inputs, models[0])
        ours, theirs = weighted_layers(models[0]), weighted_layers(models[1])
        found = Comparison(float("inf"), 0.0)
        given = [(n, convs[n]) for convs in map(weighted_layers, (original, converted)) for n in names if n in convs]
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
    found: Comparison,
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
        with fixed_random_seed():
            return tensors_in(call(model, clone_tensors(inputs)))
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
