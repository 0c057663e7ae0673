"""All code that reads untrusted files, as functions that the fuzzing engines call.

A reader may raise only a `HarmconvertError`. It must end soon and must not need more memory than the file can fill.
"""

from __future__ import annotations

import json
import math
import resource
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import harmconvert as hc
from harmconvert import save
from harmconvert.calibration import CalibrationSettings
from harmconvert.errors import DamageWarning, HarmconvertError
from harmconvert.kernels import all_frequencies
from harmconvert.layers import read_times
from harmconvert.network import preserve_random_states
from harmconvert.pipeline import FineTuning, Stage, convert, recorded_stages
from harmconvert.plan import Frequencies, Plan
from harmconvert.report import comparison_of, comparison_table, differences_table, page, report_of, write_report
from harmconvert.search import Item, Probes, SearchSettings, with_order
from harmconvert.sources import open_reference
from harmconvert.sources import opening as sources
from harmconvert.storage import Header, Source, load_state, read_header, read_weights
from harmconvert.training import RECIPES, MachineSettings, Position, Recipe, StateFile, Trainer, read_identity

from ..networks import random_input, seeded

CORPUS = Path(__file__).parent / "corpus"
SECONDS = 10.0  # processor time of this process, which does not depend on other processes
BYTES = 3 << 30  # in addition to the memory that the process has; no file here is larger than a megabyte


class Small(nn.Module):
    """Two convolutions with a shared weight, one with a one-dimensional kernel, a batch norm, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.b.weight = self.a.weight
        self.wide = nn.Conv2d(4, 4, (1, 5), groups=2)
        self.norm, self.fc = nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.wide(self.b(self.a(self.stem(x))))).mean((2, 3)))


@cache
def _network() -> nn.Module:
    return seeded(Small)


@cache
def _file(kind: str) -> bytes:
    """Return a harmonic checkpoint: calibrated, with a fitted basis, with a source to rebuild, or trained."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.safetensors"
        images = [random_input((8, 1, 12, 12))]
        if kind == "source":
            save(convert(timm.create_model("test_resnet", num_classes=3), 2), path)
        elif kind == "klt":
            save(convert(_network(), 2, example_input=images[0], basis="klt"), path)
        else:
            made = convert(_network(), 2, calibration=images, settings=CalibrationSettings(memory=1 << 24))
            history = made.history()
            searched = convert(_network(), budget={"params": 0.7}, search=SearchSettings(trials=0)).search
            history["conversion"]["search"] = searched.to_json() if searched else None
            stage = {"name": "cut", "evaluation": _EVALUATION, "why": None}
            trained = FineTuning(made.model, (Stage.from_json(stage),), (_EPOCH,), Recipe())
            save(made, path, source=Source("timm", "test_resnet", sha256="ab"), history=trained.history(history))
        return path.read_bytes()


_EVALUATION = {
    "images": 9, "labelled": 9, "top1": 0.5, "top5": 0.9, "loss": 1.0, "agreement": 0.9, "divergence": 0.1,
    "images_per_second": 3.0, "unreadable": [],
}  # fmt: skip
_EPOCH = {"epoch": 1, "lr": 0.1, "loss": 1.0, "accuracy": 0.4, "images": 9, "seconds": 1.5, "test_top1": 0.5}


def _parts(file: bytes) -> tuple[Any, bytes]:
    """Return the header of a safetensors file as a document, and its data."""
    length = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + length])
    header["__metadata__"]["harmconvert"] = json.loads(header["__metadata__"]["harmconvert"])
    return header, file[8 + length :]


def _header_of(kind: str) -> Any:
    return _parts(_file(kind))[0]["__metadata__"]["harmconvert"]


