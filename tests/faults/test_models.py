"""Unusual networks: random ones pass through all steps; others are refused in one line that names the layer."""

from __future__ import annotations

import copy
import glob
import random
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import harmconvert as hc
from harmconvert.deploy import export
from harmconvert.errors import HarmconvertError, one_line
from harmconvert.kernels import all_frequencies, level_count
from harmconvert.layers import HarmonicMixin, reason_not_factorable, to_harmonic
from harmconvert.network import LayerInfo, convolutions, evaluating, find_layers, trace
from harmconvert.plan import cut_layer, plannable

from .. import oracle
from .generated import NAMES, Case, cases
from .tally import Counter, size

# Largest relative difference of outputs with the whole basis; for 16 bits it follows from the rounding of coefficients.
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
drawn = settings(max_examples=size(12, 150), suppress_health_check=list(HealthCheck), deadline=None)


def complaint(trial: Callable[[], str | None], label: str) -> str | None:
    """Return the complaint of a trial, or the exception that it raised."""
    try:
        found = trial()
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        found = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
    return None if found is None else f"{label!a}: {found}"


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Return everything that must not change: values, identities, flags."""
    state = {f"{key} (tensor)": (id(t), t.dtype, bits(t)) for key, t in model.state_dict(keep_vars=True).items()}
    frozen = {f"{key} (grad)": p.requires_grad for key, p in model.named_parameters(remove_duplicate=False)}
    modules = {
        f"{name} (module)": (id(m), type(m), m.training) for name, m in model.named_modules(remove_duplicate=False)
    }
    return {**state, **frozen, **modules, "rng": torch.get_rng_state().numpy().tobytes()}


def bits(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def state(model: nn.Module) -> dict[str, Any]:
    return {key: (t.dtype, tuple(t.shape), bits(t)) for key, t in model.state_dict().items()}


def frozen(model: nn.Module) -> dict[str, bool]:
    named = model.named_parameters(remove_duplicate=False)
    return {key.replace("coefficients", "weight"): parameter.requires_grad for key, parameter in named}


def difference(ours: nn.Module, theirs: nn.Module, x: Tensor) -> float:
    """Return the largest difference of outputs, relative to the largest output, in eval mode."""
    with evaluating(ours, theirs):
        expected, found = (model(x.clone()).to(torch.float64) for model in (ours, theirs))
    if not (expected.isfinite().all() and found.isfinite().all()):
        return float("inf")
    largest = expected.abs().max().item()
    return (found - expected).abs().max().item() / (largest or 1.0)


def whole(case: Case, path: Path) -> str | None:
    """Check that converting with the whole basis and back is exact and changes nothing else."""
    network, bound = case.network, BOUND[case.dtype]
    # With an example input, layers whose weight the network rewrites are found and skipped.
    conversion = hc.convert(network, example_input=case.x)
    hc.save(conversion, path)
    loaded = hc.load(path, model=network)
    if state(loaded) != state(conversion.model):
        return "what is loaded is not what was saved"
    dense = hc.fuse(loaded)
    for name, model in (("converted", conversion.model), ("loaded", loaded), ("fused", dense)):
        if frozen(model) != frozen(network):
            return f"{name}: other parameters are frozen"
        check = hc.verify(network, model, case.x)
        if not check.ok:
            return f"{name}: {check.verdict}"
        if (found := difference(network, model, case.x)) > bound:
            return f"{name}: outputs differ by {found:.1e}"
    kinds = [(name, type(m)) for name, m in network.named_modules(remove_duplicate=False)]
    if [(name, type(m)) for name, m in dense.named_modules(remove_duplicate=False)] != kinds:
        return "the fused network has other modules"
    return _kernels_are_near(network, dense, conversion.plan)


def _kernels_are_near(network: nn.Module, dense: nn.Module, plan: hc.Plan) -> str | None:
    planned = {layer.name for layer in plan.layers}
    for name, conv in convolutions(network).items():
        other = dense.get_submodule(name)
        if name not in planned:
            if state(conv) != state(other):
                return f"{name!a} was not converted, and is another"
            continue
        exact, fused = conv.weight.detach().double().flatten(1), other.weight.detach().double().flatten(1)
        # Two ulp, plus the rounding of float64 products over so many positions.
        positions = conv.weight[0, 0].numel()
        limit = exact.abs().amax(1) * (2 * torch.finfo(conv.weight.dtype).eps + positions * 1e-15)
        if not ((fused - exact).abs().amax(1) <= limit).all():
            return f"{name!a}: its fused kernel is off"
    return None


def convertible_layers(network: nn.Module, x: Tensor | None) -> list[LayerInfo]:
    """Return the layers that can be converted; a run on ``x`` finds those whose weight the network rewrites."""
    layers = find_layers(network, None if x is None else trace(network, x))
    return [site for site in plannable(layers) if not site.skip]


def random_plan(network: nn.Module, seed: int, x: Tensor | None = None) -> hc.Plan:
    """Return a plan with a random set of frequencies for each layer, the same for layers that share a weight."""
    rng = random.Random(seed)
    chosen: dict[str, tuple[tuple[int, ...], ...]] = {}
    layers = []
    for site in convertible_layers(network, x):
        every = all_frequencies(site.kernel_size)
        kept = sorted(rng.sample(range(len(every)), rng.randint(1, len(every))))
        chosen[site.name] = chosen.get(site.tied_to or "", tuple(every[index] for index in kept))
        layers.append(cut_layer(site.name, site.kernel_size, chosen[site.name]))
    return hc.Plan(tuple(layers))


def random_lambdas(network: nn.Module, seed: int, x: Tensor | None = None) -> dict[str, int]:
    """Return literal levels for some of the layers, by name."""
    rng = random.Random(seed)
    sites = convertible_layers(network, x)
    some = rng.sample(sites, rng.randint(1, len(sites)))
    return {glob.escape(site.name): rng.randint(1, level_count(site.kernel_size)) for site in some}


def cut(case: Case, lam: Any, path: Path) -> str | None:
    """Check that file, fused and factored form of a cut are the same network, with the projected kernels."""
    network, bound = case.network, BOUND[case.dtype]
    conversion = hc.convert(network, lam, example_input=case.x)
    hc.save(conversion, path, force=True)
    loaded = hc.load(path, model=network)
    if state(loaded) != state(conversion.model) or frozen(loaded) != frozen(network):
        return "what is loaded is not what was saved"
    check = hc.verify(network, loaded, case.x)
    if not check.as_planned:
        return f"not as planned: {check.verdict}"
    dense, factored = hc.fuse(loaded), hc.factor(loaded, layers="factored")
    for name, conv in convolutions(factored).items():
        # Layers without a factored form are dense.
        twin = loaded if isinstance(conv, HarmonicMixin) else dense
        if state(conv) != state(twin.get_submodule(name)):
            return f"{name!a} of the factored form holds something else"
    for name, model in (("fused", dense), ("factored", factored)):
        if (found := difference(loaded, model, case.x)) > bound:
            return f"{name}: outputs differ by {found:.1e}"
    return _kernels_are_projections(network, dense, conversion.plan) or _exported(network, dense, path)


def _kernels_are_projections(network: nn.Module, dense: nn.Module, plan: hc.Plan) -> str | None:
    """Compare the first filter of each layer with the paper's equations in loops."""
    for layer in plan.layers:
        exact, fused = (model.get_submodule(layer.name).weight[0, 0].detach().double() for model in (network, dense))
        if exact.numel() > 30:
            continue  # the loops are slow
        kernel = exact.numpy()
        expected = sum(oracle.coefficient(kernel, f) * oracle.dct_kernel(kernel.shape, f) for f in layer.frequencies)
        rounding = torch.finfo(network.get_submodule(layer.name).weight.dtype).eps
        if not np.abs(fused.numpy() - expected).max() <= 4 * (rounding + 1e-15) * np.abs(kernel).max():
            return f"{layer.name!a} is not the projection"
    return None


