"""convert_to_file(): convert a network, verify it, and write a harmonic checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from ..arguments import Budget, stays_as_it_is
from ..calibration import CalibrationSettings
from ..data.datasets import DIVIDED, DataRequest
from ..errors import Argument, CheckError, UsageError
from ..files import check_output, write_file
from ..metrics import Metric, MetricLike, metric_of
from ..network.distributed import joined, on_first_rank
from ..network.forms import dense_form
from ..plan import Bits, Plan, Rank
from ..search.records import SearchSettings
from ..storage.checkpoint import Header, Network, is_harmonic, read_checkpoint, read_header
from ..storage.precision import dtype_named
from ..training.evaluation import Evaluation
from .calibrating import CalibrationData, calibration_batches
from .convert import Conversion, convert
from .devices import place
from .inputs import Sizes, declare_inputs, verification_inputs, zeros_of
from .labelled import Halves, halves
from .listener import Listener
from .networks import Openable, is_given, known_source, opened, text_of
from .overview import overview
from .precision import in_fewer_bits
from .saving import save
from .showing import listener_for
from .testing import TaskData
from .verification import Verification
from .verify import verify


@dataclass(frozen=True)
class Rounding:
    """The dtype of the weights in a file, and the relative difference of the outputs that it causes."""

    dtype: str
    difference: float


@dataclass(frozen=True, repr=False)
class ConvertedFile:
    """A harmonic checkpoint that is written and verified.

    ``source`` is the source of the network, ``model`` the harmonic network in the file, ``header`` the header of the
    file. ``conversion`` is None if the network was already harmonic and was written unchanged. ``rounding`` is None for
    a file in float32. ``held_out`` has the evaluations of the uncut and the converted network on labelled images that
    did not choose the size.
    """

    output: str
    source: str
    model: nn.Module
    header: Header
    verification: Verification
    conversion: Conversion | None = None
    rounding: Rounding | None = None
    held_out: Mapping[str, Evaluation] | None = None

    def __repr__(self) -> str:
        if self.conversion is None:
            return f"{self.output}: {self.source}, already harmonic and written unchanged; {self.verification.verdict}"
        return f"{self.output}\n{overview(self.conversion, self.verification.verdict)}"

    def to_json(self) -> dict[str, Any]:
        """Return everything except the network as JSON values."""
        verification = self.verification.to_json()
        if self.conversion is None:
            return {"output": self.output, "plan": self.header.plan.to_json(), "verification": verification}
        result = {"output": self.output, **self.conversion.to_json(), "verification": verification}
        return {**result, "held_out": _held_out_json(self.held_out)}


def convert_to_file(
    source: Openable,
    output: str | Path,
    lam: str | int | Mapping[str, int] | Plan | None = None,
    *,
    plan: str | Path | None = None,
    budget: str | Mapping[str, Any] | None = None,
    max_drop: float | None = None,
    metric: MetricLike | None = None,
    labelled: TaskData | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    basis: str = "dct",
    normalization: str = "ortho",
    rank: float | int | Mapping[str, float | int] | None = None,
    bits: float | str | Mapping[str, float] | None = None,
    dtype: str = "float32",
    calibration: CalibrationData | None = None,
    settings: CalibrationSettings | None = None,
    batch_size: int = 32,
    search: SearchSettings | None = None,
    latency_batch: int = 1,
    input_sizes: Sizes = (),
    example_input: Any = None,
    preprocessing: Mapping[str, Any] | None = None,
    device: str | None = None,
    force: bool = False,
    command: Mapping[str, Any] | None = None,
    progress: bool | None = None,
    listener: Listener | None = None,
) -> ConvertedFile:
    """Open a network, convert it, verify it, and write one harmonic checkpoint.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = convert_to_file("sample:resnet_mnist5k", f"{folder}/cut.safetensors", "progressive")
    >>> file.verification.as_planned, len(file.header.plan.layers)
    (True, 19)

    Args:
        source: a source string, a request, or a network object, which is not changed.
        output: the .safetensors file to write.
        lam: as for `convert`; None means ``"full"``, or no change if the network is already harmonic. If the weights of
            a harmonic network are to be coded, None keeps its cut.
        plan: a file with a plan, instead of ``lam``: JSON, or a harmonic checkpoint.
        rank, bits, budget, max_drop, include, exclude, basis, normalization, settings, search: as for `convert`.
        metric: what ``max_drop`` limits, as for `evaluate`; default: the top-1 of a classifier.
        labelled: data for ``max_drop``, as for `evaluate`: every second test image (of your own batches, every second
            batch) chooses the size, the others measure the loss.
        dtype: type of the weights in the file: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        calibration: a folder of images, ``sample:NAME``, a timm data set, or batches of your own. If it names the same
            data as ``labelled``, the training part calibrates and the test part measures; data without splits are
            divided in half.
        batch_size: calibration images in one forward pass.
        latency_batch: examples in the forward pass that is measured for a budget of latency.
        input_sizes: size of each input of one example, (C, H, W); default: the network's own.
        example_input: instead of ``input_sizes``, as for `convert`.
        preprocessing: of images, with timm's names, if it is not the network's own (`harmconvert.data.preprocessing`).
        device: where to run; default: a GPU if there is one and images are used, else the CPU; a network object stays
            on its device.
        force: replace an existing file.
        command: name and options of the running command, for the history of the file.
        progress: show progress bars; None: in an interactive session (a Python prompt, IPython, a notebook).
        listener: receives messages and progress instead, and the results `Conversion`, `Verification` and `Rounding`;
            without it, the logger ``harmconvert`` gets the messages.

    Raises:
        UsageError: the output exists, arguments contradict each other, or as in `convert`.
        InputError: the network or the images are unusable.
        OutsideError: the disk, the internet or a package is not available.
        CheckError: the converted network is not what its plan says; no file was written.
    """
    listener = listener_for(listener, progress)
    check_output(output, force, ".safetensors")
    dtype_named(dtype)
    settings = settings or CalibrationSettings(inputs=256)
    if metric is not None and labelled is None:
        raise UsageError(Argument("metric"), " is measured on data: give ", Argument("labelled", "DATA"))
    chosen = None if metric is None else metric_of(metric)
    if labelled is not None and isinstance(calibration, str | Path | DataRequest) and calibration == labelled:
        calibration = labelled = DataRequest.parse(calibration, holdout=DIVIDED)
    data = _Data(calibration, labelled, chosen, settings, batch_size, input_sizes, preprocessing or {}, listener)
    target = _Target(source, str(output), dtype, input_sizes, force, command, listener, example_input)
    choices = (*(one is not None for one in (lam, rank, bits, plan, budget, labelled, calibration)), include, exclude)
    unchanged = stays_as_it_is(None if is_given(source) else text_of(source), choices, basis, normalization, dtype)
    options: dict[str, Any] = {
        "include": include, "exclude": exclude, "basis": basis, "normalization": normalization, "rank": rank,
        "bits": bits, "budget": budget, "max_drop": max_drop, "search": search or SearchSettings(say=listener.say),
        "settings": settings, "lam": _plan_in(plan) if plan is not None else "full" if lam is None else lam,
    }  # fmt: skip
    with joined():
        network = opened(source, listener, intact=True, form="harmonic" if unchanged else "dense")
        if unchanged and network.header:
            return _write_unchanged(network, target)
        if network.header and lam is None and plan is None:
            options["lam"] = _kept_plan(network.header.plan, options)
        network = _prepared(network, source, data, device)
        example = zeros_of(input_sizes, network.model, latency_batch) if example_input is None else example_input
        reserved = target.record_bytes(network)
        return _write(network, _convert(network.model, data, example, options, reserved), target)


@dataclass(frozen=True)
class _Data:
    """The images of a conversion, for the calibration and for ``max_drop``, and how to read them."""

    calibration: CalibrationData | None
    labelled: TaskData | None
    metric: Metric | None
    settings: CalibrationSettings
    batch_size: int
    sizes: Sizes
    preprocessing: Mapping[str, Any]
    listener: Listener

    @property
    def on_gpu(self) -> bool:
        """Whether the network runs on images, for which a GPU is faster."""
        return self.calibration is not None or self.labelled is not None

    def batches(self, model: nn.Module) -> Iterable[Any] | None:
        """Return the batches for the calibration."""
        return calibration_batches(
            self.calibration, model, self.settings, batch_size=self.batch_size, sizes=self.sizes,
            preprocessing=self.preprocessing, listener=self.listener,
            training_part=self.labelled is not None and self.calibration is self.labelled,
        )  # fmt: skip

    def halves(self, model: nn.Module) -> Halves | None:
        """Return the halves of the labelled images; None without labelled images."""
        if self.labelled is None:
            return None
        return halves(
            self.labelled, model, self.metric, sizes=self.sizes, preprocessing=self.preprocessing,
            listener=self.listener,
        )  # fmt: skip


@dataclass(frozen=True)
class _Converted:
    """A conversion, the evaluations on held-out images, and the calibration images if they were read from a name."""

    conversion: Conversion
    held_out: Mapping[str, Evaluation] | None
    images: Sequence[Tensor]


@dataclass(frozen=True)
class _Target:
    """The file to write, and how to verify it: on ``inputs``, or else on inputs of these ``sizes``."""

    source: Openable
    output: str
    dtype: str
    sizes: Sizes
    force: bool
    command: Mapping[str, Any] | None
    listener: Listener
    inputs: Any = None

    def verification_inputs(self, network: Network, images: Sequence[Tensor] = ()) -> dict[str, Any]:
        if self.inputs is not None:
            return {"inputs": self.inputs}
        return verification_inputs(self.sizes, network.source, images)

    def command_record(self, network: Network) -> dict[str, Any]:
        """Return the history entry of the command that runs; empty if no command runs."""
        if self.command is None:
            return {}
        text = text_of(self.source) if network.header else str(network.source)
        return {"command": {**self.command, "source": text}}

    def record_bytes(self, network: Network) -> int:
        """Return the most bytes that the source and the command need in the header of the file."""
        source = known_source(network)
        record = {**self.command_record(network), "source": asdict(source) if source else None}
        return len(json.dumps(json.dumps(record)))


def _prepared(network: Network, source: Openable, data: _Data, device: str | None) -> Network:
    """Return the network, or a copy of the caller's, in dense form, with its inputs declared and on its device."""
    if is_given(source):
        network = replace(network, model=dense_form(network.model))
    declare_inputs(network.model, data.preprocessing, data.sizes)
    if device is not None or not is_given(source):
        place(network.model, device, gpu=data.on_gpu)
    return network


