"""What does each way to make a network smaller cost in tasks other than photographs with labels?

    python benchmarks/tasks.py                       # writes results/tasks.csv; minutes
    python benchmarks/tasks.py audio --summary

Networks and data are those of the scripts in examples/ (a segmenter, a detector, a super-resolution network, an audio
network), trained here in seconds, with more test samples: seed 0 makes the training data, seed 1 the test data. They
are small, and their data is made by the script, except for the two photographs of super-resolution.

Ways: `uncut`; `lambda 2` of all layers but the first; the same `calibrated` on the training inputs; `rank 0.5`,
calibrated; 2, 3 and 4 bits, calibrated; `fine-tuned`: 3 bits and lambda 2, after the epochs of the examples. `value` is
the metric of the task on the test data, with its 95 % interval; `bytes` those of the file; `ms` the median time of one
batch in the form that `factor` chooses, all ways of a network in turns.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from table import appended, processor
from torch import nn

import harmconvert as hc
from harmconvert.layers import in_turns
from harmconvert.network import factoring

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "tasks.csv"
KEYS = ["task", "way"]
FIELDS = [*KEYS, "metric", "value", "low", "high", "samples", "bytes", "ms", "spread", "processor", "torch"]
METRICS = {"segmentation": "miou", "detection": "map", "super_resolution": "psnr", "audio": "top1"}
TRAINING: dict[str, dict[str, Any]] = {
    "segmentation": {"preprocessing": {"input_size": (3, 64, 64), "preprocess": "none"}, "epochs": 2},
    "detection": {"epochs": 1},
    "super_resolution": {"preprocessing": {"preprocess": "none"}},
    "audio": {"loss": "distillation", "batch_size": 16},
}
SAMPLES = (160, 200)  # for training, for the test


def data_of(task: str, example: Any, folder: Path) -> tuple[Path, list[Any], list[Any]]:
    """Return the folder of the training data, its batches, and those of the test data."""
    sources = example.load_sample_images().images if task == "super_resolution" else (None, None)
    places = []
    for seed, (part, source, count) in enumerate(zip(("train", "test"), sources, SAMPLES, strict=True)):
        photograph = () if source is None else (source,)
        places.append(example.write_folder(folder / part, *photograph, count=count, seed=seed))
    read = example.samples_of if task == "detection" else example.batches_of
    return places[0], read(places[0]), read(places[1])


def ways(task: str, network: nn.Module, batches: list[Any], train: Path) -> dict[str, Callable[[Path], nn.Module]]:
    """Return functions that write the file of a way, and return its network."""
    inputs = [one for one, _ in batches]

    def converted(path: Path, lam: str | int = "full", calibrated: bool = True, **options: Any) -> nn.Module:
        calibration = inputs if calibrated else None
        conversion = hc.convert(network, lam, calibration=calibration, example_input=inputs[0], **options)
        hc.save(conversion, path, force=True)
        return conversion.model

    def finetuned(path: Path) -> nn.Module:
        cut = hc.convert(network, 2, bits=3, calibration=inputs, example_input=inputs[0])
        return hc.finetune(cut, train, path, metric=METRICS[task], teacher=network, force=True, **TRAINING[task]).model

    return {
        "uncut": partial(converted, calibrated=False),
        "lambda 2": partial(converted, lam=2, calibrated=False),
        "lambda 2, calibrated": partial(converted, lam=2),
        "rank 0.5, calibrated": partial(converted, rank=0.5),
        **{f"{bits} bits, calibrated": partial(converted, bits=bits) for bits in (4, 3, 2)},
        "3 bits and lambda 2, calibrated": partial(converted, lam=2, bits=3),
        "3 bits and lambda 2, fine-tuned": finetuned,
    }


def measured(task: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for each way of a task."""
    example = importlib.import_module(task)
    train, batches, tested = data_of(task, example, folder)
    network, x = example.trained_network(batches), tested[0][0]
    path, rows, runs = folder / "file.safetensors", [], {}
    for way, make in ways(task, network, batches, train).items():
        model = make(path)
        found = hc.evaluate(model, tested, metric=METRICS[task]).measurement
        assert found is not None
        assert found.interval is not None
        runs[way] = partial(factoring(model, (x,) if isinstance(x, list) else x).model.eval(), x)
        low, high = (f"{bound:.2f}" for bound in found.interval)
        row: dict[str, Any] = {
            "task": task,
            "way": way,
            "metric": f"{found.title}, {found.unit}",
            "value": f"{found.value:.2f}",
        }
        rows.append({**row, "low": low, "high": high, "samples": found.samples, "bytes": path.stat().st_size})
    with torch.no_grad():
        times = in_turns(runs, 15, 5, 60.0, warm=2)
    for row in rows:
        time = times[str(row["way"])]
        row |= {"ms": f"{1e3 * time.median:.2f}", "spread": f"{time.spread:.3f}"}
        yield {**row, "processor": processor(), "torch": torch.__version__}


def run(tasks: list[str]) -> None:
    with appended(RESULTS, FIELDS, KEYS) as (done, write):
        for task in tasks:
            if (task, "uncut") not in done:
                with tempfile.TemporaryDirectory() as folder:
                    for row in measured(task, Path(folder)):
                        write(row)


def summary() -> None:
    with RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        print(f"\n{task}: {own[0]['metric']}, {own[0]['samples']} samples")
        print(f"{'way':34} {'value':>8} {'95 %':>16} {'bytes':>10} {'ms':>8}")
        for row in own:
            interval = f"{row['low']} to {row['high']}"
            print(f"{row['way']:34} {row['value']:>8} {interval:>16} {int(row['bytes']):10,} {row['ms']:>8}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(METRICS), metavar="TASK")
    parser.add_argument("--summary", action="store_true", help="print the results only")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "examples"))
    if not args.summary:
        run(args.tasks)
    summary()


if __name__ == "__main__":
    main()
