"""Run an original and a converted network side by side; compare the outputs of the layers and of the networks."""

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
from ..network.heads import compared_outputs, floating_tensors
from ..network.layers import all_layers
from ..network.running import call, evaluating, unchanged
from ..network.side_effects import fixed_random_seed
from ..network.values import clone_tensors, match_dtype, tensors_in
from ..plan.cost import parameter_count

# Networks with more weights are not compared in float64, and not copied at all: the copies would need 4 to 8 GB.
MOST_IN_FLOAT64 = 2**28


@dataclass
class Comparison:
    """The result of a comparison in one precision.

    ``error`` is the relative difference of the outputs, ``agreement`` the share of inputs with the same top-1. If the
    layers were compared, ``outputs`` has the relative difference of the outputs of each layer, by name; both layers got
    the input of the original.

    Names of layers: ``uncopied`` layers belong to the caller's networks and ran although only copies were called.
    ``idle`` layers ran only in the original. ``constant`` layers got constant inputs. The original rewrites the weights
    of ``rewritten`` layers in its forward pass.
    """

    error: float
    agreement: float | None
    outputs: dict[str, float] = field(default_factory=dict)
    uncopied: set[str] = field(default_factory=set)
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
    """Compare in float64 if possible, and in float32 unless the weights are float64.

    Only the first comparison compares the layers: in float64, differences come from wrong layers and not from rounding.

    Raises:
        UsageError: the networks do not run on the inputs.
    """
    comparison = _SideBySide(original, converted, inputs, dtype, names, tick)
    results: dict[torch.dtype, Comparison] = {}
    for precision in (torch.float64, torch.float32):
        if precision == torch.float32 and dtype == torch.float64:
            continue
        count = parameter_count(original)
        if precision != dtype and precision == torch.float64 and count > MOST_IN_FLOAT64:
            notes.append(f"not compared in float64: copies of {count / 1e6:,.0f}M weights are too large")
            continue
        try:
            results[precision] = comparison.compare(precision, per_layer=not results)
        except _NoRunError as problem:
            if precision != torch.float64 or dtype == torch.float64:
                raise user_code_error(problem.__cause__ or problem) or UsageError(str(problem)) from problem
            notes.append(f"not compared in float64: {problem}")
    return results


class _NoRunError(Exception):
    """The network does not run on the inputs in this precision."""


@dataclass(frozen=True)
class _SideBySide:
    """Two networks, their inputs, the dtype of their weights, and the names of the layers to compare."""

    original: nn.Module
    converted: nn.Module
    inputs: Any
    dtype: torch.dtype
    names: list[str]
    tick: Callable[[str], None]

    def compare(self, precision: torch.dtype, per_layer: bool) -> Comparison:
        """Compare copies of both networks in one precision.

        Logits whose difference is below the rounding of ``dtype`` are ties in the top-1.
        """
        networks = (self.original, self.converted)
        with _default_dtype(precision):
            shared = parameter_count(self.original) > MOST_IN_FLOAT64
            copies = [in_precision(model, precision, shared) for model in networks]
            inputs = match_dtype(self.inputs, copies[0])
            original_layers, converted_layers = all_layers(copies[0]), all_layers(copies[1])
            result = Comparison(float("inf"), 0.0)
            callers = [(n, layers[n]) for layers in map(all_layers, networks) for n in self.names if n in layers]
            watched = {name: original_layers[name] for name in self.names if per_layer}
            # Hooks of the copies may change objects that the caller's networks share.
            with unchanged(copies[0]), unchanged(copies[1]), evaluating(*copies), _calls(callers) as uncopied:
                before = {name: weight_state(conv) for name, conv in original_layers.items()}
                with self._comparing_layers(watched, converted_layers, result, precision), unchanged(copies[1]):
                    outputs = [self._outputs("original", copies[0], inputs, precision)]
                result.rewritten = {
                    name for name, conv in original_layers.items() if weight_state(conv) != before[name]
                }
                with _calls([(n, converted_layers[n]) for n in self.names]) as ran:
                    outputs.append(self._outputs("converted", copies[1], inputs, precision))
        result.uncopied, result.idle = uncopied, [name for name in result.outputs if name not in ran]
        if [t.shape for t in outputs[0]] == [t.shape for t in outputs[1]]:
            pairs = list(zip(*outputs, strict=True))
            result.error = max((relative_difference(b, a) for a, b in pairs), default=float("nan"))
            result.agreement = top1_agreement(pairs, torch.finfo(self.dtype).eps)
        return result

    @contextmanager
    def _comparing_layers(
        self,
        original_layers: Mapping[str, nn.Module],
        converted_layers: Mapping[str, nn.Module],
        result: Comparison,
        precision: torch.dtype,
    ) -> Iterator[None]:
        """After each call of a layer inside, call its counterpart on the same input and compare the outputs."""

        def watch(name: str) -> Callable[..., None]:
            def hook(conv: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                self.tick(name)
                expected = [tensor.clone() for tensor in tensors_in(output)]  # the layer may reuse its output tensor
                try:
                    actual = tensors_in(converted_layers[name](*args, **kwargs))
                except Exception as failure:
                    raise _NoRunError(
                        f"layer {name or '(root)'} of the converted network does not run in {precision}: "
                        f"{type(failure).__name__}: {first_line(failure)}"
                    ) from failure
                result.outputs[name] = max(greatest_difference(actual, expected), result.outputs.get(name, 0.0))
                if all(map(_constant, tensors_in((args, kwargs)))):
                    result.constant.add(name)

            return hook

        with _hooks(
            [conv.register_forward_hook(watch(name), with_kwargs=True) for name, conv in original_layers.items()]
        ):
            yield

    def _outputs(self, which: str, model: nn.Module, inputs: Any, precision: torch.dtype) -> list[Tensor]:
        self.tick(f"outputs in {str(precision).removeprefix('torch.')}")
        try:
            with fixed_random_seed():
                return floating_tensors(compared_outputs(model, lambda: call(model, clone_tensors(inputs))))
        except _NoRunError:
            raise
        except Exception as failure:
            raise _NoRunError(
                f"the {which} network does not run on these inputs in {precision}: "
                f"{type(failure).__name__}: {first_line(failure)}"
            ) from failure


def _constant(tensor: Tensor) -> bool:
    return not tensor.numel() or bool((tensor == tensor.flatten()[0]).all())


@contextmanager
def _calls(layers: Iterable[tuple[str, nn.Module]]) -> Iterator[set[str]]:
    """Yield the set of the names of layers that this thread runs inside."""
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
    """Set the default dtype inside, which networks use for tensors that they create in their forward pass."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
