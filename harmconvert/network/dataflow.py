"""Follow the tensors of one run: which layers read the input, where kernels come from, which other modules convolve."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import HarmconvertError, first_line
from ..layers.block import HarmonicBlock2d
from ..layers.harmonic import CONVOLUTIONS
from .copying import deep_copy
from .side_effects import changes_first_argument

REWRITTEN = "its weight is rewritten in the network's forward, so coefficients would not be used"
STALE = "it computes with a copy of its weight that was made before the run, so a change of the weight has no effect"

_CONVOLVING = {f"conv{kind}{axes}d" for kind in ("", "_transpose") for axes in (1, 2, 3)} | {
    "convolution",
    "_convolution",
}
# Functions that mix channels. The output of such a function with trained weights no longer counts as the input.
_MIXING = {
    *_CONVOLVING, "linear", "bilinear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv",
    "addmm", "baddbmm", "einsum", "tensordot", "embedding", "lstm", "gru", "rnn_tanh", "rnn_relu",
    "multi_head_attention_forward",
}  # fmt: skip
# The forward of a convolution class of these packages is one convolution with its own weight.
_TRUSTED_PACKAGES = ("torch.", "timm.")


@dataclass(frozen=True)
class OtherRun:
    """A module that called a convolution function and is not one of torch's convolutions.

    ``macs``: multiply-adds of all calls. ``learned``: its kernels depend on trained parameters.
    """

    kind: str
    kernel_size: tuple[int, ...]
    macs: int
    learned: bool


@dataclass
class Findings:
    """The result of watching a run, by layer or module name.

    ``unfit``: why a layer cannot be converted. ``others``: modules that call convolution functions themselves.
    """

    unfit: dict[str, str] = field(default_factory=dict)
    others: dict[str, OtherRun] = field(default_factory=dict)


def fixed_parameters(model: nn.Module) -> set[int]:
    """Return the ids of the parameters of fixed transforms: frozen layers in a network that is trained otherwise.

    Fixed transforms are, for example, Fourier transforms, colour transforms and edge filters; their biases are zero or
    missing. A backbone that is frozen for fine-tuning is different: its normalisation layers are frozen too, or its
    layers have biases.
    """
    parameters = list(model.parameters())
    if all(p.requires_grad for p in parameters) or not any(p.requires_grad for p in parameters):
        return set()
    fixed: set[int] = set()
    for module in model.modules():
        kind = type(module).__name__
        own = [p for p in module._parameters.values() if p is not None]
        normalises = "Norm" in kind and bool([*own, *module._buffers])
        if normalises and not any(p.requires_grad for p in own):
            return set()
        weight, bias = (module._parameters.get(key) for key in ("weight", "bias"))
        if any(p.requires_grad for p in own) or normalises:
            continue
        is_colour_transform = (
            weight is not None
            and not is_lazy(weight)
            and weight.dim() > 1
            and max(weight.shape[:2]) <= 4
            and prod(weight.shape[2:]) == 1
        )
        if bias is None or is_colour_transform or not (bias.is_meta or is_lazy(bias) or bool(bias.any())):
            fixed.update(map(id, own))
    return fixed


class Dataflow(TorchFunctionMode):
    """Watches every torch function that is called in one run of ``model`` on ``inputs``.

    A tensor counts as the network's input as long as it is computed from the inputs by functions without trained
    weights, by fixed transforms, or by trained scales and shifts, which do not mix channels. Run the network inside
    `watching`, then call `finish`.
    """

    def __init__(self, model: nn.Module, inputs: list[Tensor]) -> None:
        super().__init__()
        self.findings = Findings()
        self.input_was_read = False
        convs = {n: m for n, m in model.named_modules() if isinstance(m, CONVOLUTIONS)}
        weights = {
            name: weight for name, conv in convs.items() if (weight := conv._parameters.get("weight")) is not None
        }
        self._model, self._convs = model, set(convs)
        self._owners = {id(weight): name for name, weight in weights.items()}
        self._before = {name: (conv, *weight_state(conv)) for name, conv in convs.items() if name in weights}
        self._addresses = {_address(weight): name for name, weight in weights.items() if _address(weight)}
        fixed = fixed_parameters(model)
        self._trained = {id(p) for p in model.parameters() if id(p) not in fixed}
        self._is_input = WeakTensorKeyDictionary()  # True: counts as the input; False: went through a trained layer
        self._learned = WeakTensorKeyDictionary()  # computed from trained parameters only
        self._kernel_of = WeakTensorKeyDictionary()  # computed from a convolution's weight: name of the convolution
        for tensor in inputs:
            self._is_input[tensor] = True
        self._failure: Exception | None = None
        self._suspects: dict[str, tuple[nn.Module, Any, Any]] = {}
        self._running: list[tuple[str, WeakTensorKeyDictionary]] = []

    def reads_input(self, tensor: Tensor) -> bool:
        """Return whether a tensor is the network's input or a fixed transform of it."""
        return bool(self._is_input.get(tensor))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the run inside the context: which module runs, and each convolution after it has run."""
        with ExitStack() as stack:
            for name, module in self._model.named_modules():
                if isinstance(module, torch.jit.ScriptModule):
                    continue
                before = module.register_forward_pre_hook(
                    partial(self._on_module_start, name), prepend=True, with_kwargs=True
                )
                stack.callback(before.remove)
                stack.callback(
                    module.register_forward_hook(partial(self._on_module_end, name), with_kwargs=True).remove
                )
            stack.enter_context(self)
            yield
        for name, (conv, *before_run) in self._before.items():
            if before_run != list(weight_state(conv)):
                self.findings.unfit[name] = REWRITTEN

    def finish(self) -> None:
        """Find the layers whose output does not depend on their weight. Call this after the run.

        Raises:
            HarmconvertError: this class failed during the run; this is a bug of harmconvert, not of the network.
        """
        if self._failure is not None:
            kind, text = type(self._failure).__name__, first_line(self._failure)
            raise HarmconvertError(f"harmconvert failed while it watched a run: {kind}: {text}; please report it")
        for name, (module, args, kwargs) in self._suspects.items():
            if name not in self.findings.unfit and _ignores_its_weight(module, args, kwargs):
                self.findings.unfit[name] = STALE

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self._observe(self._on_function, func, args, kwargs or {}, output)
        return output

    def _observe(self, method: Callable[..., None], *args: Any) -> None:
        """Call a method that only observes the run; keep its first error for `finish`, so that the run goes on."""
        try:
            method(*args)
        except Exception as error:
            self._failure = self._failure or error

    def _on_function(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Update all records after a call of a torch function."""
        name = getattr(func, "__name__", "")
        arguments = list(_tensors((args, kwargs)))
        if not arguments:
            return
        results = list(_tensors(output))
        if changes_first_argument(name, func):
            self._note_write(arguments[0])
            results += [arguments[0]] if arguments[0]._base is None else [arguments[0], arguments[0]._base]
        if isinstance(kwargs.get("out"), Tensor):
            self._note_write(kwargs["out"])
        self._follow(name, arguments, results)
        if name in _CONVOLVING and isinstance(output, Tensor):
            values = {**dict(zip(("input", "weight"), args, strict=False)), **kwargs}
            self._note_convolution(values["input"], values["weight"], output, "transpose" in name)

    def _follow(self, name: str, arguments: list[Tensor], results: list[Tensor]) -> None:
        """Derive from the arguments of a function what its results are: the input, learned, made of a kernel."""
        states = [self._is_input.get(tensor) for tensor in arguments]
        learned = any(id(tensor) in self._trained or tensor in self._learned for tensor in arguments)
        mixed = True in states and learned and name in _MIXING
        self.input_was_read |= mixed
        if False in states or mixed:
            state: bool | None = False
        else:
            state = True if True in states else None
        kernels = [self._owners.get(id(t)) or self._kernel_of.get(t) for t in arguments if state is None]
        kernel = next(filter(None, kernels), None)
        for tensor in results:
            if state is not None:
                self._is_input[tensor] = state
            elif learned:
                self._learned[tensor] = True
            if kernel is not None:
                self._kernel_of[tensor] = kernel
        for owner, derived in self._running:
            if any(self._owners.get(id(t)) == owner or t in derived for t in arguments):
                for tensor in results:
                    derived[tensor] = True

    def _note_write(self, tensor: Tensor) -> None:
        """Mark the convolution whose weight is overwritten, if the tensor is a weight."""
        owner = self._addresses.get(_address(tensor))
        if owner is not None:
            self.findings.unfit[owner] = REWRITTEN

    def _note_convolution(self, input: Tensor, weight: Tensor, output: Tensor, transposed: bool) -> None:
        """Record a call of a convolution function whose kernel is not the weight of a convolution module."""
        if self.reads_input(input):
            self.input_was_read = True
        owner = self._running[-1][0] if self._running else ""
        conv_of_weight = self._owners.get(id(weight)) or self._kernel_of.get(weight)
        module = self._model.get_submodule(owner)
        if owner in self._convs or conv_of_weight or isinstance(module, HarmonicBlock2d) or prod(weight.shape[2:]) == 1:
            return
        learned = id(weight) in self._trained or weight in self._learned or any(True for _ in module.parameters())
        macs = (input if transposed else output).numel() * weight[0].numel()
        earlier = self.findings.others.get(owner)
        size = tuple(weight.shape[2:])
        if earlier is not None:
            macs += earlier.macs
            size, learned = max(size, earlier.kernel_size, key=prod), learned or earlier.learned
        self.findings.others[owner] = OtherRun(type(module).__name__, size, macs, learned)

    def _on_module_start(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._running.append((name, WeakTensorKeyDictionary()))

    def _on_module_end(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._observe(self._inspect_module, name, module, args, kwargs, output)

    def _inspect_module(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Pass the records on to the outputs, and remember a convolution whose output may not depend on its weight."""
        place = max((i for i, (owner, _) in enumerate(self._running) if owner == name), default=None)
        if place is None:
            return
        derived = self._running[place][1]
        del self._running[place:]  # later entries are modules that ended with an exception that the network caught
        outputs = list(_tensors(output))
        self._follow_module(module, list(_tensors((args, kwargs))), outputs)
        if name not in self._before or name in self.findings.unfit or _has_trusted_forward(module):
            return
        if outputs and not any(tensor in derived for tensor in outputs):
            self._suspects.setdefault(name, (module, _cloned(args), _cloned(kwargs)))

    def _follow_module(self, module: nn.Module, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Follow tensors through a module whose functions cannot be watched (TorchScript, other packages)."""
        states = [self._is_input.get(tensor) for tensor in inputs]
        for tensor in outputs:
            if self._is_input.get(tensor) is None and any(state is not None for state in states):
                trained = any(id(p) in self._trained for p in module.parameters())
                self._is_input[tensor] = False not in states and not trained


def _has_trusted_forward(conv: nn.Module) -> bool:
    """Return whether a convolution has the forward of a class that is known to use its current weight."""
    own = {"forward", "_conv_forward"} & vars(conv).keys()
    return not own and type(conv).forward.__module__.startswith(_TRUSTED_PACKAGES)


@torch.no_grad()
def _ignores_its_weight(conv: nn.Module, args: Any, kwargs: Any) -> bool:
    """Return whether the layer with other weights gives the same output, bit for bit."""
    try:
        plain, changed = deep_copy(conv), deep_copy(conv)
        weight = cast(Tensor, changed._parameters["weight"])
        generator = torch.Generator().manual_seed(0)
        weight.data = torch.randn(weight.shape, generator=generator).to(weight)
        pairs = zip(*(_tensors(one(*args, **kwargs)) for one in (plain, changed)), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)
    except Exception:  # the layer cannot be run alone: then assume that it uses its weight
        return False


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested lists, tuples and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _cloned(item) for key, item in value.items()}
    return type(value)(map(_cloned, value)) if type(value) in (list, tuple) else value


def _address(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (
        RuntimeError,
        NotImplementedError,
        ValueError,
    ):  # not initialised; quantised or sparse; tensor classes of other packages
        return 0


def weight_state(conv: nn.Module) -> tuple[Any, ...]:
    """Return a value that changes when a layer's weight is replaced or overwritten."""
    weight = conv._parameters.get("weight")
    if weight is None or is_lazy(weight):
        return ()
    return id(weight), _address(weight), None if weight.is_inference() else weight._version
