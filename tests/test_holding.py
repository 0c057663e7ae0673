"""Forward passes that are held at a layer: they equal new runs, with less work, and leave no state behind."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import harmconvert as hc
from harmconvert.calibration import CalibrationSettings, Forwards, calibration_set, holding
from harmconvert.network import convolutions, tensors_in

from .networks import Branches, random_input, seeded

SIZE = (3, 20, 20)


class Chain(nn.Module):
    """Four convolutions with in-place activations, and a residual connection around two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.last = (
            nn.Conv2d(inside, 8, 3, padding=1) for inside in (3, 8, 8, 8)
        )  # fmt: skip
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu_()
        x = x + self.third(self.second(x).relu_())
        return self.last(x).mean((2, 3))


class Drawing(Chain):
    """A network that uses random numbers between its layers."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) + torch.randn(8, 1, 1)
        x = self.second(x) + torch.randn(8, 1, 1)
        return self.last(self.third(x) * torch.rand(1)).mean((2, 3))


class Remembering(Chain):
    """A network that stores an intermediate result in an attribute, which two interleaved runs would mix up."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.first(x)
        x = self.third(self.second(self.kept))
        return self.last(x + self.kept).mean((2, 3))


class Minding(Chain):
    """A network that depends on the thread in which it runs."""

    def forward(self, x: Tensor) -> Tensor:
        assert threading.current_thread() is threading.main_thread()
        return super().forward(x)


LOCK = threading.Lock()


class Pooling(Chain):
    """A network that runs two layers in parallel, in threads of its own."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        with ThreadPoolExecutor(2) as pool:
            left, right = pool.map(lambda layer: layer(x), (self.second, self.third))
        return self.last(left + right).mean((2, 3))


class Setting(Chain):
    """A network that changes a setting of the whole process while its layers run."""

    def forward(self, x: Tensor) -> Tensor:
        before = torch.backends.mkldnn.enabled
        torch.backends.mkldnn.enabled = False
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return super().forward(x)
        finally:
            torch.backends.mkldnn.enabled = before


class Counting(Chain):
    """A network that stores the number of images in an attribute."""

    def forward(self, x: Tensor) -> Tensor:
        self.images = len(x)
        x = self.third(self.second(self.first(x)))
        return self.last(x * self.images).mean((2, 3))


class Silent(Remembering):
    """A network without an output that can be compared."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:0]


class Locked(Chain):
    """A network with a lock: a forward pass waits until the other one ends."""

    def forward(self, x: Tensor) -> Tensor:
        with LOCK:
            return super().forward(x)


class Nested(Chain):
    """A network whose layers run inside context managers."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = self.second(self.first(x))
            with torch.autocast("cpu", enabled=False):
                x = self.third(x.float())
        return self.last(x).mean((2, 3))


class Turning(Chain):
    """A network that skips layers for every second image."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.mean() > 0:
            x = self.second(x)
        return self.last(self.third(x)).mean((2, 3))


def images(count: int = 12) -> Tensor:
    x = random_input((count, *SIZE))
    return x + x.roll(1, 3) + 0.5 * x.roll(1, 2)


def calibrated(model: nn.Module, batches: Any = None, **settings: Any) -> hc.Conversion:
    return hc.convert(
        model, {"*": 2}, example_input=images(1), calibration=batches or images().split(4),
        settings=CalibrationSettings(**settings),
    )  # fmt: skip


def same(held: hc.Conversion, anew: hc.Conversion) -> bool:
    states = [conversion.model.state_dict() for conversion in (held, anew)]
    reports = [
        [{key: value for key, value in vars(layer).items() if key != "seconds"} for layer in c.calibration.layers]
        for c in (held, anew)
        if c.calibration
    ]
    return reports[0] == reports[1] and all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def counted(run: Callable[[], Any]) -> tuple[Any, Counter[int]]:
    """Return the result of ``run``, and for each batch size the number of runs of a first layer."""
    calls: Counter[int] = Counter()
    forward = nn.Conv2d.forward

    def counting(self: nn.Conv2d, x: Tensor) -> Tensor:
        calls[len(x)] += self.in_channels == 3
        return forward(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Conv2d, "forward", counting)
        return run(), calls


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


HELD = (Chain, Drawing, Nested, Turning)
ANEW = (Remembering, Minding, Locked, Pooling, Setting, Counting, Silent)


