"""Tracing a run: which layers read the input, which weights are not used, which other modules convolve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import DeformConv2d

import harmconvert as hc
from harmconvert.errors import InputError, UsageError
from harmconvert.network import find_layers, trace
from harmconvert.plan import plannable

from .networks import random_input, seeded

X = random_input((2, 3, 16, 16))


def why(model: nn.Module, lam: Any = 2, example_input: Any = X) -> dict[str, tuple[int, str | None]]:
    layers = hc.convert(model, lam, example_input=example_input).layers
    return {layer.name: (layer.kept, layer.why) for layer in layers}


INPUT = (9, "whole: it reads the network's input")


def test_the_input_of_a_module_may_be_a_view_of_a_parameter() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.drop = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Dropout()
            self.position = nn.Parameter(torch.ones(4, 14, 14))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x) + self.drop(self.position.expand(2, -1, -1, -1)))

    network = seeded(Positions)
    assert why(network) == {"first": INPUT, "last": (3, None)}
    assert trace(network, X).macs == 2 * 9 * (3 * 4 * 14 * 14 + 4 * 4 * 12 * 12)


# --- layers that read the input ---


class Readers(nn.Module):
    """Two layers read the input after ``prepare``; a third layer reads their outputs."""

    def __init__(self, prepare: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.prepare = prepare
        self.one, self.two, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.prepare(x)
        return self.last(torch.cat([self.one(x), self.two(x.flip(3))], 1).relu())


PREPARATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda x: x,
    "normalised": lambda x: (x - 0.5) / torch.tensor([0.2, 0.3, 0.4])[:, None, None],
    "padded": lambda x: functional.pad(x, (1, 1, 1, 1), mode="reflect"),
    "in place": lambda x: x.mul_(2).sub_(1),
    "resized": lambda x: functional.interpolate(x, scale_factor=0.5, mode="bilinear"),
    "colours mixed by a constant matrix": lambda x: torch.einsum("bchw,cd->bdhw", x, torch.eye(3) / 2),
    "copied into a batch": lambda x: torch.zeros_like(x).copy_(x),
}


@pytest.mark.parametrize("prepare", PREPARATIONS.values(), ids=PREPARATIONS)
def test_all_layers_that_read_the_input_or_a_fixed_transform_of_it_stay_whole(prepare: Any) -> None:
    assert why(seeded(lambda: Readers(prepare))) == {"one": INPUT, "two": INPUT, "last": (3, None)}


def test_a_trained_normalisation_of_the_input_still_counts_as_the_input() -> None:
    network = seeded(
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    )
    assert why(network) == {"1": INPUT, "3": (3, None)}


def test_each_of_several_inputs_has_its_input_layer() -> None:
    class Streams(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.colour, self.flow, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(2, 4, 3), nn.Conv2d(8, 4, 3)

        def forward(self, colour: Tensor, flow: Tensor) -> Tensor:
            return self.last(torch.cat([self.colour(colour), self.flow(flow / 20)], 1))

    found = why(seeded(Streams), example_input=(X, X[:, :2]))
    assert found == {"colour": INPUT, "flow": INPUT, "last": (3, None)}


def test_a_layer_that_reads_the_input_together_with_features_is_not_an_input_layer() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x + self.first(x))

    assert why(seeded(Skip)) == {"first": INPUT, "last": (3, None)}


class Transform(nn.Module):
    """A fixed transform (without bias, not trained), followed by trained layers."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.filter = nn.Conv2d(3, 3, 3, padding=1, bias=False).requires_grad_(False)
        self.first, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 3)
        self.where = where

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "input":
            return self.last(self.first(self.filter(x).abs().log1p()))
        return self.last(self.filter(self.first(x)))


def test_a_fixed_transform_of_the_input_and_the_layer_after_it_stay_whole() -> None:
    assert why(seeded(lambda: Transform("input"))) == {"filter": INPUT, "first": INPUT, "last": (3, None)}


def test_a_fixed_transform_inside_the_network_stays_whole_unless_it_is_named() -> None:
    network = seeded(lambda: Transform("inside"))
    fixed = (9, "whole: a fixed transform, which is not trained")
    assert why(network) == {"filter": fixed, "first": INPUT, "last": (3, None)}
    named = hc.convert(network, 2, include=["filter"], example_input=X).layers
    assert {layer.name: layer.kept for layer in named}["filter"] == 3


def test_a_backbone_that_is_frozen_with_its_norms_is_truncated_as_usual() -> None:
    network = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)))
    network.append(nn.Conv2d(4, 2, 3))  # type: ignore[operator]
    network[1:3].requires_grad_(False)  # type: ignore[index]
    assert why(network)["1"] == (3, None)
    assert why(network.requires_grad_(False))["1"] == (3, None)  # the whole network is frozen, for inference


