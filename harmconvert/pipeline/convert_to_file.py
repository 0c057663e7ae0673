"""convert_to_file(): a network in, a verified harmonic checkpoint out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from ..arguments import stays_as_it_is
from ..calibration import CalibrationSettings
from ..data.datasets import DataRequest
from ..errors import CheckError
from ..files import check_output, write_file
from ..network.distributed import joined, on_first_rank
from ..network.forms import dense_form
from ..plan.plan import Plan
from ..search.records import SearchSettings
from ..storage.checkpoint import Header, Network, is_harmonic, read_checkpoint, read_header
from ..storage.precision import dtype_named
from ..training.evaluation import Evaluation
from .calibrating import Calibrating, calibration_batches
from .convert import Conversion, convert
from .devices import place
from .inputs import Sizes, declare_inputs, verification_inputs, zeros_of
from .labelled import halves
from .listener import SILENT, Listener
from .networks import Openable, is_given, known_source, opened, text_of
from .precision import in_fewer_bits
from .saving import save
from .verification import Verification
from .verify import verify


@dataclass(frozen=True)
class Rounding:
    """The dtype that the weights of a file have, and the relative difference that this makes to the outputs."""

    dtype: str
    difference: float


@dataclass(frozen=True)
class ConvertedFile:
    """A harmonic checkpoint that was written and verified.

    ``source`` is where the network came from, ``model`` the harmonic network in the file, ``header`` what the file says
    of itself. ``conversion`` is None where the network
    was harmonic already and was written as it is; ``rounding`` is None of a file in float32. ``held_out`` says how the
    uncut and the converted network do on labelled images that chose nothing.
    """

    output: str
    source: str
    model: nn.Module
    header: Header
    verification: Verification
    conversion: Conversion | None = None
    rounding: Rounding | None = None
    held_out: Mapping[str, Evaluation] | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict of all but the network."""
        verification = self.verification.to_json()
        if self.conversion is None:
            return {"output": self.output, "plan": self.header.plan.to_json(), "verification": verification}
        told = {"output": self.output, **self.conversion.to_json(), "verification": verification}
        return {**told, "held_out": _judged(self.held_out)}


def convert_to_file(
    source: Openable,
    output: str | Path,
    lam: str | int | Mapping[str, int] | Plan | None = None,
    *,
    plan: str | Path | None = None,
    budget: str | Mapping[str, Any] | None = None,
    max_drop: float | None = None,
    labelled: str | Path | DataRequest | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    basis: str = "dct",
    normalization: str = "ortho",
    dtype: str = "float32",
    calibration: Calibrating | None = None,
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
    listener: Listener = SILENT,
) -> ConvertedFile:
    """Open a network, convert it, verify it, and write one harmonic checkpoint.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     done = convert_to_file("sample:resnet_mnist5k", f"{folder}/cut.safetensors", "progressive")
    >>> done.verification.as_planned, len(done.header.plan.layers)
    (True, 19)

    Args:
        source: a source string, a request or a network; a given network is not changed.
        output: the .safetensors file to write.
        lam: as for `convert`; None is ``"full"``, and of a network that is harmonic already what it has.
        plan: a plan file to follow instead: JSON, or a harmonic checkpoint.
        budget, max_drop, include, exclude, basis, normalization, settings, search: as for `convert`.
        labelled: images for ``max_drop``; every second test image chooses, the others say what was lost.
        dtype: of the weights in the file: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        calibration: a folder of images, ``sample:NAME``, a timm data set, or batches of your own.
        batch_size: calibration images in one forward.
        latency_batch: examples in the forward that is timed for a budget of latency.
        input_sizes: of each input of one example, (C, H, W); default: the network's own.
        example_input: instead of ``input_sizes``, as for `convert`.
        preprocessing: of images, in timm's words, where it is not the network's own (`harmconvert.data.preprocessing`).
        device: where to run; default: a GPU where there is one and images are given, else where the network is.
        force: replace a file that is there.
        command: name and words of the command that runs this, for the file to record.
        listener: is told what happens; `Conversion`, `Verification` and `Rounding` are its results on the way.

    Raises:
        UsageError: the output exists, or arguments that do not go together; and as `convert`.
        InputError: the network, or its images, cannot be used. OutsideError: a disk, a network or a package fails.
        CheckError: the converted network is not what its plan says; nothing was written.
    """
    check_output(output, force, ".safetensors")
    dtype_named(dtype)
    preprocessing, settings = preprocessing or {}, settings or CalibrationSettings(inputs=256)
    target = _Target(source, str(output), dtype, input_sizes, force, command, listener)
    choices = (*(one is not None for one in (lam, plan, budget, labelled, calibration)), include, exclude)
    as_it_is = stays_as_it_is(None if is_given(source) else text_of(source), choices, basis, normalization, dtype)
    with joined():
        network = opened(source, listener, intact=True, form="harmonic" if as_it_is else "dense")
        if as_it_is and network.header:
            return _written_as_it_is(network, target)
        if is_given(source):
            network = replace(network, model=dense_form(network.model))  # a copy, which may be changed
        declare_inputs(network.model, preprocessing, input_sizes)
        if device is not None or not is_given(source):
            place(network.model, device, gpu=calibration is not None or labelled is not None)
        images: dict[str, Any] = {"sizes": input_sizes, "preprocessing": preprocessing, "listener": listener}
        parts = halves(labelled, network.model, **images) if labelled is not None else None
        batches = calibration_batches(calibration, network.model, settings, batch_size=batch_size, **images)
        if example_input is None:
            example_input = zeros_of(input_sizes, network.model, latency_batch)
        else:
            target = replace(target, inputs=example_input)
        with listener.progress("converting") as progress:
            conversion = convert(
                network.model,
                _plan(plan) if plan is not None else "full" if lam is None else lam,
                example_input=example_input,
                include=include,
                exclude=exclude,
                basis=basis,
                normalization=normalization,
                budget=budget,
                max_drop=max_drop,
                metric=parts.metric if parts else None,
                search=search or SearchSettings(say=listener.say),
                calibration=batches,
                settings=settings,
                progress=progress,
            )
        with listener.busy("testing on the images that chose nothing"):
            held_out = parts.held_out(network.model, conversion.model) if parts else None  # by all processes
        seen = cast("Sequence[Tensor]", batches) if isinstance(calibration, str | Path | DataRequest) else ()
        return _written(network, conversion, target, held_out, seen)


