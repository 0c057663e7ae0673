"""What does fine-tuning gain after a conversion, compared with fine-tuning the uncut network in the same variant?

    python benchmarks/finetune.py                         # appends to results/finetune.csv; skips existing rows
    python benchmarks/finetune.py --networks resnet_mnist5k --seeds 0
    python benchmarks/finetune.py --summary

For each network and seed: the uncut network, the plain cut, the cut calibrated on 128 images, and each of these after
the paper's fine-tuning of 5 epochs (SGD, momentum 0.9, learning rate 0.001, weight decay 1e-4). The calibrated network
is also trained for 1 epoch, and for 5 epochs on the logits of the uncut network without labels, with frozen batch norms
(in old rows called "distilled, no labels", batch norms were not frozen). The control is the *uncut* network after the
same 5 epochs. The seed selects the calibration images, and the order and the augmentation of training.

The batch size is 64, not 256 as in the paper, because these data sets have 2,000 to 4,000 images and ImageNet has 1.3
million. The test images are those of calibration.py; they select nothing. efficientnet_lite0 has no labels here: it is
trained on 500 crops of photographs in each epoch with the uncut network as teacher, and tested by agreement on 200
other crops; its depthwise layers are named, so that they are cut.
"""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import mean

import calibration as common
import networks
import torch
from table import appended
from torch import Tensor, nn

import harmconvert as hc
from harmconvert.calibration import CalibrationSettings
from harmconvert.data import NO_LABEL, Batch, calibration_images
from harmconvert.training import Callbacks, MachineSettings, recipe_named, train

RESULTS = Path(__file__).parent / "results" / "finetune.csv"
KEYS = ["network", "lambda", "seed", "method"]
FIELDS = [*KEYS, "parameters", "top1", "agreement", "kl", "seconds", "torch"]
NETWORKS = ["resnet_mnist5k", "wrn16_4_mnist5k", "resnet18_elpv", "efficientnet_lite0"]
LAMBDAS: dict[str, list[str | int]] = {"efficientnet_lite0": [3]}
RECIPE = recipe_named("finetune", batch_size=64)


@dataclass
class Tensors:
    """Images in memory, shuffled and augmented by seed and epoch, with the interface of a loader for `train`."""

    images: Tensor
    labels: Tensor
    augment: Callable[[Tensor], Tensor]
    seed: int
    batch_size: int = RECIPE.batch_size
    sampler: None = None

    @property
    def steps(self) -> int:
        return len(self.images) // self.batch_size

    def epoch(self, number: int, first_step: int = 0) -> Iterator[Batch]:
        for step in range(first_step, self.steps):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1_000_003 * self.seed + number)
                order = torch.randperm(len(self.images))
                torch.manual_seed(1_000_003 * self.seed + 1009 * number + step + 1)
                chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
                images = self.augment(self.images[chosen])
            yield Batch(images, self.labels[chosen], [])


def training_data(name: str, model: nn.Module, seed: int) -> Tensors:
    if name == "efficientnet_lite0":
        crops = torch.cat(calibration_images("sample:photographs", model, 500, 50, seed=1000 + seed).batches)
        return Tensors(crops, torch.full((len(crops),), NO_LABEL), lambda images: images, seed)
    if name == "resnet_mnist5k":
        data = networks.mnist5k()
        return Tensors(data.images, data.labels, networks.shifted, seed)
    data = networks.RECIPES[name].data()
    return Tensors(data.images, data.labels, networks.RECIPES[name].augment, seed)


@dataclass(frozen=True)
class Variant:
    """A function that makes a network, and the name of the method for each number of epochs of fine-tuning."""

    lam: str
    make: Callable[[], nn.Module]
    methods: dict[int, str]
    distill: float = 0.0