def test_calibration_inputs_show_which_layer_reads_the_input() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.stem = nn.Conv2d(8, 4, 3), nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.stem(x).relu())

    batches = (batch for batch in [X, X + 1])  # a generator can be read only once
    conversion = hc.convert(seeded(Backwards), 2, calibration=batches)
    assert {layer.name: layer.kept for layer in conversion.layers} == {"head": 3, "stem": 9}
    assert conversion.calibration is not None
    assert conversion.calibration.inputs == 4


# --- layers whose weight is not what they compute with ---


class Merging(nn.Module):
    """A network that writes the merged kernel of two layers into a third in each forward pass in eval mode."""

    def __init__(self, write: Callable[[nn.Module, Tensor], None]) -> None:
        super().__init__()
        self.point, self.wide = nn.Conv2d(3, 6, 1, bias=False), nn.Conv2d(6, 3, 3, padding=1, bias=False)
        self.merged, self.last = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.Conv2d(3, 4, 3)
        self.merged.weight.requires_grad_(False)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.last(self.wide(self.point(x)))
        kernel = torch.einsum("omhw,mi->oihw", self.wide.weight, self.point.weight[:, :, 0, 0])
        self.write(self.merged, kernel)
        return self.last(self.merged(x))


def _by_load(conv: nn.Module, kernel: Tensor) -> None:
    conv.load_state_dict({"weight": kernel})


def _by_parameter(conv: Any, kernel: Tensor) -> None:
    conv.weight = nn.Parameter(kernel, requires_grad=False)


def _by_data(conv: Any, kernel: Tensor) -> None:
    conv.weight.data = kernel


def _in_place(conv: Any, kernel: Tensor) -> None:
    conv.weight.data.copy_(kernel)


def _by_slice(conv: Any, kernel: Tensor) -> None:
    conv.weight.data[:] = kernel


@pytest.mark.parametrize("write", [_by_load, _by_parameter, _by_data, _in_place, _by_slice])
def test_a_layer_whose_weight_the_forward_pass_rewrites_is_skipped(write: Any) -> None:
    network: Any = seeded(lambda: Merging(write))
    weight, kept = network.merged.weight, network.merged.weight.clone()
    cut = hc.convert(network, {"wide": 2}, example_input=X)
    reasons = {layer.name: layer.why for layer in cut.layers}
    assert "its weight is rewritten in the network's forward" in (reasons["merged"] or "")
    assert network.merged.weight is weight
    if write in (_by_parameter, _by_data):  # a weight that is changed in place keeps the value of the last run
        assert torch.equal(weight, kept)
    assert hc.verify(network, cut.model, X).as_planned
    with torch.no_grad():
        assert torch.allclose(hc.fuse(cut.model)(X), cut.model(X), atol=1e-5)
        assert not torch.allclose(network(X), cut.model(X), atol=1e-3)


def test_without_an_example_input_verify_detects_a_rewritten_weight() -> None:
    network = seeded(lambda: Merging(_by_data))
    check = hc.verify(network, hc.convert(network, "full").model, X)
    assert not check.ok
    assert "merged: the network rewrites its weight in each forward" in check.verdict


def test_a_weight_that_is_a_buffer_is_a_fixed_filter() -> None:
    network: Any = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)))
    kernel = network[1].weight.detach()
    del network[1].weight
    network[1].register_buffer("weight", kernel)
    assert why(network)["1"] == (0, "its weight is a buffer: a fixed filter, which is not trained")


class Renormalising(nn.Conv2d):
    """A convolution that limits the norm of its kernels in each forward pass, as in EEGNet."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=1)
        return super().forward(x)


def test_a_layer_that_rewrites_its_own_weight_is_skipped() -> None:
    found = why(seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), Renormalising(4, 4, 3), nn.Conv2d(4, 4, 3))))
    assert [kept for kept, _ in found.values()] == [9, 0, 3]


class Cached(nn.Conv2d):
    """A convolution that prepares its kernel once, in the first forward pass or when it enters eval mode."""

    kernel: Tensor | None = None

    def train(self, mode: bool = True) -> Any:
        self.kernel = None if mode else self.kernel
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel is None:
            self.kernel = (self.weight * 0.5).detach()
        return functional.conv2d(x, self.kernel, self.bias)


class CachedMatrix(Cached):
    """The convolution of `Cached`, computed as a product of matrices."""

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel is None:
            self.kernel = self.weight.detach().flatten(1).clone()
        patches = functional.unfold(x, 3)
        return (self.kernel @ patches).unflatten(2, (x.shape[2] - 2, -1))


@pytest.mark.parametrize("kind", [Cached, CachedMatrix])
def test_a_layer_that_has_cached_a_copy_of_its_weight_is_skipped(kind: Any) -> None:
    network = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), kind(4, 4, 3), nn.Conv2d(4, 4, 3)))
    assert [kept for kept, _ in why(network).values()] == [9, 3, 3]  # the copy is made again, from the cut kernel
    with torch.no_grad():
        network(X)
    found = why(network)
    assert [kept for kept, _ in found.values()] == [9, 0, 3]
    assert "a copy of its weight that was made before the run" in (found["1"][1] or "")
    with pytest.raises(InputError, match=r"no convolution over 1x1 to convert .*a copy of its weight"):
        hc.convert(network[1], example_input=X[:, [0, 1, 2, 0]])  # type: ignore[index]


def test_layers_that_use_their_weight_in_unusual_ways_are_converted() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return functional.conv2d(x, weight / weight.std(), self.bias)

    class Sign(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: Tensor) -> Tensor:
            return weight.sign()

    class Binary(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return functional.conv2d(x, Sign.apply(self.weight), self.bias)

    network = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), Standardised(4, 4, 3), Binary(4, 4, 3)))
    assert [kept for kept, _ in why(network).values()] == [9, 3, 3]


# --- other convolutions ---


class Functional(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(o, i, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight / 9, padding=1)


class Kernels(nn.Module):
    """A module with a kernel under another name, and a fixed kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = nn.Parameter(torch.randn(8, 8, 5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.kernels, padding=2)


class Blur(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("taps", torch.ones(8, 1, 3, 3) / 9)

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.get_buffer("taps"), padding=1, groups=8)


class Offset(DeformConv2d):
    def __init__(self) -> None:
        super().__init__(8, 8, 3, padding=1)
        self.offset = nn.Conv2d(8, 18, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, self.offset(x))


class Own(nn.modules.conv._ConvNd):
    def __init__(self) -> None:
        super().__init__(8, 8, (3, 3), (1, 1), (1, 1), (1, 1), False, (0, 0), 1, True, "zeros")

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight, self.bias, 1, 1)


