"""At equal size, is the searched plan better than a uniform lambda, progressive, and other methods?

    python benchmarks/budget.py                          # appends to results/budget.csv; skips existing rows
    python benchmarks/budget.py --networks resnet_mnist5k --seeds 0
    python benchmarks/budget.py --methods "best frequencies" --sizes "50 %" "20 %"
    python benchmarks/budget.py --summary

The sizes are shares of the parameters: those of lambda 3, progressive, lambda 2 and lambda 1, and 50, 40, 30, 20 and
15 %. No method may use more parameters. The methods:

- search: `convert --budget` with 8 trials; "scores alone" has no trials (--trials 0); "by energy" has scores without
  images.
- best frequencies: `convert --budget --frequencies best` with 8 trials; "scores alone" has none.
- threshold: each layer is cut as far as its score stays below one threshold for all layers, as AIMET uses scores; the
  lowest threshold that gives the size.
- uniform or progressive: the plan of the lambda that has this size.
- tucker-2: Tucker-2 of every layer at the same share.
- channel pruning: by magnitude, with Torch-Pruning.

All plans are calibrated on the same 128 images. For the last two methods, batch norms are re-estimated on these images.

Measures top-1 (or agreement) and KL on held-back images that selected nothing, before training and after 1 epoch of the
paper's fine-tuning, for three random choices of images. `seconds` is the cost of each method.
"""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import cast

import calibration as common
import finetune
import torch
from table import appended
from torch import Tensor, nn

import harmconvert as hc
from harmconvert.calibration import CalibrationSettings, reestimate_batch_norm
from harmconvert.network import convolutions, find_layers, trace
from harmconvert.plan import Plan, bases_of, make_plan
from harmconvert.search import Item, Probes, SearchSettings, costs_of, items_of, key_of, name_of, plan_of, whole_plan
from harmconvert.training import MachineSettings, train

RESULTS = Path(__file__).parent / "results" / "budget.csv"
KEYS = ["network", "size", "seed", "method", "epochs"]
FIELDS = [*KEYS, "parameters", "share", "top1", "agreement", "kl", "seconds", "torch"]
UNIFORM: list[str | int] = [3, "progressive", 2, 1]
SHARES = [0.5, 0.4, 0.3, 0.2, 0.15]
IMAGES = 128


class Study:
    """One network and one random choice of calibration images; all methods and sizes share the probes of the layers."""

    def __init__(self, name: str, seed: int, folder: Path) -> None:
        self.name, self.seed = name, seed
        self.subject = common.subject(name)
        self.model, self.include = self.subject.model, self.subject.include
        self.example = self.subject.images[:1]
        self.batches = self.subject.calibration(IMAGES, seed)
        self.settings = CalibrationSettings(seed=seed)
        self.probes = str(folder / "probes.json")
        self.sites = find_layers(self.model, trace(self.model, self.example))
        self.whole = hc.convert(self.model).cost.parameters

    def sizes(self) -> Iterator[tuple[str, float, Plan | None]]:
        """Yield the name of each size, its share of the parameters, and the plan of the lambda with this size."""
        for lam in UNIFORM:
            conversion = hc.convert(self.model, lam, example_input=self.example, include=self.include)
            yield f"lambda {lam}", conversion.cost.harmonic_parameters / self.whole, conversion.plan
        yield from ((f"{100 * share:g} %", share, None) for share in SHARES)

    def methods(self, share: float, uniform: Plan | None) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
        yield "search", lambda: self.searched(share, 8)
        yield "search, scores alone", lambda: self.searched(share, 0)
        yield "search, by energy", lambda: self.by_energy(share)
        yield "best frequencies", lambda: self.searched(share, 8, "best")
        yield "best frequencies, scores alone", lambda: self.searched(share, 0, "best")
        yield "threshold", lambda: self.by_threshold(share)
        if uniform is not None:
            yield "uniform or progressive", lambda: self.calibrated(uniform)
        yield "tucker-2", lambda: self.tucker(share)
        yield "channel pruning", lambda: self.pruned(share)

    def calibrated(self, plan: Plan) -> nn.Module:
        return hc.convert(
            self.model, plan, example_input=self.example, calibration=self.batches, settings=self.settings
        ).model

    def searched(self, share: float, trials: int, frequencies: str = "lambda") -> nn.Module:
        search = SearchSettings(trials, self.probes, frequencies=frequencies)
        return hc.convert(
            self.model, budget={"params": share}, example_input=self.example, include=self.include,
            calibration=self.batches, settings=self.settings, search=search,
        ).model  # fmt: skip

    def by_energy(self, share: float) -> nn.Module:
        conversion = hc.convert(self.model, budget={"params": share}, example_input=self.example, include=self.include)
        return self.calibrated(conversion.plan)

    def by_threshold(self, share: float) -> nn.Module:
        whole = whole_plan(self.sites, self.include)
        items = items_of(whole, {})
        total, changes = costs_of(self.model, whole, items, "params", None)
        scores = self.scores(whole, items)
        for threshold in sorted({score for row in scores for score in row}):
            chosen = [max(i for i, score in enumerate(row) if score <= threshold) for row in scores]
            if total + sum(row[i] for row, i in zip(changes, chosen, strict=True)) <= share * self.whole:
                break
        return self.calibrated(plan_of(whole, items, chosen, "threshold"))

    def scores(self, whole: Plan, items: Sequence[Item]) -> list[list[float]]:
        """Return the scores in the probe file of the search."""
        saved = Probes.opened(
            Path(self.probes), key_of(self.model, self.batches, self.settings, bases_of(whole)[0])
        ).single
        return [[0.0, *(saved[name_of(item.names, c)] for c in item.choices[1:])] for item in items]

    def tucker(self, share: float) -> nn.Module:
        other = copy.deepcopy(self.model)
        convs, total = convolutions(other), self.whole
        layers = [p.name for p in make_plan(self.sites, 1, self.include).layers if not p.whole]
        reducible = sum(cast(Tensor, convs[name].weight).numel() for name in layers)
        kept = (share * self.whole - (total - reducible)) / reducible
        for name in layers:
            weight = cast(Tensor, convs[name].weight)
            weight.data.copy_(common.tucker2(weight.data, int(weight.numel() * kept)))
        reestimate_batch_norm(other, self.batches)
        return other

    def pruned(self, share: float) -> nn.Module:
        import torch_pruning

        def at(ratio: float) -> nn.Module:
            other = copy.deepcopy(self.model)
            last = [module for module in other.modules() if isinstance(module, nn.Linear)][-1:]
            torch_pruning.pruner.MagnitudePruner(
                other, self.example, torch_pruning.importance.MagnitudeImportance(p=2), pruning_ratio=ratio,
                ignored_layers=last,
            ).step()  # fmt: skip
            return other

        low, high = 0.0, 0.95
        for _ in range(9):
            middle = (low + high) / 2
            size = sum(p.numel() for p in at(middle).parameters())
            low, high = (low, middle) if size <= share * self.whole else (middle, high)
        other = at(high)
        reestimate_batch_norm(other, self.batches)
        return other

    def tuned(self, model: nn.Module) -> nn.Module:
        model = copy.deepcopy(model)
        data = finetune.training_data(self.name, self.model, self.seed)
        train(model, data, replace(finetune.RECIPE, seed=self.seed, epochs=1), machine=MachineSettings())
        return model


