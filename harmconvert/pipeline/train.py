"""train(): train a network from scratch, plain or harmonic (paper sec. 4)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..arguments import check_run_outputs
from ..data.datasets import Data, DataRequest
from ..data.preprocessing import preprocessing_record
from ..errors import Argument
from ..network.distributed import joined, on_first_rank
from ..plan.plan import Plan
from ..storage.checkpoint import Network
from ..storage.weights import untied_state, write_tensors
from ..training.evaluation import Evaluation
from ..training.harmonize import harmonize
from ..training.loop import Callbacks
from ..training.loop import train as run_training
from ..training.losses import loss_of
from ..training.recipe import Recipe
from ..training.trainer import MachineSettings, TrainingTask
from .devices import machine_on, workers_for
from .finetuning import TrainingSetup, check_classes, evaluator, train_loading
from .inputs import image_config, size_of, zeros_of
from .listener import Listener
from .networks import Openable, known_source, opened, own, text_of
from .runs import data_identity, recipe_for, reporting, resume_hint, state_file_for
from .saving import save
from .showing import listener_for
from .testing import metric_for, opened_data


@dataclass(frozen=True)
class Trained:
    """A trained network, its recipe, a row of metrics for each epoch, and its evaluation on the test images.

    ``output`` is the file, if the network was written.
    """

    model: nn.Module
    recipe: Recipe
    rows: tuple[Mapping[str, Any], ...]
    evaluation: Evaluation
    output: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the output and the record of this run as JSON values."""
        return {"output": self.output, **self.record()}

    def record(self) -> dict[str, Any]:
        """Return the part of a checkpoint's history that describes this run."""
        epochs = [dict(row) for row in self.rows]
        return {"recipe": self.recipe.to_json(), "epochs": epochs, "evaluation": self.evaluation.to_json()}


def train(
    model: Openable,
    data: str | Path | DataRequest,
    output: str | Path | None = None,
    *,
    recipe: str | Recipe = "imagenet-resnet",
    harmonic: str = "all",
    lam: str | int | Mapping[str, int] | Plan = "full",
    basis: str = "dct",
    normalize_first: bool = True,
    preprocessing: Mapping[str, Any] | None = None,
    machine: MachineSettings | None = None,
    workers: int | None = None,
    save_every: int | None = None,
    resume: str | Path | None = None,
    log: str | None = None,
    force: bool = False,
    command: Mapping[str, Any] | None = None,
    progress: bool | None = None,
    listener: Listener | None = None,
    **changes: Any,
) -> Trained:
    """Train a network from scratch, plain or harmonic, by one of the paper's recipes or your own.

    >>> layers = nn.Conv2d(1, 8, 7, stride=4), nn.ReLU(), nn.Conv2d(8, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    >>> digits = {"input_size": (1, 28, 28), "preprocess": "none"}
    >>> trained = train(nn.Sequential(*layers), "sample:mnist5k", preprocessing=digits, epochs=1, crop="none")
    >>> len(trained.rows), type(trained.model[0]).__name__
    (1, 'HarmonicBlock2d')

    Args:
        model: a source string, a request, or a network object, which is not changed. Pretrained weights of a source are
            not loaded. A network object keeps the weights of layers that do not become harmonic.
        output: the .safetensors file to write: a harmonic checkpoint, or plain weights if no layer is harmonic; None:
            write no file, and save no state.
        harmonic: ``"none"`` (the plain network), ``"first"`` (Harm1: only the input layer) or ``"all"`` (Harm).
        lam: what the layers after the first keep, as for `convert`.
        basis: basis of the layers after the first.
        normalize_first: False leaves out the normalisation of the spectrum in the first layer.
        data, recipe, changes, preprocessing, machine, workers, save_every, resume, log, force, command, progress,
            listener: as for `finetune`.

    Raises the errors of `finetune` and `harmonize`.
    """
    listener = listener_for(listener, progress)
    target, preprocessing = None if output is None else str(output), preprocessing or {}
    if target is not None:
        check_run_outputs(target, resume, force)
    with joined():
        final = recipe_for(recipe, changes, resume)
        torch.manual_seed(final.seed)
        network = own(opened(model, listener, pretrained=False), model)
        to_train = _harmonized(network.model, harmonic, lam, basis, normalize_first, preprocessing)
        request = replace(DataRequest.parse(data), seed=final.seed)
        images = _open_data(request, to_train, listener)
        listener.say(str(final))
        config = image_config(to_train, preprocessing, listener, task=images.task, prepared=images.prepared)
        identity = {
            "recipe": final.to_json(), "data": data_identity(images, request.dataset, config),
            "network": [text_of(model), harmonic, _lambda_text(lam), basis, not normalize_first],
            "arguments": dict(network.source.arguments),
        }  # fmt: skip
        setup = TrainingSetup(
            config, machine or machine_on(), workers_for(workers, request.dataset), data=request.name,
            metric=metric_for(None, images.task),
            state_file=state_file_for(target, resume, save_every, identity, force, listener),
        )  # fmt: skip
        with setup.state_file.lock():
            with reporting(setup, final.epochs, target, log, listener) as reported:
                trained = replace(_train(to_train, images, final, reported), output=target)
            if target is not None:
                _write(trained, network, harmonic, command, setup, force)
                listener.wrote(target)
    return trained