OTHERS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "a function": (lambda: Functional(8, 8), "calls a convolution as a function", (3, 3)),
    "kernels of another name": (Kernels, "calls a convolution as a function", (5, 5)),
    "a fixed filter": (Blur, "its filter is fixed, not learned", (3, 3)),
    "a deformable class": (Offset, "reads at positions", (3, 3)),
    "a class beside torch's": (Own, "Own is not one of torch's convolution classes", (3, 3)),
    "TorchScript": (lambda: torch.jit.script(nn.Conv2d(8, 8, 3, padding=1)), "it is TorchScript", (3, 3)),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning", "ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.parametrize(("make", "reason", "size"), OTHERS.values(), ids=OTHERS)
def test_convolutions_that_are_not_converted_are_listed_with_the_reason(make: Any, reason: str, size: Any) -> None:
    network = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), make(), nn.Conv2d(8, 8, 3)))
    conversion = hc.convert(network, 2, example_input=X)
    layers = {layer.name: layer for layer in conversion.layers}
    assert reason in (layers["1"].why or "")
    assert layers["1"].kernel == size
    assert (layers["0"].kept, layers["2"].kept) == (9, 3)
    learned = sum(p.numel() for p in network.parameters() if p.dim() == 4)
    assert conversion.cost.over_1x1_parameters == learned
    assert any(skip.name == "1" for skip in hc.inspect(network, X).skipped)


def test_without_a_run_other_convolutions_are_detected_by_their_weight() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), Functional(8, 8), nn.LayerNorm((8, 4, 4)), nn.Bilinear(2, 3, 4))
    assert {site.name: site.skip for site in plannable(find_layers(network)) if site.skip} == {
        "1": "Functional is not one of torch's convolution classes"
    }


def test_a_first_layer_that_is_a_function_reads_the_input_and_the_second_does_not() -> None:
    found = why(seeded(lambda: nn.Sequential(Functional(3, 8), nn.Conv2d(8, 8, 3))))
    assert found["1"] == (3, None)


# --- outputs and inputs of any kind ---


class Masked(nn.Conv2d):
    """A convolution that returns its map and a mask of valid positions."""

    def forward(self, picture: Tensor, mask: Any = None) -> Any:  # type: ignore[override]
        mask = torch.ones_like(picture[:, :1]) if mask is None else mask
        return super().forward(picture * mask), functional.max_pool2d(mask, 3, 1, 1)


def test_layers_with_several_outputs_and_keywords_of_any_name_are_traced() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Masked(3, 8, 3, padding=1), Masked(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x, mask = self.first(picture=x)
            return self.second(mask=mask, picture=x)[0]

    network = seeded(Net)
    run = trace(network, X)
    assert [(name, layer.output_size) for name, layer in run.layers.items()] == [
        ("first", (16, 16)),
        ("second", (16, 16)),
    ]
    check = hc.verify(network, hc.convert(network, "full").model, X)
    assert check.ok, check.verdict
    assert all(layer.output_error is not None for layer in check.layers)


def test_errors_of_the_network_and_errors_of_the_tracing_are_distinguished(monkeypatch: pytest.MonkeyPatch) -> None:
    from harmconvert.network import Dataflow

    def broken(*_: Any) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(Dataflow, "_follow", broken)
    with pytest.raises(hc.HarmconvertError, match="harmconvert failed while it watched a run: KeyError") as caught:
        trace(nn.Conv2d(3, 4, 3), X)
    assert not isinstance(caught.value, UsageError)