@cache
def _trained() -> nn.Module:
    """Return the network of the checkpoint that has a history."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.safetensors"
        path.write_bytes(_file("trained"))
        return hc.load(path, model=_network())


# --- readers of a path ---


def _read_checkpoint(path: Path) -> None:
    read_header(path)
    with warnings.catch_warnings():  # a changed header does not match its checksum
        warnings.simplefilter("ignore", DamageWarning)
        hc.load(path, model=_network(), form="dense")


def _read_source(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamageWarning)
        sources.load(path)


def _read_weights(path: Path) -> None:
    state = read_weights(path)
    load_state(seeded(Small), state, str(path))


def _read_reference(path: Path) -> None:
    open_reference(str(path), {}, "dense")


def _read_plan(path: Path) -> None:
    plan = Plan.load(path)
    str(plan)
    assert plan.whole in (True, False)
    assert all(kept.levels is None or kept.levels > 0 for kept in plan.on("space").values())
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def _read_probes(path: Path) -> None:
    probes = Probes.opened(path, {"weights": "ab", "images": "cd", "settings": {"seed": 0}})
    item = Item(("a",), ((Frequencies((3, 3), all_frequencies((3, 3))),),))
    if "a" in probes.orders:
        with_order(item, probes.orders["a"].frequencies)
    assert all(math.isfinite(score) for scores in (probes.single, probes.whole) for score in scores.values())


def _read_state(path: Path) -> None:
    with preserve_random_states():
        position, content = StateFile(path, identity={"data": [4]}).load()
        assert position.epoch >= 0
        assert position.step >= 0
        assert sum(position.sums) is not None
        trainer().load_state_dict(content)
        recipe = Recipe.from_json(read_identity(path).get("recipe"))
        str(recipe)
        recorded_stages(path)


def trainer() -> Trainer:
    """Return a trainer into which a state is loaded."""
    return Trainer(seeded(Small), Recipe(), MachineSettings(channels_last=False), 4, None)


def _read_times(path: Path) -> None:
    known = read_times(path)
    assert all(0 < seconds < math.inf for times in known.values() for seconds in times), known


# --- readers of a document ---


def _of_document(read: Callable[[Any], None]) -> Callable[[Path], None]:
    """Return a reader of files that gets the parsed JSON; it ignores text that is not JSON."""

    def reader(path: Path) -> None:
        try:
            document = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            return
        read(document)

    return reader


def _read_recorded_source(document: Any) -> None:
    source = Source.from_json(document)
    str(source)
    sources.rebuild(source, limit=1 << 30)


def _read_header_json(document: Any) -> None:
    header = Header.from_json(document)
    assert Header.from_json(json.loads(json.dumps(header.to_json()))) == header
    assert all(isinstance(value, str) for value in header.calibrated.values())


def _read_recipe(document: Any) -> None:
    recipe = Recipe.from_json(document)
    str(recipe)
    json.dumps(recipe.to_json())


def _read_history(document: Any) -> None:
    """Use a history as reports and further training do."""
    header = Header.from_json({**_header_of("trained"), "history": document})
    FineTuning(_network(), (), (), Recipe()).history(header.history)
    report = report_of(_trained(), header, "net")
    page(report)
    with tempfile.TemporaryDirectory() as folder:
        write_report(report, Path(folder) / "report.json")
    comparison = comparison_of([report, report], all_layers=True)
    json.dumps(comparison.to_json())
    comparison_table(comparison), differences_table(comparison)


@dataclass(frozen=True)
class Target:
    """A reader, the ending of its files, their kind (``json``, ``safetensors``, ``pickle``), and valid documents."""

    read: Callable[[Path], None]
    suffix: str
    kind: str
    seeds: Callable[[], list[Any]]


def _state_seed() -> Any:
    kept: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.state.pth"
        stage = Stage("cut").to_json()
        identity = {"recipe": Recipe().to_json(), "data": [4]}
        state_file = StateFile(path, identity=identity, record={"stages": [stage], "calibration": None})
        state_file.save(Position(1, 2, rows=(_EPOCH,)), trainer().state_dict)
        kept.append(torch.load(path, weights_only=True))
    return {**kept[0], "position": {**kept[0]["position"], "sums": [0.0] * 3, "rows": [_EPOCH]}}


def _wide_resnet() -> dict[str, Tensor]:
    """Return tensors with the shapes of the reference implementation's smallest network with a harmonic first layer."""
    from ..test_reference import state_of

    return dict(state_of("harm_wrn10_1"))


_PROBES = {
    "version": 1,
    "key": {"weights": "ab", "images": "cd", "settings": {"seed": 0}},
    "single": {"a: 0-0": 0.5, "b: 0-0": 1},
    "whole": {"whole": 0.0},
    "orders": {"a": {"frequencies": [list(f) for f in reversed(all_frequencies((3, 3)))], "by": "energy", "why": None}},
}
_PLANS = [
    {**Plan.from_json({"layers": []}).to_json()},
    {"layers": [{"name": "a", "kernel_size": [3, 3], "frequencies": [[0, 0], [0, 1]]}],
     "skipped": [{"name": "b", "kind": "Conv2d", "kernel_size": [1, 7], "why": "?"}], "notes": {"a": "whole"}},
]  # fmt: skip

TARGETS = {
    "checkpoint": Target(
        _read_checkpoint, ".safetensors", "safetensors", lambda: [_parts(_file(kind)) for kind in ("trained", "klt")]
    ),
    "source": Target(_read_source, ".safetensors", "safetensors", lambda: [_parts(_file("source"))]),
    "weights": Target(_read_weights, ".pth", "pickle", lambda: [
        dict(_network().state_dict()), {"state_dict": dict(_network().state_dict()), "epoch": 3},
    ]),
    "reference": Target(_read_reference, ".pt7", "pickle", lambda: [_wide_resnet()]),
    "state": Target(_read_state, ".pth", "pickle", lambda: [_state_seed()]),
    "plan": Target(_read_plan, ".json", "json", lambda: _PLANS),
    "probes": Target(_read_probes, ".json", "json", lambda: [_PROBES]),
    "times": Target(_read_times, ".json", "json", lambda: [{"[1]": [0.5, 0.25], "[2]": [1, 2]}]),
    "recorded source": Target(_of_document(_read_recorded_source), ".json", "json", lambda: [
        _header_of("source")["source"], {"scheme": "sample", "name": "resnet_mnist5k", "arguments": {"num_classes": 3}},
    ]),
    "header": Target(_of_document(_read_header_json), ".json", "json", lambda: [_header_of("trained")]),
    "recipe": Target(_of_document(_read_recipe), ".json", "json", lambda: [r.to_json() for r in RECIPES.values()]),
    "history": Target(_of_document(_read_history), ".json", "json", lambda: [_header_of("trained")["history"]]),
}  # fmt: skip


def complaint(target: Target, data: bytes) -> str | None:
    """Return what is wrong with a reader's reaction to a file; None if it reads or refuses the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"file{target.suffix}"
        path.write_bytes(data)
        start = time.process_time()
        try:
            with _bounded(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                target.read(path)
        except HarmconvertError as error:
            if "allocate memory" in str(error):
                return f"memory: {error}"
        except Exception as error:
            own = [frame for frame in traceback.extract_tb(error.__traceback__) if "harmconvert" in frame.filename]
            where = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "?"
            return f"{type(error).__name__} in {where}: {str(error)[:200]!r}"
        took = time.process_time() - start
    return f"took {took:.0f} s" if took > SECONDS else None


@contextmanager
def _bounded() -> Iterator[None]:
    """Limit the memory to what a small file can need."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def corpus(name: str) -> list[Path]:
    """Return the stored inputs of a target: each has revealed a bug, or covers a separate path of the code."""
    return sorted((CORPUS / name.replace(" ", "-")).glob("*"))
