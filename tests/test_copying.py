"""Copies of networks that hold functions: the copied functions use the copy, never the original."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from functools import partial, wraps
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import harmconvert as hc
from harmconvert.network import deep_copy
from harmconvert.storage import rounded

from .networks import random_input

X = random_input((2, 3, 9, 9))


class Keeps(nn.Module):
    """A network that runs its layer through a function that it holds."""

    def __init__(self, make: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
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
def test_functions_of_a_copy_use_the_copy(name: str) -> None:
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
def test_converted_layers_run_instead_of_the_originals(name: str) -> None:
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


def test_objects_outside_the_network_that_a_function_uses_are_not_copied() -> None:
    seen: list[int] = []
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    network[1].register_forward_hook(lambda module, args, output: seen.append(len(network)))
    copied = deep_copy(network)
    del network[1]
    copied(X)
    assert seen == [2]


def test_a_forward_from_outside_the_network_is_reported() -> None:
    """The function finds the network through a global name, which a copy cannot change."""
    globals()["outside"] = network = Keeps(lambda network: None).eval()
    network.forward = lambda x: outside.conv(outside.stem(x))  # type: ignore[name-defined]  # noqa: F821
    check = hc.verify(network, hc.convert(network, 1, example_input=X).model, X)
    assert not check.ok
    assert not check.as_planned
    assert "conv: a copy of the network still calls this layer of the network itself" in check.verdict


def test_a_layer_that_runs_only_in_the_original_is_noted() -> None:
    class EarlyExit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            return (self.last(y) if y.std() > 0.1 else y).mean((2, 3))

    torch.manual_seed(0)
    network = EarlyExit().eval()
    with torch.no_grad():
        network.stem.weight.sub_(network.stem.weight.mean((2, 3), keepdim=True))
    converted = hc.convert(network, {"stem": 1}, example_input=X).model
    check = hc.verify(network, converted, X)
    assert (check.ok, check.as_planned) == (False, True)
    assert check.notes == ("last runs only in the original on these inputs",)


def test_runs_of_another_thread_are_not_observed() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)).eval()
    converted = hc.convert(network, example_input=X).model
    over = threading.Event()

    def serve() -> None:
        with torch.no_grad():
            while not over.is_set():
                network(X)

    server = threading.Thread(target=serve)
    server.start()
    try:
        assert hc.verify(network, converted, X).ok
    finally:
        over.set()
        server.join()


def test_a_converted_layer_that_another_layer_replaces_at_run_time_is_reported() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)).eval()
    converted = hc.convert(network, {"1": 1}, example_input=X).model
    kernel, stem = network[1].weight.detach(), network[1].bias
    converted.forward = lambda x: nn.functional.conv2d(converted[0](x), kernel, stem)
    check = hc.verify(network, converted, X)
    assert not check.ok
    assert "1: it runs only in the original, but the outputs are equal" in check.verdict


# --- what is not the network's own stays what it is ---


def bare() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 4, 3, bias=False))


def test_functions_that_do_not_use_the_network_are_not_copied() -> None:
    network = bare()
    network.up = nn.functional.interpolate
    converted = hc.convert(network, 2).model
    assert converted.up is nn.functional.interpolate
    assert pickle.dumps(hc.fuse(converted))


def test_a_hook_still_writes_to_its_own_record() -> None:
    network, seen = bare(), {"last": None, "lock": threading.Lock()}

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        seen["last"] = output

    network[1].register_forward_hook(hook)
    converted = hc.convert(network, 2).model
    output = converted(X)
    assert seen["last"] is output


def test_a_record_outside_the_network_does_not_prevent_copying() -> None:
    network = bare()
    state = {"network": network, "lock": threading.Lock(), "last": network(X)}
    network[1].register_forward_hook(lambda module, args, output: state.update(last=output))
    network[1].register_forward_hook(lambda module, args, output: None if state["network"] else output)
    assert hc.verify(network, hc.convert(network, example_input=X).model, X).ok


def test_a_patched_method_uses_the_copy() -> None:
    network = bare()
    before = network[1].forward

    def doubled(self: nn.Module, x: Tensor) -> Tensor:
        return before(x) * 2

    network[1].forward = MethodType(doubled, network[1])
    cut = hc.convert(network, 1, example_input=X).model
    with torch.no_grad():
        cut[1].coefficients.zero_()
        assert not cut(X).any()
        assert network(X).any()


def test_deeply_nested_wrappers_are_copied_in_linear_time() -> None:
    network, shared = bare(), [str(number) for number in range(20_000)]

    def wrapped(inner: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        @wraps(inner)
        def outer(x: Tensor, names: list[str] = shared) -> Tensor:
            return inner(x)

        return outer

    run = network[1].forward
    for _ in range(200):
        run = wrapped(run)
        network[0].register_forward_hook(lambda *_, run=run: None)
    network.run = run
    network.again = lambda: (network.again, network)
    copied = deep_copy(network)
    assert copied.again() == (copied.again, copied)
    with torch.no_grad():
        copied[1].weight.zero_()
        assert not copied.run(X[:, :1].expand(-1, 4, -1, -1)).any()
    assert copied.run.__name__ == "forward"
    assert copied.run.__wrapped__ is not network.run.__wrapped__
    assert shared is copied.run.__defaults__[0]
