"""Make the report of a harmonic network from the network and the header of its file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from torch import nn

from ..deploy.advice import Benchmark
from ..errors import InputError
from ..files import short_name
from ..metrics.intervals import wilson_interval
from ..metrics.metric import Measurement
from ..network.declared import input_sizes
from ..network.forms import dense_form
from ..network.layers import all_layers
from ..network.tracing import Trace, find_layers, trace_if_possible
from ..pipeline.convert import RECORD_KEY
from ..plan import Cost, Plan, layer_costs, network_cost, parameter_count, tensor_bytes
from ..storage.checkpoint import Header
from .coding import layer_bytes
from .facts import Form, LayerFacts, Report, StageFacts
from .next_steps import next_steps
from .ranks import layer_ranks
from .reproduce import reproduction
from .space import block_facts, planned_facts, with_spectra

# The errors that reading a history raises if entries are missing or have wrong types, or if its numbers are invalid.
HISTORY_ERRORS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


def report_of(
    model: nn.Module,
    header: Header,
    name: str,
    *,
    path: str | Path | None = None,
    example_input: Any = None,
    latency: Benchmark | None = None,
    checkpoint: str | None = None,
) -> Report:
    """Make the report of a harmonic network.

    Args:
        model: the network in harmonic form. header: the header of its file.
        name: the name of the network in the report.
        path: the file, for its hash and size.
        example_input: the input on which MACs are counted. None: an input of the network's own size; if that is not
            known either, the MACs are not known.
        latency: the times of the forms, not compiled, for one batch size and one number of threads.
        checkpoint: the text that names the checkpoint in commands; default: the name with ``.safetensors``.

    Raises:
        InputError: the history in the header is invalid.
    """
    dense = dense_form(model)
    trace = trace_if_possible(dense, "any", example_input)
    cost = network_cost(dense, header.plan, trace)
    history = header.history
    try:
        record = dict(history.get(RECORD_KEY) or {})
        calibration = history.get("calibration")
        # Layers that share their coefficients have one record, under all of their names.
        refits = {
            name: layer for layer in (calibration or {}).get("layers", []) for name in str(layer["name"]).split(", ")
        }
        training = tuple(dict(entry) for entry in history.get("training", []))
        layers = _layers(model, dense, header.plan, trace, record.get("layers") or {}, refits)
        checkpoint = checkpoint or f"{short_name(name)}.safetensors"
        reproduced = reproduction(header, checkpoint, find_layers(dense, trace))
        report = Report(
            name=name,
            source=header.source,
            plan=header.plan,
            forms=tuple(_with_time(form, latency) for form in _forms(model, cost, record, header)),
            layers=layers,
            stages=_stages(training, history.get("held_out")),
            calibration=calibration,
            search=record.get("search"),
            drops=tuple(record.get("drops") or ()),
            training=training,
            commands=reproduced.lines,
            command_notes=reproduced.notes,
            versions=dict(header.versions),
            sha256=_sha256(path) if path is not None else None,
            file_bytes=Path(path).stat().st_size if path is not None else None,
            parameter_share_over_1x1=cost.parameter_share,
            timing=_timing(latency) if latency else None,
            coding=layer_bytes(model, header.codecs.coded),
            ranks=layer_ranks(model, refits),
        )
        return replace(report, next_steps=next_steps(report, header, checkpoint, bool(input_sizes(model))))
    except HISTORY_ERRORS as error:
        raise invalid_history(name, error) from error


def invalid_history(name: str, error: Exception) -> InputError:
    """Return the error for a history from which no report can be made."""
    return InputError(f"{name}: the history in its header is invalid: {error!r}")


def _forms(model: nn.Module, cost: Cost, record: Mapping[str, Any], header: Header) -> tuple[Form, ...]:
    """Return the forms, with the MACs that `convert` recorded if the network could not be run now."""
    recorded = record.get("cost") or {}
    dense = cost.dense_macs if cost.dense_macs is not None else recorded.get("dense_macs")
    factored = cost.factored_macs if cost.factored_macs is not None else recorded.get("factored_macs")
    parameters, bytes = parameter_count(model), tensor_bytes(model, header.codecs.coded)
    return (
        Form("dense", cost.parameters, cost.bytes, dense),
        Form("harmonic", parameters, bytes, None if dense is None else dense + cost.merge_macs),
        Form("factored", parameters, bytes, factored),
    )


def _with_time(form: Form, latency: Benchmark | None) -> Form:
    """Return the form with its time in the faster memory format."""
    rows = [row for row in latency.rows if row.form == form.name and row.seconds is not None] if latency else []
    if not rows:
        return form
    fastest = min(rows, key=lambda row: row.seconds or 0.0)
    return replace(form, seconds=fastest.seconds, spread=fastest.spread, layout=fastest.layout)


def _timing(latency: Benchmark) -> dict[str, Any]:
    return {"batch": latency.rows[0].batch, "threads": latency.rows[0].threads, "machine": dict(latency.machine)}


def _layers(
    model: nn.Module,
    dense: nn.Module,
    plan: Plan,
    trace: Trace | None,
    recorded: Mapping[str, Mapping[str, Any]],
    refits: Mapping[str, Mapping[str, Any]],
) -> tuple[LayerFacts, ...]:
    """Return the facts about planned, not planned and skipped layers, in the order of the network.

    ``recorded`` and ``refits``: what `convert` and the calibration recorded, by layer name.
    """
    modules, costs = all_layers(dense), layer_costs(dense, plan, trace)
    planned = []
    for layer in plan.layers:
        record, refit, cost = recorded.get(layer.name, {}), refits.get(layer.name, {}), costs[layer.name]
        facts = replace(
            planned_facts(layer, type(modules[layer.name]).__name__),
            parameters=cost.parameters,
            kept_parameters=cost.kept_parameters,
            macs=cost.macs,
            factored_macs=cost.factored_macs,
            energy=_number(record.get("energy")),
            kernel_error=_number(record.get("error")),
            output_error_before=_number(refit.get("error_before")),
            output_error_after=_number(refit.get("error_after")),
            decision=refit.get("decision"),
            why=plan.notes.get(layer.name) or refit.get("why"),
        )
        planned.append(facts)
    skipped = [
        LayerFacts(skip.name, skip.kind, skip.kernel_size, 0, prod(skip.kernel_size), (), None, why=skip.why)
        for skip in plan.skipped
    ]
    layers = with_spectra([*planned, *block_facts(model, costs), *skipped], model, plan, recorded)
    order = {name: index for index, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    return tuple(sorted(layers, key=lambda layer: order.get(layer.name, len(order))))


def _stages(training: Sequence[Mapping[str, Any]], held_out: Mapping[str, Any] | None) -> tuple[StageFacts, ...]:
    """Return the stages that were measured by trainings; without training, those that a search measured."""
    stages: list[StageFacts] = []
    for number, run in enumerate(training):
        recorded = run.get("stages") or []
        # Every run measures the earlier stages again, so only the last stage of a later run is new.
        for stage in recorded if number == 0 else recorded[-1:]:
            name = stage["name"]
            if name == "before":  # the network with which the fine-tuning began
                name = "calibrated" if any(other["name"] == "cut" for other in recorded) else "cut"
            suffix = f" again ({number + 1})" if number else ""
            stages.append(_stage(name + suffix, stage["evaluation"], stage["why"]))
        if run.get("evaluation"):  # recorded by `train`, which trains from scratch
            stages.append(_stage("trained", run["evaluation"], None))
    if not stages and held_out:
        names = {"converted": "cut"}
        stages = [_stage(names.get(name, name), evaluation, None) for name, evaluation in held_out.items()]
    return tuple(stages)


def _stage(name: str, evaluation: Mapping[str, Any] | None, why: str | None) -> StageFacts:
    if not evaluation:
        return StageFacts(name, why=why or "not measured")
    top1, labelled = _number(evaluation["top1"]), int(evaluation["labelled"])
    interval = None if top1 is None or not labelled else wilson_interval(top1, labelled)
    loss, agreement, divergence = (_number(evaluation[key]) for key in ("loss", "agreement", "divergence"))
    images, measured = labelled or int(evaluation["images"]), evaluation.get("measurement")
    measurement = Measurement.from_json(measured) if measured else None
    return StageFacts(name, images, top1, interval, loss, agreement, divergence, why, measurement)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
