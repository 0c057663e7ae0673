"""Numbers at the ends of their range and uninformative images: exact, or refused by name; NaN is never silent."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import harmconvert as hc
from harmconvert.calibration import NormalEquations, Operator, Problem, Samples, solver
from harmconvert.errors import InputError
from harmconvert.kernels import all_frequencies

from .. import oracle
from ..networks import Branches, random_input, seeded
from ..seams import replace_everywhere
from .generated import DTYPES
from .tally import Counter, size
from .test_models import BOUND, complaint, difference, refusal

SHAPES = ((3, 3), (2, 2), (5,), (1, 7), (3, 2, 3))
CLASSES = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
drawn = settings(max_examples=size(60, 1500), suppress_health_check=list(HealthCheck), deadline=None)


@st.composite
def convolutions(draw: st.DrawFn) -> Any:
    """Draw a convolution whose filters have random magnitudes, from the smallest subnormal to the largest number."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(SHAPES))
    info = torch.finfo(dtype)
    least, most = np.log10(info.smallest_normal * info.eps), np.log10(info.max) - 1e-9
    kernel = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).uniform(-1, 1, (3, 2, *shape))
    for filters in kernel:
        pattern = draw(st.sampled_from(("noise", "noise", "constant", "zero", "one")))
        if pattern == "constant":
            filters[:] = 1.0
        elif pattern in ("zero", "one"):
            filters[:] = 0.0
            filters.flat[0] = float(pattern == "one")
        # The ends of the range are more frequent than its middle.
        exponent = draw(st.sampled_from((least, most, 0.0)) | st.floats(least, most))
        filters *= 10.0**exponent
    conv: Any = CLASSES[len(shape)](2, 3, shape).to(dtype)
    with torch.no_grad():
        conv.weight.copy_(torch.from_numpy(kernel))
    return conv


def largest_number(conv: nn.Module, normalization: str) -> np.longdouble:
    """Return the largest possible coefficient or partial sum of a kernel's terms, in the widest float type."""
    kernel = conv.weight.detach().double().numpy().astype(np.longdouble)
    found, sums = np.longdouble(0), np.zeros_like(kernel)
    for f in all_frequencies(kernel.shape[2:]):
        psi = oracle.dct_kernel(kernel.shape[2:], f).astype(np.longdouble)
        coefficients = np.abs((kernel * psi).sum(tuple(range(2, kernel.ndim)), keepdims=True))
        found = max(found, coefficients.max() * (np.abs(psi).sum() if normalization == "l1" else 1))
        sums += coefficients * np.abs(psi)
    return max(found, sums.max())


def there_and_back(conv: nn.Module, normalization: str) -> str | None:
    """Check that the whole basis restores every filter within rounding, or reports a coefficient out of range."""
    network, info = nn.Sequential(conv), torch.finfo(conv.weight.dtype)
    try:
        dense: Any = hc.fuse(hc.convert(network, normalization=normalization).model)
    except InputError as error:
        fits = largest_number(conv, normalization) < info.max * 0.99
        return f"refused, but it fits: {error}" if fits or "layer 0" not in str(error) else None
    exact, fused = conv.weight.detach().double().flatten(1), dense[0].weight.detach().double().flatten(1)
    positions = conv.weight[0, 0].numel()
    limit = exact.abs().amax(1) * (2 * info.eps + positions * 1e-15) + 2 * positions * info.smallest_normal * info.eps
    if not ((fused - exact).abs().amax(1) <= limit).all():
        return f"fused, it is off by {((fused - exact).abs().amax(1) / limit).max():.1f} times what it may"
    x = random_input((2, 2, *(9,) * (conv.weight.dim() - 2)), conv.weight.dtype)
    problems = hc.verify(network, dense, x).problems
    return f"verify has {problems}" if problems else None


