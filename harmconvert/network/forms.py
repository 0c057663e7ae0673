"""The forms of one network (DESIGN 2): `fuse` gives the dense one, `factor` the factored one where it is faster."""

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
from ..layers.factored import empty_factored, reason_not_factorable, to_factored
from ..layers.harmonic import HarmonicMixin, empty_counterpart, to_dense
from ..layers.layer_times import LayerInput, kernels_to_channels_last, layer_times
from ..layers.timing import in_turns
from .exchange import exchange, put_in_place
from .form_check import check_form, compared, running
from .layers import harmonic_layers
from .running import call, evaluating, refusing, unchanged
from .values import cloned, default_input, tensors_in

Choice = Literal["dense", "factored"]
# A form has to be this much faster than another before it is taken for faster.
MARGIN = 0.02


@dataclass(frozen=True)
class LayerForm:
    """The form that one harmonic convolution got, and why; medians in seconds of both where they were measured."""

    name: str
    form: Choice
    why: str
    dense_seconds: float | None = None
    factored_seconds: float | None = None


@dataclass(frozen=True)
class Factoring:
    """A network in the forms that were chosen, layer by layer; seconds of the whole network in its best dense form and
    as chosen."""

    model: nn.Module
    layers: tuple[LayerForm, ...]
    dense_seconds: float | None = None
    factored_seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything but the network, JSON-able."""
        layers = [asdict(layer) for layer in self.layers]
        return {"layers": layers, "dense_seconds": self.dense_seconds, "factored_seconds": self.factored_seconds}

    @property
    def factored(self) -> tuple[str, ...]:
        """Names of the layers that were factored."""
        return tuple(layer.name for layer in self.layers if layer.form == "factored")


def fuse(model: nn.Module, example_input: Any = None) -> nn.Module:
    """The dense form: a copy of ``model`` with plain convolutions that hold the merged kernels.

    Its state dict has the keys and shapes of the network that was converted. Parts that are not harmonic are copied;
    a `HarmonicBlock2d` folds into one convolution, which gains a bias where the block normalises and no batch norm
    behind it can take that. Its outputs are compared with the network's before it is handed back.

    >>> from harmconvert.layers.harmonic import to_harmonic
    >>> fuse(nn.Sequential(to_harmonic(nn.Conv2d(1, 2, 3))))
    Sequential(
      (0): Conv2d(1, 2, kernel_size=(3, 3), stride=(1, 1))
    )

    Args:
        model: a network with harmonic convolutions.
        example_input: what to compare the two on, as for `convert`; by default an input of the network's own size.
            Where no size is known, each layer is compared by itself.

    Raises:
        UsageError: the network does not run on ``example_input``.
        InputError: the network cannot be copied, or a merged kernel is out of its dtype's range.
        CheckError: the dense form does not compute what the network does.
    """
    dense = dense_form(model)
    check_form(model, dense, "dense", example_input)
    return dense


def dense_form(model: nn.Module) -> nn.Module:
    """The dense form as `fuse` gives it, not compared with the network.

    Raises:
        InputError: the network cannot be copied, or a merged kernel is out of its dtype's range.
    """
    harmonic = harmonic_layers(model)
    dense = exchange(model, {conv: partial(to_dense, conv) for conv in harmonic.values()})
    _check_kernels(dense, harmonic)
    return _folded(dense)


def fold_blocks(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with a convolution in the place of each `HarmonicBlock2d`, all else as it is."""
    return _folded(exchange(model, {}))


def factor(model: nn.Module, example_input: Any = None, *, layers: str | Mapping[str, str] = "measured") -> nn.Module:
    """The factored form: a copy of ``model`` whose truncated convolutions filter their input by the kept basis kernels
    and mix what comes out, wherever that is *measured* to be faster on this machine; elsewhere they are dense.

    Where the whole is not faster than the dense network, all of it is dense. The copy is laid out channels_last where
    that is faster; `factoring` also says what was chosen. The copy can be trained, saved and fused as the harmonic form
    can. Times are kept in the cache folder (`harmconvert.layers.layer_times`).

    Args:
        model: a network with harmonic convolutions, such as `convert` makes.
        example_input: as for `convert`, of the size and batch that the network is to be fast at; by default one example
            of the network's own size. Needed where anything is to be measured.
        layers: ``"measured"``; ``"factored"`` or ``"dense"`` to have all that can be so without measuring; or a dict
            from shell-style layer pattern to one of the three, where what no pattern matches is measured.

    Raises:
        UsageError: an unknown form, a pattern without a match, no input to measure on or one that does not fit.
        InputError: the network cannot be copied, has no values (meta device), or a merged kernel is out of its dtype's
            range.
    """
    return factoring(model, example_input, layers=layers).model


