"""benchmark(): measure how fast each form of a network is on this machine, and advise which one to deploy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..deploy.benchmark import FORMS, LAYOUTS, Benchmark, BenchmarkSettings, time_forms
from .devices import place
from .inputs import Sizes, random_of
from .listener import SILENT, Listener
from .networks import Openable, opened, own


def benchmark(
    model: Openable,
    example_input: Any = None,
    *,
    input_sizes: Sizes = (),
    batches: Sequence[int] = (1, 16),
    threads: Sequence[int] = (),
    forms: Sequence[str] = FORMS,
    layouts: Sequence[str] = LAYOUTS,
    compiled: bool = False,
    repeats: int = 9,
    device: str | None = None,
    listener: Listener = SILENT,
) -> Benchmark:
    """Measure the forms of a network in turns, for each batch size and number of threads.

    >>> from torch import nn
    >>> result = benchmark(nn.Conv2d(3, 4, 3), input_sizes=[(3, 8, 8)], batches=[2], repeats=3)
    >>> [(row.form, row.layout, row.batch) for row in result.rows]
    [('dense', 'contiguous', 2), ('dense', 'channels_last', 2)]

    Args:
        model: a source string, a request, or a network object, which is not changed.
        example_input: as for `convert`; default: one seeded random example of each of ``input_sizes``.
        input_sizes: size of each input of one example, (C, H, W); default: the network's own.
        batches: batch sizes.
        threads: numbers of threads of torch; default: the current number.
        forms, layouts: ``"dense"``, ``"harmonic"``, ``"factored"``; ``"contiguous"``, ``"channels_last"``.
        compiled: time each form also under torch.compile.
        repeats: how often each form is timed; fewer times if a forward pass takes long.
        device: where to run; default: the device of a network object, else the CPU.
        listener: receives messages and progress.

    Raises:
        UsageError: a form or a layout is unknown, no input size is known, or the network does not accept the input.
        CheckError: the outputs of a form differ from those of the network.
    """
    settings = BenchmarkSettings(batches, threads, forms, layouts, compiled, repeats)
    network = opened(model, listener)
    if device is not None:
        network = own(network, model)
        place(network.model, device)
    if example_input is None:
        example_input = random_of(input_sizes, network.model)
    with listener.progress() as progress:
        result = time_forms(network.model, example_input, settings, progress)
    return replace(result, source=str(network.source))
