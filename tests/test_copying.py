"""Copies of networks that keep functions of their own: what a function reaches is the copy's, never the original's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import harmconvert as hc
from harmconvert.copying import deep_copy
from harmconvert.precision import rounded

from .networks import random_input

X = random_input((2, 3, 9, 9))


class Keeps(nn.Module):
    """Runs its layer through whatever function it is given to keep."""

    def __init__(self, make: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.run = make(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.stem(x)).mean((2, 3))


def nested(network: nn.Module) -> Any:
    inner = lambda x: network.conv(x)  # noqa: E731
    return {"run": [lambda x: inner(x)]}["run"][0]


FUNCTIONS = {
    "closure": lambda network: lambda x: network.conv(x),
    "closure over a layer": lambda network: (lambda conv: lambda x: conv(x))(network.conv),
    "closure over a parameter": lambda network: (lambda weight: lambda x: nn.functional.conv2d(x, weight, padding=1))(
        network.conv.weight
    ),
    "default": lambda network: lambda x, conv=network.conv: conv(x),
    "keyword default": lambda network: lambda x, *, conv=network.conv: conv(x),
    "partial": lambda network: partial(lambda conv, x: conv(x), network.conv),
    "bound method": lambda network: network.conv.forward,
    "nested": nested,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_copys_functions_work_on_the_copy(name: str) -> None:
    torch.manual_seed(0)
    network = Keeps(FUNCTIONS[name]).eval()
    copied = deep_copy(network)
    with torch.no_grad():
        expected = network(X)
        assert torch.equal(copied(X), expected)
        for parameter in copied.parameters():
            parameter.zero_()
        assert torch.equal(network(X), expected)
        assert not copied(X).any()
        assert rounded(network, torch.float16).half()(X.half()).dtype == torch.float16


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "closure over a parameter"])
def test_converted_layers_run_in_the_place_of_the_originals(name: str) -> None:
    torch.manual_seed(0)
    network = Keeps(FUNCTIONS[name]).eval()
    whole = hc.convert(network, example_input=X).model
    assert hc.verify(network, whole, X).ok
    cut = hc.convert(network, 1, example_input=X).model
    with torch.no_grad():
        by_hand = hc.fuse(cut).conv(cut.stem(X)).mean((2, 3))
        assert torch.allclose(cut(X), by_hand, atol=1e-6)
        assert torch.allclose(hc.fuse(cut)(X), by_hand, atol=1e-6)
    check = hc.verify(network, cut, X)
    assert (check.ok, check.as_planned) == (False, True)


def test_what_a_function_reaches_outside_of_the_network_stays_what_it_is() -> None:
    seen: list[int] = []
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    network[1].register_forward_hook(lambda module, args, output: seen.append(len(network)))
    copied = deep_copy(network)
    del network[1]
    copied(X)
    assert seen == [2]


def test_a_forward_from_outside_is_told() -> None:
    """It reaches the network by a name of its module, which no copy can change."""
    globals()["outside"] = network = Keeps(lambda network: None).eval()
    network.forward = lambda x: outside.conv(outside.stem(x))  # type: ignore[name-defined]  # noqa: F821
    check = hc.verify(network, hc.convert(network, 1, example_input=X).model, X)
    assert not check.ok
    assert not check.as_planned
    assert "conv: a copy of the network still runs the layer that it was copied from" in check.verdict


def test_a_layer_that_only_the_original_runs_is_told() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)).eval()
    converted = hc.convert(network, example_input=X).model
    idle = converted[1]
    kernel = hc.fuse(converted)[1]
    idle.__dict__["forward"] = idle.forward
    other = nn.Sequential(converted[0], idle)
    other.forward = lambda x: kernel(other[0](x))  # type: ignore[method-assign]
    check = hc.verify(network, other, X)
    assert not check.ok
    assert "1: it runs in the original alone" in check.verdict