def rows(
    study: Study,
    uncut: Tensor,
    done: set[tuple[str, ...]],
    sizes: Sequence[str],
    methods: Sequence[str],
    trained: Sequence[str],
) -> Iterator[dict[str, object]]:
    for size, share, uniform in study.sizes():
        for method, make in study.methods(share, uniform):
            if (sizes and size not in sizes) or (methods and method not in methods):
                continue
            epochs = (0, 1) if not trained or size in trained else (0,)
            keys = [(study.name, size, str(study.seed), method, str(number)) for number in epochs]
            if all(key in done for key in keys):
                continue
            start = time.perf_counter()
            model = make()
            seconds = time.perf_counter() - start
            # The Tucker form is multiplied out here, so its parameters cannot be counted.
            count = int(share * study.whole) if method == "tucker-2" else sum(p.numel() for p in model.parameters())
            for key in keys:
                if key in done:
                    continue
                if key[-1] == "1" and method == "tucker-2":
                    continue  # after training in multiplied form it would not be a Tucker form any more
                network = model if key[-1] == "0" else study.tuned(model)
                yield {
                    **dict(zip(KEYS, key, strict=True)), "parameters": count, "share": f"{count / study.whole:.4f}",
                    **common.scores(network, study.subject, uncut), "seconds": f"{seconds:.1f}",
                    "torch": torch.__version__,
                }  # fmt: skip


def run(
    names: list[str], seeds: list[int], threads: int, sizes: list[str], methods: list[str], trained: list[str]
) -> None:
    torch.set_num_threads(threads)
    with appended(RESULTS, FIELDS, KEYS) as (done, write), tempfile.TemporaryDirectory() as folder:
        for seed, name in itertools.product(seeds, names):
            place = Path(folder) / f"{name}-{seed}"
            place.mkdir()
            study = Study(name, seed, place)
            for row in rows(study, common.logits(study.model, study.subject.images), done, sizes, methods, trained):
                write(row)


def summary() -> None:
    with RESULTS.open() as file:
        table = list(csv.DictReader(file))
    for name, epochs in dict.fromkeys((row["network"], row["epochs"]) for row in table):
        here = [row for row in table if (row["network"], row["epochs"]) == (name, epochs)]
        measure = "top1" if here[0]["top1"] else "agreement"
        print(f"\n{name}, {epochs} epochs: {measure} in %, mean (min-max) over seeds; KL")
        for size, method in dict.fromkeys((row["size"], row["method"]) for row in here):
            rows = [row for row in here if (row["size"], row["method"]) == (size, method)]
            values = [100 * float(row[measure]) for row in rows]
            share = mean(float(row["share"]) for row in rows)
            kl, seconds = (mean(float(row[key]) for row in rows) for key in ("kl", "seconds"))
            print(
                f"  {size:18} {method:24} {share:6.1%}  {mean(values):6.2f} ({min(values):.1f}-{max(values):.1f})  "
                f"KL {kl:.4f}  {seconds:6.1f} s  {len(rows)} seeds"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ["resnet_mnist5k", "wrn16_4_mnist5k", "resnet18_elpv", "ear_notes"]
    parser.add_argument("--networks", nargs="+", default=every, choices=every)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sizes", nargs="+", default=[], help="such as '50 %%'; default: all")
    parser.add_argument("--methods", nargs="+", default=[], help="such as 'best frequencies'; default: all")
    parser.add_argument(
        "--trained", nargs="+", default=[], help="sizes that are also fine-tuned for an epoch; default: all"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    if not args.summary:
        run(args.networks, args.seeds, args.threads, args.sizes, args.methods, args.trained)
    summary()


if __name__ == "__main__":
    main()
