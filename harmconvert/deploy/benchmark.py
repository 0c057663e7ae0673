"""How fast is each form of a network here, and which one should be deployed?"""

from __future__ import annotations

import ctypes
import itertools
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import Argument, UsageError, counted, first_line
from ..layers import native
from ..layers.layer_times import kernels_to_channels_last
from ..layers.timing import in_turns
from ..network.checks import check_network
from ..network.comparison import greatest_difference
from ..network.exchange import exchange
from ..network.form_check import make_runnable
from ..network.forms import Factoring, factoring, fuse
from ..network.layers import harmonic_layers
from ..network.running import call, evaluating, unchanged
from ..network.values import clone_tensors, default_input, images_to_channels_last, map_tensors, tensors_in
from ..storage.precision import in_float32

FORMS = ("dense", "harmonic", "factored")
LAYOUTS = ("contiguous", "channels_last")


@dataclass(frozen=True)
class Row:
    """One way to run a network: median seconds of a forward, half the distance of the quartiles as a share of it,
    examples per second, and bytes in use at most beyond what was in use before (None where that cannot be told).

    ``error``: greatest difference from the outputs of the network as it was given, relative to the greatest of these.
    """

    form: str
    compiled: bool
    layout: str
    batch: int
    threads: int
    seconds: float | None
    spread: float | None
    examples_per_second: float | None
    peak_bytes: int | None
    error: float | None
    note: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """All rows, what `factor` chose for each (batch, threads), the machine, and the source of the network where it is
    known."""

    rows: tuple[Row, ...]
    factorings: dict[tuple[int, int], Factoring]
    machine: dict[str, Any]
    source: str | None = None

    def fastest(self, batch: int, threads: int) -> Row:
        """The row to deploy by.

        Raises:
            UsageError: nothing could be timed for that batch size and number of threads.
        """
        timed = [row for row in self.rows if row.seconds is not None and (row.batch, row.threads) == (batch, threads)]
        if not timed:
            raise UsageError(f"nothing was timed at batch {batch} with {counted(threads, 'thread')}")
        return min(timed, key=lambda row: row.seconds or 0.0)

    def advice(self) -> list[str]:
        """A sentence for each batch size and number of threads."""
        said = []
        for batch, threads in dict.fromkeys((row.batch, row.threads) for row in self.rows):
            alike = [row for row in self.rows if (row.batch, row.threads) == (batch, threads)]
            if not any(row.seconds for row in alike):
                said.append(f"batch {batch}, {counted(threads, 'thread')}: {alike[0].note}")
                continue
            best = self.fastest(batch, threads)
            eager = [row.seconds for row in alike if row.form == "dense" and row.seconds and not row.compiled]
            gain = ""
            if eager and best.seconds:
                gain = f": {min(eager) / best.seconds:.2f} times as fast as the dense form, eager"
            how = f"{best.form} form, {best.layout}, {'compiled' if best.compiled else 'eager'}"
            said.append(f"batch {batch}, {counted(threads, 'thread')}: deploy the {how}{gain}")
        return said

    def to_json(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        factorings = [
            {"batch": batch, "threads": threads, **found.to_json()}
            for (batch, threads), found in self.factorings.items()
        ]
        source = {} if self.source is None else {"source": self.source}
        return {
            **source, "machine": self.machine, "rows": [asdict(row) for row in self.rows], "factored": factorings,
            "advice": self.advice(),
        }  # fmt: skip


def benchmark(
    model: nn.Module,
    example_input: Any,
    *,
    batches: Sequence[int] = (1, 16),
    threads: Sequence[int] = (),
    forms: Sequence[str] = FORMS,
    layouts: Sequence[str] = LAYOUTS,
    compiled: bool = False,
    repeats: int = 9,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Benchmark:
    """Time the forms of a network in turns, without gradients, for each batch size and number of threads.

    A network with no harmonic convolutions has its dense form only. The factored form has its layout from `factor`.

    Args:
        example_input: one example or more, as for `convert`; repeated to each batch size. On a CPU, networks stored in
            16 bits are timed in float32.
        threads: of torch; default: as many as it has now.
        compiled: time each also under torch.compile. What does not compile, or run at a batch size or in a layout, says
            so in its row's note.
        repeats: of each; fewer where they take long.
        progress: called with (repeats done, repeats in all, what is timed).

    Raises:
        UsageError: an unknown form or layout, an input that the network does not take, or no batch size that it takes.
        CheckError: a form of the network computes something else.
    """
    check_network(model)
    for given, known, what in ((forms, FORMS, "form"), (layouts, LAYOUTS, "layout")):
        if unknown := [name for name in given if name not in known]:
            raise UsageError(f"unknown {what} {unknown[0]!r}: use {', '.join(known)}")
    if not harmonic_layers(model):
        forms = [form for form in forms if form == "dense"] or ["dense"]
    example_input = default_input(model) if example_input is None else example_input
    if not tensors_in(example_input):
        raise UsageError("this network is timed on an input: give ", Argument("example_input"))
    if tensors_in(example_input)[0].device.type == "cpu":
        model = in_float32(exchange(model, {}))  # 16 bits are for files
    model, example_input = make_runnable(model, example_input)
    groups = list(itertools.product(batches, threads or [torch.get_num_threads()]))
    rows: list[Row] = []
    factorings: dict[tuple[int, int], Factoring] = {}
    for index, (batch, count) in enumerate(groups):
        begun, total, what = index * repeats, len(groups) * repeats, f"batch {batch}, {counted(count, 'thread')}"
        progress(begun, total, what)

        def told(done: int, begun: int = begun, total: int = total, what: str = what) -> None:
            progress(begun + done, total, what)

        with _threads(count):
            input = map_tensors(partial(_repeated, batch=batch), example_input)
            found, chosen = _group(model, input, batch, count, forms, layouts, compiled, repeats, told)
        rows += found
        if chosen is not None:
            factorings[batch, count] = chosen
    progress(len(groups) * repeats, len(groups) * repeats, "done")
    if rows and not any(row.seconds for row in rows):
        raise UsageError(f"the network does not run at batch {', '.join(map(str, batches))}: {rows[0].note}")
    device = tensors_in(example_input)[0].device
    return Benchmark(tuple(rows), factorings, {"device": str(device), **machine()})


def machine() -> dict[str, Any]:
    """What the times were taken on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": platform.processor() or platform.machine(), "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(), "gpu": gpu, "torch": torch.__version__, "python": platform.python_version(),
        "compiled kernel": native.reason_unavailable() or "yes",
    }  # fmt: skip


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes in use at most while ``run`` runs, beyond those before; None where the system does not tell."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    if not sys.platform.startswith("linux"):
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed would be used again without a trace
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _status("VmRSS")
        run()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError, StopIteration):
        return None


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{key}:")))


def _group(
    model: nn.Module, input: Any, batch: int, threads: int, forms: Sequence[str], layouts: Sequence[str],
    compiled: bool, repeats: int, progress: Callable[[int], None],
) -> tuple[list[Row], Factoring | None]:  # fmt: skip
    """All ways to run the network on one input."""
    networks: dict[tuple[str, str], nn.Module] = {}
    chosen = None
    try:
        with evaluating(model), unchanged(model):
            truth = [
                tensor.double()
                for tensor in tensors_in(call(model, clone_tensors(input)))
                if tensor.is_floating_point()
            ]
    except Exception as error:  # some networks take some batch sizes only
        why = _note("does not run", error)
        ways = itertools.product(forms, layouts)
        rows = [Row(form, False, layout, batch, threads, None, None, None, None, None, why) for form, layout in ways]
        return rows, None
    for form, layout in itertools.product(forms, layouts):
        if form == "factored":
            if chosen is None:
                chosen = factoring(model, input)
                networks[form, "channels_last"] = chosen.model
            continue
        network = fuse(model, input) if form == "dense" else exchange(model, {})
        networks[form, layout] = kernels_to_channels_last(network) if layout == "channels_last" else network
    rows = []
    runs: dict[int, Callable[[], Any]] = {}
    with evaluating(*networks.values()):
        told = {"contiguous": input, "channels_last": images_to_channels_last(input)}
        for (form, layout), network in networks.items():
            for under_compiler in (False, True) if compiled else (False,):
                row = Row(form, under_compiler, layout, batch, threads, None, None, None, None, None)
                run, note = _runnable(network, told[layout], under_compiler)
                if run is not None:
                    device = tensors_in(input)[0].device
                    row = replace(
                        row, error=greatest_difference(_outputs(run), truth), peak_bytes=peak_bytes(run, device)
                    )
                    runs[len(rows)] = run
                rows.append(replace(row, note=note))
        times = in_turns({str(index): run for index, run in runs.items()}, repeats, 3, 20.0, warm=1, progress=progress)
    for name, found in times.items():
        timed = replace(
            rows[int(name)], seconds=found.median, spread=found.spread, examples_per_second=batch / found.median
        )
        rows[int(name)] = timed
    return rows, chosen


def _runnable(network: nn.Module, input: Any, compiled: bool) -> tuple[Callable[[], Any] | None, str | None]:
    """What to time, warmed up; or why there is nothing."""
    try:
        run = partial(_run, torch.compile(network) if compiled else network, input)
        run()
        return run, None
    except Exception as error:
        return None, _note("does not compile" if compiled else "does not run", error)


def _note(what: str, error: Exception) -> str:
    return f"{what} ({type(error).__name__}: {first_line(error)})"


def _run(network: Any, input: Any) -> Any:
    with torch.no_grad():
        return call(network, input)


def _outputs(run: Callable[[], Any]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [tensor.double() for tensor in tensors_in(run()) if tensor.is_floating_point()]


def _repeated(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    """A tensor's examples repeated and cut to ``batch``; a scalar as it is."""
    if not tensor.dim():
        return tensor
    times = -(-batch // max(len(tensor), 1))
    return tensor.repeat(times, *[1] * (tensor.dim() - 1))[:batch]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
