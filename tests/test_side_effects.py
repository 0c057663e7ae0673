"""Forward passes have no lasting effect: a snapshot of a network restores all state that they can change."""

from __future__ import annotations

import random
from array import array
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import harmconvert as hc
from harmconvert.network import Snapshot, unchanged

from .networks import Branches, random_input, seeded


class Slotted:
    __slots__ = ("__secret", "calls")

    def __init__(self) -> None:
        self.calls, self.__secret = 0, [0]

    def count(self) -> None:
        self.calls += 1
        self.__secret.append(1)


class Keeping(nn.Conv2d):
    """A convolution that changes its state in each forward pass with a given function."""

    shared: list[int] = []  # noqa: RUF012 - a class attribute that forwards change is what is tested
    total = 0

    def __init__(self, state: Any, change: Callable[[Any, Tensor], None]) -> None:
        super().__init__(3, 4, 3)
        self.state, self.change = state, change

    def forward(self, input: Tensor, kept: list[int] = []) -> Tensor:  # noqa: B006 - so is a default
        type(self).total += 1
        self.shared.append(len(input))
        kept.append(1)
        self.change(self.state, input)
        return super().forward(input)


def appended(state: list[Any], x: Tensor) -> None:
    state.append(x)


def overwritten(state: Tensor, x: Tensor) -> None:
    state.data.add_(1)  # this does not change the version counter of the tensor


def counted(state: dict[str, int], x: Tensor) -> None:
    state["calls"] = state.get("calls", 0) + 1


def inner(state: Any, x: Tensor) -> None:
    state.inner.calls += 1
    state.inner.log.append(x)


STATES: dict[str, tuple[Callable[[], Any], Callable[[Any, Any], Any]]] = {
    "list": (list, appended),
    "list in a tuple": (lambda: ([1], []), lambda state, x: state[1].append(x)),
    "dict": (dict, counted),
    "dict in a list": (lambda: [{"a": {"b": 1}}], lambda state, x: state[0]["a"].update(b=2, c=x)),
    "Counter": (Counter, counted),
    "defaultdict": (lambda: defaultdict(list), lambda state, x: state["x"].append(x)),
    "OrderedDict in its order": (lambda: OrderedDict(a=1, b=2), lambda state, x: state.move_to_end("a")),
    "UserDict": (UserDict, counted),
    "set": (lambda: {1}, lambda state, x: state.add(2)),
    "deque": (lambda: deque([1, 2], maxlen=2), appended),
    "bytearray": (lambda: bytearray(b"a"), lambda state, x: state.extend(b"b")),
    "array": (lambda: array("d", [1.5]), lambda state, x: state.append(2.5)),
    "tensor": (lambda: torch.zeros(3), overwritten),
    "tensor of another size": (lambda: torch.zeros(3), lambda state, x: state.resize_(5).fill_(1)),
    "tensor in a dict": (lambda: {"x": torch.tensor([0.0, float("nan")])}, lambda state, x: state["x"].add_(1)),
    "NumPy array": (lambda: np.zeros(3), lambda state, x: state.fill(1)),
    "object": (
        lambda: SimpleNamespace(inner=SimpleNamespace(calls=0, log=[])), inner
    ),
    "object with slots": (Slotted, lambda state, x: state.count()),
    "Python's generator": (lambda: random.Random(0), lambda state, x: state.random()),
    "torch's generator": (torch.Generator, lambda state, x: torch.rand(1, generator=state)),
    "NumPy's generator": (lambda: np.random.default_rng(0), lambda state, x: state.random()),
    "a module in a list": (lambda: [nn.BatchNorm1d(2).train()], lambda state, x: state[0](torch.ones(3, 2))),
}  # fmt: skip


def told(value: Any) -> Any:
    """Return the contents of a value in a form that can be compared."""
    if isinstance(value, Tensor | np.ndarray):
        return value.tolist()
    if isinstance(value, dict | UserDict):
        return [(key, told(item)) for key, item in value.items()]
    if isinstance(value, list | tuple | deque):
        return [told(item) for item in value]
    if isinstance(value, nn.Module):
        return told(value.state_dict())
    if isinstance(value, SimpleNamespace):
        return told(vars(value))
    if isinstance(value, Slotted):
        return (value.calls, told(value._Slotted__secret))  # type: ignore[attr-defined]
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, torch.Generator):
        return told(value.get_state())
    return str(value.bit_generator.state) if isinstance(value, np.random.Generator) else value


def seen_with(change: Callable[[Any, Any], Any], state: Any, conv: nn.Module, args: Any, output: Tensor) -> None:
    change(state, output)


