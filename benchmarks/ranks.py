"""What do ranks, frequencies, and both keep of a network's outputs at equal parameters and at equal multiply-adds?

    python benchmarks/ranks.py                               # writes results/ranks.csv; hours
    python benchmarks/ranks.py resnet_mnist5k --draws 1
    python benchmarks/ranks.py --summary

Networks and their test inputs are those of coding.py: efficientnet_lite0 (ImageNet weights; agreement and KL on crops
of photographs that calibration did not see) and trained networks with labelled test images. Nothing is trained after
the cut. `parameters` and `macs` are shares of the uncut network; the MACs are those of the factored form. Each draw
takes other calibration inputs; no choice is made on the test inputs.

Methods:

- `both`, `ranks`, `frequencies`: --budget with --axes; ranks and frequencies of each layer are chosen by probes of the
  network's outputs, and fitted layer after layer,
- `ranks, same share`: every layer keeps the same share of its parameters, fitted layer after layer,
- `whitened SVD`: after BALF (arXiv:2509.25136): each layer alone, on the inputs of the uncut network; a global
  allocation keeps the largest singular values relative to their sum in each layer,
- `SVD`: the nearest matrices without inputs; every layer keeps the same share of its parameters.
"""

from __future__ import annotations

import argparse
import copy
import csv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from statistics import mean
from tempfile import gettempdir
from typing import Any

import coding
import torch
from table import appended
from torch import Tensor, nn

import harmconvert as hc
from harmconvert.calibration import CalibrationContext, CalibrationSettings, moments_of, whole_layers
from harmconvert.kernels import from_groups, full_rank, to_groups
from harmconvert.network import find_layers, trace, weighted_layers
from harmconvert.plan import Plan, Rank, RankSetting, make_plan, network_cost
from harmconvert.search import SearchSettings

RESULTS = Path(__file__).parent / "results" / "ranks.csv"
KEYS = ["network", "method", "budget", "draw"]
FIELDS = [*KEYS, "parameters", "macs", "kl", "agreement", "top1"]
NETWORKS = ["resnet_mnist5k", "efficientnet_lite0", "wrn16_4_mnist5k", "resnet18_elpv"]
BUDGETS = [f"{unit}={share}%" for unit in ("params", "macs") for share in (80, 70, 60, 50, 40)]
MEMORY = 4 << 30


@dataclass(frozen=True)
class Cut:
    """A network that was cut, and its plan."""

    model: nn.Module
    plan: Plan


@dataclass(frozen=True)
class Matrix:
    """The weight of one layer as matrices, and the eigenvectors of its outputs' second moments, the largest first."""

    weight_GON: Tensor
    vectors_GOO: Tensor
    shares_GO: Tensor
    transposed: bool
    frequencies: int


def searched(subject: coding.Subject, budget: str, draw: int, axes: tuple[str, ...] | None, trials: int) -> Cut:
    probes = Path(gettempdir()) / f"harmconvert-ranks-{'-'.join(axes or ('both',))}-{id(subject)}-{draw}.json"
    search = SearchSettings(trials, str(probes), axes=axes)
    batches = subject.calibration(draw)
    conversion = hc.convert(
        subject.model, budget=budget, calibration=batches, example_input=batches[0][:1], search=search
    )
    return Cut(conversion.model, conversion.plan)


def plan_with(model: nn.Module, ranks: Mapping[str, int], example: Tensor) -> Plan:
    return make_plan(find_layers(model, trace(model, example)), "full", rank=RankSetting.of({**ranks}))


def costs(model: nn.Module, plan: Plan, example: Tensor) -> tuple[float, float]:
    cost = network_cost(model, plan, trace(model, example))
    return cost.harmonic_parameters / cost.parameters, (cost.factored_macs or 0) / (cost.dense_macs or 1)


