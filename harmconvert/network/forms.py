"""Convert a network to its other forms: `fuse` makes the dense form, `factor` the factored form where it is faster."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, cast

from torch import Tensor, nn

from ..errors import InputError, UsageError, first_line
from ..kernels.projection import all_finite, check_range
from ..layers.block import HarmonicBlock2d, absorb_bias, fold_block
from ..layers.factored import empty_factored, to_factored
from ..layers.harmonic import empty_counterpart, to_dense
from ..layers.layer_times import (
    MARGIN,
    LayerInput,
    first_is_faster_factored,
    kernels_to_channels_last,
    layer_times,
)
from ..layers.low_rank import LowRank, factors_first, reason_without_fast_form
from ..layers.ranked import RankedMixin, is_ranked
from ..layers.timing import in_turns
from .exchange import exchange, replace_module
from .form_check import check_form, compare_forms, make_runnable
from .layers import converted_layers, harmonic_layers, is_harmonic_layer, state_key
from .low_rank import at_full_rank, in_one_layer, in_two_layers
from .running import call, evaluating, unchanged, usage_errors
from .values import clone_tensors, default_input, tensors_in

Choice = Literal["dense", "factored"]


@dataclass(frozen=True)
class LayerForm:
    """The form chosen for one converted layer, the reason, and the median seconds of both forms if measured.

    The factored form of a layer of low rank is two layers. ``first`` is the form of the first one, if measured.
    """

    name: str
    form: Choice
    why: str
    dense_seconds: float | None = None
    factored_seconds: float | None = None
    first: Choice | None = None


@dataclass(frozen=True)
class Factoring:
    """A network with the form chosen for each layer, and the seconds of the whole network, dense and as chosen."""

    model: nn.Module
    layers: tuple[LayerForm, ...]
    dense_seconds: float | None = None
    factored_seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return everything except the network as a dict for JSON."""
        layers = [asdict(layer) for layer in self.layers]
        return {"layers": layers, "dense_seconds": self.dense_seconds, "factored_seconds": self.factored_seconds}

    @property
    def factored(self) -> tuple[str, ...]:
        """Return the names of the layers that were factored."""
        return tuple(layer.name for layer in self.layers if layer.form == "factored")


def fuse(model: nn.Module, example_input: Any = None) -> nn.Module:
    """Return the dense form: a copy of ``model`` with plain convolutions that hold the merged kernels (sec. 5.2).

    Its state dict has the keys and shapes of the network that was converted. Parts that are not harmonic are copied. A
    `HarmonicBlock2d` becomes one convolution; it gets a bias if the block normalises and no batch norm behind it can
    absorb that bias. The outputs of the copy are compared with those of ``model`` before it is returned.

    >>> from harmconvert.layers.harmonic import to_harmonic
    >>> fuse(nn.Sequential(to_harmonic(nn.Conv2d(1, 2, 3))))
    Sequential(
      (0): Conv2d(1, 2, kernel_size=(3, 3), stride=(1, 1))
    )

    Args:
        model: a network with harmonic convolutions.
        example_input: the input for the comparison, as for `convert`; by default an input of the size that the network
            names. If it names none, each layer is compared alone.

    Raises:
        UsageError: the network does not run on ``example_input``.
        InputError: the network cannot be copied, or a merged kernel is out of its dtype's range.
        CheckError: the dense form does not compute the same as the network.
    """
    dense = dense_form(model)
    check_form(model, dense, "dense", example_input)
    return dense


def dense_form(model: nn.Module) -> nn.Module:
    """Return the dense form like `fuse`, but do not compare it with the network.

    Raises:
        InputError: the network cannot be copied, or a merged kernel is out of its dtype's range.
    """
    full = at_full_rank(in_one_layer(model))
    harmonic = harmonic_layers(full)
    dense = exchange(full, {conv: partial(to_dense, conv) for conv in harmonic.values()})
    _check_kernels(dense, converted_layers(full))
    return _folded(dense)