def factoring(
    model: nn.Module, example_input: Any = None, *, layers: str | Mapping[str, str] = "measured"
) -> Factoring:
    """The factored form as `factor` makes it, with what was chosen for each layer and why."""
    harmonic = harmonic_layers(model)
    wanted = _wanted(harmonic, layers)
    fixed = {name: _fixed(name, conv, wanted[name]) for name, conv in harmonic.items()}
    measured = {name: harmonic[name] for name, choice in fixed.items() if choice is None}
    if valueless := [name for name, conv in measured.items() if conv.coefficients.is_meta]:
        raise InputError(f"layer {valueless[0] or '(root)'} has no values to measure with (meta device): load weights")
    if not measured:
        return _checked(model, harmonic, list(cast("dict[str, LayerForm]", fixed).values()), example_input)
    if (inputs := default_input(model) if example_input is None else example_input) is None:
        raise UsageError("which form is faster is measured on an input: give example_input, or layers='factored'")
    network, inputs = running(model, inputs)
    inputs_by_name = layer_inputs(network, {name: network.get_submodule(name) for name in measured}, inputs)
    timed = harmonic_layers(network)
    found = [fixed[name] or _faster(name, timed[name], inputs_by_name.get(name)) for name in harmonic]
    chosen = _checked(model, harmonic, found, example_input)
    if network is model:
        return _never_slower(model, chosen, inputs)
    # A network that is stored in 16 bits and computes in float32 is as fast as its float32 copy.
    timed_whole = _never_slower(network, _checked(network, timed, list(chosen.layers), inputs), inputs)
    chosen = _checked(model, harmonic, list(timed_whole.layers), example_input)
    return replace(timed_whole, model=chosen.model, layers=chosen.layers)


def _checked(
    model: nn.Module, harmonic: Mapping[str, HarmonicMixin], chosen: list[LayerForm], example_input: Any
) -> Factoring:
    """The network in the forms chosen, compared with what it is made of; layers whose factored form computes something
    else are dense, and all are where that is not enough.

    Raises:
        UsageError: the network does not run on ``example_input``.
        CheckError: the dense form does not compute what the network does either.
    """
    while names := [layer.name for layer in chosen if layer.form == "factored"]:
        form = kernels_to_channels_last(_as_chosen(model, harmonic, chosen))
        result, layers = compared(model, form, names, example_input)
        if result.problem is None and not layers:
            return Factoring(form, tuple(chosen))
        whole = f"with factored layers the network computes something else: {result.problem}"
        whys = {name: f"factored, {why}" for name, why in layers.items()} or dict.fromkeys(names, whole)
        chosen = [replace(one, form="dense", why=whys[one.name]) if one.name in whys else one for one in chosen]
    form = _as_chosen(model, harmonic, chosen)
    check_form(model, form, "dense", example_input)
    return Factoring(form, tuple(chosen))


def _check_kernels(dense: nn.Module, harmonic: Mapping[str, HarmonicMixin]) -> None:
    """Coefficients that are in range may add up to a kernel that is not."""
    for name, conv in harmonic.items():
        if not isinstance(merged := dense.get_submodule(name), HarmonicMixin) and all_finite(conv.coefficients):
            check_range(cast(Tensor, merged.weight), name, "merged kernels")


def _wanted(harmonic: Mapping[str, HarmonicMixin], layers: str | Mapping[str, str]) -> dict[str, str]:
    patterns = {"*": layers} if isinstance(layers, str) else layers
    wanted = dict.fromkeys(harmonic, "measured")
    for pattern, form in patterns.items():
        if form not in ("measured", "dense", "factored"):
            raise UsageError(f"unknown form {form!r} of a layer: use measured, dense or factored")
        matching = [name for name in harmonic if fnmatchcase(name, pattern)]
        if not matching and pattern != "*":
            raise UsageError(f"no harmonic convolution matches {pattern!r}: there are {', '.join(list(harmonic)[:5])}")
        wanted |= dict.fromkeys(matching, form)
    return wanted


