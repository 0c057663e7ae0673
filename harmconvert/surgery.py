"""Find the convolutions of a network, see how they run, and copy a network with some of them exchanged."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .conv import CONVOLUTIONS, HarmonicMixin, empty_counterpart, reason_not_convertible
from .copying import deep_copy
from .errors import InputError, UsageError, first_line, shortened
from .plan import ConvSite
from .side_effects import Snapshot

# Modules that convolve but are no torch convolution: named in the report, so that nothing is left out silently.
_OTHER_KINDS = {
    "CondConv2d": "its kernels are mixed anew for each input",
    "BlurPool2d": "its blur filter is fixed, not learned",
    "DeformConv2d": "its kernel reads at positions of its input's own choosing",
}


@dataclass(frozen=True)
class LayerRun:
    """How one convolution ran: its place in the order, output size of its largest call, calls, MACs of all calls."""

    order: int
    output_size: tuple[int, ...]
    reads_input: bool
    calls: int
    macs: int


@dataclass(frozen=True)
class Trace:
    """One run of a network on an example input: its convolutions by name, and the MACs of the whole.

    MACs count the matrix products and convolutions that the run dispatched (one multiply-add each, whole batch);
    element-wise operations, normalisation and pooling are not counted.
    """

    layers: Mapping[str, LayerRun]
    macs: int
    batch: int


def convolutions(model: nn.Module) -> dict[str, nn.Module]:
    """Every convolution by its first name, shared ones once, in the network's own order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CONVOLUTIONS)}


def kernel_size(conv: nn.Module) -> tuple[int, ...]:
    """A convolution's kernel size as a tuple of ints."""
    return tuple(cast("tuple[int, ...]", conv.kernel_size))


def pretrained_config(model: nn.Module) -> Mapping[str, Any]:
    """What a network says of its weights and pre-processing, as timm's do (``pretrained_cfg``, a dict or a record);
    nothing of one that says nothing."""
    config = getattr(model, "pretrained_cfg", None)
    return config if isinstance(config, Mapping) else getattr(config, "__dict__", {})


def state_key(layer: str, tensor: str) -> str:
    """The key of a layer's tensor in the state dict of its network, which may be the layer itself."""
    return f"{layer}.{tensor}" if layer else tensor


def find_sites(model: nn.Module, trace: Trace | None = None) -> list[ConvSite]:
    """The convolutions over 1x1, with what a policy needs to know of each; those that cannot be converted say why.

    Without a trace the first convolution of the network is taken for the one that reads its input.
    """
    sites: list[ConvSite] = []
    strangers = _weights_used_elsewhere(model)
    first_with: dict[int, str] = {}
    for index, (name, conv) in enumerate(convolutions(model).items()):
        if prod(kernel_size(conv)) == 1:
            continue
        run = trace.layers.get(name) if trace else None
        weight = conv._parameters.get("weight")
        skip = reason_not_convertible(conv)
        if skip is None and id(weight) in strangers:
            skip = f"its weight is also used by {strangers[id(weight)]}"
        groups = cast(int, conv.groups)
        site = ConvSite(name, type(conv).__name__, kernel_size(conv), groups > 1 and groups == conv.in_channels)
        reads_input = run.reads_input if run else trace is None and index == 0
        tied_to = first_with.setdefault(id(weight), name) if weight is not None else name
        sites.append(
            replace(
                site,
                reads_input=reads_input,
                output_size=run.output_size if run else None,
                tied_to=tied_to if tied_to != name else None,
                skip=skip,
            )
        )
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in _OTHER_KINDS and not isinstance(module, CONVOLUTIONS):
            sites.append(ConvSite(name, kind, _size_of_other(module), skip=_OTHER_KINDS[kind]))
        elif "quantized" in type(module).__module__ and "Conv" in kind:
            sites.append(ConvSite(name, kind, _size_of_other(module), skip="it is quantised"))
    return sites


