"""Networks with state from earlier forward passes: calibration equals undisturbed runs and restores the state."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import harmconvert as hc
from harmconvert.network import Snapshot

from .networks import random_input, seeded


def clips(count: int = 24) -> list[Tensor]:
    x = random_input((count, 2, 40))
    return [*(x + x.roll(1, 2)).split(4)]


class Streaming(nn.Conv1d):
    """A streaming convolution: it prepends the end of the previous chunk to the next one."""

    end: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        before = input.new_zeros(*input.shape[:2], 4) if self.end is None else self.end
        input = torch.cat([before, input], 2)
        self.end = input[..., -4:]
        return super().forward(input)


class Padded(nn.Conv1d):
    """The convolution of `Streaming` for a first chunk, without state."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(input, (4, 0)))


GLOBAL: dict[str, Any] = {}


class InGlobals(nn.Conv1d):
    """The convolution of `Streaming` with its state in a global variable, which is not restored."""

    def forward(self, input: Tensor) -> Tensor:
        before = GLOBAL.get(str(id(self)), input.new_zeros(*input.shape[:2], 4))
        input = torch.cat([before, input], 2)
        GLOBAL[str(id(self))] = input[..., -4:]
        return super().forward(input)


class Stream(nn.Module):
    """A network of streaming convolutions that resets their state after each clip."""

    def __init__(self, kind: type[nn.Conv1d] = Streaming) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = kind(2, 6, 5), kind(6, 6, 5), kind(6, 6, 5), kind(6, 2, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.d(self.c(self.b(self.a(x).relu()).relu()).relu())
        GLOBAL.clear()
        for layer in (self.a, self.b, self.c, self.d):
            layer.end = None
        return y


@pytest.fixture(autouse=True)
def globals_are_empty() -> Iterator[None]:
    GLOBAL.clear()
    yield
    GLOBAL.clear()


def calibrated(model: nn.Module, batches: list[Tensor] | None = None) -> hc.Conversion:
    return hc.convert(model, {"*": 2}, calibration=batches or clips())


def same(one: hc.Conversion, other: hc.Conversion) -> bool:
    state = other.model.state_dict()
    return all(torch.equal(value, state[key]) for key, value in one.model.state_dict().items())


@pytest.mark.parametrize("kind", [Streaming, InGlobals])
def test_streaming_convolutions_are_calibrated_like_the_same_network_without_state(kind: type[nn.Conv1d]) -> None:
    model, plain = seeded(lambda: Stream(kind)), seeded(lambda: Stream(Padded))
    found, expected = calibrated(model), calibrated(plain)
    assert [layer.decision for layer in found.calibration.layers] == ["refit"] * 4
    assert same(found, expected)
    assert all(getattr(layer, "end", None) is None for layer in found.model.modules())
    assert not GLOBAL


def test_the_refit_of_a_streaming_layer_is_the_least_squares_solution_of_an_ordinary_forward() -> None:
    model, batches = seeded(Stream).double(), [part.double() for part in clips()]
    settings = hc.CalibrationSettings(damping=0.0, batch_norm=False)
    found = hc.convert(model, {"c": 2}, calibration=batches, settings=settings)
    fed: list[Tensor] = []
    handle = model.c.register_forward_pre_hook(lambda conv, args: fed.append(args[0]))
    with torch.no_grad():
        model(torch.cat(batches)[[row for row in range(24) if row % 4 != 3]])
    handle.remove()
    windows = nn.functional.pad(fed[0], (4, 0)).unfold(2, 5, 1)  # (N, I, P, K)
    basis = np.stack([np.cos(np.pi * (np.arange(5) + 0.5) * u / 5) for u in range(2)])
    answers = torch.einsum("nipk,oik->npo", windows, model.c.weight.detach()).flatten(0, 1).numpy()
    design = np.einsum("nipk,fk->npif", windows.numpy(), basis).reshape(len(answers), -1)
    design = np.column_stack([design, np.ones(len(design))])
    solution, *_ = np.linalg.lstsq(design, answers, rcond=None)
    kernel = np.einsum("ifo,fk->oik", solution[:-1].reshape(6, 2, 6), basis)
    assert found.model.c.weight.detach().numpy() == pytest.approx(kernel, abs=1e-8)
    assert not np.allclose(kernel, hc.convert(model, {"c": 2}).model.c.weight.detach().numpy(), atol=1e-3)


class Counting(nn.Module):
    """A layer whose output depends on the number of its runs."""

    def __init__(self, where: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv1d(i, 4, 5) for i in (2, 4, 4))
        self.where = {"calls": 0} if where is None else None

    def forward(self, x: Tensor) -> Tensor:
        counts = GLOBAL if self.where is None else self.where
        counts["calls"] = counts.get("calls", 0) + 1
        return self.c(self.b(self.a(x).relu()) * counts["calls"])


def test_a_counter_of_runs_is_reset_before_each_run() -> None:
    class Once(Counting):
        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x).relu()))

    model = seeded(Counting)
    found = calibrated(model)
    assert same(found, calibrated(seeded(Once)))
    assert (model.where, found.model.where) == ({"calls": 0}, {"calls": 0})


def test_a_layer_whose_input_differs_between_runs_keeps_its_projection_and_the_record_says_so() -> None:
    model = seeded(lambda: Counting({}))
    found = calibrated(model)
    decisions = {layer.name: (layer.decision, layer.why) for layer in found.calibration.layers}
    assert decisions["a"] == decisions["b"] == ("refit", None)
    assert decisions["c"] == ("projection", "its input differs from run to run on the same example")


def test_calibration_restores_logs_caches_and_buffers_of_both_networks() -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv1d(i, 4, 5) for i in (2, 4, 4))
            self.cache: dict[Any, Tensor] = {}
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).relu()
            self.cache[tuple(x.shape)] = h
            self.seen.add_(1)
            return self.c(self.b(self.cache[tuple(x.shape)]).relu())

    model, log = seeded(Keeping), []
    model.b.register_forward_hook(lambda conv, args, output: log.append(output))
    before = Snapshot(model)
    found = calibrated(model)
    assert before.intact
    assert log == []
    assert found.model.cache == {}
    assert found.model.seen == 0
    assert [layer.decision for layer in found.calibration.layers] == ["refit"] * 3


def test_an_interrupted_run_ends_even_if_the_network_catches_the_exception() -> None:
    class Catching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv1d(i, 4, 5, padding=2) for i in (2, 4, 4))

        def forward(self, x: Tensor) -> Tensor:
            try:
                h = self.a(x)
            except:  # noqa: E722 - networks do this
                h = x.repeat(1, 2, 1)
            return self.c(self.b(h).relu())

    class Plain(Catching):
        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x)).relu())

    assert same(calibrated(seeded(Catching)), calibrated(seeded(Plain)))


def test_every_run_uses_the_same_random_numbers_and_the_callers_state_is_restored() -> None:
    import random

    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv1d(i, 4, 5) for i in (2, 4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x) * random.random()) + float(np.random.rand()))

    random.seed(3), np.random.seed(3)
    expected = (random.random(), np.random.rand())
    random.seed(3), np.random.seed(3)
    model = seeded(Drawing)
    first, second = calibrated(model), calibrated(copy.deepcopy(model))
    assert (random.random(), np.random.rand()) == expected
    assert same(first, second)
    assert [layer.decision for layer in first.calibration.layers] == ["refit"] * 3