def _fixed(name: str, conv: HarmonicMixin, wanted: str) -> LayerForm | None:
    """The form of a layer that need not be measured; None for one that must be."""
    if wanted != "dense" and (reason := reason_not_factorable(conv)):
        return LayerForm(name, "dense", reason)
    return None if wanted == "measured" else LayerForm(name, cast(Choice, wanted), "as asked for")


def layer_inputs(model: nn.Module, convs: Mapping[str, nn.Module], example_input: Any) -> dict[str, LayerInput]:
    """What each of the layers is fed in one run; of those that run."""
    found: dict[str, LayerInput] = {}

    def watch(name: str) -> Any:
        def hook(conv: nn.Module, args: Any, kwargs: Any) -> None:
            for given in tensors_in((args, kwargs))[:1]:
                found[name] = LayerInput(tuple(given.shape), given.dtype, given.device)

        return hook

    handles = [conv.register_forward_pre_hook(watch(name), with_kwargs=True) for name, conv in convs.items()]
    try:
        with unchanged(model), refusing(example_input), evaluating(model):
            call(model, cloned(example_input))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _faster(name: str, conv: HarmonicMixin, layer_input: LayerInput | None) -> LayerForm:
    if layer_input is None:
        return LayerForm(name, "dense", "it does not run on this input")
    try:
        dense, factored = layer_times(conv, layer_input)
    except Exception as error:  # by itself it may not run on what it is given in the network (autocast)
        return LayerForm(name, "dense", f"it cannot be timed by itself: {type(error).__name__}: {first_line(error)}")
    if factored < (1 - MARGIN) * dense:
        return LayerForm(name, "factored", f"{dense / factored:.2f} times as fast as dense", dense, factored)
    return LayerForm(name, "dense", f"factored it takes {factored / dense:.2f} times as long", dense, factored)


def _as_chosen(model: nn.Module, harmonic: Mapping[str, HarmonicMixin], found: list[LayerForm]) -> nn.Module:
    wanted = {harmonic[layer.name] for layer in found if layer.form == "factored"}
    fill: dict[nn.Module, Any] = {
        conv: partial(to_factored if conv in wanted else to_dense, conv) for conv in harmonic.values()
    }
    copied = exchange(model, fill, lambda conv: empty_factored(conv) if conv in wanted else empty_counterpart(conv))
    _check_kernels(copied, harmonic)
    return _folded(copied)


def _never_slower(model: nn.Module, chosen: Factoring, example_input: Any) -> Factoring:
    """The fastest whole network: as chosen layer by layer, or dense in either memory layout."""
    candidates = dense_layouts(model)
    if chosen.factored:
        candidates["factored"] = chosen.model
    times = _times(candidates, example_input)
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
    """Median seconds of a forward of a network's dense form in each memory layout, measured in turns."""
    return _times(dense_layouts(model), example_input)


def dense_layouts(model: nn.Module) -> dict[str, nn.Module]:
    """The dense form of a network, and that laid out channels_last."""
    return {"dense": dense_form(model), "dense, channels_last": kernels_to_channels_last(dense_form(model))}


def _times(candidates: Mapping[str, nn.Module], example_input: Any) -> dict[str, float]:
    """Median seconds of those that run: some networks run in one memory layout only."""
    with evaluating(*candidates.values()), ExitStack() as stack:
        for network in candidates.values():
            stack.enter_context(unchanged(network, weights=False))
        runs = {name: partial(_run, network, example_input) for name, network in candidates.items()}
        for name in list(runs):
            try:
                runs[name]()
            except Exception:
                if name == "dense":
                    raise
                del runs[name]
        return {name: found.median for name, found in in_turns(runs, 7, 3, 6.0).items()}


def _run(network: nn.Module, example_input: Any) -> Any:
    return call(network, cloned(example_input))


def _folded(model: nn.Module) -> nn.Module:
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, HarmonicBlock2d)}
    for name, block in blocks.items():
        conv = fold_block(block)
        # Where the block replaced a convolution with a bias, the network has a place for one.
        model = put_in_place(model, block, conv)
        if block.mix.bias is None:
            absorb_bias(model, name)
    return model
