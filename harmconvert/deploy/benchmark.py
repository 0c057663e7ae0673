"""Time each form of a network on this machine."""

from __future__ import annotations

import ctypes
import itertools
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..calibration import CalibrationContext
from ..errors import Argument, UsageError, counted, first_line
from ..layers import native
from ..layers.layer_times import kernels_to_channels_last
from ..layers.timing import SETTLING, in_turns
from ..metrics.metric import Measurement
from ..network.checks import check_network
from ..network.comparison import greatest_difference
from ..network.exchange import exchange
from ..network.form_check import make_runnable
from ..network.forms import Factoring, factoring, fuse
from ..network.layers import harmonic_layers
from ..network.running import call, evaluating, unchanged
from ..network.values import clone_tensors, default_input, images_to_channels_last, map_tensors, tensors_in
from ..storage.precision import in_float32
from .advice import Benchmark, Row
from .runtime_rows import RUNTIMES, TIMED_PRECISIONS, EightBits, in_low_precision_and_runtimes, missing_runtimes

FORMS = ("dense", "harmonic", "factored")
LAYOUTS = ("contiguous", "channels_last")


@dataclass(frozen=True)
class BenchmarkSettings:
    """Which forms of a network to time, and how.

    ``threads``: numbers of threads of torch; empty: the current number. ``compiled``: time each form also under
    torch.compile. ``repeats``: how often each form is timed; fewer times if a forward pass takes long. ``runtimes``,
    ``precisions``: where networks are timed, as far as installed and supported by the processor. ``context``: images on
    which low precision is calibrated and compared. ``measured``: measures a network with a metric.
    """

    batches: Sequence[int] = (1, 16)
    threads: Sequence[int] = ()
    forms: Sequence[str] = FORMS
    layouts: Sequence[str] = LAYOUTS
    compiled: bool = False
    repeats: int = 9
    runtimes: Sequence[str] = ("torch",)
    precisions: Sequence[str] = ("f32",)
    context: CalibrationContext | None = None
    measured: Callable[[nn.Module], Measurement] | None = None

    def __post_init__(self) -> None:
        for names, known, kind in (
            (self.forms, FORMS, "form"), (self.layouts, LAYOUTS, "layout"), (self.runtimes, RUNTIMES, "runtime"),
            (self.precisions, TIMED_PRECISIONS, "precision"),
        ):  # fmt: skip
            if unknown := [name for name in names if name not in known]:
                raise UsageError(f"unknown {kind} {unknown[0]!r}: use {', '.join(known)}")


_DEFAULTS = BenchmarkSettings()


def time_forms(
    model: nn.Module,
    example_input: Any,
    settings: BenchmarkSettings = _DEFAULTS,
    progress: Callable[[int, int, str], None] = lambda done, total, description: None,
) -> Benchmark:
    """Time the forms of a network in turns, without gradients, for each batch size and number of threads.

    A network without harmonic convolutions has only its dense form. `factor` chooses the layout of the factored form.
    If a form does not compile, or does not run at a batch size or in a layout, the note of its row gives the reason.

    Args:
        example_input: one or more examples, as for `convert`; they are repeated to each batch size. On a CPU, networks
            stored in 16 bits are timed in float32.
        progress: called with the number of repeats done, the total number, and a description.

    Raises:
        UsageError: the network does not run on the input, or not at any of the batch sizes.
        CheckError: the outputs of a form differ from those of the network.
    """
    check_network(model)
    if not harmonic_layers(model):
        settings = replace(settings, forms=["dense"])
    example_input = default_input(model) if example_input is None else example_input
    if not tensors_in(example_input):
        raise UsageError("timing needs an example input: give ", Argument("example_input"))
    device = tensors_in(example_input)[0].device
    if device.type == "cpu":
        model = in_float32(exchange(model, {}))  # 16 bits are a storage format; CPUs compute slowly in them
    model, example_input = make_runnable(model, example_input)
    conditions = list(itertools.product(settings.batches, settings.threads or [torch.get_num_threads()]))
    total = len(conditions) * settings.repeats
    eight_bits = EightBits(settings.context)
    rows: list[Row] = []
    factorings: dict[tuple[int, int], Factoring] = {}
    for index, (batch, threads) in enumerate(conditions):
        description = f"batch {batch}, {counted(threads, 'thread')}"
        report = partial(_report, progress, index * settings.repeats, total, description)
        report(0)
        with _torch_threads(threads):
            input = map_tensors(partial(_repeat_examples, batch=batch), example_input)
            new_rows, chosen = _time_input(model, input, batch, settings, eight_bits, report)
        rows += new_rows
        if chosen is not None:
            factorings[batch, threads] = chosen
    progress(total, total, "done")
    if settings.measured is not None:  # all forms in float32 have the same outputs up to rounding
        measurement = settings.measured(model)
        rows = [
            replace(row, measurement=measurement) if row.precision == "f32" and row.seconds else row for row in rows
        ]
    if rows and not any(row.seconds for row in rows):
        raise UsageError(f"the network does not run at batch {', '.join(map(str, settings.batches))}: {rows[0].note}")
    machine = {"device": str(device), **describe_machine()}
    return Benchmark(tuple(rows), factorings, machine, notes=tuple(missing_runtimes(settings.runtimes)))