def cut(conv: nn.Module, basis: str) -> str | None:
    """Check that half of the basis gives finite kernels of no more energy, or an error that names the layer."""
    kept = all_frequencies(conv.kernel_size)[: conv.weight[0, 0].numel() // 2]
    plan = hc.Plan.from_json(
        {"layers": [{"name": "0", "kernel_size": conv.kernel_size, "frequencies": kept}], "basis": basis}
    )
    try:
        conversion = hc.convert(nn.Sequential(conv), plan)
        dense: Any = hc.fuse(conversion.model)
    except InputError as error:
        return None if "layer 0: its" in str(error) and "range" in str(error) else f"refused with {error}"
    if not dense[0].weight.isfinite().all():
        return "the cut kernel is not finite"
    (record,) = conversion.layers
    normal = conv.weight.abs().max() >= torch.finfo(conv.weight.dtype).smallest_normal
    if not (
        0 <= record.energy <= 1 and 0 <= record.error <= (1 + 8 * torch.finfo(conv.weight.dtype).eps if normal else 10)
    ):
        return f"energy {record.energy}, error {record.error}"
    return None


@pytest.mark.parametrize("normalization", ["ortho", "l1"])
def test_kernels_of_every_magnitude_are_reconstructed_or_refused(tally: Counter, normalization: str) -> None:
    count = tally("numbers", "kernels from subnormal to the largest number, there and back")

    @drawn
    @given(convolutions())
    def one(conv: nn.Module) -> None:
        count.trial(complaint(partial(there_and_back, conv, normalization), f"{conv} {conv.weight.dtype}"))

    one()


@pytest.mark.parametrize("basis", ["dct", "haar", "klt"])
def test_cuts_of_kernels_of_every_magnitude_are_finite_or_refused(tally: Counter, basis: str) -> None:
    count = tally("numbers", "kernels from subnormal to the largest number, cut in half")

    @drawn
    @given(convolutions())
    def one(conv: nn.Module) -> None:
        count.trial(complaint(partial(cut, conv, basis), f"{conv} {conv.weight.dtype}"))

    one()


def test_nan_and_infinity_are_refused_in_any_tensor(tally: Counter) -> None:
    count = tally("numbers", "NaN and infinity in each tensor of a network")
    state = seeded(Branches).state_dict()
    keys = [key for key, tensor in state.items() if tensor.is_floating_point()]
    for key, value in itertools.product(size(keys[::3], keys), (float("nan"), float("inf"), -float("inf"))):
        network = seeded(Branches)
        with torch.no_grad():
            network.state_dict()[key].flatten()[-1:].fill_(value)
        # The message names a tied weight by its first key.
        name = key.replace("alias", "shared").replace("tied_b.weight", "tied_a.weight")
        count.trial(complaint(partial(refusal, partial(hc.convert, network), name), f"{key} {value}"))


class Stack(nn.Module):
    """Three convolutions, the last one not followed by a batch norm; maps may have any size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 6), (6, 6), (6, 4)))
        self.norm_a, self.norm_b = nn.BatchNorm2d(6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_a(self.a(x)).relu()
        return self.c(self.norm_b(self.b(x)).relu()).mean((2, 3))


def _dead(channels: int) -> Callable[[Any], None]:
    def edit(network: Any) -> None:
        network.a.weight[:channels] = 0
        network.a.bias[:channels] = -1

    return edit


def _scaled(first: float, second: float) -> Callable[[Any], None]:
    def edit(network: Any) -> None:
        network.a.weight.mul_(first)
        network.b.weight.mul_(second)

    return edit


def _no_variance(network: Any) -> None:
    network.norm_a.running_var.zero_()
    network.norm_b.running_var.zero_()


def _filters_apart(network: Any) -> None:
    network.b.weight[0] *= 1e20


def _alike(network: Any) -> None:
    network.b.weight.copy_(network.b.weight[:1].expand_as(network.b.weight))


NETWORKS: dict[str, Callable[[Any], None]] = {
    "as it is": lambda network: None,
    "a layer of zeros": lambda network: network.b.weight.zero_(),
    "three dead channels": _dead(3),
    "dead": _dead(6),
    "no variance": _no_variance,
    "a filter 1e20 times the next": _filters_apart,
    "filters alike": _alike,
    "huge, then tiny": _scaled(1e30, 1e-30),
    "tiny, then huge": _scaled(1e-30, 1e30),
    "subnormal": _scaled(1e-40, 1.0),
    "huge": _scaled(1e30, 1e30),
}
IMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "noise": lambda x: x,
    "one image": lambda x: x[:1],
    "two images": lambda x: x[:2],
    "one pixel": lambda x: x[:, :, :1, :1],
    "all the same": lambda x: x[:1].expand_as(x).clone(),
    "constant": torch.ones_like,
    "black": torch.zeros_like,
    "one white pixel": lambda x: torch.zeros_like(x).index_fill(3, torch.tensor([4]), 255.0),
    "huge": lambda x: x * 1e30,
    "tiny": lambda x: x * 1e-30,
    "subnormal": lambda x: x * 1e-42,
    "from -65504 to 65504": lambda x: torch.where(x > 0, 65504.0, -65504.0),
}


def network_of(edit: Callable[[Any], None], dtype: torch.dtype = torch.float32) -> nn.Module:
    network = seeded(Stack)
    with torch.no_grad():
        edit(network)
    return network.to(dtype)


def calibrated(network: nn.Module, x: Tensor) -> str | None:
    """Check that calibration gives finite values, and outputs no worse than the plain cut unless it says so."""
    plain = hc.convert(network, 2)
    conversion = hc.convert(network, 2, calibration=x.split(5))
    record = conversion.calibration
    if not all(t.isfinite().all() for t in conversion.model.state_dict().values() if t.is_floating_point()):
        return "a tensor is not finite"
    json.dumps(record.to_json(), allow_nan=False)
    if len(x) == 1 and not any("one input" in note for note in record.notes):
        return f"nothing is said of the one input: {record.notes}"
    before, after = (
        difference(network, model, x.to(next(network.parameters()).dtype)) for model in (plain.model, conversion.model)
    )
    if after == float("inf"):
        told = record.failed or record.incomparable
        return None if told else "the outputs are not finite, and nothing is said of it"
    # Calibration compares squares on held-back inputs; this test compares the largest difference on all inputs.
    rounding = 4 * torch.finfo(next(network.parameters()).dtype).eps
    return None if after <= 1.5 * before + rounding else f"{after:.2e}, the plain cut {before:.2e}: {record.notes}"


METHODS: tuple[type[Problem], ...] = (NormalEquations, Samples, Operator)


@pytest.mark.parametrize("method", METHODS)
def test_calibration_never_silently_makes_outputs_worse(
    tally: Counter, monkeypatch: pytest.MonkeyPatch, method: type[Problem]
) -> None:
    replace_everywhere(monkeypatch, solver, lambda *sizes: method)
    count = tally("numbers", "calibration: odd networks on odd images, by every solver")
    pairs = list(itertools.product(NETWORKS.items(), IMAGES.items()))
    x = random_input((14, 3, 8, 9))
    for (what, edit), (images, change) in size(pairs[METHODS.index(method) :: 19], pairs):
        count.trial(complaint(partial(calibrated, network_of(edit), change(x)), f"{what}, {images}"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_calibration_in_other_dtypes_never_silently_makes_outputs_worse(tally: Counter, dtype: torch.dtype) -> None:
    count = tally("numbers", "calibration: odd images in 16 and 64 bits")
    x = random_input((14, 3, 8, 9))
    for images, change in size(list(IMAGES.items())[::4], list(IMAGES.items())):
        most = min(torch.finfo(dtype).max, torch.finfo(x.dtype).max)
        values = change(x).clamp(-most, most).to(dtype)
        count.trial(complaint(partial(calibrated, network_of(NETWORKS["as it is"], dtype), values), images))


def budgeted(network: nn.Module, x: Tensor) -> str | None:
    """Check that the network is finite and within its budget, or that an error says what to do about the images."""
    search = partial(hc.convert, network, budget={"params": 0.6}, calibration=x.split(5), example_input=x[:1])
    before = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        shown = bool(network(x).isfinite().all())
    if len(x) == 1 or not shown:
        return refusal(search, "cannot be compared on these images", "leave the images out")
    conversion = search()
    if not conversion.cost.harmonic_parameters <= 0.6 * conversion.cost.parameters:
        return f"{conversion.cost.harmonic_parameters} of {conversion.cost.parameters} parameters"
    finite = all(t.isfinite().all() for t in conversion.model.state_dict().values() if t.is_floating_point())
    same = all(torch.equal(before[key], tensor) for key, tensor in network.state_dict().items())
    return None if finite and same else f"finite: {finite}, original as it was: {same}"


@pytest.mark.slow
def test_budgets_on_uninformative_images_give_a_finite_network_or_an_error(tally: Counter) -> None:
    count = tally("numbers", "budget search: odd networks on odd images")
    pairs = list(itertools.product(NETWORKS.items(), IMAGES.items()))
    x = random_input((14, 3, 8, 9))
    for (what, edit), (images, change) in size(pairs[::37], pairs):
        count.trial(complaint(partial(budgeted, network_of(edit), change(x)), f"{what}, {images}"))


def verified(network: nn.Module, x: Tensor) -> str | None:
    """Check that the whole basis gives the same network, or that the verdict says that no output can be compared."""
    converted = hc.convert(network).model
    for model in (converted, hc.fuse(converted)):
        check = hc.verify(network, model, x)
        found = difference(network, model, x)
        if found == float("inf"):
            if check.ok or check.problems:
                return f"not finite, yet {check.verdict}"
        elif not check.ok or found > BOUND[torch.float32]:
            return f"{found:.1e}: {check.verdict}"
    return None


def test_verify_on_uninformative_images_passes_or_reports_them(tally: Counter) -> None:
    count = tally("numbers", "verify, whole basis: odd networks on odd images")
    x = random_input((14, 3, 8, 9))
    pairs = list(itertools.product(NETWORKS.items(), IMAGES.items()))
    for (what, edit), (images, change) in size(pairs[::7], pairs):
        count.trial(complaint(partial(verified, network_of(edit), change(x)), f"{what}, {images}"))