def trace(model: nn.Module, example_input: Any) -> Trace:
    """Run the network once, without gradients and in eval mode, and see which convolutions run, where and on what.

    ``example_input``: a tensor, a tuple of arguments, a dict of keyword arguments, or a list (one argument).

    Raises:
        UsageError: the network does not run on that input.
    """
    example_input = cloned(example_input)  # a forward may normalise its input in place
    inputs = {_storage(tensor) for tensor in tensors_in(example_input)}
    batch = batch_size(example_input)
    runs: dict[str, LayerRun] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(conv: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            tensor = args[0] if args else kwargs["input"]
            run = runs.get(name) or LayerRun(len(runs), (), False, 0, 0)
            size = tuple(output.shape[2:]) if output.dim() > len(kernel_size(conv)) + 1 else tuple(output.shape[1:])
            runs[name] = LayerRun(
                run.order,
                max(size, run.output_size, key=lambda s: (len(s), prod(s))),
                run.reads_input or _storage(tensor) in inputs,
                run.calls + 1,
                run.macs + _macs(conv, tensor, output),
            )

        return hook

    handles = [c.register_forward_hook(watch(n), with_kwargs=True) for n, c in convolutions(model).items()]
    counter = FlopCounterMode(display=False)
    try:
        with unchanged(model), refusing(example_input), evaluating(model), torch.random.fork_rng(devices=[]), counter:
            call(model, example_input)
    finally:
        for handle in handles:
            handle.remove()
    if runs and not any(run.reads_input for run in runs.values()):
        # The input was normalised or padded on its way: the first convolution to run is the one that reads it.
        first = next(iter(runs))
        runs[first] = replace(runs[first], reads_input=True)
    return Trace(runs, counter.get_total_flops() // 2, batch)


def exchange(
    model: nn.Module,
    fill: Mapping[nn.Module, Callable[[dict[int, Any]], Any]],
    empty: Callable[[nn.Module], Any] = empty_counterpart,
) -> nn.Module:
    """A deep copy of ``model`` in which some convolutions are their counterparts in another form.

    Each key's counterpart is made ``empty`` and handed to deepcopy's memo first, so that every reference to it, in
    containers, under a second name or as the model itself, leads to the one replacement; its weight is never copied.

    Raises:
        InputError: the network cannot be copied.
    """
    memo: dict[int, Any] = {id(conv): empty(conv) for conv in fill}
    # Every module has a dozen empty containers for hooks: making them here halves the time of the copy.
    for value in (value for module in model.modules() for value in vars(module).values()):
        if type(value) in (dict, OrderedDict, set) and not value:
            memo[id(value)] = type(value)()
    try:
        for make in fill.values():
            make(memo)
        return deep_copy(model, memo)
    except RecursionError as error:
        raise InputError(f"the modules of this {type(model).__name__} are nested too deeply to be copied") from error
    except (RuntimeError, TypeError) as error:
        held = [
            f"{name}.{key}" if name else key
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, Tensor) and not value.is_leaf
        ]
        where = f" for {shortened(held, 3)}" if held else ""
        raise InputError(
            f"this {type(model).__name__} cannot be copied{where}: {first_line(error)}; remove what "
            "copy.deepcopy refuses (tensors with a gradient history, locks, open files) and convert again"
        ) from error


def in_precision(model: nn.Module, precision: torch.dtype, shared: bool = False) -> nn.Module:
    """A copy that computes in a precision, also where its numbers are complex.

    ``shared``: parameters that have the precision are the network's own; a forward must not change them.

    Raises:
        InputError: the network cannot be copied.
    """

    def cast_one(tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.to(precision.to_complex())
        return tensor.to(precision) if tensor.is_floating_point() else tensor

    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter and parameter.is_floating_point():
            value = parameter.detach().to(precision, copy=not shared)
            memo[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    try:
        return deep_copy(model, memo)._apply(cast_one)
    except RecursionError as error:
        raise InputError(f"the modules of this {type(model).__name__} are nested too deeply to be copied") from error


def put_in_place(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Give ``new`` every name that ``old`` has in ``model``, which is changed; gives the model back."""
    if model is old:
        return new
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, name, new)
    return model


def call(model: nn.Module, example_input: Any) -> Any:
    """Call a network on an example input: tuple as arguments, dict as keywords, anything else as the one argument."""
    if isinstance(example_input, tuple):
        return model(*example_input)
    if isinstance(example_input, dict):
        return model(**example_input)
    return model(example_input)


@contextmanager
def refusing(example_input: Any) -> Iterator[None]:
    """Whatever goes wrong in a run on an example input becomes a UsageError that names the input."""
    try:
        yield
    except Exception as error:
        raise UsageError(
            f"the network does not run on an example input of {describe_input(example_input)}: "
            f"{type(error).__name__}: {first_line(error)}; "
            "give an input that it takes (example_input=, --input-size C,H,W)"
        ) from error


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients for the time being; every module's own training flag is put back afterwards."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def unchanged(model: nn.Module, but: Collection[nn.Module] = ()) -> Iterator[None]:
    """Undo afterwards what forwards change in a network beside its outputs (counters, caches, logs of hooks), except in
    the modules ``but``; see `Snapshot`."""
    before = Snapshot(model, but)
    try:
        yield
    finally:
        before.restore()


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples, dicts and plain objects (such as model outputs), in order."""
    found: list[Tensor] = []
    seen: dict[int, Any] = {}  # kept alive, lest another be taken for one that is gone
    waiting = [value]
    while waiting:  # no function that calls itself: until the garbage collector came, it would keep what it found
        item = waiting.pop()
        if isinstance(item, Tensor):
            found.append(item)
        elif id(item) not in seen and not isinstance(item, type | Enum | nn.Module):
            seen[id(item)] = item
            if isinstance(item, Mapping):
                item = item.values()
            elif not isinstance(item, list | tuple):
                item = getattr(item, "__dict__", {}).values()
            waiting += reversed([*item])
    return found


def mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same nest of lists, tuples and dicts with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(change, item) for key, item in value.items()}
    return type(value)(mapped(change, item) for item in value) if type(value) in (list, tuple) else value


def cloned(value: Any) -> Any:
    """The same nest of lists, tuples and dicts with every tensor cloned."""
    return mapped(Tensor.clone, value)


def channels_last(value: Any) -> Any:
    """The same nest of lists, tuples and dicts with batches of images, tensors of four axes, laid out channels_last."""
    return mapped(lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t, value)


def fitted(inputs: Any, model: nn.Module) -> Any:
    """The same nest of lists, tuples and dicts with every tensor on the device of the network's first floating
    parameter, and floating ones in its dtype."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return mapped(lambda tensor: tensor, inputs)
    device, dtype = parameter.device, parameter.dtype
    return mapped(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype), inputs)


def default_input(model: nn.Module, batch: int = 1) -> Tensor | None:
    """Zeros of the size in the model's ``pretrained_cfg``, in its dtype and on its device; None where it has none."""
    size = pretrained_config(model).get("input_size")
    if not size:
        return None
    return fitted(torch.zeros(batch, *size), model)


def batch_size(example_input: Any) -> int:
    """Examples in an input: the length of its first tensor, or of a list of single images, as detectors take them."""
    if isinstance(example_input, list) and example_input and all(isinstance(t, Tensor) for t in example_input):
        return len(example_input) if example_input[0].dim() == 3 else len(example_input[0])
    return next((len(t) for t in tensors_in(example_input) if t.dim() > 1), 1)


def describe_input(example_input: Any) -> str:
    """Shapes in a line, for messages."""
    return ", ".join(f"shape {tuple(t.shape)}" for t in tensors_in(example_input)) or type(example_input).__name__


def _weights_used_elsewhere(model: nn.Module) -> dict[int, str]:
    """Parameters that something else than a plain convolution's weight also refers to, by id: where."""
    elsewhere: dict[int, str] = {}
    for name, module in model.named_modules():
        is_conv = isinstance(module, CONVOLUTIONS) and not isinstance(module, HarmonicMixin)
        for key, parameter in module._parameters.items():
            if parameter is not None and not (is_conv and key == "weight"):
                elsewhere[id(parameter)] = f"{name}.{key}"
    return elsewhere


def _size_of_other(module: nn.Module) -> tuple[int, ...]:
    for key in ("kernel_size", "filt_size"):
        size = getattr(module, key, None)
        if isinstance(size, int):
            return (size, size)
        if isinstance(size, list | tuple):
            return tuple(size)
    return ()


def _storage(tensor: Tensor) -> int:
    # The address of the storage object, not of its data: meta tensors have no data.
    return cast(int, tensor.untyped_storage()._cdata)


def _macs(conv: nn.Module, input: Tensor, output: Tensor) -> int:
    """Multiply-adds of one call: a weight for every output element it reaches (input element, if transposed)."""
    per_position = prod(kernel_size(conv)) * cast(int, conv.in_channels) // cast(int, conv.groups)
    if cast(bool, conv.transposed):
        per_position = prod(kernel_size(conv)) * cast(int, conv.out_channels) // cast(int, conv.groups)
        return input.numel() * per_position
    return output.numel() * per_position
