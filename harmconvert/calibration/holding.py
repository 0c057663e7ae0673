"""Hold forwards of a network at a layer while it is refitted, and go on from there.

What the next layer is fed depends on all refits before it, so that each needs another run up to it: with as many layers
the work grows with the square of the depth. A run that is held at the layer goes on once that has its coefficients.
Each has a thread of its own, because a thread can be held in the midst of any Python code and keeps alive just what
that code still needs; the caller waits while one runs. A trial shows first that the network bears it: runs in turns
must feed every layer what whole runs feed it, to the bit. Where it does not, or memory is short, runs begin anew.
"""

from __future__ import annotations

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

from ..network.running import evaluating
from ..network.side_effects import RandomStates, Snapshot, random_states_kept
from ..network.values import tensors_in
from .capture import ConvCall, Reached, Recorder, See, forward, watch_convolutions
from .inputs import Batch
from .limits import threads_free
from .repeating import fed, fed_in_a_run

MOST_BYTES = 1 << 30
MOST_THREADS = 512  # each that computes has as many helpers as torch has threads
_PATIENCE = 10.0  # seconds, and twenty times what whole runs take, before one is thought to wait for another
_MOMENT = 1.0  # seconds for a thread to end, before the others are asked to


class Forwards:
    """Forwards of ``model`` up to one of ``layers`` after the other, in the order in which they run.

    A context: its threads end with it. ``batches``: all that will be run; ``probes``: a few examples of them in two
    batches for the trial (`CalibrationSet.probes`). No more than ``memory`` bytes are held, nor than `MOST_BYTES`.
    ``complete``: no run is held or interrupted (`Runs.complete`).
    Only on a CPU: on a GPU each thread would have a workspace and a stream of its own.
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
        self._model, self._layers, self._probes, self._complete = model, dict(layers), probes, complete
        self._alike = len({_shapes(batch) for batch in batches}) == 1 and not complete
        self._memory = min(memory, MOST_BYTES)
        self._most = threads_free(MOST_THREADS) // torch.get_num_threads()
        self._bytes: dict[str, int] = {}  # held of one example at a layer; empty: nothing is
        self._runs: list[_Run] = []  # that have begun, in that order
        self._held: dict[int, _Run] = {}

    def __enter__(self) -> Forwards:
        with ExitStack() as leaving:
            leaving.enter_context(evaluating(self._model))  # once: what one run puts back would change another's
            for name, layer in self._layers.items():
                before = layer.register_forward_pre_hook(self._begins, prepend=True, with_kwargs=True)
                leaving.callback(before.remove)
                leaving.callback(layer.register_forward_hook(partial(self._ended, name)).remove)
            leaving.callback(lambda: self._end(self._runs))
            self._bytes = self._tried()
            self._leaving = leaving.pop_all()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._leaving.__exit__(*raised)

    def watch(self, names: Sequence[str], batch: Batch, see: See, calls: int) -> None:
        """Show the ``calls`` calls of the layers ``names`` in a forward of ``batch`` to ``see``, as
        `watch_convolutions` does; raises what that does."""
        name, run = names[0], None
        if len(names) == 1 and calls == 1 and name in self._bytes:
            run = self._before(name, batch)
        if run is None:
            layers = {name: self._layers[name] for name in names}
            watch_convolutions(self._model, layers, batch.input, see, None if self._complete else calls)
            return
        try:
            if self._go_on(run, {name}):
                see(name, run.shown)
        except BaseException:
            self._end([run])
            raise
        run.shown = None  # lets go of maps
        if run.done or self._room(run) < self._bytes[name] * len(batch):
            self._end([run])

    def _before(self, name: str, batch: Batch) -> _Run | None:
        """A run of ``batch`` that has not come to the layer yet; none where a new one could not be held there."""
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
        run = _Run(self._model, batch, recorder)
        self._runs.append(run)  # before it starts, so that whatever happens it is ended
        run.thread.start()
        return run

    def _room(self, beside: _Run | None = None) -> int:
        """Bytes that may be held beside what is."""
        others = (run for run in self._held.values() if run is not beside)
        return self._memory - sum(self._bytes[run.at] * len(run.batch) for run in others if run.at)

    def _go_on(self, run: _Run, until: set[str], patience: float | None = None) -> bool:
        """Whether it came to one of the layers."""
        with random_states_kept():
            run.go_on(until, patience)
        if run.failure is not None:
            raise run.failure
        return not run.done

    def _end(self, runs: Sequence[_Run]) -> None:
        """End these, the last that began first: what one has set for the process it has found like that."""
        ending = list(reversed(runs))
        try:
            with random_states_kept():
                for run in ending:
                    run.end(_MOMENT)
                for run in ending:  # one may have waited for another
                    run.end(None)
        except BaseException:  # an interrupt: nobody waits for them, but they end
            for run in ending:
                run.ask_to_end()
            raise
        self._runs = [run for run in self._runs if run not in ending]
        self._held = {key: run for key, run in self._held.items() if run not in ending}

    def _begins(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        if (run := self._here()) is not None:
            run.begins(args, kwargs)

    def _ended(self, name: str, layer: nn.Module, args: Any, output: Any) -> Any:
        return run.ended(name, layer, output) if (run := self._here()) is not None else None

    def _here(self) -> _Run | None:
        """The run whose thread this is: a network may run layers in threads of its own, and the caller the network."""
        return next((run for run in self._runs if run.thread is threading.current_thread()), None)

    def _tried(self) -> dict[str, int]:
        """Bytes that a run of one example held at each layer keeps alive.

        None, where there is nothing to gain, or two runs in turns do not feed the layers what they are fed one after
        the other: the network keeps something of one run beyond its frames, sets something for the whole process,
        looks at the thread that it runs in, or has one run wait for the other.
        """
        parameters = list(self._model.parameters())
        bears = self._alike and self._most > 1 and all(p.device.type == "cpu" for p in parameters)
        if not bears or len(self._layers) < 3 or len(self._probes) < 2 or _same(*self._probes):
            return {}
        bytes: dict[str, int] = {}
        state = Snapshot(self._model)
        try:
            start, settings = time.perf_counter(), _settings()
            plain = [iter(fed_in_a_run(self._model, self._layers, probe)) for probe in self._probes]
            patience = _PATIENCE + 20 * (time.perf_counter() - start)
            runs = [self._begun(probe, kind()) for probe, kind in zip(self._probes, (_Alive, Recorder), strict=True)]
            while not all(run.done for run in runs):
                for run, expected in zip(runs, plain, strict=True):
                    run.always_again = True
                    if run.done or not self._go_on(run, set(self._layers), patience):
                        continue
                    if settings != _settings() or fed(run.at, run.shown) != next(expected, None):
                        return {}
                    run.shown = None
                    if isinstance(run.recorder, _Alive):
                        held = -(-run.recorder.bytes(self._model) // len(run.batch))
                        bytes[run.at] = max(bytes.get(run.at, 0), held)
            if any(next(expected, None) for expected in plain) or not state.intact:
                return {}  # also a network that keeps what no layer's input shows yet: a counter, a log
            return bytes
        except Exception:  # what is wrong with the network, whoever runs it next will say
            return {}
        finally:
            self._end(self._runs)
            state.restore()


class _Run:
    """A forward in a thread of its own, which runs only while `go_on` waits for it."""

    def __init__(self, model: nn.Module, batch: Batch, recorder: Recorder) -> None:
        self.batch, self.recorder = batch, recorder
        self.passed: dict[str, tuple[nn.Module, int]] = {}  # layers that ran, and what they were then
        self.at, self.done, self.always_again, self._again, self._ending = "", False, False, False, False
        self.shown: ConvCall | None = None
        self.failure: BaseException | None = None
        self._until: set[str] = set()
        self._given: tuple[Any, Any] = ((), {})
        # Of C, so that an interrupt finds them whole, as it may not find a Semaphore.
        self._turn: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._back: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._random: RandomStates | None = None
        threads = torch.get_num_threads()

        def run() -> None:
            self._turn.get()
            try:
                if not self._ending:
                    torch.set_num_threads(threads)  # a new thread has its own idea
                    forward(model, batch.input, recorder)
            except Reached:
                pass
            except BaseException as error:
                self.failure = error
            finally:
                self.done = True
                self._back.put(None)

        self.thread = threading.Thread(target=run, name="harmconvert forward", daemon=True)

    @property
    def valid(self) -> bool:
        """Whether what ran before is as it was then."""
        return all(_version(layer) == version for layer, version in self.passed.values())

    def go_on(self, until: set[str], patience: float | None = None) -> None:
        """Let it run to the next call of one of these layers, which is shown, or to the end.

        Raises:
            TimeoutError: it has not come so far in ``patience`` seconds.
        """
        self._until = until
        if self._random is not None:
            self._random.set()
        self._turn.put(None)
        try:
            self._back.get(timeout=patience)
        except queue.Empty:
            raise TimeoutError(f"a forward has not gone on in {patience} s") from None
        self._random = RandomStates.now()

    def ask_to_end(self) -> None:
        """Let its thread end, at once where it is held, else at the next layer."""
        self._ending = True
        self._turn.put(None)

    def end(self, patience: float | None) -> None:
        """Let its thread end, and wait for that so many seconds."""
        self.ask_to_end()
        with suppress(RuntimeError):  # it has not started
            self.thread.join(patience)

    def begins(self, args: Any, kwargs: Any) -> None:
        """A layer is called; in the thread."""
        if not self._again:
            self._given = (args, kwargs)
            self.recorder.start()

    def ended(self, name: str, layer: nn.Module, output: Any) -> Any:
        """It has answered; held here, where asked for, and asked again if it is no longer the same; in the thread."""
        if self._again:
            return None
        if self._ending:
            raise Reached
        found, (args, kwargs) = self.recorder.stop(), self._given
        self._given = ((), {})
        if name in self._until:
            self.shown, self.at = found[0] if len(found) == 1 else None, name
            version = _version(layer)
            del found
            self._back.put(None)
            self._turn.get()
            if self._ending:
                raise Reached
            torch.clear_autocast_cache()  # of a network's own autocast: it has parameters as they were
            if self.always_again or _version(layer) != version:
                self._again = True
                try:
                    output = layer(*args, **kwargs)
                finally:
                    self._again = False
        self.passed.setdefault(name, (layer, _version(layer)))
        return output


class _Alive(Recorder):
    """Notes also what torch is given and makes, to know what of it is still needed."""

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
        """Of all storages that are alive, but for the model's own."""
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
    """A number that grows with each change of the layer's parameters in place."""
    return sum(parameter._version for parameter in layer.parameters())


def _shapes(batch: Batch) -> tuple[tuple[Any, ...], ...]:
    """Of its tensors, but for the number of examples."""
    return tuple((tensor.dtype, *tensor.shape[1:]) for tensor in tensors_in(batch.input))


def _same(one: Batch, other: Batch) -> bool:
    """Whether both begin with equal examples, so that runs in turns could not be told from whole ones."""
    ours, theirs = tensors_in(one.input), tensors_in(other.input)
    if len(ours) != len(theirs):
        return False
    pairs = zip(ours, theirs, strict=True)
    return all(torch.equal(a[:1], b[:1]) if a.dim() and b.dim() else torch.equal(a, b) for a, b in pairs)


def _settings() -> tuple[Any, ...]:
    """What is set for the whole process, and a network may set for a part of its forward."""
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    return (
        torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(), mkldnn.enabled,
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, list(warnings.filters),
    )  # fmt: skip