def candidates(model: nn.Module, example: Tensor) -> dict[str, Rank]:
    """Return the layers whose rank a bare share would reduce."""
    infos = find_layers(model, trace(model, example))
    reduced = make_plan(infos, "full", rank=RankSetting(0.01)).on("channels")
    whole = make_plan(infos, "full", rank=RankSetting(whole=True)).on("channels")
    return {name: whole[name] for name in reduced}


def same_share(model: nn.Module, budget: str, example: Tensor) -> dict[str, int]:
    """Return the ranks with which every layer keeps the same share of its parameters, within the budget."""
    unit, text = budget.split("=")
    limit, which = float(text.rstrip("%")) / 100, 0 if unit == "params" else 1
    layers, best = candidates(model, example), dict[str, int]()
    low, high = 0.01, 1.0
    for _ in range(12):
        share = (low + high) / 2
        ranks = {}
        for name, whole in layers.items():
            assert whole.matrix is not None
            rows, channels, frequencies = whole.matrix
            rank = int(share * rows * channels * frequencies / (rows + channels * frequencies))
            ranks[name] = min(max(1, rank), full_rank(rows, channels, frequencies, False))
        if costs(model, plan_with(model, ranks, example), example)[which] <= limit:
            low, best = share, ranks
        else:
            high = share
    return best


def uniform(subject: coding.Subject, budget: str, draw: int | None) -> Cut:
    batches = subject.calibration(draw or 0)
    ranks = same_share(subject.model, budget, batches[0][:1])
    calibration = None if draw is None else batches
    conversion = hc.convert(subject.model, rank=ranks, calibration=calibration, example_input=batches[0][:1])
    return Cut(conversion.model, conversion.plan)


def matrices(subject: coding.Subject, draw: int) -> dict[str, Matrix]:
    """Return the whitened spectrum of each layer on the inputs of the uncut network."""
    context = CalibrationContext.of(subject.model, subject.calibration(draw), CalibrationSettings())
    names = candidates(subject.model, subject.calibration(draw)[0][:1])
    layers = {name: layer for name, layer in weighted_layers(subject.model).items() if name in names}
    found = {}
    for name, whole in whole_layers(subject.model, layers, context.data, 0, MEMORY):
        layer: Any = layers[name]
        stored = layer.weight.detach().double()
        frequencies = prod(stored.shape[2:])
        transposed, groups = bool(getattr(layer, "transposed", False)), getattr(layer, "groups", 1)
        weight_GON = to_groups(stored.flatten(2) if stored.dim() > 2 else stored[..., None], groups, transposed)
        metric = moments_of(whole.fit, torch.ones(1, dtype=torch.float64))
        if metric is None:
            continue
        values_GO, vectors_GOO = torch.linalg.eigh(weight_GON @ metric.gram_BNN @ weight_GON.mT)
        values_GO = values_GO.clamp_min(0).flip(-1)
        shares_GO = values_GO / values_GO.sum().clamp_min(1e-300)
        found[name] = Matrix(weight_GON, vectors_GOO.flip(-1), shares_GO, transposed, frequencies)
    return found


