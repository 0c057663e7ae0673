"""Hold forwards of a network at a layer while it is refitted, and go on from there.

What the next layer is fed depends on all refits before it, so that each needs another run up to it: with as many layers
the work grows with the square of the depth. A run that is held at the layer goes on once that has its coefficients.
Each has a thread of its own, of which one runs at a time, because a thread can be held in the midst of any Python code
and keeps alive just what that code still needs. Where memory, or the network, does not allow it, runs begin anew.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..surgery import evaluating, tensors_in
from .capture import ConvCall, Reached, Recorder, See, forward, watch_convolutions
from .inputs import Batch

MOST_BYTES = 1 << 30
# Each thread that computes has as many helpers as torch has threads.
MOST_THREADS = 512
# Of outputs of runs in turns, beside those of whole runs: a GPU may add in another order from one run to the next.
_ALIKE = 1e-3
_PATIENCE = 10.0  # seconds, beside twenty times what whole runs take, before one is thought to wait for another


class Forwards:
    """Forwards of ``model`` up to one of ``layers`` after the other, in the order in which they run.

    A context: threads end with it. ``memory``: bytes that may be held, beside `MOST_BYTES`; ``examples``: two batches
    of one example, different ones, on which is tried whether this network can be run like this.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Module], memory: int, examples: Sequence[Batch]
    ) -> None:
        self._model, self._layers, self._examples = model, dict(layers), examples
        self._memory = min(memory, MOST_BYTES)
        self._most = MOST_THREADS // torch.get_num_threads()
        self._bytes: dict[str, int] = {}  # held of one example at a layer; empty: nothing is
        self._held: dict[int, _Held] = {}
        self._running: _Held | None = None

    def __enter__(self) -> Forwards:
        with ExitStack() as leaving:
            leaving.enter_context(evaluating(self._model))  # once: what one run puts back would change another's
            for name, layer in self._layers.items():
                before = layer.register_forward_pre_hook(self._begins, prepend=True, with_kwargs=True)
                leaving.callback(before.remove)
                leaving.callback(layer.register_forward_hook(partial(self._ended, name)).remove)
            leaving.callback(self._end)
            if len(self._layers) > 2 and len(self._examples) > 1:
                self._bytes = self._tried()
            self._leaving = leaving.pop_all()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._leaving.__exit__(*raised)

    def watch(self, names: Sequence[str], batch: Batch, see: See, calls: int) -> None:
        """Show the ``calls`` calls of the layers ``names`` in a forward of ``batch`` to ``see``, as
        `watch_convolutions` does; raises what that does."""
        once = len(names) == 1 and calls == 1 and self._bytes.get(names[0])
        held = self._before(names[0], batch) if once else None
        if held is None:
            watch_convolutions(self._model, {name: self._layers[name] for name in names}, batch.input, see, calls)
            return
        (name,) = names
        try:
            if self._go_on(held, {name}):
                see(name, held.shown)
        except BaseException:
            _end([held])
            raise
        held.shown = None  # lets go of maps
        held.bytes = self._bytes[name] * len(batch)
        room = self._memory - sum(other.bytes for other in self._held.values())
        if held.done or held.bytes > room or len(self._held) >= self._most:
            _end([held])
        else:
            self._held[id(batch)] = held

    def _go_on(self, held: _Held, until: set[str], patience: float | None = None) -> bool:
        """Whether it came to one of the layers."""
        self._running = held
        held.go_on(until, patience)
        self._running = None
        if held.failure is not None:
            raise held.failure
        return not held.done

    def _before(self, name: str, batch: Batch) -> _Held | None:
        """A run of ``batch`` that has not come to the layer yet; none where no thread can be started."""
        held = self._held.pop(id(batch), None)
        if held is not None and held.at != name and name not in held.passed and held.valid:
            return held
        if held is not None:
            _end([held])
        try:
            return _Held(self._model, batch, Recorder())
        except RuntimeError:  # the system's limit
            return None

    def _begins(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        if self._running is not None:
            self._running.begins(args, kwargs)

    def _ended(self, name: str, layer: nn.Module, args: Any, output: Any) -> Any:
        return self._running.ended(name, layer, output) if self._running is not None else None

    def _end(self) -> None:
        _end([*self._held.values(), *([self._running] if self._running else [])])
        self._held.clear()

    def _tried(self) -> dict[str, int]:
        """Bytes that a run of one example held at each layer keeps alive; none where two runs in turns do not come to
        what they come to one after the other: the network keeps something of one run beyond its frames, looks at the
        thread that it runs in, or has one wait for the other."""
        runs: list[_Held] = []
        bytes: dict[str, int] = {}
        try:
            start = time.perf_counter()
            plain = [_outputs(forward(self._model, batch.input)) for batch in self._examples]
            patience = _PATIENCE + 20 * (time.perf_counter() - start)
            for batch, recorder in zip(self._examples, (_Alive(), Recorder()), strict=True):
                runs.append(_Held(self._model, batch, recorder))
                runs[-1].always_again = True
            while not all(run.done for run in runs):
                for run in runs:
                    stopped = not run.done and self._go_on(run, set(self._layers), patience)
                    if stopped and isinstance(run.recorder, _Alive):
                        run.shown = None
                        inputs = sum(t.numel() * t.element_size() for t in tensors_in(run.batch.input))
                        bytes[run.at] = max(bytes.get(run.at, 0), run.recorder.bytes + inputs)
            found = [_outputs(run.output) for run in runs]
        except Exception:  # what is wrong with the network, whoever runs it next will say
            return {}
        finally:
            self._running = None
            _end(runs)
        alike = all(_alike(a, b) for a, b in zip(plain, found, strict=True))
        return bytes if alike else {}


class _Held:
    """A forward in a thread of its own, which runs only while `go_on` waits for it."""

    def __init__(self, model: nn.Module, batch: Batch, recorder: Recorder) -> None:
        self.batch, self.recorder = batch, recorder
        self.passed: dict[str, tuple[nn.Module, int]] = {}  # layers that ran, and what they were then
        self.at, self.bytes, self.done, self.always_again = "", 0, False, False
        self.shown: ConvCall | None = None
        self.output: Any = None
        self.failure: BaseException | None = None
        self._until: set[str] = set()
        self._given: tuple[Any, Any] = ((), {})
        self._again = self.ending = False
        self.turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._random: Tensor | None = None
        device, threads = _device(model), torch.get_num_threads()

        def run() -> None:
            self.turn.acquire()
            try:
                if not self.ending:
                    torch.set_num_threads(threads)  # a new thread has its own idea
                    if device is not None:
                        torch.cuda.set_device(device)
                    self.output = forward(model, batch.input, recorder)
            except Reached:
                pass
            except BaseException as error:
                self.failure = error
            finally:
                self.done = True
                self._back.release()

        self.thread = threading.Thread(target=run, name="harmconvert forward", daemon=True)
        self.thread.start()

    @property
    def valid(self) -> bool:
        """Whether what ran before is as it was then."""
        return all(_version(layer) == version for layer, version in self.passed.values())

    def go_on(self, until: set[str], patience: float | None = None) -> None:
        """Let it run to the next call of one of these layers, which is shown, or to the end.

        What is global and not the thread's own is put in its place: the state of the random generator.

        Raises:
            TimeoutError: it has not come so far in ``patience`` seconds.
        """
        self._until = until
        before = torch.get_rng_state()
        try:
            if self._random is not None:
                torch.set_rng_state(self._random)
            self.turn.release()
            if not self._back.acquire(timeout=patience):
                raise TimeoutError(f"a forward has not gone on in {patience} s")
            self._random = torch.get_rng_state()
        finally:
            torch.set_rng_state(before)

    def begins(self, args: Any, kwargs: Any) -> None:
        """A layer is called; in the thread."""
        if not self._again:
            self._given = (args, kwargs)
            self.recorder.start()

    def ended(self, name: str, layer: nn.Module, output: Any) -> Any:
        """It has answered; held here, where asked for, and asked again if it is no longer the same; in the thread."""
        if self._again:
            return None
        if self.ending:
            raise Reached
        found, (args, kwargs) = self.recorder.stop(), self._given
        self._given = ((), {})
        if name in self._until:
            self.shown, self.at = found[0] if len(found) == 1 else None, name
            version = _version(layer)
            del found
            self._back.release()
            self.turn.acquire()
            if self.ending:
                raise Reached
            if self.always_again or _version(layer) != version:
                self._again = True
                try:
                    output = layer(*args, **kwargs)
                finally:
                    self._again = False
        self.passed.setdefault(name, (layer, _version(layer)))
        return output


class _Alive(Recorder):
    """Notes also what torch makes, to know what of it is still needed."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[weakref.ref[Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = super().__torch_function__(func, types, args, kwargs)
        if isinstance(output, Tensor | tuple | list):
            self._made += [weakref.ref(tensor) for tensor in tensors_in(output)]
        return output

    @property
    def bytes(self) -> int:
        """Of all storages that are alive."""
        storages = {}
        for tensor in (made() for made in self._made):
            if tensor is not None and not isinstance(tensor, nn.Parameter):
                with suppress(RuntimeError, NotImplementedError):  # a tensor without storage
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        self._made = [made for made in self._made if made() is not None]
        return sum(storages.values())


def _end(runs: Sequence[_Held]) -> None:
    """Let their threads end, at once where they are held; all before any is waited for, lest one waits for another."""
    for run in runs:
        run.ending = True
        run.turn.release()
    for run in runs:
        run.thread.join()


def _version(layer: nn.Module) -> int:
    """A number that grows with each change of the layer's parameters in place."""
    return sum(parameter._version for parameter in layer.parameters())


def _device(model: nn.Module) -> torch.device | None:
    parameter = next(model.parameters(), None)
    return parameter.device if parameter is not None and parameter.device.type == "cuda" else None


def _outputs(output: Any) -> list[Tensor]:
    """Cloned, because a network may hand out a buffer of its own."""
    return [tensor.clone() for tensor in tensors_in(output)]


def _alike(plain: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    if [tensor.shape for tensor in plain] != [tensor.shape for tensor in other]:
        return False
    for a, b in zip(plain, other, strict=True):
        difference = float((a.double() - b.double()).norm())
        if not (math.isfinite(difference) and difference <= _ALIKE * float(a.double().norm())):
            return False
    return True
