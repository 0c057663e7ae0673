"""Check that another form of a network computes the same as the network: on an input, or else layer by layer."""

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
from ..layers.low_rank import LowRank
from ..layers.ranked import channels_of
from .comparison import greatest_difference
from .exchange import in_precision, in_sixteen_bits
from .layers import converted_layers, kernel_size
from .running import call, evaluating, unchanged, usage_errors
from .side_effects import fixed_random_seed
from .values import clone_tensors, default_input, map_tensors, match_dtype, tensors_in

# Largest relative difference of outputs at which two forms count as the same, by the dtype of the weights. Sums in
# another order cause differences, which later layers amplify. A form that is wrong differs by far more.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Comparison:
    """The comparison of a form of a network with the network itself.

    ``difference``: largest relative difference of outputs; None if nothing can be compared, because no output is a
    tensor or the network itself gives different outputs in each run. ``problem``: what is wrong with the form, or None.
    ``rounding``: the outputs differ in the network's own precision and agree in float64, so the difference is rounding.
    ``failure``: why the network itself does not run on the input, or None.
    """

    difference: float | None = None
    problem: str | None = None
    rounding: bool = False
    failure: Exception | None = None


def check_form(model: nn.Module, form: nn.Module, what: str, example_input: Any = None) -> float | None:
    """Return the largest relative difference between the outputs of a form of a network and those of the network.

    The result is None if no input is known or the outputs cannot be compared; then the layers are compared one by one.

    Raises:
        UsageError: the network does not run on ``example_input``.
        CheckError: the form does not compute the same as the network.
    """
    result, layers = compare_forms(model, form, list(converted_layers(model)), example_input)
    if result.problem is None and not layers:
        return result.difference
    problem = result.problem or "one of its layers computes something else"
    where = shortened([f"layer {name or '(root)'}: {why}" for name, why in layers.items()], 3)
    raise CheckError(
        f"the {what} form of this {type(model).__name__} does not compute what the harmonic form does: "
        f"{problem}{f' ({where})' if where else ''}; "
        "convert it without the layers whose kernel or forward its own code replaces (exclude=)"
    )


def compare_forms(
    model: nn.Module, form: nn.Module, names: list[str], example_input: Any = None
) -> tuple[Comparison, dict[str, str]]:
    """Compare a form of a network with the network, first as a whole, then layer by layer if necessary.

    Returns the comparison of the whole network, and the named layers that differ, each with how. Layers are compared
    only if the whole network differs, agrees only in float64, or cannot be compared.
    """
    known = default_input(model) if example_input is None else example_input
    if not names and not any(isinstance(module, HarmonicBlock2d) for module in model.modules()):
        return Comparison(), {}
    if any(tensor.is_meta for tensor in (*model.parameters(), *tensors_in(known))):
        return Comparison(), {}
    inputs = None if known is None else comparison_inputs(known)
    result = Comparison() if inputs is None else compare_outputs(model, form, inputs)
    if result == Comparison(failure=result.failure) and result.failure and example_input is not None:
        with usage_errors(example_input):
            raise result.failure
    if result.problem is None and result.difference is not None and not result.rounding:
        return result, {}
    return result, differing_layers(model, form, names, inputs)


def compare_outputs(model: nn.Module, form: nn.Module, inputs: Any) -> Comparison:
    """Run a network and a form of it on the same inputs, in eval mode and from the same random state; compare outputs.

    If the outputs differ in float32, a comparison in float64 decides whether the difference is rounding. 16-bit
    networks are compared in float32, in which they are used, or in 16 bits if they do not run in float32.
    """
    tolerance = tolerance_of(model)
    result = Comparison()
    for networks, network_inputs in _in_each_precision((model, form), inputs):
        try:
            expected = _outputs(networks[0], network_inputs)
        except Exception as error:
            result = replace(result, failure=result.failure or error)
            continue
        try:
            actual = _outputs(networks[1], network_inputs)
        except Exception as error:
            return Comparison(None, f"it does not run: {_error_text(error)}")
        difference = _difference(actual, expected)
        if not expected or difference is None:
            return Comparison()
        if difference <= tolerance or isnan(difference):
            return Comparison(difference, rounding=result.problem is not None)
        # A network that uses random numbers in its forward may get other ones in another memory format, also from the
        # same seed. Such a network differs from itself with another seed, and cannot be compared.
        again = (_difference(_outputs(networks[0], network_inputs, seed), expected) for seed in (0, 1))
        if not all((own_difference or 0.0) <= tolerance for own_difference in again):
            return Comparison()
        result = Comparison(difference, f"outputs differ by {difference:.1e} of the largest, tolerance {tolerance:.0e}")
    return result