def whitened(subject: coding.Subject, budget: str, draw: int) -> Cut:
    example = subject.calibration(draw)[0][:1]
    unit, text = budget.split("=")
    limit, which = float(text.rstrip("%")) / 100, 0 if unit == "params" else 1
    layers = matrices(subject, draw)
    run = trace(subject.model, example)
    # The energy of each further rank, per unit of its cost; a rank at which two matrices are not smaller is the whole.
    gains = []
    for name, matrix in layers.items():
        groups, rows, columns = matrix.weight_GON.shape
        each = groups * (rows + columns)
        if which:
            each *= run.layers[name].macs // (groups * rows * columns)
        most = min(rows, columns)
        for rank in range(1, most + 1):
            gains.append((float(matrix.shares_GO[:, rank - 1].sum()) / each, name, rank))
    gains.sort(reverse=True)

    def ranks_for(count: int) -> dict[str, int]:
        ranks = dict.fromkeys(layers, 1)
        for _, name, rank in gains[:count]:
            ranks[name] = max(ranks[name], rank)
        return ranks

    low, high = 0, len(gains)
    while high - low > 1:
        middle = (low + high) // 2
        plan = plan_with(subject.model, ranks_for(middle), example)
        low, high = (middle, high) if costs(subject.model, plan, example)[which] <= limit else (low, middle)
    plan = plan_with(subject.model, ranks_for(low), example)
    model = copy.deepcopy(subject.model)
    for name, kept in plan.on("channels").items():
        matrix = layers[name]
        vectors_GOR = matrix.vectors_GOO[..., : kept.rank]
        product_GON = vectors_GOR @ (vectors_GOR.mT @ matrix.weight_GON)
        weight: Any = model.get_submodule(name).weight
        stored = from_groups(product_GON, matrix.frequencies, matrix.transposed)
        weight.data.copy_(stored.reshape(weight.shape))
    return Cut(model, plan)


def methods(subject: coding.Subject, draw: int, trials: int) -> Iterator[tuple[str, str, Callable[[], Cut]]]:
    for budget in BUDGETS:
        if draw == 0:
            yield "SVD", budget, partial(uniform, subject, budget, None)
        yield "whitened SVD", budget, partial(whitened, subject, budget, draw)
        yield "ranks, same share", budget, partial(uniform, subject, budget, draw)
        yield "frequencies", budget, partial(searched, subject, budget, draw, ("space",), trials)
        yield "ranks", budget, partial(searched, subject, budget, draw, ("channels",), trials)
        yield "both", budget, partial(searched, subject, budget, draw, None, trials)


def run(names: list[str], draws: int, trials: int, only: list[str]) -> None:
    with appended(RESULTS, FIELDS, KEYS) as (done, write):
        for draw in range(draws):
            for name in names:
                subject = coding.subject(name)
                original = coding.outputs(subject.model, subject.test)
                for method, budget, make in methods(subject, draw, trials):
                    key = {"network": name, "method": method, "budget": budget, "draw": draw}
                    if (only and not {method, budget} & {*only}) or tuple(map(str, key.values())) in done:
                        continue
                    try:
                        cut = make()
                    except hc.HarmconvertError as error:  # such a budget cannot be met with frequencies alone
                        print(*key.values(), error, flush=True)
                        continue
                    parameters, macs = costs(subject.model, cut.plan, subject.calibration(draw)[0][:1])
                    row = {**key, "parameters": f"{parameters:.4f}", "macs": f"{macs:.4f}"}
                    result = coding.scores(cut.model, subject, original)
                    write({**row, **{field: result[field] for field in FIELDS if field in result}})


def summary() -> None:
    with RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name in dict.fromkeys(row["network"] for row in rows):
        print(f"\n{name}\nbudget      method             parameters     MACs      KL   agreement    top-1  draws")
        own = [row for row in rows if row["network"] == name]
        for budget, method in sorted(dict.fromkeys((row["budget"], row["method"]) for row in own), reverse=True):
            same = [row for row in own if (row["budget"], row["method"]) == (budget, method)]

            def value(field: str, same: list[dict[str, str]] = same) -> float:
                return mean(float(row[field]) for row in same) if same[0][field] else float("nan")

            print(
                f"{budget:11} {method:18} {value('parameters'):10.1%} {value('macs'):8.1%} {value('kl'):7.2g} "
                f"{value('agreement'):11.2%} {value('top1'):8.2%} {len(same):6}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS, metavar="NETWORK")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--trials", type=int, default=8, help="whole plans that a search tries")
    parser.add_argument("--only", default="", help="only these methods or budgets, separated by commas")
    parser.add_argument("--summary", action="store_true", help="print the results only")
    args = parser.parse_args()
    if not args.summary:
        run(args.networks, args.draws, args.trials, args.only.split(",") if args.only else [])
    summary()


if __name__ == "__main__":
    main()