def _convert(
    model: nn.Module, data: _Data, example_input: Any, options: Mapping[str, Any], reserved: int
) -> _Converted:
    """Convert a network with the ``options`` of `convert`, and evaluate it on held-out images.

    ``reserved``: bytes of a budget for the records that the file gets beside the network.
    """
    parts, batches = data.halves(model), data.batches(model)
    options = dict(options)
    if _in_bytes(options["budget"]):
        options["budget"] = replace(Budget.parse(options["budget"]), reserved=reserved)
    with data.listener.progress("converting") as progress:
        conversion = convert(
            model, example_input=example_input, calibration=batches, progress=progress,
            metric=parts.chooser() if parts else None, **options,
        )  # fmt: skip
    with data.listener.busy("testing on held-out images"):
        held_out = parts.held_out(conversion.model) if parts else None  # in every process
    images = cast("Sequence[Tensor]", batches) if isinstance(data.calibration, str | Path | DataRequest) else ()
    return _Converted(conversion, held_out, images)


def _kept_plan(plan: Plan, options: Mapping[str, Any]) -> Plan | str:
    """Return what a conversion keeps of a harmonic network's plan: its cut, if it codes or lowers ranks only."""
    rank, budget = options["rank"], options["budget"]
    coded = options["bits"] is not None or _in_bytes(budget)
    if not coded and rank is None:
        return "full"
    kept = plan.without(Bits.axis)
    return kept if rank is None else kept.without(Rank.axis)


