"""train(): a network trained from scratch, plain or harmonic as the paper's networks are (sec. 4)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..arguments import check_run_outputs
from ..data.datasets import DataRequest
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
from ..training.recipe import Recipe
from ..training.trainer import MachineSettings
from .devices import machine_on, workers_for
from .finetuning import Setting, check_classes, evaluator, train_loading
from .inputs import image_config, size_of, zeros_of
from .listener import SILENT, Listener
from .networks import Openable, known_source, opened, own, text_of
from .runs import data_identity, kept, recipe_for, state_file_for, told
from .saving import save
from .testing import opened_data


@dataclass(frozen=True)
class Trained:
    """A trained network, its recipe, a row of figures for each epoch, and what it does on the test images; where it was
    written, the file."""

    model: nn.Module
    recipe: Recipe
    rows: tuple[Mapping[str, Any], ...]
    evaluation: Evaluation
    output: str | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict: where it was written (None: nowhere), and what the checkpoint says of the run."""
        return {"output": self.output, **self.record()}

    def record(self) -> dict[str, Any]:
        """What the checkpoint says of this run."""
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
    listener: Listener = SILENT,
    **changes: Any,
) -> Trained:
    """Train a network from scratch, plain or harmonic, by one of the paper's recipes or one of your own.

    >>> layers = nn.Conv2d(1, 8, 7, stride=4), nn.ReLU(), nn.Conv2d(8, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    >>> digits = {"input_size": (1, 28, 28), "preprocess": "none"}
    >>> trained = train(nn.Sequential(*layers), "sample:mnist5k", preprocessing=digits, epochs=1, crop="none")
    >>> len(trained.rows), type(trained.model[0]).__name__
    (1, 'HarmonicBlock2d')

    Args:
        model: a source string, a request or a network. A source's pretrained weights are not used; a network that is
            given is not changed, and its weights are kept where they do not become harmonic.
        output: the .safetensors file to write: a harmonic checkpoint, or plain weights where nothing is harmonic; None
            writes nothing, and keeps no state to resume from.
        harmonic: ``"none"`` (the plain network), ``"first"`` (Harm1, its input layer alone) or ``"all"`` (Harm).
        lam: what the layers behind the first keep, as for `convert`; basis: of these layers.
        normalize_first: False leaves the spectrum normalisation of the first layer out.
        data, recipe, changes, preprocessing, machine, workers, save_every, resume, log, force, command, listener: as
            for `finetune`.

    Raises: as `finetune` and `harmonize`.
    """
    target = None if output is None else str(output)
    if target is not None:
        check_run_outputs(target, resume, force)
    with joined(), ExitStack() as held:
        settled = recipe_for(recipe, changes, resume)
        torch.manual_seed(settled.seed)
        network = own(opened(model, listener, pretrained=False), model)
        trained = network.model
        if harmonic != "none":
            size = size_of(trained, preprocessing or {})
            example, normalize = zeros_of([size] if size else [], trained), normalize_first
            trained = harmonize(trained, harmonic, lam, normalize_first=normalize, basis=basis, example_input=example)
        request = replace(DataRequest.parse(data), seed=settled.seed)
        found = opened_data(request, ("train", "test"), listener)
        check_classes(found, trained, "make the network with ", Argument("arguments", {"num_classes": found.classes}))
        listener.say(str(settled))
        config = image_config(trained, preprocessing or {}, listener)
        identity = {
            "recipe": settled.to_json(),
            "data": data_identity(found, request.dataset, config),
            "network": [text_of(model), harmonic, _text(lam), basis, not normalize_first],
            "arguments": dict(network.source.arguments),
        }
        state_file = state_file_for(target, resume, save_every, identity, force, listener)
        held.enter_context(state_file.lock())
        setting = Setting(config, machine or machine_on(), workers_for(workers, request.dataset), state_file=state_file)
        with told(setting, settled.epochs, target, log, listener) as telling:
            worth = evaluator(found, settled, telling)
            rows = run_training(
                trained,
                train_loading(found, settled, telling),
                settled,
                machine=telling.machine,
                state_file=state_file,
                callbacks=Callbacks(worth, telling.told, telling.epoch_done),
            )
            done = Trained(trained, settled, rows, worth(trained), target)
        if target is not None:
            with kept(state_file):
                on_first_rank(lambda: _write(done, network, target, harmonic, command, config, force))
            state_file.remove()
            listener.wrote(target)
    return done


def _write(
    done: Trained,
    network: Network,
    target: str,
    harmonic: str,
    command: Mapping[str, Any] | None,
    config: Mapping[str, Any],
    force: bool,
) -> None:
    """A harmonic checkpoint, or the plain weights."""
    run, source = done.record(), known_source(network)
    if harmonic == "none":
        # The epochs are in the .metrics.csv beside it.
        kept = {"recipe": run["recipe"], "evaluation": run["evaluation"]}
        metadata = {"format": "pt", "harmconvert_training": json.dumps(kept, separators=(",", ":"))}
        write_tensors(untied_state(done.model)[0], target, metadata, force)
        return
    if command is not None:
        run["command"] = {**command, "source": str(network.source)}
    if source is not None:
        source = replace(source, sha256=None)  # it was not converted from weights
    history = {"training": [run]}
    save(done.model, target, source=source, history=history, preprocessing=preprocessing_record(config), force=force)


def _text(lam: str | int | Mapping[str, int] | Plan) -> str:
    """A lambda as text, for a run to be recognised by."""
    if isinstance(lam, Plan):
        return json.dumps(lam.to_json(), sort_keys=True)
    return ",".join(f"{name}={count}" for name, count in lam.items()) if isinstance(lam, Mapping) else str(lam)
