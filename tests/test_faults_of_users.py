"""A bug in a hook, or in a forward, is bad input and says where it is; an input that does not fit is a usage error."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import harmconvert as hc
from harmconvert.errors import InputError, UsageError, UserCodeError

from .test_cli import fails

X = torch.zeros(2, 3, 8, 8)
THIS = Path(__file__).name


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 5, 3)), nn.Flatten())


def broken(*_: Any) -> None:
    raise ValueError("a counter is missing")


class Broken:
    """A hook that is an object."""

    def __call__(self, *_: Any) -> None:
        raise ValueError("a counter is missing")

    def see(self, *_: Any) -> None:
        raise ValueError("a counter is missing")


@wraps(broken)
def wrapped(*arguments: Any) -> None:
    broken(*arguments)


HOOKS: list[tuple[str, Callable[..., Any]]] = [
    ("broken", broken),
    ("broken", wrapped),
    ("<lambda>", lambda *_: broken()),
    ("partial", partial(broken, None)),
    ("Broken", Broken()),
    ("Broken.see", Broken().see),
]


@pytest.mark.parametrize(("name", "hook"), HOOKS, ids=[str(number) for number in range(len(HOOKS))])
@pytest.mark.parametrize("before", [True, False])
def test_a_hook_that_fails_is_named_with_its_layer_and_its_place(
    name: str, hook: Callable[..., Any], before: bool
) -> None:
    model = network()
    layer = model[1][1]
    (layer.register_forward_pre_hook if before else layer.register_forward_hook)(hook)
    kind = "forward pre-hook" if before else "forward hook"
    with pytest.raises(UserCodeError) as caught:
        hc.convert(model, 2, example_input=X)
    message = str(caught.value)
    assert message.startswith(
        f"the {kind} {name} of layer 1.1 fails with ValueError: a counter is missing ({THIS}, line "
    )
    assert message.endswith("): repair the hook, or remove it")
    assert (caught.value.exit_code, isinstance(caught.value, UsageError)) == (3, False)


RUNS: list[Callable[[nn.Module], Any]] = [
    lambda model: hc.convert(model, 2, example_input=X),
    lambda model: hc.convert(model, {"*": 2}, calibration=[torch.randn(8, 3, 8, 8)] * 4),
    lambda model: hc.factor(hc.convert(model, {"*": 2}).model, example_input=X),
    lambda model: hc.fuse(hc.convert(model, {"*": 2}).model, X),
    lambda model: hc.verify(model, hc.convert(model, {"*": 2}).model, X),
    lambda model: hc.evaluate(model, [(X, torch.zeros(2))]),
    lambda model: hc.benchmark(model, X, batches=[2], repeats=3),
]


@pytest.mark.parametrize("run", RUNS, ids=[str(number) for number in range(len(RUNS))])
def test_every_run_of_a_network_says_whose_fault_it_is(run: Callable[[nn.Module], Any]) -> None:
    model = network()
    model.register_forward_hook(broken)
    with pytest.raises(UserCodeError, match="the forward hook broken of this Sequential fails with ValueError"):
        run(model)


def test_a_hook_of_all_modules_is_named() -> None:
    handle = nn.modules.module.register_module_forward_pre_hook(broken)
    try:
        with pytest.raises(UserCodeError, match="the global forward pre-hook broken of this Sequential fails"):
            hc.convert(network(), 2, example_input=X)
    finally:
        handle.remove()


def test_what_a_hook_calls_is_the_hooks_fault() -> None:
    """Here torch raises, in a function that the hook calls."""
    model = network()
    model[0].register_forward_hook(lambda conv, args, output: output @ torch.zeros(3, 99))
    with pytest.raises(UserCodeError, match=r"<lambda> of layer 0 fails with RuntimeError: .*shape"):
        hc.convert(model, 2, example_input=X)


def test_a_hook_of_torch_is_no_hook_of_the_users() -> None:
    model = network()
    prune.identity(model[0], "weight")
    del model[0]._buffers["weight_mask"]
    with pytest.raises(UsageError, match=r"does not run on an example input .* no attribute 'weight_mask'"):
        hc.convert(model, 2, example_input=X)


def test_an_input_that_does_not_fit_is_a_usage_error_also_where_there_are_hooks() -> None:
    model = network()
    for layer in model.modules():
        layer.register_forward_pre_hook(lambda *_: None)
        layer.register_forward_hook(lambda *_: None)
    for wrong in (torch.zeros(2, 5, 8, 8), torch.zeros(2), (X, X)):
        with pytest.raises(UsageError, match="the network does not run on an example input of shape"):
            hc.convert(model, 2, example_input=wrong)


class Careful(nn.Module):
    """A forward that refuses an input itself."""

    def __init__(self, error: type[Exception]) -> None:
        super().__init__()
        self.conv, self.error = nn.Conv2d(3, 4, 3), error

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != 1:
            raise self.error("one image at a time")
        return self.conv(x)


@pytest.mark.parametrize("error", [RuntimeError, ValueError, TypeError, IndexError, AssertionError, KeyError])
def test_a_forward_may_refuse_an_input(error: type[Exception]) -> None:
    with pytest.raises(UsageError, match=f"does not run on an example input of .*: {error.__name__}: .*one image"):
        hc.convert(Careful(error), 2, example_input=X)


class Misspelt(nn.Module):
    """A forward that no input makes run."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(xx)  # noqa: F821


def test_a_name_that_is_missing_is_no_fault_of_the_input() -> None:
    message = rf"the network's own code fails with NameError: name 'xx' is not defined \({THIS}, line \d+\): repair it"
    with pytest.raises(InputError, match=message):
        hc.convert(Misspelt(), 2, example_input=X)


def test_the_command_line_ends_with_the_code_of_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    Path("net.py").write_text(
        "from torch import nn\n"
        "def count(conv, args, output):\n"
        "    conv.count += 1\n"
        "def make():\n"
        "    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3))\n"
        "    network[0].register_forward_hook(count)\n"
        "    return network\n"
    )
    own = ["net.py:make", "--input-size", "3,8,8"]
    where = (
        "the forward hook count of layer 0 fails with AttributeError: 'Conv2d' object has no attribute 'count' (net.py"
    )
    for command in (["convert", *own], ["inspect", *own], ["benchmark", *own, "-b", "1"]):
        fails(3, f"{where}, line 3)", *command)
    fails(2, "the network does not run on an example input", "convert", "net.py:make", "--input-size", "1,8,8")