def _in_bytes(budget: str | Mapping[str, Any] | None) -> bool:
    return budget is not None and Budget.parse(budget).unit == "bytes"


def _plan_in(file: str | Path) -> Plan:
    """Return the plan in a JSON file or in a harmonic checkpoint."""
    return read_header(file).plan if is_harmonic(file) else Plan.load(file)


def _write_unchanged(network: Network, target: _Target) -> ConvertedFile:
    """Write a network that is already harmonic; compare the file with the network before it gets its name."""
    output = target.output

    def write_and_verify() -> tuple[Header, Verification]:
        inputs = target.verification_inputs(network)
        recorded = network.header.history if network.header else {}
        written: list[tuple[Header, Verification]] = []

        def write(staging: Path) -> None:
            file = staging.with_name("network.safetensors")  # behind a link, the target may have another suffix
            header = save(network, file, history=None if recorded else target.command_record(network), force=True)
            loaded = read_checkpoint(file, model=dense_form(network.model))
            check = verify(network.model, loaded, **inputs, progress=False)
            if not check.ok:
                raise CheckError(f"{output}, read back: {check.verdict}; nothing was written")
            file.replace(staging)
            written.append((header, check))

        write_file(output, write, target.force)
        return written[0]

    header, check = on_first_rank(write_and_verify)
    target.listener.wrote(output)
    return ConvertedFile(output, str(network.source), network.model, header, check)


def _write(network: Network, converted: _Converted, target: _Target) -> ConvertedFile:
    """Verify a conversion, round it to the dtype of the file, and write it."""
    conversion, held_out = converted.conversion, converted.held_out
    listener, rounding = target.listener, None
    listener.result(conversion)
    listener.say("verifying")
    inputs = target.verification_inputs(network, converted.images)
    with listener.progress() as progress:
        check = on_first_rank(lambda: verify(network.model, conversion, **inputs, progress=progress))
    if not (check.ok or (check.as_planned and not conversion.plan.whole)):
        raise CheckError(f"{check.verdict}; nothing was written")
    listener.result(check)
    if target.dtype != "float32":
        conversion, difference = in_fewer_bits(conversion, target.dtype, inputs["inputs"])
        rounding = Rounding(target.dtype, difference)
        listener.result(rounding)
    history = target.command_record(network) | ({"held_out": _held_out_json(held_out)} if held_out else {})
    source = known_source(network)
    header = on_first_rank(lambda: save(conversion, target.output, source=source, history=history, force=target.force))
    listener.wrote(target.output)
    model = conversion.model
    return ConvertedFile(target.output, str(network.source), model, header, check, conversion, rounding, held_out)


def _held_out_json(held_out: Mapping[str, Evaluation] | None) -> dict[str, Any] | None:
    return {name: evaluation.to_json() for name, evaluation in held_out.items()} if held_out else None