def variants(name: str, subject: common.Subject, seed: int) -> Iterator[Variant]:
    labelled = subject.labels is not None
    yield Variant("full", lambda: subject.model, {0: "uncut", 5: "uncut + 5 epochs"} if labelled else {0: "uncut"})
    if labelled:
        yield Variant("full", lambda: hc.convert(subject.model).model, {5: "whole basis + 5 epochs"})
    for lam in LAMBDAS.get(name, ["progressive", 2]):
        cut = partial(hc.convert, subject.model, lam, include=subject.include)

        def projection(cut: Callable[..., hc.Conversion] = cut) -> nn.Module:
            return cut().model

        @cache
        def refit(cut: Callable[..., hc.Conversion] = cut) -> nn.Module:
            return cut(calibration=subject.calibration(128, seed), settings=CalibrationSettings(seed=seed)).model

        yield Variant(str(lam), projection, {0: "projection"})
        after = {1: "refit + 1 epoch", 5: "refit + 5 epochs"} if labelled else {}
        yield Variant(str(lam), refit, {0: "refit", **after})
        if labelled:
            yield Variant(str(lam), projection, {5: "projection + 5 epochs"})
        else:
            yield Variant(str(lam), projection, {5: "projection + 5 epochs distilled, frozen batch norms"}, 1.0)
        yield Variant(str(lam), refit, {5: "refit + 5 epochs distilled, frozen batch norms"}, 1.0)


def networks_of(
    variant: Variant, wanted: dict[int, str], data: Tensors, teacher: nn.Module
) -> Iterator[tuple[str, nn.Module, float]]:
    """Yield each ``wanted`` method, its network, and the seconds of its calibration or of its training.

    The learning rate is constant, so the first epoch of five is the same as a run of one epoch.
    """
    start = time.perf_counter()
    model = variant.make()
    if 0 in wanted:
        yield wanted[0], model, time.perf_counter() - start
    if not max(wanted):
        return
    model, trained, start = copy.deepcopy(model), {}, time.perf_counter()

    def keep(epochs: Sequence[object]) -> None:
        if len(epochs) in wanted:
            trained[len(epochs)] = copy.deepcopy(model)

    recipe = replace(
        RECIPE, seed=data.seed, distill=variant.distill, freeze_bn=variant.distill == 1, epochs=max(wanted)
    )
    train(
        model,
        data,
        recipe,
        teacher=teacher if variant.distill else None,
        machine=MachineSettings(),
        callbacks=Callbacks(epoch_done=keep),
    )
    seconds = time.perf_counter() - start
    yield from ((wanted[number], trained[number], seconds * number / max(wanted)) for number in trained)


def run(names: list[str], seeds: list[int], threads: int) -> None:
    torch.set_num_threads(threads)
    with appended(RESULTS, FIELDS, KEYS) as (done, write):
        for seed, name in itertools.product(seeds, names):
            subject = common.subject(name)
            uncut, data = common.logits(subject.model, subject.images), training_data(name, subject.model, seed)
            for variant in variants(name, subject, seed):
                keys = {number: (name, variant.lam, str(seed), method) for number, method in variant.methods.items()}
                wanted = {number: variant.methods[number] for number, key in keys.items() if key not in done}
                for method, model, seconds in networks_of(variant, wanted, data, subject.model) if wanted else ():
                    row = dict(zip(KEYS, (name, variant.lam, str(seed), method), strict=True))
                    row |= {"parameters": str(sum(p.numel() for p in model.parameters())), "seconds": f"{seconds:.1f}"}
                    write({**row, "torch": torch.__version__, **common.scores(model, subject, uncut)})


def summary() -> None:
    with RESULTS.open() as file:
        table = list(csv.DictReader(file))
    for name in dict.fromkeys(row["network"] for row in table):
        here = [row for row in table if row["network"] == name]
        measure = "top1" if here[0]["top1"] else "agreement"
        print(f"\n{name}: {measure} in %, mean (min-max) over seeds")
        for lam, method in dict.fromkeys((row["lambda"], row["method"]) for row in here):
            of_method = [row for row in here if (row["lambda"], row["method"]) == (lam, method)]
            values = [100 * float(row[measure]) for row in of_method]
            spread = f" ({min(values):.1f}-{max(values):.1f})" if max(values) > min(values) else ""
            seconds = mean(float(row["seconds"]) for row in of_method)
            print(
                f"  {lam:12} {method:38} {int(of_method[0]['parameters']):>10,}  {mean(values):5.2f}{spread:14} "
                f"KL {mean(float(row['kl']) for row in of_method):.4f}  {len(of_method)} seeds  {seconds:6.1f} s"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=NETWORKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    if not args.summary:
        run(args.networks, args.seeds, args.threads)
    summary()


if __name__ == "__main__":
    main()