def _report(progress: Callable[[int, int, str], None], before: int, total: int, description: str, done: int) -> None:
    progress(before + done, total, description)


def describe_machine() -> dict[str, Any]:
    """Return the hardware and the versions on which the times depend, JSON-able."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": platform.processor() or platform.machine(), "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(), "gpu": gpu, "torch": torch.__version__, "python": platform.python_version(),
        "compiled kernel": native.reason_unavailable() or "yes",
    }  # fmt: skip


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Return the most bytes in use while ``run`` runs, minus those before; None if the system does not report them."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    if not sys.platform.startswith("linux"):
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else the run could use freed memory that the process still holds
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak (VmHWM)
        before = _status("VmRSS")
        run()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError, StopIteration):
        return None


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{key}:")))


def _time_input(
    model: nn.Module,
    input: Any,
    batch: int,
    settings: BenchmarkSettings,
    eight_bits: EightBits,
    report: Callable[[int], None],
) -> tuple[list[Row], Factoring | None]:
    """Return a row for each form in each layout, and the result of `factor` if the factored form is timed."""
    threads = torch.get_num_threads()
    try:
        with evaluating(model), unchanged(model):
            expected = _float64_tensors(call(model, clone_tensors(input)))
    except Exception as error:  # some networks accept only some batch sizes
        reason = _note("does not run", error)
        forms = itertools.product(settings.forms, settings.layouts)
        return [Row(form, False, layout, batch, threads, note=reason) for form, layout in forms], None
    networks, chosen = _networks(model, input, settings)
    inputs = {"contiguous": input, "channels_last": images_to_channels_last(input)}
    rows: list[Row] = []
    runs: dict[str, Callable[[], Any]] = {}  # by the index of the row
    with evaluating(*networks.values()):
        for ((form, layout), network), compiled in itertools.product(
            networks.items(), (False, True) if settings.compiled else (False,)
        ):
            row = Row(form, compiled, layout, batch, threads)
            run, note = _warm_run(network, inputs[layout], compiled)
            if run is not None:
                device = tensors_in(input)[0].device
                difference = greatest_difference(_float64_tensors(run()), expected)
                row = replace(row, error=difference, peak_bytes=peak_bytes(run, device))
                runs[str(len(rows))] = run
            rows.append(replace(row, note=note))
        for deployed in in_low_precision_and_runtimes(
            model, settings.forms, input, settings.runtimes, settings.precisions, eight_bits
        ):
            row = Row(
                deployed.form, False, "channels_last" if deployed.runtime == "torch" else "", batch, threads,
                note=deployed.note, runtime=deployed.runtime, precision=deployed.precision,
            )  # fmt: skip
            if deployed.network is not None:
                run, note = _warm_run(deployed.network, deployed.input, False)
                row = replace(row, note=note, agreement=deployed.agreement(settings.context) if run else None)
                if run is not None:
                    row = replace(row, error=greatest_difference(_float64_tensors(run()), expected))
                    if settings.measured is not None and row.precision != "f32":
                        row = replace(row, measurement=settings.measured(deployed.for_batches()))
                    runs[str(len(rows))] = run
            rows.append(row)
        times = in_turns(runs, settings.repeats, 3, 20.0, 1, SETTLING, report)
    for index, result in times.items():
        speed = batch / result.median
        rows[int(index)] = replace(
            rows[int(index)], seconds=result.median, spread=result.spread, examples_per_second=speed
        )
    return rows, chosen


def _networks(
    model: nn.Module, input: Any, settings: BenchmarkSettings
) -> tuple[dict[tuple[str, str], nn.Module], Factoring | None]:
    """Return the network in each (form, layout), and the result of `factor` if the factored form is among them."""
    networks: dict[tuple[str, str], nn.Module] = {}
    chosen = None
    for form, layout in itertools.product(settings.forms, settings.layouts):
        if form == "factored":
            if chosen is None:
                chosen = factoring(model, input)
                networks[form, "channels_last"] = chosen.model
            continue
        network = fuse(model, input) if form == "dense" else exchange(model, {})
        networks[form, layout] = kernels_to_channels_last(network) if layout == "channels_last" else network
    return networks, chosen


def _warm_run(network: nn.Module, input: Any, compiled: bool) -> tuple[Callable[[], Any] | None, str | None]:
    """Return a function that has run the network once; or None, and a note with the reason why it does not run."""
    try:
        run = partial(_run, torch.compile(network) if compiled else network, input)
        run()
        return run, None
    except Exception as error:
        return None, _note("does not compile" if compiled else "does not run", error)


def _note(problem: str, error: Exception) -> str:
    return f"{problem} ({type(error).__name__}: {first_line(error)})"


def _run(network: Any, input: Any) -> Any:
    with torch.no_grad():
        return call(network, input)


def _float64_tensors(output: Any) -> list[torch.Tensor]:
    return [tensor.double() for tensor in tensors_in(output) if tensor.is_floating_point()]


def _repeat_examples(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    """Repeat the examples in a tensor up to ``batch``; return a scalar unchanged."""
    if not tensor.dim():
        return tensor
    times = -(-batch // max(len(tensor), 1))
    return tensor.repeat(times, *[1] * (tensor.dim() - 1))[:batch]


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
