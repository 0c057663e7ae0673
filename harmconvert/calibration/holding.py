"""Hold forwards of a network at a layer while that layer is refitted, and continue them afterwards.

The input of a layer depends on all refits before it. Without this module each refit would need a new run of the network
up to its layer, and the work would grow with the square of the depth. Here a run waits at the layer until the layer has
its new coefficients, and then continues.

Each run has a thread of its own, because a thread can wait inside any Python code and keeps alive only the tensors that
this code still needs. Only one thread runs at a time. A trial first checks that the network supports this: two runs in
turns must give every layer the same input, bit for bit, as two runs one after the other. If they do not, or if memory
is short, each refit starts a new run.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import warnings
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import counted, first_line
from ..network.running import evaluating
from ..network.side_effects import RandomStates, Snapshot, preserve_random_states
from ..network.values import tensors_in
from .capture import ConvCall, LayerReached, OnCall, Recorder, forward, watch_convolutions
from .inputs import Batch
from .limits import threads_free
from .repeatability import input_summaries, input_summary

log = logging.getLogger(__name__)

MOST_BYTES = 1 << 30
MOST_THREADS = 512  # each thread that computes starts as many helpers as torch has threads
# Seconds, in addition to twenty times the duration of whole runs, after which a run counts as waiting for another one.
_PATIENCE = 10.0
_MOMENT = 1.0  # seconds to wait for one thread to end before the others are asked to end


class Forwards:
    """Run ``model`` up to one of ``layers`` after the other, in the order in which they run.

    Use it as a context: its threads end with it. ``refusal`` says why no run is held (None: runs are held), and
    ``repeated`` counts the runs that started from the input because memory or threads were short. Runs are held on a
    CPU only, because on a GPU each thread would have a workspace and a stream of its own.

    Args:
        memory: the most bytes to hold; never more than `MOST_BYTES`.
        batches: all batches that will be run.
        probes: a few of their examples in two batches, for the trial (`CalibrationSet.probes`).
        complete: True: no run may be held or interrupted (`Runs.complete`).
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        memory: int,
        batches: Sequence[Batch],
        probes: Sequence[Batch],
        complete: bool = False,
    ) -> None:
        self.model, self.layers, self._probes, self._complete = model, dict(layers), probes, complete
        self._alike = len({_shapes(batch) for batch in batches}) == 1 and not complete
        self._memory = min(memory, MOST_BYTES)
        self._most = threads_free(MOST_THREADS) // torch.get_num_threads()
        self.refusal: str | None = None
        self.repeated = 0
        self._bytes: dict[str, int] = {}  # bytes of one example held at each layer; empty: no run is held
        self._runs: list[_Run] = []  # in the order in which they started
        self._held: dict[int, _Run] = {}

    def __enter__(self) -> Forwards:
        with ExitStack() as leaving:
            # Once for all runs: the end of one run would otherwise change the mode of another one.
            leaving.enter_context(evaluating(self.model))
            for name, layer in self.layers.items():
                before = layer.register_forward_pre_hook(self._begins, prepend=True, with_kwargs=True)
                leaving.callback(before.remove)
                leaving.callback(layer.register_forward_hook(partial(self._ended, name)).remove)
            leaving.callback(lambda: self._end(self._runs))
            self._bytes = self._try_out()
            self._leaving = leaving.pop_all()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._leaving.__exit__(*raised)
        for fallback in self.fallbacks:
            log.debug(fallback)

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """Return why runs were not held at the layer that is refitted, in a sentence; empty if all were."""
        if self.refusal is not None:
            return (f"no run is held at the layer that is refitted: {self.refusal}",)
        runs = f"{counted(self.repeated, 'run')} started from the input again: memory or threads were short"
        return (runs,) if self.repeated else ()

    def watch(self, names: Sequence[str], batch: Batch, see: OnCall, calls: int) -> None:
        """Pass the ``calls`` calls of the layers ``names`` in a forward of ``batch`` to ``see``.

        Raises: as `watch_convolutions`.
        """
        name, run = names[0], None
        if len(names) == 1 and calls == 1 and name in self._bytes:
            run = self._before(name, batch)
            self.repeated += run is None
        if run is None:
            layers = {name: self.layers[name] for name in names}
            watch_convolutions(self.model, layers, batch.input, see, None if self._complete else calls)
            return
        try:
            if self._go_on(run, {name}):
                see(name, run.shown)
        except BaseException:
            self._end([run])
            raise
        run.shown = None  # frees the maps
        if run.done or self._room(run) < self._bytes[name] * len(batch):
            self._end([run])

    def _before(self, name: str, batch: Batch) -> _Run | None:
        """Return a run of ``batch`` that has not reached the layer yet; None where no new run could be held there."""
        run = self._held.get(id(batch))
        if run is not None and run.at != name and name not in run.passed and run.valid:
            return run
        if run is not None:
            self._end([run])
        if self._room() < self._bytes[name] * len(batch) or len(self._held) >= self._most:
            return None
        try:
            run = self._begun(batch, Recorder())
        except RuntimeError:  # no more threads
            return None
        self._held[id(batch)] = run
        return run

    def _begun(self, batch: Batch, recorder: Recorder) -> _Run:
        run = _Run(self.model, batch, recorder)
        self._runs.append(run)  # before it starts, so that it is ended in any case
        run.thread.start()
        return run

    def _room(self, beside: _Run | None = None) -> int:
        """Return how many more bytes may be held."""
        others = (run for run in self._held.values() if run is not beside)
        return self._memory - sum(self._bytes[run.at] * len(run.batch) for run in others if run.at)

    def _go_on(self, run: _Run, until: set[str], patience: float | None = None) -> bool:
        """Let a run continue; return whether it reached one of the layers."""
        with preserve_random_states():
            run.go_on(until, patience)
        if run.failure is not None:
            raise run.failure
        return not run.done

    def _end(self, runs: Sequence[_Run]) -> None:
        """End these runs, the last started first: a run may have changed a setting of the process, which the runs that
        started before it must find as they left it."""
        ending = list(reversed(runs))
        try:
            with preserve_random_states():
                for run in ending:
                    run.end(_MOMENT)
                for run in ending:  # one run may have waited for another one
                    run.end(None)
        except BaseException:  # an interrupt: do not wait, but ask all runs to end
            for run in ending:
                run.ask_to_end()
            raise
        self._runs = [run for run in self._runs if run not in ending]
        self._held = {key: run for key, run in self._held.items() if run not in ending}

    def _begins(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        if (run := self._here()) is not None:
            run.begins(layer, args, kwargs)

    def _ended(self, name: str, layer: nn.Module, args: Any, output: Any) -> Any:
        return run.ended(name, layer, output) if (run := self._here()) is not None else None

    def _here(self) -> _Run | None:
        """Return the run whose thread this is; None in threads of the network or of the caller."""
        return next((run for run in self._runs if run.thread is threading.current_thread()), None)

    def _reason_not_to_hold(self) -> str | None:
        """Return why no run is held, as far as this is known without a trial; None where a trial decides."""
        if self._complete:
            return "runs of the network must not be interrupted"
        if not self._alike:
            return "the batches have different shapes"
        if self._most <= 1:
            return "the machine has no threads left"
        if any(parameter.device.type != "cpu" for parameter in self.model.parameters()):
            return "the network is not on a CPU"
        if len(self.layers) < 3:
            return "fewer than three layers are refitted"
        if len(self._probes) < 2 or _same(*self._probes):
            return "there are no two different examples for a trial"
        return None

    def _try_out(self) -> dict[str, int]:
        """Return the bytes that a run of one example held at each layer keeps alive; empty where no run is to be held.

        That is so where two runs in turns do not give the layers the same inputs as two runs one after the other: the
        network keeps something of a run beyond its frames, changes a setting of the process, depends on the thread that
        it runs in, or lets one run wait for the other.
        """
        self.refusal = self._reason_not_to_hold()
        if self.refusal is not None:
            return {}
        self.refusal = "two runs in turns do not give the layers the inputs that two runs one after the other give"
        bytes: dict[str, int] = {}
        state = Snapshot(self.model)
        try:
            start, settings = time.perf_counter(), _settings()
            plain = [iter(input_summaries(self.model, self.layers, probe)) for probe in self._probes]
            patience = _PATIENCE + 20 * (time.perf_counter() - start)
            runs = [self._begun(probe, kind()) for probe, kind in zip(self._probes, (_Alive, Recorder), strict=True)]
            while not all(run.done for run in runs):
                for run, expected in zip(runs, plain, strict=True):
                    run.always_again = True
                    if run.done or not self._go_on(run, set(self.layers), patience):
                        continue
                    if settings != _settings() or input_summary(run.at, run.shown) != next(expected, None):
                        return {}
                    run.shown = None
                    if isinstance(run.recorder, _Alive):
                        held = -(-run.recorder.bytes(self.model) // len(run.batch))
                        bytes[run.at] = max(bytes.get(run.at, 0), held)
            if any(next(expected, None) for expected in plain) or not state.intact:
                return {}  # also a network that keeps something that no layer's input shows yet: a counter, a log
            self.refusal = None
            return bytes
        except Exception as error:  # the next whole run of the network reports what is wrong
            self.refusal = f"the trial failed: {first_line(error)}"
            return {}
        finally:
            self._end(self._runs)
            state.restore()


class _Run:
    """A forward in a thread of its own; it runs only while `go_on` waits for it."""

    def __init__(self, model: nn.Module, batch: Batch, recorder: Recorder) -> None:
        self.batch, self.recorder = batch, recorder
        self.passed: dict[str, tuple[nn.Module, int]] = {}  # layers that ran, with their version then
        self.at, self.done, self.always_again, self._again, self._ending = "", False, False, False, False
        self.shown: ConvCall | None = None
        self.failure: BaseException | None = None
        self._until: set[str] = set()
        self._arguments: tuple[Any, Any] = ((), {})
        # Queues are implemented in C: an interrupt cannot leave them half-changed, as it can a Semaphore.
        self._turn: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._back: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._random: RandomStates | None = None
        threads = torch.get_num_threads()

        def run() -> None:
            self._turn.get()
            try:
                if not self._ending:
                    torch.set_num_threads(threads)  # a new thread starts with another number
                    forward(model, batch.input, recorder)
            except LayerReached:
                pass
            except BaseException as error:
                self.failure = error
            finally:
                self.done = True
                self._back.put(None)

        self.thread = threading.Thread(target=run, name="harmconvert forward", daemon=True)

    @property
    def valid(self) -> bool:
        """Return whether the layers that ran before have not changed since."""
        return all(_version(layer) == version for layer, version in self.passed.values())

    def go_on(self, until: set[str], patience: float | None = None) -> None:
        """Let the run continue to the next call of one of the layers ``until``, or to its end.

        Raises:
            TimeoutError: it has not reached either in ``patience`` seconds.
        """
        self._until = until
        if self._random is not None:
            self._random.restore()
        self._turn.put(None)
        try:
            self._back.get(timeout=patience)
        except queue.Empty:
            raise TimeoutError(f"a forward has not gone on in {patience} s") from None
        self._random = RandomStates.current()

    def ask_to_end(self) -> None:
        """Ask the thread to end: at once where it waits, otherwise at the next layer."""
        self._ending = True
        self._turn.put(None)

    def end(self, patience: float | None) -> None:
        """Ask the thread to end and wait for it, at most ``patience`` seconds (None: as long as it takes)."""
        self.ask_to_end()
        with suppress(RuntimeError):  # the thread has not started
            self.thread.join(patience)

    def begins(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        """Note that a layer is called. Runs in the thread."""
        if not self._again:
            self._arguments = (args, kwargs)
            self.recorder.start(layer)

    def ended(self, name: str, layer: nn.Module, output: Any) -> Any:
        """Wait here if this layer is asked for, and run it again if it has changed meanwhile. Runs in the thread."""
        if self._again:
            return None
        if self._ending:
            raise LayerReached
        found, (args, kwargs) = self.recorder.stop(), self._arguments
        self._arguments = ((), {})
        if name in self._until:
            self.shown, self.at = found[0] if len(found) == 1 else None, name
            version = _version(layer)
            del found
            self._back.put(None)
            self._turn.get()
            if self._ending:
                raise LayerReached
            torch.clear_autocast_cache()  # the cache of a network's own autocast holds old values of parameters
            if self.always_again or _version(layer) != version:
                self._again = True
                try:
                    output = layer(*args, **kwargs)
                finally:
                    self._again = False
        self.passed.setdefault(name, (layer, _version(layer)))
        return output


class _Alive(Recorder):
    """Also notes the tensors that torch reads and makes, to know which of them are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[weakref.ref[Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = super().__torch_function__(func, types, args, kwargs)
        for value in (*args, *(kwargs or {}).values(), output):
            if isinstance(value, Tensor | tuple | list):
                self._seen += map(weakref.ref, tensors_in(value))
        return output

    def bytes(self, model: nn.Module) -> int:
        """Return the bytes of all storages that are alive, without those of the model."""
        storages: dict[int, int] = {}
        for tensor in (seen() for seen in self._seen):
            if tensor is not None:
                with suppress(RuntimeError, NotImplementedError):  # a tensor without storage
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        self._seen = [seen for seen in self._seen if seen() is not None]
        for tensor in (*model.parameters(), *model.buffers()):
            storages.pop(tensor.untyped_storage().data_ptr(), None)
        return sum(storages.values())


def _version(layer: nn.Module) -> int:
    """Return a number that grows with each change of the layer's parameters in place."""
    return sum(parameter._version for parameter in layer.parameters())


def _shapes(batch: Batch) -> tuple[tuple[Any, ...], ...]:
    """Return the types and shapes of a batch's tensors, without the number of examples."""
    return tuple((tensor.dtype, *tensor.shape[1:]) for tensor in tensors_in(batch.input))


def _same(one: Batch, other: Batch) -> bool:
    """Return whether both start with equal examples: then runs in turns and whole runs could not be distinguished."""
    ours, theirs = tensors_in(one.input), tensors_in(other.input)
    if len(ours) != len(theirs):
        return False
    pairs = zip(ours, theirs, strict=True)
    return all(torch.equal(a[:1], b[:1]) if a.dim() and b.dim() else torch.equal(a, b) for a, b in pairs)


def _settings() -> tuple[Any, ...]:
    """Return the settings of the process that a network may change during a forward."""
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    return (
        torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(), mkldnn.enabled,
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, list(warnings.filters),
    )  # fmt: skip
