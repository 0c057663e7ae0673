"""What do ranks, frequencies, and both keep of a network's outputs at equal parameters and at equal multiply-adds?

    python benchmarks/ranks.py                               # writes results/ranks.csv; days
    python benchmarks/ranks.py resnet_mnist5k --draws 1 --only both --only params=40% --epochs 0
    python benchmarks/ranks.py --summary

Networks and their test inputs are those of coding.py: efficientnet_lite0 (ImageNet weights; agreement and KL on crops
of photographs that calibration did not see) and trained networks with labelled test images; mobilenetv2_mnist5k is a
small MobileNetV2. There are 256 calibration inputs, as by default; rows with 128 `inputs` are of code before the second
metric of ranks. `parameters` and `macs` are shares of the uncut
network; the MACs are those of the factored form. Each draw takes other calibration inputs; no choice is made on the
test inputs.

`epochs`: after so many epochs of distillation from the uncut network, without labels, by the recipe of `finetune` for
ranks; 0: nothing is trained. Training takes the labelled networks' own images, or 4,096 crops of the calibration
photographs of efficientnet_lite0.

Methods:

- `both`, `ranks`, `frequencies`: --budget with --axes; ranks and frequencies of each layer are chosen by probes of the
  network's outputs, and fitted layer after layer,
- `ranks, same share`: every layer keeps the same share of its parameters, fitted layer after layer,
- `whitened SVD`: after BALF (arXiv:2509.25136): each layer alone, on the inputs of the uncut network; a global
  allocation keeps the largest singular values relative to their sum in each layer,
- `SVD`: the nearest matrices without inputs; every layer keeps the same share of its parameters,
- `Tucker-2`: low rank over both channel axes (HOSVD), every layer with the same share; `Tucker-2, data`: in the metric
  of the inputs of the uncut network,
- `channel pruning`: Torch-Pruning, the channels of least norm, with re-estimated batch norms.
"""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from statistics import mean
from tempfile import gettempdir
from typing import Any

import coding
import cuts_of_peers
import finetune
import photographs
import torch
from table import appended
from torch import Tensor, nn

import harmconvert as hc
from harmconvert.calibration import CalibrationContext, CalibrationSettings, moments_of, whole_layers
from harmconvert.data import NO_LABEL, Batch
from harmconvert.kernels import from_groups, full_rank, to_groups
from harmconvert.network import find_layers, trace, weighted_layers
from harmconvert.plan import Plan, Rank, RankSetting, apply_plan, make_plan, network_cost
from harmconvert.search import SearchSettings
from harmconvert.training import Callbacks, MachineSettings, recipe_named, train

RESULTS = Path(__file__).parent / "results" / "ranks.csv"
KEYS = ["network", "method", "budget", "draw", "inputs", "epochs"]
FIELDS = [*KEYS, "parameters", "macs", "kl", "agreement", "top1"]
NETWORKS = ["resnet_mnist5k", "efficientnet_lite0", "wrn16_4_mnist5k", "resnet18_elpv", "mobilenetv2_mnist5k"]
INPUTS = 256
BUDGETS = [f"{unit}={share}%" for unit in ("params", "macs") for share in (80, 70, 60, 50, 40)]
MEMORY = 4 << 30


@dataclass(frozen=True)
class Cut:
    """A network that was cut, which can be trained in this form, and its plan; None: a plain network of a peer."""

    model: nn.Module
    plan: Plan | None


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
    """Return the shares of parameters and multiply-adds that a plan keeps."""
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
    first = {name: replace(kept, kernel_second=False) for name, kept in plan.on("channels").items()}
    plan = plan.map_layers(lambda layer: layer.keeping(first[layer.name]) if layer.name in first else layer)
    model = copy.deepcopy(subject.model)
    for name, kept in plan.on("channels").items():
        matrix = layers[name]
        vectors_GOR = matrix.vectors_GOO[..., : kept.rank]
        product_GON = vectors_GOR @ (vectors_GOR.mT @ matrix.weight_GON)
        weight: Any = model.get_submodule(name).weight
        stored = from_groups(product_GON, matrix.frequencies, matrix.transposed)
        weight.data.copy_(stored.reshape(weight.shape))
    return Cut(apply_plan(model, plan), plan)


def tucker(subject: coding.Subject, budget: str, draw: int | None) -> Cut:
    example = subject.calibration(draw or 0)[0][:1]
    names = candidates(subject.model, example)
    layers = {n: m for n, m in weighted_layers(subject.model).items() if n in names and getattr(m, "groups", 1) == 1}
    moments = None
    if draw is not None:
        context = CalibrationContext.of(subject.model, subject.calibration(draw), CalibrationSettings())
        moments = {}
        for name, whole in whole_layers(subject.model, layers, context.data, 0, MEMORY):
            if (metric := moments_of(whole.fit, torch.ones(1, dtype=torch.float64))) is not None:
                moments[name] = metric.gram_BNN[0]
    return Cut(cuts_of_peers.tucker2(subject.model, moments or layers, budget, example, moments), None)


def pruned(subject: coding.Subject, budget: str, draw: int) -> Cut:
    batches = subject.calibration(draw)
    infos = find_layers(subject.model, trace(subject.model, batches[0][:1]))
    classifiers = [info.name for info in infos if info.classifier]
    return Cut(cuts_of_peers.pruned(subject.model, classifiers, budget, batches), None)