class Seeing:
    def __init__(self, change: Callable[[Any, Any], Any], state: Any) -> None:
        self.change, self.state = change, state

    def see(self, conv: nn.Module, args: Any, output: Tensor) -> None:
        self.change(self.state, output)


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("held_by", ["attribute", "hook", "closure", "bound method", "partial"])
def test_state_is_restored_in_place_in_any_container(name: str, held_by: str) -> None:
    make, change = STATES[name]
    state, network = make(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    if held_by == "attribute":
        network = nn.Sequential(Keeping(state, change), nn.ReLU())
    elif held_by == "partial":
        network[0].register_forward_hook(partial(seen_with, change, state))
    elif held_by == "bound method":
        network[0].register_forward_hook(Seeing(change, state).see)
    else:
        network[0].register_forward_hook(lambda conv, args, output: seen_with(change, state, conv, args, output))
    before = told(make() if "generator" not in name else state)
    for _ in range(2):
        with unchanged(network):
            network(random_input((1, 3, 5, 5)))
            assert repr(told(state)) != repr(before)
        assert repr(told(state)) == repr(before)


def test_class_attributes_defaults_and_cells_are_restored() -> None:
    calls = 0

    def hook(conv: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal calls
        calls += 1

    network = Keeping(None, lambda state, x: None)
    network.register_forward_hook(hook)
    with unchanged(network):
        network(random_input((1, 3, 5, 5)))
        assert (calls, Keeping.total, Keeping.shared) == (1, 1, [1])
    assert (calls, Keeping.total, Keeping.shared) == (0, 0, [])
    assert Keeping.forward.__defaults__ == ([],)


def test_attributes_hooks_and_submodules_that_a_forward_pass_replaces_are_restored() -> None:
    class Once(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            handle.remove()
            self.extra = nn.Identity()
            self.padding = (1, 1)
            del self.mark
            return super().forward(input)

    network = Once(3, 4, 3)
    network.mark = "here"  # type: ignore[assignment]
    handle = network.register_forward_pre_hook(lambda *_: None)
    hooks, order = dict(network._forward_pre_hooks), sorted(vars(network))
    with unchanged(network):
        network(random_input((1, 3, 5, 5)))
    assert network._forward_pre_hooks == hooks
    assert sorted(vars(network)) == order
    assert [*network.children()] == []


def test_values_of_parameters_and_excluded_modules_are_not_restored() -> None:
    network = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    network.view = network[0].weight.detach()  # type: ignore[assignment]
    before = Snapshot(network, excluded=[network[1]])
    assert before.intact
    with torch.no_grad():
        network[0].weight.fill_(1)
        network[1].running_mean.fill_(2)  # type: ignore[union-attr,operator]
    before.restore()
    assert network[0].weight.eq(1).all()
    assert network[1].running_mean.eq(2).all()  # type: ignore[union-attr,operator]


def test_a_network_without_state_is_unchanged_after_a_forward_pass() -> None:
    network = seeded(Branches)
    before = Snapshot(network)
    network(random_input((1, 3, 20, 20)))
    assert before.intact
    network.norm.running_mean += 1
    assert not before.intact
    before.restore()
    assert before.intact


def test_tracing_a_network_restores_the_logs_of_its_hooks() -> None:
    network, log = seeded(Branches), ["before"]
    network.stem.register_forward_hook(lambda conv, args, output: log.append(output))
    hc.convert(network, 2, example_input=random_input((1, 3, 20, 20)))
    assert log == ["before"]


WRITES: dict[str, Callable[[nn.Parameter], Any]] = {
    "in place": lambda weight: weight.mul_(2),
    "through data": lambda weight: weight.data.add_(1),
    "a part of it": lambda weight: weight.data.__setitem__(0, 0.0),
    "as the output of a function": lambda weight: torch.round(weight, out=weight.data),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_weights_that_a_first_forward_pass_changes_are_restored(write: Any) -> None:
    class Lazily(nn.Sequential):
        done = False

        def forward(self, x: Tensor) -> Tensor:
            if not self.done:
                with torch.no_grad():
                    write(self[1].weight)
                self.done = True
            return super().forward(x)

    network: Any = seeded(lambda: Lazily(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3)))
    before = network[1].weight.detach().clone()
    x = random_input((32, 1, 9, 9))
    conversion = hc.convert(network, 2, example_input=x, calibration=[x])
    assert hc.verify(network, conversion.model, x).as_planned
    assert network[1].weight.detach().equal(before)
    assert not network.done