def differing_layers(model: nn.Module, form: nn.Module, names: list[str], inputs: Any) -> dict[str, str]:
    """Return the named layers whose counterpart in the form computes something else, each with how it differs.

    Each counterpart gets the input of the layer in a run of the network, so that rounding does not add up over layers.
    Without ``inputs``, or if the network does not run on them, each layer gets a seeded random input.
    """
    problems: dict[str, str] = {}
    running_again: list[str] = []  # the layer whose hook is running it a second time: that run is not watched

    def watch(layer: nn.Module, counterpart: nn.Module, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if running_again:
                return
            expected = [tensor.clone() for tensor in tensors_in(output)]
            running_again.append(name)
            try:
                problem, own_problem = (
                    _problem(expected, partial(one, *clone_tensors(args), **clone_tensors(kwargs)), tolerance_of(layer))
                    for one in (counterpart, layer)
                )
            finally:
                running_again.clear()
            if problem and not own_problem:  # with an own problem, the layer gives another output each time
                problems.setdefault(name, problem)

        return hook

    if inputs is not None:
        for (network, network_form), network_inputs in _in_each_precision((model, form), inputs):
            pairs = {name: (network.get_submodule(name), network_form.get_submodule(name)) for name in names}
            hooks = [a.register_forward_hook(watch(a, b, n), with_kwargs=True) for n, (a, b) in pairs.items()]
            try:
                with unchanged(network_form), evaluating(network_form):
                    _outputs(network, network_inputs)
                return problems
            except Exception:  # it does not run in this precision; try the next one
                problems.clear()
            finally:
                for handle in hooks:
                    handle.remove()
    return differing_layers_alone(model, form, names)


def differing_layers_alone(model: nn.Module, form: nn.Module, names: list[str]) -> dict[str, str]:
    """Return the same as `differing_layers`, with each layer run alone on a small seeded random input.

    Layers that do not run on such an input cannot be compared and are left out.
    """
    problems: dict[str, str] = {}
    for name in names:
        layer = model.get_submodule(name)
        inputs = _random_input(layer)
        for (one, its_form), layer_inputs in _in_each_precision((layer, form.get_submodule(name)), inputs):
            try:
                expected = _outputs(one, layer_inputs)
            except Exception:
                continue
            if problem := _problem(expected, partial(_outputs, its_form, layer_inputs), tolerance_of(layer)):
                problems[name] = problem
            break
    return problems


def comparison_inputs(example_input: Any, batch: int | None = None) -> Any:
    """Return inputs on which to compare networks: a copy of ``example_input``, or seeded random values if it is zero.

    Args:
        batch: number of examples; None keeps the number. The rows are used in turn; a repeated row is rolled along its
            last axis, so that all rows differ.
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

    return map_tensors(like, example_input)


def make_runnable(model: nn.Module, example_input: Any) -> tuple[nn.Module, Any]:
    """Return a network and inputs on which it runs.

    The first of these that runs is returned: the network and input unchanged; the input in the network's dtype; a
    float32 copy of a network that is stored in 16 bits.

    Raises:
        UsageError: none of these runs.
    """
    matched = match_dtype(example_input, model)
    attempts: list[Callable[[], tuple[nn.Module, Any]]] = [lambda: (model, example_input), lambda: (model, matched)]
    if in_sixteen_bits(model):
        attempts.append(lambda: (copied := in_precision(model, torch.float32), match_dtype(example_input, copied)))
    failure: Exception | None = None
    for attempt in attempts:
        network, inputs = attempt()
        try:
            with unchanged(network), evaluating(network), fixed_random_seed():
                call(network, clone_tensors(inputs))
            return network, inputs
        except Exception as error:
            failure = failure or error
    with usage_errors(example_input):
        raise cast(Exception, failure)


def tolerance_of(*models: nn.Module) -> float:
    """Return the tolerance for comparing networks: that of the coarsest dtype among their weights."""
    dtypes = {p.dtype for model in models for p in model.parameters()} & TOLERANCE.keys()
    return max((TOLERANCE[dtype] for dtype in dtypes), default=TOLERANCE[torch.float32])


def _in_each_precision(
    networks: tuple[nn.Module, nn.Module], inputs: Any
) -> Iterator[tuple[tuple[nn.Module, nn.Module], Any]]:
    """Yield the networks and inputs in each precision in which they are compared; a new precision is that of copies."""
    sixteen = in_sixteen_bits(networks[0])
    for precision in (torch.float32, None) if sixteen else (None, torch.float64):
        pair = networks
        if precision is not None:
            try:
                pair = (in_precision(networks[0], precision), in_precision(networks[1], precision))
            except (HarmconvertError, RuntimeError, TypeError, ValueError):
                continue  # networks that cannot be copied are compared only in their own precision
        yield pair, match_dtype(inputs, pair[0]) if sixteen or precision is not None else inputs


def _outputs(network: nn.Module, inputs: Any, seed: int = 0) -> list[Tensor]:
    with unchanged(network), evaluating(network), fixed_random_seed(seed):
        return [tensor.clone() for tensor in tensors_in(call(network, clone_tensors(inputs)))]


def _difference(actual: list[Tensor], expected: list[Tensor]) -> float | None:
    """Return the largest relative difference; None if the tensors cannot be compared (sparse, nested)."""
    try:
        return greatest_difference(actual, expected)
    except (RuntimeError, TypeError):
        return None


def _problem(expected: list[Tensor], run: Callable[[], Any], tolerance: float) -> str | None:
    """Return how the outputs of ``run`` differ from the expected ones, or None if they do not."""
    try:
        actual = tensors_in(run())
    except Exception as error:
        return f"it does not run: {_error_text(error)}"
    difference = _difference(actual, expected)
    if difference is None or difference <= tolerance or isnan(difference):
        return None
    return f"outputs differ by {difference:.1e} of the largest"


def _random_input(conv: nn.Module) -> Tensor:
    first = conv.first if isinstance(conv, LowRank) else conv
    if isinstance(conv, LowRank):
        conv = conv.second if conv.kernel_second else conv.first
    kernel = kernel_size(conv)
    dilation, padding = (_per_axis(getattr(conv, name, 1), len(kernel)) for name in ("dilation", "padding"))
    size = [max(d * (k - 1) + 1, p + 1) + 1 for k, d, p in zip(kernel, dilation, padding, strict=True)]
    generator = torch.Generator().manual_seed(0)
    return match_dtype(torch.randn(2, channels_of(first)[0], *size, generator=generator), conv)


def _per_axis(value: Any, axes: int) -> tuple[int, ...]:
    """Return a setting for each axis; 0 if it is not a number ('same', 'valid')."""
    values = tuple(value) if isinstance(value, tuple | list) else (value,) * axes
    return tuple(one if isinstance(one, int) else 0 for one in values)


def _error_text(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