def _exported(network: nn.Module, dense: nn.Module, path: Path) -> str | None:
    """Check the dense file: torch alone can load it into the original's class."""
    target = path.with_name("dense.safetensors")
    export(dense, target, force=True)
    twin = copy.deepcopy(network)
    for buffers in (module._buffers for module in twin.modules()):
        for name, buffer in buffers.items():
            buffers[name] = buffer if buffer is None else buffer.clone(memory_format=torch.contiguous_format)
    twin.load_state_dict(safetensors.torch.load_file(target))
    return None if state(twin) == state(dense) else "the exported file holds another network"


def unchanged(case: Case, trial: Callable[[], str | None]) -> str | None:
    """Run a trial and check that it does not change the original."""
    before = fingerprint(case.network)
    found = trial()
    after = fingerprint(case.network)
    changed = [key for key in before if before[key] != after.get(key)]
    return found or (f"the original was changed: {changed[:3]}" if changed else None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "network.safetensors"


def test_random_networks_are_converted_saved_loaded_and_fused_exactly(tally: Counter, path: Path) -> None:
    count = tally("models", "random networks: convert, save, load, fuse, verify, whole basis")

    @drawn
    @given(cases)
    def one(case: Case) -> None:
        path.unlink(missing_ok=True)
        assume(convertible_layers(case.network, case.x))
        count.trial(complaint(lambda: unchanged(case, lambda: whole(case, path)), case.label))

    one()


@pytest.mark.parametrize("choose", [random_plan, random_lambdas])
def test_random_networks_with_random_cuts_are_consistent_in_every_form(
    tally: Counter, path: Path, choose: Callable[..., Any]
) -> None:
    count = tally("models", "random networks, cut at random: saved, loaded, fused, factored, exported")

    @drawn
    @given(cases, st.integers(0, 2**20))
    def one(case: Case, seed: int) -> None:
        assume(convertible_layers(case.network, case.x))
        lam = choose(case.network, seed, case.x)
        count.trial(complaint(lambda: unchanged(case, lambda: cut(case, lam, path)), case.label))

    one()


def on_meta(case: Case, path: Path) -> str | None:
    """Check that a network without values is converted and fused; steps that need values must say so."""
    network = copy.deepcopy(case.network).to("meta")
    conversion = hc.convert(network, random_plan(network, 1))
    shapes = {key: tensor.shape for key, tensor in network.state_dict().items()}
    if {key: tensor.shape for key, tensor in hc.fuse(conversion.model).state_dict().items()} != shapes:
        return "fused, it has other keys or shapes"
    found = refusal(lambda: hc.save(conversion, path), "meta device")
    found = found or refusal(lambda: hc.verify(network, conversion.model, case.x), "meta device")
    # If no layer has a factored form, nothing is measured, which is correct.
    if any(
        isinstance(conv, HarmonicMixin) and reason_not_factorable(conv) is None
        for conv in convolutions(conversion.model).values()
    ):
        found = found or refusal(lambda: hc.factor(conversion.model, case.x), "meta device")
    return found or ("a file was left" if path.exists() else None)


def refusal(trial: Callable[[], Any], *words: str) -> str | None:
    """Return what is wrong with a refusal: it is missing, has another type, or says too little."""
    try:
        trial()
    except HarmconvertError as error:
        text = str(error)
        missing = [word for word in words if word not in text]
        if missing or not text.isprintable():
            return f"it does not say {missing}: {text!a}"
        return None
    return "not refused"


def test_random_networks_without_values_are_converted_but_not_written(tally: Counter, path: Path) -> None:
    count = tally("models", "random networks on the meta device")

    @drawn
    @given(cases)
    def one(case: Case) -> None:
        count.trial(complaint(lambda: on_meta(case, path), case.label))

    one()


def _filled(value: float, dtype: torch.dtype = torch.float32) -> nn.Module:
    conv = nn.Conv2d(2, 2, 3).to(dtype)
    nn.init.constant_(conv.weight, value)
    return conv


def _other_weight(weight: Tensor) -> nn.Module:
    conv = nn.Conv2d(2, 2, 3)
    conv.weight = nn.Parameter(weight, requires_grad=False)
    return conv


class Named(nn.Conv2d):
    """A class whose base has a method with a name that the harmonic form uses."""

    def _merge(self, input: Tensor) -> Tensor:
        return input


class Heir(Named):
    pass


UNCONVERTIBLE: dict[str, Callable[[], nn.Module]] = {
    "NaN": lambda: _filled(float("nan")),
    "infinite": lambda: _filled(float("-inf")),
    "coefficients over 65504": lambda: _filled(40000.0, torch.float16),
    "coefficients over 3.4e38": lambda: _filled(2e38),
    "integers": lambda: _other_weight(torch.ones(2, 2, 3, 3, dtype=torch.int8)),
    "8-bit floats": lambda: _other_weight(torch.ones(2, 2, 3, 3).to(torch.float8_e4m3fn)),
    "complex": lambda: nn.Conv2d(2, 2, 3, dtype=torch.complex64),
    "another kernel size": lambda: _other_weight(torch.ones(2, 2, 5, 5)),
    "no channels": lambda: _other_weight(torch.ones(0, 2, 3, 3)),
    "parametrised": lambda: weight_norm(nn.Conv2d(2, 2, 3)),
    "lazy": lambda: nn.LazyConv2d(2, 3),
    "an attribute of that name": lambda: Heir(2, 2, 3),
    "harmonic": lambda: to_harmonic(nn.Conv2d(2, 2, 3)),
}


def named(name: str, module: nn.Module) -> nn.Module:
    network = nn.Sequential()
    network.add_module(name, module)
    return network


def test_layers_that_cannot_be_converted_are_named_in_one_line(tally: Counter) -> None:
    count = tally("models", "layers that cannot be converted, under odd names")
    for name in NAMES:
        for what, make in size(sorted(UNCONVERTIBLE.items())[:: 1 + len(name) % 3], sorted(UNCONVERTIBLE.items())):
            trial = partial(refusal, partial(hc.convert, named(name, make())), one_line(name))
            count.trial(complaint(trial, f"{name}: {what}"))


def test_networks_without_a_convolution_or_an_input_are_refused(tally: Counter) -> None:
    count = tally("models", "networks with nothing to convert, or that cannot be gone through")
    deep: nn.Module = nn.Conv2d(1, 1, 3)
    for _ in range(300):
        deep = nn.Sequential(deep)
    deeper = deep
    for _ in range(900):
        deeper = nn.Sequential(deeper)
    for network, words in (
        (nn.Sequential(), "no convolution over 1x1"),
        (nn.Sequential(nn.ReLU(), nn.Flatten()), "no convolution over 1x1"),
        (nn.Sequential(nn.Conv2d(3, 3, 1), nn.Linear(2, 2)), "no convolution over 1x1"),
        (nn.LSTM(2, 2), "no convolution over 1x1"),
        (deep, "nested too deeply to be copied"),
        (deeper, "nested too deeply to be visited"),
        (nn.DataParallel(nn.Conv2d(1, 1, 3)), "wrapped in DataParallel"),
        ("resnet18", "not str"),
        (None, "not NoneType"),
    ):
        trial = partial(refusal, partial(hc.convert, network), words)  # type: ignore[arg-type]
        count.trial(complaint(trial, words))


class Extra(nn.Module):
    """A module with state that is not a tensor."""

    def get_extra_state(self) -> Any:
        return {"any": "thing"}

    def set_extra_state(self, state: Any) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_values_that_a_file_cannot_hold_are_refused_and_no_file_is_left(tally: Counter, path: Path) -> None:
    count = tally("models", "tensors and names that no file can hold")
    values = {
        "sparse": torch.eye(3).to_sparse(),
        "complex128": torch.zeros(2, dtype=torch.complex128),
        "extra": Extra(), "\udc80": torch.ones(1),
    }  # fmt: skip
    for name, value in values.items():
        network = named("conv", nn.Conv2d(3, 4, 3))
        if isinstance(value, nn.Module):
            network.add_module(name, value)
        else:
            network.register_buffer(name, value)
        conversion = hc.convert(network)
        for write in (partial(hc.save, conversion), partial(export, conversion.model)):
            found = complaint(partial(refusal, partial(write, path), one_line(name)), name)
            left = [str(entry) for entry in path.parent.iterdir()]
            count.trial(found or (f"{left} left" if left else None))