def _harmonized(
    model: nn.Module,
    harmonic: str,
    lam: str | int | Mapping[str, int] | Plan,
    basis: str,
    normalize_first: bool,
    preprocessing: Mapping[str, Any],
) -> nn.Module:
    """Return the network with the harmonic layers that ``harmonic`` names."""
    if harmonic == "none":
        return model
    size = size_of(model, preprocessing)
    example = zeros_of([size] if size else [], model)
    return harmonize(model, harmonic, lam, normalize_first=normalize_first, basis=basis, example_input=example)


def _open_data(request: DataRequest, model: nn.Module, listener: Listener) -> Data:
    """Open the data, and check that the network has its classes."""
    images = opened_data(request, ("train", "test"), listener)
    check_classes(images, model, "build the network with ", Argument("arguments", {"num_classes": images.classes}))
    return images


def _train(model: nn.Module, data: Data, recipe: Recipe, setup: TrainingSetup) -> Trained:
    evaluation_of = evaluator(data, recipe, setup)
    rows = run_training(
        model, train_loading(data, recipe, setup), recipe, machine=setup.machine, state_file=setup.state_file,
        callbacks=Callbacks(evaluation_of, setup.on_step, setup.epoch_done),
        task=TrainingTask(data.task, loss_of(recipe.loss, data.task)),
    )  # fmt: skip
    return Trained(model, recipe, rows, evaluation_of(model))


def _write(
    trained: Trained,
    network: Network,
    harmonic: str,
    command: Mapping[str, Any] | None,
    setup: TrainingSetup,
    force: bool,
) -> None:
    """Write the file of a run, then remove the state of the run."""
    with resume_hint(setup.state_file):
        if harmonic == "none":
            on_first_rank(lambda: _write_weights(trained, force))
        else:
            on_first_rank(lambda: _write_checkpoint(trained, network, command, setup.preprocessing, force))
    setup.state_file.remove()


def _write_weights(trained: Trained, force: bool) -> None:
    assert trained.output is not None
    run = trained.record()
    record = {"recipe": run["recipe"], "evaluation": run["evaluation"]}  # the epochs are in the .metrics.csv beside it
    metadata = {"format": "pt", "harmconvert_training": json.dumps(record, separators=(",", ":"))}
    write_tensors(untied_state(trained.model)[0], trained.output, metadata, force)


def _write_checkpoint(
    trained: Trained, network: Network, command: Mapping[str, Any] | None, config: Mapping[str, Any], force: bool
) -> None:
    assert trained.output is not None
    run, source = trained.record(), known_source(network)
    if command is not None:
        run["command"] = {**command, "source": str(network.source)}
    if source is not None:
        source = replace(source, sha256=None)  # the network was not converted from weights
    history, preprocessing = {"training": [run]}, preprocessing_record(config)
    save(trained.model, trained.output, source=source, history=history, preprocessing=preprocessing, force=force)


def _lambda_text(lam: str | int | Mapping[str, int] | Plan) -> str:
    """Return a lambda as text, for the comparison of runs."""
    if isinstance(lam, Plan):
        return json.dumps(lam.to_json(), sort_keys=True)
    return ",".join(f"{name}={count}" for name, count in lam.items()) if isinstance(lam, Mapping) else str(lam)
