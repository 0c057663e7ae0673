"""What a report says of a checkpoint, as data: the page, its JSON and the comparison are made from this and no more.

What the file does not tell, and nothing measured, is None: a report never guesses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

from torch import nn

from ..deploy.benchmark import Benchmark
from ..errors import InputError
from ..kernels.basis import Frequency, all_frequencies
from ..network.forms import dense_form
from ..network.layers import weighted_layers
from ..network.tracing import Trace, find_layers, trace_if_possible
from ..pipeline.convert import RECORD_KEY
from ..plan import Frequencies, LayerPlan, Plan, bases_text, normalizations_text
from ..plan.cost import Cost, LayerCost, layer_costs, network_cost, parameter_count, tensor_bytes
from ..storage.checkpoint import Header, Source
from ..training.evaluation import wilson_interval
from .kernels import layers_of
from .reproduce import reproduction
from .spectrum import spectrum

REPORT_VERSION = 1
# What comes of a history that lacks something, or has numbers that make no sense together.
UNTELLABLE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


@dataclass(frozen=True)
class Form:
    """One form of the network: MACs per example; where it was timed (`Report.timing`) the median seconds of a forward,
    half the distance of the quartiles as a share of it, and the memory layout that was the faster one."""

    name: str
    parameters: int
    bytes: int
    macs: int | None
    seconds: float | None = None
    spread: float | None = None
    layout: str | None = None


@dataclass(frozen=True)
class StageFacts:
    """What the network was worth at one stage, shares from 0 to 1; ``why`` says why nothing is known."""

    name: str
    images: int | None = None
    top1: float | None = None
    top1_interval: tuple[float, float] | None = None
    loss: float | None = None
    agreement: float | None = None
    divergence: float | None = None
    why: str | None = None


@dataclass(frozen=True)
class LayerFacts:
    """One convolution over 1x1. ``kept`` of ``total`` frequencies (0: skipped); ``keeps`` says which.

    ``kernel_error`` is that of the plain cut; output errors are of held-back inputs, before and after calibration.
    ``other_axes`` says what it keeps on axes other than the space axis, where that is not everything.
    ``spectrum`` is the mean |coefficient| of each frequency, of the uncut kernel where ``spectrum_uncut``.
    """

    name: str
    kind: str
    kernel: tuple[int, ...]
    kept: int
    total: int
    keeps: tuple[bool, ...]
    levels: int | None
    parameters: int | None = None
    kept_parameters: int | None = None
    macs: int | None = None
    factored_macs: int | None = None
    energy: float | None = None
    kernel_error: float | None = None
    output_error_before: float | None = None
    output_error_after: float | None = None
    decision: str | None = None
    why: str | None = None
    spectrum: tuple[float, ...] | None = None
    spectrum_uncut: bool = False
    other_axes: str = ""

    @property
    def share(self) -> float:
        """Share of the frequencies that stay; of a skipped layer all do."""
        return self.kept / self.total if self.kept else 1.0

    @property
    def cut(self) -> bool:
        """Whether it lost any."""
        return 0 < self.kept < self.total


@dataclass(frozen=True)
class Report:
    """All that is known of a harmonic checkpoint. ``calibration``, ``search``, ``drops`` and ``training`` are as the
    checkpoint's history has them; ``timing`` is what the forms were timed with and on, None where they were not."""

    name: str
    source: Source | None
    plan: Plan
    forms: tuple[Form, ...]
    layers: tuple[LayerFacts, ...]
    stages: tuple[StageFacts, ...]
    calibration: Mapping[str, Any] | None
    search: Mapping[str, Any] | None
    drops: tuple[Mapping[str, Any], ...]
    training: tuple[Mapping[str, Any], ...]
    commands: tuple[str, ...]
    versions: Mapping[str, str]
    sha256: str | None = None
    file_bytes: int | None = None
    parameter_share_over_1x1: float | None = None
    timing: Mapping[str, Any] | None = None
    command_notes: tuple[str, ...] = ()

    def form(self, name: str) -> Form:
        """The form of that name."""
        return next(form for form in self.forms if form.name == name)

    @property
    def bases(self) -> str:
        """The names of the bases that its layers are in."""
        return bases_text(self.plan)

    @property
    def normalizations(self) -> str:
        """The normalizations of the bases."""
        return normalizations_text(self.plan)

    @property
    def share(self) -> float:
        """Parameters over those of the uncut network."""
        return self.form("harmonic").parameters / max(self.form("dense").parameters, 1)

    @property
    def from_scratch(self) -> bool:
        """Whether the first thing recorded is a training, not a conversion."""
        return bool(self.training) and not self.training[0].get("stages")

    @property
    def cut(self) -> tuple[LayerFacts, ...]:
        """The layers that lost frequencies."""
        return tuple(layer for layer in self.layers if layer.cut)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict; the plan as `Plan.load` reads it."""
        plain = asdict(replace(self, plan=Plan(())))
        plain["layers"] = [{**asdict(layer), "share": layer.share} for layer in self.layers]
        return {
            "report_version": REPORT_VERSION, "harmconvert": version("harmconvert"), **plain,
            "plan": self.plan.to_json(),
        }  # fmt: skip


def report_of(
    model: nn.Module,
    header: Header,
    name: str,
    *,
    path: str | Path | None = None,
    example_input: Any = None,
    latency: Benchmark | None = None,
) -> Report:
    """All that can be said of a harmonic network.

    Args:
        model: in harmonic form. header: what its file says of it.
        name: what to call it. path: its file, for hash and size.
        example_input: what MACs are counted on; the network's own size where None, and unknown where that is, too.
        latency: its forms timed, uncompiled, at one batch size and number of threads.

    Raises:
        InputError: the header's history is not what this harmconvert writes.
    """
    dense = dense_form(model)
    run = trace_if_possible(dense, "any", example_input)
    cost = network_cost(dense, header.plan, run)
    history = header.history
    try:
        record = dict(history.get(RECORD_KEY) or {})
        calibration = history.get("calibration")
        # Layers that share their coefficients have one record, under all of their names.
        refits = {
            name: layer for layer in (calibration or {}).get("layers", []) for name in str(layer["name"]).split(", ")
        }
        training = tuple(dict(entry) for entry in history.get("training", []))
        layers = _layers(model, dense, header.plan, run, record.get("layers") or {}, refits)
        again = reproduction(header, name, find_layers(dense, run))
        return Report(
            name=name,
            source=header.source,
            plan=header.plan,
            forms=tuple(_timed(form, latency) for form in _forms(model, cost, record, header)),
            layers=layers,
            stages=_stages(training, history.get("held_out")),
            calibration=calibration,
            search=record.get("search"),
            drops=tuple(record.get("drops") or ()),
            training=training,
            commands=again.lines,
            command_notes=again.notes,
            versions=dict(header.versions),
            sha256=_sha256(path) if path is not None else None,
            file_bytes=Path(path).stat().st_size if path is not None else None,
            parameter_share_over_1x1=cost.parameter_share,
            timing=_timing(latency) if latency else None,
        )
    except UNTELLABLE as error:
        raise untellable(name, error) from error


def untellable(name: str, error: Exception) -> InputError:
    """The complaint about a history of which no report can be made."""
    return InputError(f"{name}: what its header says was done to it is unreadable: {error!r}")


def _forms(model: nn.Module, cost: Cost, record: Mapping[str, Any], header: Header) -> tuple[Form, ...]:
    """The forms: as counted now, and MACs as `convert` counted them where there is nothing to run the network on."""
    known = record.get("cost") or {}
    dense = cost.dense_macs if cost.dense_macs is not None else known.get("dense_macs")
    factored = cost.factored_macs if cost.factored_macs is not None else known.get("factored_macs")
    held, size = parameter_count(model), tensor_bytes(model, header.codecs.coded)
    return (
        Form("dense", cost.parameters, cost.bytes, dense),
        Form("harmonic", held, size, None if dense is None else dense + cost.merge_macs),
        Form("factored", held, size, factored),
    )


def _timed(form: Form, latency: Benchmark | None) -> Form:
    """The form with the time of its faster layout."""
    rows = [row for row in latency.rows if row.form == form.name and row.seconds is not None] if latency else []
    if not rows:
        return form
    best = min(rows, key=lambda row: row.seconds or 0.0)
    return replace(form, seconds=best.seconds, spread=best.spread, layout=best.layout)


def _timing(latency: Benchmark) -> dict[str, Any]:
    return {"batch": latency.rows[0].batch, "threads": latency.rows[0].threads, "machine": dict(latency.machine)}


def _layers(
    model: nn.Module,
    dense: nn.Module,
    plan: Plan,
    run: Trace | None,
    recorded: Mapping[str, Mapping[str, Any]],
    refits: Mapping[str, Mapping[str, Any]],
) -> tuple[LayerFacts, ...]:
    convs, costs = weighted_layers(dense), layer_costs(dense, plan, run)
    spectra = _spectra(model, plan, recorded)
    facts = []
    for layer in plan.layers:
        record, refit, cost = recorded.get(layer.name, {}), refits.get(layer.name, {}), costs[layer.name]
        found = replace(
            _planned(layer, type(convs[layer.name]).__name__, cost),
            energy=_number(record.get("energy")),
            kernel_error=_number(record.get("error")),
            output_error_before=_number(refit.get("error_before")),
            output_error_after=_number(refit.get("error_after")),
            decision=refit.get("decision"),
            why=plan.notes.get(layer.name) or refit.get("why"),
        )
        values, uncut = spectra.get(layer.name, (None, False))
        facts.append(replace(found, spectrum=values, spectrum_uncut=uncut))
    for block in layers_of(model):  # blocks are in no plan: they were made harmonic, not converted
        if block.name not in costs and block.harmonic:
            keeps = _flags(block.kernel_size, block.frequencies)
            made = LayerFacts(
                block.name, "HarmonicBlock2d", block.kernel_size, sum(keeps), len(keeps), keeps, None,
                why="a block with weights of its own for each frequency",
            )  # fmt: skip
            facts.append(replace(made, spectrum=spectra.get(block.name, (None, False))[0]))
    for skip in plan.skipped:
        total = len(all_frequencies(skip.kernel_size))
        facts.append(LayerFacts(skip.name, skip.kind, skip.kernel_size, 0, total, (), None, why=skip.why))
    order = {name: index for index, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    return tuple(sorted(facts, key=lambda layer: order.get(layer.name, len(order))))


def _planned(layer: LayerPlan, kind: str, cost: LayerCost) -> LayerFacts:
    space = layer.on("space")
    positions = (True,) * prod(layer.kernel_size)
    keeps = _flags(space.kernel_size, space.frequencies) if isinstance(space, Frequencies) else positions
    levels = space.levels if isinstance(space, Frequencies) else None
    return LayerFacts(
        layer.name, kind, layer.kernel_size, sum(keeps), len(keeps), keeps, levels, cost.parameters,
        cost.kept_parameters, cost.macs, cost.factored_macs,
        other_axes=", ".join(str(kept) for kept in layer.keeps if kept is not space and not kept.whole),
    )  # fmt: skip


def _spectra(
    model: nn.Module, plan: Plan, recorded: Mapping[str, Mapping[str, Any]]
) -> dict[str, tuple[tuple[float, ...] | None, bool]]:
    """Of each layer the spectrum that `convert` saw before the cut, else that of the coefficients; of another basis
    than the DCT there is none to speak of."""
    if bases_text(plan) != "dct":
        return {}
    found: dict[str, tuple[tuple[float, ...] | None, bool]] = {}
    for layer in spectrum(model).layers:
        before = recorded.get(layer.name, {}).get("spectrum")
        if before is not None and len(before) == len(layer.frequencies):
            found[layer.name] = tuple(map(float, before)), True
        else:
            found[layer.name] = layer.magnitudes, False
    return found


def _flags(kernel_size: Sequence[int], kept: Sequence[Frequency]) -> tuple[bool, ...]:
    there = set(kept)
    return tuple(frequency in there for frequency in all_frequencies(kernel_size))


def _stages(training: Sequence[Mapping[str, Any]], held_out: Mapping[str, Any] | None) -> tuple[StageFacts, ...]:
    """Every stage that somebody measured: those of fine-tuning, else what a search by ``max_drop`` held out."""
    stages: list[StageFacts] = []
    for number, run in enumerate(training):
        # Later runs measure again what the first one began with.
        known = run.get("stages") or []
        for stage in known if number == 0 else known[-1:]:
            name = stage["name"]
            if name == "before":  # the file that the run was given
                name = "calibrated" if any(other["name"] == "cut" for other in known) else "cut"
            again = f" again ({number + 1})" if number else ""
            stages.append(_stage(name + again, stage["evaluation"], stage["why"]))
        if run.get("evaluation"):  # of `train`, from scratch
            stages.append(_stage("trained", run["evaluation"], None))
    if not stages and held_out:
        stages = [_stage({"converted": "cut"}.get(name, name), found, None) for name, found in held_out.items()]
    return tuple(stages)


def _stage(name: str, found: Mapping[str, Any] | None, why: str | None) -> StageFacts:
    if not found:
        return StageFacts(name, why=why or "not measured")
    top1, labelled = _number(found["top1"]), int(found["labelled"])
    interval = None if top1 is None or not labelled else wilson_interval(top1, labelled)
    loss, agreement, divergence = (_number(found[key]) for key in ("loss", "agreement", "divergence"))
    return StageFacts(name, labelled or int(found["images"]), top1, interval, loss, agreement, divergence, why)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _sha256(path: str | Path) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    found = hashlib.sha256()  # Python 3.10 has no file_digest
    for part in iter(lambda: file.read(1 << 20), b""):
        found.update(part)
    return found.hexdigest()