@dataclass(frozen=True)
class _Target:
    """What is to be written, from what, and how it is verified: on ``inputs`` or on inputs of these ``sizes``."""

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

    def made_by(self, network: Network) -> dict[str, Any]:
        """The entry of the history that says which command ran, where one did."""
        if self.command is None:
            return {}
        text = text_of(self.source) if network.header else str(network.source)
        return {"command": {**self.command, "source": text}}


def _plan(file: str | Path) -> Plan:
    """The plan of a JSON file, or of a harmonic checkpoint."""
    return read_header(file).plan if is_harmonic(file) else Plan.load(file)


def _written_as_it_is(network: Network, target: _Target) -> ConvertedFile:
    """Write a network that is harmonic already; the file takes its place once it is compared with the network."""
    output = target.output

    def work() -> tuple[Header, Verification]:
        inputs = target.verification_inputs(network)
        recorded = network.header.history if network.header else {}
        written: list[tuple[Header, Verification]] = []

        def write(staging: Path) -> None:
            file = staging.with_name("network.safetensors")  # the target may be called otherwise, behind a link
            header = save(network, file, history=None if recorded else target.made_by(network), force=True)
            loaded = read_checkpoint(file, model=dense_form(network.model))
            check = verify(network.model, loaded, **inputs)
            if not check.ok:
                raise CheckError(f"{output}, read back: {check.verdict}; nothing was written")
            file.replace(staging)
            written.append((header, check))

        write_file(output, write, target.force)
        return written[0]

    header, check = on_first_rank(work)
    target.listener.wrote(output)
    return ConvertedFile(output, str(network.source), network.model, header, check)


def _written(
    network: Network,
    conversion: Conversion,
    target: _Target,
    held_out: Mapping[str, Evaluation] | None,
    images: Sequence[Tensor],
) -> ConvertedFile:
    """Verify a conversion, store it in the dtype asked for, write it."""
    listener, rounding = target.listener, None
    listener.result(conversion)
    listener.say("verifying")
    inputs = target.verification_inputs(network, images)
    with listener.progress() as progress:
        check = on_first_rank(lambda: verify(network.model, conversion, **inputs, progress=progress))
    if not (check.ok or (check.as_planned and not conversion.plan.whole)):
        raise CheckError(f"{check.verdict}; nothing was written")
    listener.result(check)
    small = conversion
    if target.dtype != "float32":
        small, difference = in_fewer_bits(conversion, target.dtype, inputs["inputs"])
        rounding = Rounding(target.dtype, difference)
        listener.result(rounding)
    history = target.made_by(network) | ({"held_out": _judged(held_out)} if held_out else {})
    source = known_source(network)
    header = on_first_rank(lambda: save(small, target.output, source=source, history=history, force=target.force))
    listener.wrote(target.output)
    return ConvertedFile(target.output, str(network.source), small.model, header, check, small, rounding, held_out)


def _judged(held_out: Mapping[str, Evaluation] | None) -> dict[str, Any] | None:
    return {name: found.to_json() for name, found in held_out.items()} if held_out else None
