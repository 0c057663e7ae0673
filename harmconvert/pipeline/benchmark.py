"""benchmark(): measure how fast each form of a network is on this machine, and advise which one to deploy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..calibration import CalibrationSettings
from ..data.datasets import DataRequest
from ..data.loading import Batch
from ..deploy.advice import Benchmark
from ..deploy.benchmark import FORMS, LAYOUTS, BenchmarkSettings, time_forms
from ..deploy.quantised_graphs import calibration_context
from ..errors import Argument, UsageError
from ..metrics import MetricLike, TaskBatches, measured_on, metric_of
from ..network.values import match_dtype
from ..training.trainer import MachineSettings
from .calibrating import CalibrationData, calibration_batches
from .devices import place
from .export import BATCH_SIZE
from .inputs import Sizes, random_of
from .listener import Listener
from .networks import Openable, opened, own
from .showing import listener_for
from .testing import evaluation_loading, own_loader


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
    runtimes: Sequence[str] = ("torch",),
    precisions: Sequence[str] = ("f32",),
    data: CalibrationData | None = None,
    max_drop: float = 1.0,
    metric: MetricLike | None = None,
    settings: CalibrationSettings | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    device: str | None = None,
    progress: bool | None = None,
    listener: Listener | None = None,
) -> Benchmark:
    """Measure the forms of a network in turns, for each batch size and number of threads.

    >>> result = benchmark(nn.Conv2d(3, 4, 3), input_sizes=[(3, 8, 8)], batches=[2], repeats=3)
    >>> [(row.form, row.layout, row.batch) for row in result.rows]
    [('dense', 'contiguous', 2), ('dense', 'channels_last', 2)]

    Args:
        model: a source string, a request, or a network object, which is not changed.
        example_input: as for `convert`; default: the first image of ``data``, else one seeded random example of each of
            ``input_sizes``.
        input_sizes: size of each input of one example, (C, H, W); default: the network's own.
        batches: batch sizes.
        threads: numbers of threads of torch; default: the current number.
        forms, layouts: ``"dense"``, ``"harmonic"``, ``"factored"``; ``"contiguous"``, ``"channels_last"``.
        compiled: time each form also under torch.compile.
        repeats: how often each form is timed; fewer times if a forward pass takes long.
        runtimes: of ``"torch"``, ``"onnx"`` and ``"openvino"``; those that are installed are timed, on a CPU.
        precisions: of ``"f32"``, ``"bf16"`` and ``"int8"``; those that the processor and the runtime have are timed.
        data: images, as the ``calibration`` of `convert_to_file`, on which low precision is calibrated and compared.
        max_drop: the largest loss of low precision that the advice allows: the images with another top-1, in %.
        metric: also measure the network in each precision with this metric, as for `evaluate`, on the test images of
            ``data``, or on its batches: then these are (inputs, targets) pairs if the metric needs targets.
        settings: the number of these images.
        preprocessing: of images, with timm's names, if it is not the network's own (`harmconvert.data.preprocessing`).
        device: where to run; default: the device of a network object, else the CPU.
        progress: show progress bars; None: in an interactive session (a Python prompt, IPython, a notebook).
        listener: receives messages and progress instead; without it, the logger ``harmconvert`` gets them.

    Raises:
        UsageError: a form or a layout is unknown, no input size is known, or the network does not accept the input.
        CheckError: the outputs of a form differ from those of the network.
    """
    listener = listener_for(listener, progress)
    if metric is not None and data is None:
        raise UsageError(Argument("metric"), " is measured on data: give ", Argument("data", "DATA"))
    chosen = None if metric is None else metric_of(metric)
    data = tuple(data) if isinstance(data, Iterator) else data
    images = settings or CalibrationSettings(inputs=256)
    timed = BenchmarkSettings(batches, threads, forms, layouts, compiled, repeats, runtimes, precisions)
    network = opened(model, listener)
    if device is not None:
        network = own(network, model)
        place(network.model, device)
    given = calibration_batches(
        data, network.model, images, batch_size=BATCH_SIZE, sizes=input_sizes, preprocessing=preprocessing or {},
        listener=listener,
    )  # fmt: skip
    if example_input is None and isinstance(given, tuple) and given and isinstance(given[0], Tensor):
        # The ranges of 8 bits suit the images: on random values their error would say nothing.
        example_input = match_dtype(given[0][:1], network.model)
    elif example_input is None:
        example_input = random_of(input_sizes, network.model)
    if given is not None:
        timed = replace(timed, context=calibration_context(network.model, given, images.inputs))
    if chosen is not None and data is not None:
        tested, name = _test_batches(data, network.model, preprocessing or {}, listener)
        timed = replace(timed, measured=lambda one: measured_on(chosen, tested, one, network.model, name))
    with listener.progress() as report:
        result = time_forms(network.model, example_input, timed, report)
    return replace(result, source=str(network.source), max_drop=max_drop)


def _test_batches(
    data: CalibrationData, model: nn.Module, preprocessing: Mapping[str, Any], listener: Listener
) -> tuple[Iterable[Batch], str]:
    """Return the batches on which a metric is measured, and the name of the data."""
    data, name = own_loader(data)
    if not isinstance(data, str | Path | DataRequest):
        return TaskBatches(data), name
    request = DataRequest.parse(data, holdout=0.0)
    loading, _ = evaluation_loading(
        request, model, MachineSettings(), batch_size=BATCH_SIZE, workers=0, preprocessing=preprocessing,
        listener=listener,
    )  # fmt: skip
    return loading, request.name