@pytest.mark.parametrize(
    ("make", "room"), [(Chain, 120_000), *((make, 1 << 30) for make in (*HELD, *ANEW, Branches))]
)  # fmt: skip
def test_held_runs_equal_new_runs(make: Callable[[], nn.Module], room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, settings = seeded(make), holding._settings()
    monkeypatch.setattr(holding, "_PATIENCE", 0.5)
    monkeypatch.setattr(holding, "_MOMENT", 0.1)
    monkeypatch.setattr(holding, "MOST_BYTES", room)
    held, few = counted(lambda: calibrated(model))
    assert holding._settings() == settings
    with monkeypatch.context() as patch:
        patch.setattr(Forwards, "_try_out", lambda self: {})
        whole, many = counted(lambda: calibrated(model))
    assert same(held, whole)
    fit = 3  # images of a batch that are used for the fit
    fallbacks = held.calibration.fallbacks
    if make in ANEW:
        assert few[fit] == many[fit]
        assert [text.split(":")[0] for text in fallbacks] == ["no run is held at the layer that is refitted"]
    elif room < 1 << 30:
        assert [text.split(": ")[1] for text in fallbacks] == ["memory or threads were short"]
    elif room == 1 << 30 and make is not Branches:
        # Three layers and three batches, and one more run of the first layer.
        assert few[fit] <= many[fit] - 5, (few, many)


@pytest.mark.parametrize("batches", ["equal", "of several sizes", "dicts", "single images", "two images"])
def test_held_runs_equal_new_runs_for_any_batches(batches: str) -> None:
    x = images()
    given: dict[str, Any] = {
        "equal": [x[:1].expand(4, *SIZE)] * 3,
        "of several sizes": [x[:4], nn.functional.interpolate(x[4:8], (24, 16)), x[8:]],
        "dicts": [{"x": part} for part in x.split(4)],
        "single images": x.split(1),
        "two images": [x[:2]],
    }
    model = seeded(Remembering if batches in ("equal", "of several sizes") else Chain)
    held = calibrated(model, given[batches])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Forwards, "_try_out", lambda self: {})
        assert same(held, calibrated(model, given[batches]))


def test_a_held_run_continues_with_the_current_coefficients() -> None:
    """The reference is a new run: its maps must equal those of the held run bit for bit after any change."""
    model, data = seeded(Chain), calibration_set(images().split(4))
    converted = calibrated(model).model
    layers = convolutions(converted)

    def fed(watch: Any) -> Tensor:
        seen: list[Tensor] = []
        watch(lambda name, call: seen.append(call.input.clone()))
        return seen[0]

    with Forwards(converted, layers, 1 << 30, data.fit, data.probes) as forwards, torch.no_grad():
        for name in ("first", "second", "third", "last"):
            if name == "last":  # a layer before the held ones changes, so the held runs must begin again
                layers["first"].coefficients.mul_(0.5)  # type: ignore[union-attr,operator]
            for batch in data.fit:
                held = fed(lambda see, name=name, batch=batch: forwards.watch([name], batch, see, 1))
                anew = fed(
                    lambda see, name=name, batch=batch: holding.watch_convolutions(
                        converted, {name: layers[name]}, batch.input, see, 1
                    )
                )
                assert torch.equal(held, anew)
            layers[name].coefficients.mul_(1.5)  # type: ignore[union-attr,operator]
            layers[name].bias.add_(0.25)  # type: ignore[union-attr,operator]


def test_the_memory_of_held_tensors_is_counted() -> None:
    """At the second layer of Chain these are the image, the layer's input (which is added later), and its output."""
    data, converted = calibration_set(images().split(4)), calibrated(seeded(Chain)).model
    with Forwards(converted, convolutions(converted), 1 << 30, data.fit, data.probes) as forwards:
        assert forwards._bytes["second"] == 4 * 20 * 20 * (3 + 8 + 8)
        assert forwards._bytes["first"] == 4 * 20 * 20 * (3 + 8)


