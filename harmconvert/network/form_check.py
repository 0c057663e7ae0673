"""Does another form of a network compute what the network does? Compared on an input, else layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import isnan
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import CheckError, HarmconvertError, first_line, shortened
from ..layers.block import HarmonicBlock2d
from ..layers.harmonic import HarmonicMixin
from .comparison import greatest_difference
from .exchange import in_precision, in_sixteen_bits
from .layers import harmonic_layers
from .running import call, evaluating, refusing, unchanged
from .side_effects import seeded_sources
from .values import cloned, default_input, fitted, mapped, tensors_in

# Relative difference of outputs up to which two forms are the same, by the dtype of the weights. It allows for sums in
# another order, amplified by the layers that follow; a form that computes something else differs by far more.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Comparison:
    """A form of a network beside the network itself.

    ``difference``: greatest relative difference of outputs (None where there is nothing to compare: no output is a
    tensor, or the network itself gives other outputs each time). ``problem``: what is wrong with the form, or None.
    ``rounding``: only float64 shows that the two are the same, where sums in another order do not add up to as much.
    ``failure``: why the network itself does not run on the input, or None.
    """

    difference: float | None = None
    problem: str | None = None
    rounding: bool = False
    failure: Exception | None = None


def check_form(model: nn.Module, form: nn.Module, what: str, example_input: Any = None) -> float | None:
    """The greatest relative difference of the outputs of a form of a network from the network's own; None where the
    layers were compared one by one, because no input is known or the outputs cannot be compared.

    Raises:
        UsageError: the network does not run on ``example_input``.
        CheckError: the form does not compute what the network does.
    """
    result, layers = compared(model, form, list(harmonic_layers(model)), example_input)
    if result.problem is None and not layers:
        return result.difference
    problem = result.problem or "one of its layers computes something else"
    where = shortened([f"layer {name or '(root)'}: {why}" for name, why in layers.items()], 3)
    raise CheckError(
        f"the {what} form of this {type(model).__name__} does not compute what the harmonic form does: "
        f"{problem}{f' ({where})' if where else ''}; "
        "convert it without the layers whose kernel or forward its own code replaces (exclude=)"
    )


def compared(
    model: nn.Module, form: nn.Module, names: list[str], example_input: Any = None
) -> tuple[Comparison, dict[str, str]]:
    """The comparison of a whole network and, where that shows a difference or nothing, of the named layers."""
    known = default_input(model) if example_input is None else example_input
    if not names and not any(isinstance(module, HarmonicBlock2d) for module in model.modules()):
        return Comparison(), {}
    if any(tensor.is_meta for tensor in (*model.parameters(), *tensors_in(known))):
        return Comparison(), {}
    inputs = None if known is None else comparable(known)
    result = Comparison() if inputs is None else compare(model, form, inputs)
    if result == Comparison(failure=result.failure) and result.failure and example_input is not None:
        with refusing(example_input):
            raise result.failure
    if result.problem is None and result.difference is not None and not result.rounding:
        return result, {}
    return result, differing_layers(model, form, names, inputs)


def compare(model: nn.Module, form: nn.Module, inputs: Any) -> Comparison:
    """Run a network and a form of it on the same inputs, in eval mode and from the same random state.

    Where float32 shows a difference, float64 decides whether it comes of rounding. 16-bit networks are compared in
    float32, as they are used, or in 16 bits where they run in nothing else.
    """
    tolerance = tolerance_of(model)
    result = Comparison()
    for networks, given in _precisions((model, form), inputs):
        try:
            expected = _outputs(networks[0], given)
        except Exception as error:
            result = replace(result, failure=result.failure or error)
            continue
        try:
            found = _outputs(networks[1], given)
        except Exception as error:
            return Comparison(None, f"it does not run: {_named(error)}")
        difference = _difference(found, expected)
        if not expected or difference is None:
            return Comparison()
        if difference <= tolerance or isnan(difference):
            return Comparison(difference, rounding=result.problem is not None)
        # A network that draws in its forward may draw other values for another memory layout, from the same seed.
        if not all((_difference(_outputs(networks[0], given, s), expected) or 0.0) <= tolerance for s in (0, 1)):
            return Comparison()
        result = Comparison(difference, f"outputs differ by {difference:.1e} of the largest, tolerance {tolerance:.0e}")
    return result


def differing_layers(model: nn.Module, form: nn.Module, names: list[str], inputs: Any) -> dict[str, str]:
    """Those of the named layers whose counterpart in the form computes something else, and how it differs.

    Each counterpart is given what the layer itself gets in a run of the network, so that no rounding adds up; without
    ``inputs``, or where the network does not run on them, a seeded random input.
    """
    problems: dict[str, str] = {}
    again: list[str] = []  # the layer that is run a second time, by its own hook

    def watch(layer: nn.Module, counterpart: nn.Module, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if again:
                return
            expected = [tensor.clone() for tensor in tensors_in(output)]
            again.append(name)
            try:
                by_form, by_itself = (
                    _problem(expected, partial(one, *cloned(args), **cloned(kwargs)), tolerance_of(layer))
                    for one in (counterpart, layer)
                )
            finally:
                again.clear()
            if by_form and not by_itself:  # else it gives another output each time
                problems.setdefault(name, by_form)

        return hook

    if inputs is not None:
        for (ours, theirs), given in _precisions((model, form), inputs):
            pairs = {name: (ours.get_submodule(name), theirs.get_submodule(name)) for name in names}
            hooks = [a.register_forward_hook(watch(a, b, n), with_kwargs=True) for n, (a, b) in pairs.items()]
            try:
                with unchanged(theirs), evaluating(theirs):
                    _outputs(ours, given)
                return problems
            except Exception:  # in this precision; the next one may run
                problems.clear()
            finally:
                for handle in hooks:
                    handle.remove()
    return differing_alone(model, form, names)


def differing_alone(model: nn.Module, form: nn.Module, names: list[str]) -> dict[str, str]:
    """The same of layers that are run by themselves, on a seeded random input of the least size; what does not run on
    such an input cannot be compared."""
    problems: dict[str, str] = {}
    for name in names:
        layer = cast(HarmonicMixin, model.get_submodule(name))
        inputs = _own_input(layer)
        for (ours, theirs), given in _precisions((layer, form.get_submodule(name)), inputs):
            try:
                expected = _outputs(ours, given)
            except Exception:
                continue
            if problem := _problem(expected, partial(_outputs, theirs, given), tolerance_of(layer)):
                problems[name] = problem
            break
    return problems


def comparable(example_input: Any, batch: int | None = None) -> Any:
    """Inputs to compare networks on, like ``example_input``: its values, or seeded random ones where it is all zeros.

    ``batch``: so many examples (None: as many as it has): its rows in turn, those that are repeated rolled along their
    last axis.
    """
    generator = torch.Generator().manual_seed(0)

    def like(tensor: Tensor) -> Tensor:
        batched = tensor.dim() > 0 and batch is not None and len(tensor) > 0
        shape = (cast(int, batch), *tensor.shape[1:]) if batched else tensor.shape
        if tensor.is_floating_point() and not tensor.is_meta and not tensor.any():
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            return values.to(tensor.device, tensor.dtype)
        if not batched:
            return tensor.clone()
        rows = [tensor[i % len(tensor)] for i in range(cast(int, batch))]
        if tensor.is_floating_point() and tensor.dim() > 1:
            rows = [row.roll(i // len(tensor), -1) for i, row in enumerate(rows)]
        return torch.stack(rows)

    return mapped(like, example_input)


def running(model: nn.Module, example_input: Any) -> tuple[nn.Module, Any]:
    """A network and inputs on which it runs: as they are, else in the network's dtype, else a float32 copy of a network
    in 16 bits, which are for files.

    Raises:
        UsageError: it does not run in any way.
    """
    fit = fitted(example_input, model)
    attempts: list[Callable[[], tuple[nn.Module, Any]]] = [lambda: (model, example_input), lambda: (model, fit)]
    if in_sixteen_bits(model):
        attempts.append(lambda: (copied := in_precision(model, torch.float32), fitted(example_input, copied)))
    failure: Exception | None = None
    for attempt in attempts:
        network, inputs = attempt()
        try:
            with unchanged(network), evaluating(network), seeded_sources():
                call(network, cloned(inputs))
            return network, inputs
        except Exception as error:
            failure = failure or error
    with refusing(example_input):
        raise cast(Exception, failure)


def tolerance_of(*models: nn.Module) -> float:
    """The tolerance for networks, by the coarsest dtype of their weights."""
    dtypes = {p.dtype for model in models for p in model.parameters()} & TOLERANCE.keys()
    return max((TOLERANCE[dtype] for dtype in dtypes), default=TOLERANCE[torch.float32])


def _precisions(
    networks: tuple[nn.Module, nn.Module], inputs: Any
) -> Iterator[tuple[tuple[nn.Module, nn.Module], Any]]:
    """The networks and inputs in the precisions to compare in, in this order; copies, but as they are."""
    sixteen = in_sixteen_bits(networks[0])
    for precision in (torch.float32, None) if sixteen else (None, torch.float64):
        pair = networks
        if precision is not None:
            try:
                pair = (in_precision(networks[0], precision), in_precision(networks[1], precision))
            except (HarmconvertError, RuntimeError, TypeError, ValueError):
                continue  # what cannot be copied is compared as it is
        yield pair, fitted(inputs, pair[0]) if sixteen or precision is not None else inputs


def _outputs(network: nn.Module, inputs: Any, seed: int = 0) -> list[Tensor]:
    with unchanged(network), evaluating(network), seeded_sources(seed):
        return [tensor.clone() for tensor in tensors_in(call(network, cloned(inputs)))]


def _difference(found: list[Tensor], expected: list[Tensor]) -> float | None:
    """The greatest relative difference; None of tensors that cannot be compared (sparse, nested)."""
    try:
        return greatest_difference(found, expected)
    except (RuntimeError, TypeError):
        return None


def _problem(expected: list[Tensor], again: Callable[[], Any], tolerance: float) -> str | None:
    try:
        found = tensors_in(again())
    except Exception as error:
        return f"it does not run: {_named(error)}"
    difference = _difference(found, expected)
    if difference is None or difference <= tolerance or isnan(difference):
        return None
    return f"outputs differ by {difference:.1e} of the largest"


def _own_input(conv: HarmonicMixin) -> Tensor:
    kernel = cast("tuple[int, ...]", conv.kernel_size)
    dilation, padding = _per_axis(conv.dilation, len(kernel)), _per_axis(conv.padding, len(kernel))
    size = [max(d * (k - 1) + 1, p + 1) + 1 for k, d, p in zip(kernel, dilation, padding, strict=True)]
    generator = torch.Generator().manual_seed(0)
    return fitted(torch.randn(2, cast(int, conv.in_channels), *size, generator=generator), conv)


def _per_axis(value: Any, axes: int) -> tuple[int, ...]:
    """A setting of each axis; 0 where it is no number ('same', 'valid')."""
    values = tuple(value) if isinstance(value, tuple | list) else (value,) * axes
    return tuple(one if isinstance(one, int) else 0 for one in values)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