def fold_blocks(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` in which each `HarmonicBlock2d` is replaced by a convolution."""
    return _folded(exchange(model, {}))


def factor(model: nn.Module, example_input: Any = None, *, layers: str | Mapping[str, str] = "measured") -> nn.Module:
    """Return the factored form: a copy with its truncated convolutions factored (eq. 2) where that is faster.

    A factored convolution filters its input with the kept basis kernels and mixes the responses. A layer of low rank
    becomes two layers. Each layer is *measured* on this machine and stays dense if the factored form is not faster. If
    the whole network is not faster than the dense one, all layers are dense. The copy uses channels_last if that is
    faster; `factoring` also returns what was chosen. The copy can be trained, saved and fused like the harmonic form.
    Measured times are stored in the cache folder (`harmconvert.layers.layer_times`).

    Args:
        model: a network with harmonic convolutions, as `convert` returns it.
        example_input: as for `convert`; its size and batch size should be those at which the network must be fast. By
            default one example of the size that the network names. Needed if anything is measured.
        layers: ``"measured"``; ``"factored"`` or ``"dense"`` for all layers that can have this form, without measuring;
            or a dict from shell-style layer pattern to one of the three (layers that no pattern matches are measured).

    Raises:
        UsageError: a form is unknown, a pattern matches nothing, or the input is missing or does not fit.
        InputError: the network cannot be copied or has no values (meta device), or a merged kernel is out of its
            dtype's range.
    """
    return factoring(model, example_input, layers=layers).model


def factoring(
    model: nn.Module, example_input: Any = None, *, layers: str | Mapping[str, str] = "measured"
) -> Factoring:
    """Return the factored form like `factor`, with the form chosen for each layer and the reason."""
    model = in_one_layer(model)
    harmonic = converted_layers(model)
    requested = _requested_forms(harmonic, layers)
    fixed = {name: _form_without_measuring(name, conv, requested[name]) for name, conv in harmonic.items()}
    measured = {name: harmonic[name] for name, choice in fixed.items() if choice is None}
    if valueless := [name for name, conv in measured.items() if any(p.is_meta for p in conv.parameters())]:
        raise InputError(f"layer {valueless[0] or '(root)'} has no values to measure with (meta device): load weights")
    if not measured:
        return _apply_and_check(model, harmonic, list(cast("dict[str, LayerForm]", fixed).values()), example_input)
    if (inputs := default_input(model) if example_input is None else example_input) is None:
        raise UsageError("an input is needed to measure which form is faster: give example_input or layers='factored'")
    network, inputs = make_runnable(model, inputs)
    inputs_by_name = layer_inputs(network, {name: network.get_submodule(name) for name in measured}, inputs)
    timed = converted_layers(network)
    forms = [fixed[name] or _faster_form(name, timed[name], inputs_by_name.get(name)) for name in harmonic]
    chosen = _apply_and_check(model, harmonic, forms, example_input)
    if network is model:
        return _never_slower(model, chosen, inputs)
    # A network that is stored in 16 bits and computes in float32 is as fast as its float32 copy: time the copy.
    timed_whole = _never_slower(network, _apply_and_check(network, timed, list(chosen.layers), inputs), inputs)
    chosen = _apply_and_check(model, harmonic, list(timed_whole.layers), example_input)
    return replace(timed_whole, model=chosen.model, layers=chosen.layers)


def _apply_and_check(
    model: nn.Module, harmonic: Mapping[str, nn.Module], chosen: list[LayerForm], example_input: Any
) -> Factoring:
    """Return the network with the chosen forms, after comparing it with ``model``.

    Layers whose factored form computes something else become dense. If no such layer is found but the network still
    differs, all layers become dense.

    Raises:
        UsageError: the network does not run on ``example_input``.
        CheckError: the dense form does not compute the same as the network either.
    """
    while names := [layer.name for layer in chosen if layer.form == "factored"]:
        form = kernels_to_channels_last(_with_forms(model, harmonic, chosen))
        result, layers = compare_forms(model, form, names, example_input)
        if result.problem is None and not layers:
            return Factoring(form, tuple(chosen))
        whole = f"with factored layers the network computes something else: {result.problem}"
        reasons = {name: f"factored, {why}" for name, why in layers.items()} or dict.fromkeys(names, whole)
        chosen = [replace(one, form="dense", why=reasons[one.name]) if one.name in reasons else one for one in chosen]
    form = _with_forms(model, harmonic, chosen)
    check_form(model, form, "dense", example_input)
    return Factoring(form, tuple(chosen))


def _check_kernels(dense: nn.Module, harmonic: Mapping[str, nn.Module]) -> None:
    """Raise InputError if a merged kernel is out of its dtype's range although its coefficients are in range."""
    for name, conv in harmonic.items():
        merged = dense.get_submodule(name)
        in_range = all(all_finite(parameter) for parameter in conv.parameters(recurse=False))
        if in_range and not is_harmonic_layer(merged) and not isinstance(merged, LowRank):
            check_range(cast(Tensor, merged.weight), name, "merged kernels")


def _requested_forms(harmonic: Mapping[str, nn.Module], layers: str | Mapping[str, str]) -> dict[str, str]:
    patterns = {"*": layers} if isinstance(layers, str) else layers
    requested = dict.fromkeys(harmonic, "measured")
    for pattern, form in patterns.items():
        if form not in ("measured", "dense", "factored"):
            raise UsageError(f"unknown form {form!r} of a layer: use measured, dense or factored")
        matching = [name for name in harmonic if fnmatchcase(name, pattern)]
        if not matching and pattern != "*":
            raise UsageError(f"no harmonic convolution matches {pattern!r}: there are {', '.join(list(harmonic)[:5])}")
        requested |= dict.fromkeys(matching, form)
    return requested


def _form_without_measuring(name: str, conv: nn.Module, requested: str) -> LayerForm | None:
    """Return the form of a layer that is requested or the only possible one; None if the layer must be measured."""
    if requested != "dense" and (reason := reason_without_fast_form(conv)):
        return LayerForm(name, "dense", reason)
    return None if requested == "measured" else LayerForm(name, cast(Choice, requested), "as asked for")


def layer_inputs(model: nn.Module, convs: Mapping[str, nn.Module], example_input: Any) -> dict[str, LayerInput]:
    """Run the network once and return the shape, dtype and device of the input of each given layer that runs.

    Raises:
        UsageError: the network does not run on ``example_input``.
    """
    inputs: dict[str, LayerInput] = {}

    def watch(name: str) -> Any:
        def hook(conv: nn.Module, args: Any, kwargs: Any) -> None:
            for tensor in tensors_in((args, kwargs))[:1]:
                inputs[name] = LayerInput(tuple(tensor.shape), tensor.dtype, tensor.device)

        return hook

    handles = [conv.register_forward_pre_hook(watch(name), with_kwargs=True) for name, conv in convs.items()]
    try:
        with unchanged(model), usage_errors(example_input), evaluating(model):
            call(model, clone_tensors(example_input))
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _faster_form(name: str, conv: nn.Module, layer_input: LayerInput | None) -> LayerForm:
    if layer_input is None:
        return LayerForm(name, "dense", "it does not run on this input")
    try:
        dense, factored = layer_times(conv, layer_input)
        first: Choice | None = None
        if is_ranked(conv):
            first = "factored" if first_is_faster_factored(conv, layer_input) else "dense"
    except Exception as error:  # some layers run only inside the network, for example under its autocast
        return LayerForm(name, "dense", f"it cannot be timed by itself: {type(error).__name__}: {first_line(error)}")
    if factored < (1 - MARGIN) * dense:
        return LayerForm(name, "factored", f"{dense / factored:.2f} times as fast as dense", dense, factored, first)
    return LayerForm(name, "dense", f"factored it takes {factored / dense:.2f} times as long", dense, factored)


def _with_forms(model: nn.Module, harmonic: Mapping[str, nn.Module], forms: list[LayerForm]) -> nn.Module:
    chosen = {form.name for form in forms if form.form == "factored"}
    ranked = {form.name: form for form in forms if form.name in chosen and is_ranked(harmonic[form.name])}
    model = in_two_layers(model, ranked, harmonic=True)
    chosen |= {
        state_key(name, "first")
        for name, form in ranked.items()
        if (factors_first(cast(RankedMixin, harmonic[name])) if form.first is None else form.first == "factored")
    }
    left = harmonic_layers(model)
    factored = {conv for name, conv in left.items() if name in chosen}
    fill: dict[nn.Module, Any] = {
        conv: partial(to_factored if conv in factored else to_dense, conv) for conv in left.values()
    }
    copied = exchange(model, fill, lambda conv: empty_factored(conv) if conv in factored else empty_counterpart(conv))
    _check_kernels(copied, harmonic)
    return _folded(copied)


def _never_slower(model: nn.Module, chosen: Factoring, example_input: Any) -> Factoring:
    """Return the fastest whole network: with the forms chosen layer by layer, or dense in one of two memory formats."""
    candidates = dense_candidates(model)
    if chosen.factored:
        candidates["factored"] = chosen.model
    times = _median_seconds(candidates, example_input)
    fastest = min(times, key=lambda name: times[name])
    dense = min(seconds for name, seconds in times.items() if name != "factored")
    chosen = replace(chosen, dense_seconds=dense, factored_seconds=times.get("factored"))
    if fastest == "factored":
        return chosen
    check_form(model, candidates[fastest], "dense", example_input)
    layers = tuple(
        layer if layer.form == "dense" else replace(layer, form="dense", why="factored, the whole network is no faster")
        for layer in chosen.layers
    )
    return replace(chosen, model=candidates[fastest], layers=layers)


def run_times(model: nn.Module, example_input: Any) -> dict[str, float]:
    """Return the median seconds of a forward of the dense form in each memory format, measured in turns."""
    return _median_seconds(dense_candidates(model), example_input)


def dense_candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Return the dense form of a network in the default memory format and in channels_last."""
    return {"dense": dense_form(model), "dense, channels_last": kernels_to_channels_last(dense_form(model))}


def _median_seconds(candidates: Mapping[str, nn.Module], example_input: Any) -> dict[str, float]:
    """Return the median seconds of the networks that run: some networks run in one memory format only."""
    with evaluating(*candidates.values()), ExitStack() as stack:
        for network in candidates.values():
            stack.enter_context(unchanged(network, weights=False))
        runs = {name: partial(_call_on_copy, network, example_input) for name, network in candidates.items()}
        for name in list(runs):
            try:
                runs[name]()
            except Exception:
                if name == "dense":
                    raise
                del runs[name]
        return {name: times.median for name, times in in_turns(runs, 7, 3, 6.0).items()}


def _call_on_copy(network: nn.Module, example_input: Any) -> Any:
    return call(network, clone_tensors(example_input))


def _folded(model: nn.Module) -> nn.Module:
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, HarmonicBlock2d)}
    for name, block in blocks.items():
        conv = fold_block(block)
        model = replace_module(model, block, conv)
        if block.mix.bias is None:  # the original convolution had no bias: the dense form should not have one either
            absorb_bias(model, name)
    return model