@dataclass
class Crops:
    """Random crops of the calibration photographs for a training without labels."""

    seed: int
    steps: int = 64
    batch_size: int = 64
    sampler: None = None

    def epoch(self, number: int, first_step: int = 0) -> Iterator[Batch]:
        for step in range(first_step, self.steps):
            seed = 1_000_003 * (self.seed + 1) + 1009 * number + step
            images = photographs.crops(photographs.FIT, self.batch_size, 224, seed)
            yield Batch(images, torch.full((len(images),), NO_LABEL), [])


def distilled(name: str, cut: Cut, teacher: nn.Module, draw: int, epochs: list[int]) -> Iterator[tuple[int, nn.Module]]:
    """Yield the cut network after some epochs of distillation from the uncut one."""
    model, trained = copy.deepcopy(cut.model), dict[int, nn.Module]()

    def keep(rows: Sequence[object]) -> None:
        if len(rows) in epochs:
            trained[len(rows)] = copy.deepcopy(model).eval()

    data = Crops(draw) if name == "efficientnet_lite0" else finetune.training_data(name, teacher, draw)
    recipe = recipe_named("finetune", distill=1.0, clip_grad=1.0, batch_size=64, epochs=max(epochs), seed=draw)
    train(model, data, recipe, teacher=teacher, machine=MachineSettings(), callbacks=Callbacks(epoch_done=keep))
    yield from trained.items()


def methods(subject: coding.Subject, draw: int, trials: int) -> Iterator[tuple[str, str, Callable[[], Cut]]]:
    for budget in BUDGETS:
        if draw == 0:
            yield "SVD", budget, partial(uniform, subject, budget, None)
            yield "Tucker-2", budget, partial(tucker, subject, budget, None)
        yield "Tucker-2, data", budget, partial(tucker, subject, budget, draw)
        yield "channel pruning", budget, partial(pruned, subject, budget, draw)
        yield "whitened SVD", budget, partial(whitened, subject, budget, draw)
        yield "ranks, same share", budget, partial(uniform, subject, budget, draw)
        yield "frequencies", budget, partial(searched, subject, budget, draw, ("space",), trials)
        yield "ranks", budget, partial(searched, subject, budget, draw, ("channels",), trials)
        yield "both", budget, partial(searched, subject, budget, draw, None, trials)


def run(names: list[str], draws: int, trials: int, only: list[str], epochs: list[int]) -> None:
    wanted_methods, wanted_budgets = {*only} - {*BUDGETS}, {*only} & {*BUDGETS}
    with appended(RESULTS, FIELDS, KEYS) as (done, write):
        for draw in range(draws):
            for name in names:
                subject = coding.subject(name, INPUTS)
                original = coding.outputs(subject.model, subject.test)
                for method, budget, make in methods(subject, draw, trials):
                    if method not in (wanted_methods or [method]) or budget not in (wanted_budgets or [budget]):
                        continue
                    missing = [e for e in epochs if (name, method, budget, str(draw), str(INPUTS), str(e)) not in done]
                    if not missing:
                        continue
                    try:
                        cut = make()
                    except (hc.HarmconvertError, ValueError) as error:  # such a budget cannot be met by this method
                        print(name, method, budget, draw, error, flush=True)
                        continue
                    example = subject.calibration(draw)[0][:1]
                    if cut.plan is None:
                        parameters, macs = cuts_of_peers.shares(subject.model, cut.model, example)
                    else:
                        parameters, macs = costs(subject.model, cut.plan, example)
                    results = [(0, cut.model)] if 0 in missing else []
                    later = [e for e in missing if e]
                    for epoch, model in itertools.chain(
                        results, distilled(name, cut, subject.model, draw, later) if later else ()
                    ):
                        row = {"network": name, "method": method, "budget": budget, "draw": draw, "inputs": INPUTS}
                        row |= {"epochs": epoch}
                        row |= {"parameters": f"{parameters:.4f}", "macs": f"{macs:.4f}"}
                        result = coding.scores(model, subject, original)
                        write({**row, **{field: result[field] for field in FIELDS if field in result}})


def _row_kind(row: Mapping[str, str]) -> tuple[str, str, str, str]:
    return row["budget"], row["method"], row["inputs"], row["epochs"]


def summary() -> None:
    with RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name in dict.fromkeys(row["network"] for row in rows):
        print(f"\n{name}\nbudget      method             inputs epochs  parameters     MACs      KL  agreement", end="")
        print("    top-1  draws")
        own = [row for row in rows if row["network"] == name]
        rows_of = itertools.groupby(sorted(own, key=_row_kind, reverse=True), _row_kind)
        for (budget, method, inputs, epochs), found in rows_of:
            same = list(found)

            def value(field: str, same: list[dict[str, str]] = same) -> float:
                return mean(float(row[field]) for row in same) if same[0][field] else float("nan")

            print(
                f"{budget:11} {method:18} {inputs:>6} {epochs:>6} {value('parameters'):10.1%} {value('macs'):8.1%} "
                f"{value('kl'):7.2g} {value('agreement'):11.2%} {value('top1'):8.2%} {len(same):6}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS, metavar="NETWORK")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--trials", type=int, default=8, help="whole plans that a search tries")
    parser.add_argument(
        "--only", action="append", default=[], metavar="METHOD|BUDGET", help="only this one; repeatable"
    )
    parser.add_argument("--epochs", nargs="+", type=int, default=[0, 1, 5], help="epochs of distillation; 0: none")
    parser.add_argument("--summary", action="store_true", help="print the results only")
    args = parser.parse_args()
    if not args.summary:
        run(args.networks, args.draws, args.trials, args.only, args.epochs)
    summary()


if __name__ == "__main__":
    main()