@pytest.mark.parametrize("memory", [0, 50_000, 100_000, 200_000, 1 << 30])
def test_held_tensors_stay_within_the_memory_limit(memory: int) -> None:
    data, converted = calibration_set(images(40).split(4)), calibrated(seeded(Chain)).model
    most, before = 0, threading.active_count()
    with Forwards(converted, convolutions(converted), memory, data.fit, data.probes) as forwards:
        for name in ("first", "second", "third"):
            for batch in data.fit:
                forwards.watch([name], batch, lambda *call: None, 1)
                held = forwards._held.values()
                assert forwards._room() >= 0
                assert sum(forwards._bytes[run.at] * len(run.batch) for run in held) <= memory
                assert threading.active_count() <= before + 1 + len(held)
                most = max(most, len(held))
    assert most == min(10, memory // (3 * forwards._bytes["first"]))


def test_random_states_and_flags_of_the_caller_are_not_changed() -> None:
    model, drawn = seeded(Drawing).train(), []
    torch.manual_seed(5)
    hc.convert(model, {"*": 2}, calibration=images().split(4), progress=lambda *_: drawn.append(torch.rand(1)))
    assert model.training
    assert model.norm.training
    torch.manual_seed(5)
    assert drawn == [torch.rand(1) for _ in drawn]


def test_under_autocast_runs_stay_in_the_thread_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast applies only to one thread, so a held run would not use it."""
    found = []
    for tried in (Forwards._try_out, lambda self: {}):
        monkeypatch.setattr(Forwards, "_try_out", tried)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(calibrated(seeded(Chain)))
    assert same(*found)


def test_if_no_thread_can_be_started_runs_begin_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system allows no more threads: first two for the trial, then four."""
    model, start, left = seeded(Chain), threading.Thread.start, [6]

    def limited(self: threading.Thread) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("can't start new thread")
        start(self)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", limited)
        few = calibrated(model)
    assert left[0] < 0
    assert same(few, calibrated(model))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_ends_the_threads(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    go_on = holding._Run.go_on

    def failing(self: Any, *given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 16:
            raise error("here")
        go_on(self, *given)

    monkeypatch.setattr(holding._Run, "go_on", failing)
    if error is KeyboardInterrupt:
        with pytest.raises(error, match="here"):
            calibrated(seeded(Chain))
    else:
        conversion = calibrated(seeded(Chain))
        assert conversion.calibration
        assert [layer.decision for layer in conversion.calibration.layers].count("failed") == 1


@pytest.mark.parametrize(
    ("room", "method", "call"),
    [
        (threading.Thread, "start", 2), (threading.Thread, "start", 5), (holding._Run, "go_on", 3),
        (holding._Run, "end", 2), (holding._Run, "end", 5), (holding._Run, "end", 7), (holding._Run, "__init__", 6),
    ],
)  # fmt: skip
@pytest.mark.parametrize("after", [False, True])
def test_an_interrupt_ends_the_threads(
    room: type, method: str, call: int, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interrupt comes before or after one of the calls that begin, continue and end runs."""
    calls, plain = 0, getattr(room, method)

    def interrupted(self: Any, *given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            raise KeyboardInterrupt
        plain(self, *given)
        if calls == call:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(room, method, interrupted)
        with pytest.raises(KeyboardInterrupt):
            calibrated(seeded(Chain))
    for thread in threading.enumerate():
        if thread.name == "harmconvert forward":
            thread.join(10)  # no other code waits for this thread


def test_the_error_of_a_network_that_fails_midway_is_recorded() -> None:
    class Failing(Chain):
        def forward(self, x: Tensor) -> Tensor:
            x = self.second(self.first(x))
            if len(x) == 3:
                raise RuntimeError("three are too many")
            return self.last(self.third(x)).mean((2, 3))

    conversion = calibrated(seeded(Failing))
    assert conversion.calibration
    assert all(layer.decision == "failed" for layer in conversion.calibration.layers)
    assert all("three are too many" in (layer.why or "") for layer in conversion.calibration.layers)


def test_tensors_in_keeps_no_reference_to_tensors() -> None:
    """Maps that wait for the garbage collector would use memory that is not counted."""
    tensor = torch.ones(3)
    alive = weakref.ref(tensor)
    gc.disable()
    try:
        assert tensors_in({"a": [tensor, (tensor,)]}) == [tensor, tensor]
        del tensor
        assert alive() is None
    finally:
        gc.enable()


def test_tensors_are_listed_in_order_and_cycles_end() -> None:
    a, b, c = torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)
    nest: dict[str, Any] = {"first": [a, {"x": b}], "then": (c,)}
    nest["itself"] = nest
    assert [t.item() for t in tensors_in(nest)] == [0.0, 1.0, 2.0]
