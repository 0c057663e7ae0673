"""How much of the loss of a cut does calibration recover, without labels or training, and is it the best method?

    python benchmarks/calibration.py                        # appends to results/calibration.csv; skips existing rows
    python benchmarks/calibration.py --networks resnet_mnist5k --images 128 --seeds 0
    python benchmarks/calibration.py --summary

For each network, lambda, number of calibration images and seed (which selects the images): the uncut network, the plain
cut, the plain cut with re-estimated batch norms, the refit, the refit with re-estimated batch norms, and the result of
`convert --calibrate`, which keeps the re-estimation if it improves the outputs on held-back inputs. Three other methods
without training have the same number of parameters: Tucker-2 of each kernel, a KLT basis for each layer (eigenvectors
of the layer's filters) instead of the DCT, and filter pruning (filters of least magnitude set to zero).

Measures, on test images that neither training nor calibration used: top-1, agreement with the uncut network, and the KL
divergence of the class probabilities from those of the uncut network (nats). The summary prints the share of the KL
that a method removes, and the share of the lost top-1 that it recovers if the cut lost at least one point. Networks:
two samples, and two dense 3x3 networks that networks.py trains. efficientnet_lite0 has no labelled test set here: it
has agreement and KL on crops of photographs, and its depthwise layers are named, so that they are cut.
"""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import cast

import networks
import torch
from table import appended
from torch import Tensor, nn

import harmconvert as hc
from harmconvert.calibration import CalibrationSettings, calibrate, reestimate_batch_norm
from harmconvert.data import calibration_images
from harmconvert.network import convolutions
from harmconvert.pipeline import Conversion
from harmconvert.samples import photographs

RESULTS = Path(__file__).parent / "results" / "calibration.csv"
KEYS = ["network", "lambda", "images", "seed", "method"]
FIELDS = [*KEYS, "parameters", "top1", "agreement", "kl", "seconds", "torch"]
LAMBDAS: list[str | int] = [3, "progressive", 2, 1]
BATCH = 32


@dataclass(frozen=True)
class Subject:
    """A network, a function from (count, seed) to calibration images, and test images with their labels or None."""

    model: nn.Module
    calibration: Callable[[int, int], list[Tensor]]
    images: Tensor
    labels: Tensor | None
    include: tuple[str, ...] = ()
    lambdas: tuple[str | int, ...] = tuple(LAMBDAS)


def subject(name: str) -> Subject:
    if name == "efficientnet_lite0":
        model = hc.open_source("sample:efficientnet_lite0").model
        depthwise = tuple(n for n, c in convolutions(model).items() if cast(int, c.groups) > 1)
        test = torch.cat(calibration_images("sample:photographs", model, 200, BATCH, seed=12345).batches)
        assert photographs().shape[1:] == test.shape[1:]
        return Subject(
            model,
            lambda count, seed: list(calibration_images("sample:photographs", model, count, BATCH, seed=seed).batches),
            test,
            None,
            depthwise,
            (3, 2),
        )
    if name == "resnet_mnist5k":
        model, data = hc.open_source("sample:resnet_mnist5k").model, networks.mnist5k()
    else:
        model, data = networks.trained(name), networks.RECIPES[name].data()

    def random_images(count: int, seed: int) -> list[Tensor]:
        order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(seed))
        return list(data.images[order[:count]].split(BATCH))

    return Subject(model, random_images, data.test_images, data.test_labels)


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(batch) for batch in images.split(64)]).double()


def scores(model: nn.Module, subject: Subject, uncut: Tensor) -> dict[str, float | str]:
    actual = logits(model, subject.images)
    p, q = uncut.log_softmax(1), actual.log_softmax(1)
    kl = (p.exp() * (p - q)).sum(1).mean().item()
    agreement = (actual.argmax(1) == uncut.argmax(1)).double().mean().item()
    top1: float | str = ""
    if subject.labels is not None:
        top1 = round((actual.argmax(1) == subject.labels).double().mean().item(), 4)
    return {"top1": top1, "agreement": round(agreement, 4), "kl": float(f"{kl:.4g}")}


# --- the other methods, each with as many parameters as the cut keeps in a layer ---


def tucker2(kernel: Tensor, budget: int) -> Tensor:
    """Return the Tucker-2 approximation of a kernel (O, I, *K) over both channel axes.

    It is computed by higher-order orthogonal iteration. The ranks are in proportion to the axes, and the largest for
    which the factors and the core fit the budget.
    """
    out, inside, size = kernel.shape[0], kernel.shape[1], kernel[0, 0].numel()
    share = next(
        s
        for s in torch.linspace(1, 0, 2001).tolist()
        if (r := max(1, int(s * out))) * out + (q := max(1, int(s * inside))) * inside + r * q * size <= budget
        or s == 0
    )
    ranks = max(1, int(share * out)), max(1, int(share * inside))
    tensor = kernel.double().flatten(2)
    right = torch.linalg.svd(tensor.transpose(0, 1).flatten(1), full_matrices=False)[0][:, : ranks[1]]
    for _ in range(20):
        left = torch.linalg.svd(torch.einsum("oik,iq->oqk", tensor, right).flatten(1), full_matrices=False)[0]
        left = left[:, : ranks[0]]
        mixed = torch.einsum("oik,or->irk", tensor, left).flatten(1)
        right = torch.linalg.svd(mixed, full_matrices=False)[0][:, : ranks[1]]
    core = torch.einsum("oik,or,iq->rqk", tensor, left, right)
    return torch.einsum("rqk,or,iq->oik", core, left, right).view_as(kernel).to(kernel)


def klt(kernel: Tensor, kept: int) -> Tensor:
    """Project each filter onto the ``kept`` strongest eigenvectors of the layer's filters."""
    filters = kernel.double().flatten(2).flatten(0, 1)
    vectors = torch.linalg.eigh(filters.T @ filters)[1][:, -kept:]
    return (filters @ vectors @ vectors.T).view_as(kernel).to(kernel)


def pruned(kernel: Tensor, share: float) -> Tensor:
    """Set the output filters of least norm to zero; keep the ``share`` of filters."""
    norms = kernel.flatten(1).norm(dim=1)
    keep = norms.topk(max(1, round(share * len(norms)))).indices
    mask = torch.zeros_like(norms)
    mask[keep] = 1
    return kernel * mask.view(-1, *(1,) * (kernel.dim() - 1))


OTHER_METHODS = ("tucker-2", "klt", "filter pruning")


def other_methods(
    model: nn.Module, conversion: Conversion, names: Iterable[str] = OTHER_METHODS
) -> Iterator[tuple[str, nn.Module]]:
    for name in names:
        other = copy.deepcopy(model)
        convs = convolutions(other)
        for layer in conversion.plan.layers:
            if layer.whole:
                continue
            weight = cast(Tensor, convs[layer.name].weight)
            kept, total = len(layer.frequencies), weight[0, 0].numel()
            if name == "tucker-2":
                new = tucker2(weight.data, weight.numel() * kept // total)
            elif name == "klt":
                new = klt(weight.data, kept)
            else:
                new = pruned(weight.data, kept / total)
            weight.data.copy_(new)
        yield name, other


# --- rows ---


def methods(subject: Subject, lam: str | int, count: int, seed: int) -> Iterator[tuple[str, nn.Module, float]]:
    """Yield the name, the network and the seconds of each method; each converts the network again."""

    def cut() -> Conversion:
        return hc.convert(subject.model, lam, include=subject.include)

    batches = subject.calibration(count, seed)
    yield "projection", cut().model, 0.0
    conversion = cut()
    start = time.perf_counter()
    reestimate_batch_norm(conversion.model, batches)
    yield "projection + bn", conversion.model, time.perf_counter() - start
    conversion = cut()
    start = time.perf_counter()
    plan = conversion.plan
    calibrate(subject.model, conversion.model, plan, batches, CalibrationSettings(batch_norm=False, seed=seed))
    seconds = time.perf_counter() - start
    yield "refit", conversion.model, seconds
    result = copy.deepcopy(conversion.model)
    reestimate_batch_norm(conversion.model, batches)
    yield "refit + bn", conversion.model, time.perf_counter() - start
    # As convert() does after its refit: keep the re-estimation if it improves the outputs on held-back inputs.
    calibrate(subject.model, result, plan, batches, CalibrationSettings(refit=False, seed=seed))
    yield "convert --calibrate", result, time.perf_counter() - start


def run(names: list[str], counts: list[int], seeds: list[int], threads: int) -> None:
    torch.set_num_threads(threads)
    with appended(RESULTS, FIELDS, KEYS) as (done, append):

        def write(key: tuple[object, ...], parameters: int, scores: dict[str, float | str], seconds: float) -> None:
            row = dict(zip(KEYS, map(str, key), strict=True))
            append({**row, "parameters": parameters, "seconds": f"{seconds:.1f}", "torch": torch.__version__, **scores})

        subjects = {name: subject(name) for name in names}
        uncut = {name: logits(case.model, case.images) for name, case in subjects.items()}
        sizes: dict[tuple[str, str | int], int] = {}
        for name, case in subjects.items():
            if (name, "full", "", "", "uncut") not in done:
                size = sum(p.numel() for p in case.model.parameters())
                write((name, "full", "", "", "uncut"), size, scores(case.model, case, uncut[name]), 0.0)
            for lam in case.lambdas:
                conversion = hc.convert(case.model, lam, include=case.include)
                sizes[name, lam] = conversion.cost.harmonic_parameters
                missing = [method for method in OTHER_METHODS if (name, str(lam), "", "", method) not in done]
                for method, model in other_methods(case.model, conversion, missing):
                    write((name, lam, "", "", method), sizes[name, lam], scores(model, case, uncut[name]), 0.0)
        # The outer loop is over seeds, so that an interrupted run has complete tables for fewer seeds.
        for seed, count, (name, case) in itertools.product(seeds, counts, subjects.items()):
            for lam in case.lambdas:
                if (name, str(lam), str(count), str(seed), "convert --calibrate") in done:
                    continue
                for method, model, seconds in methods(case, lam, count, seed):
                    key = (name, lam, count, seed, method)
                    if tuple(map(str, key)) not in done:
                        write(key, sizes[name, lam], scores(model, case, uncut[name]), seconds)


def summary() -> None:
    with RESULTS.open() as file:
        rows = list(csv.DictReader(file))
    uncut = {row["network"]: row for row in rows if row["method"] == "uncut"}

    def pick(**wanted: str) -> list[dict[str, str]]:
        return [row for row in rows if all(row[key] == value for key, value in wanted.items())]

    def spread(values: list[float], digits: int = 1) -> str:
        if len(values) == 1 or max(values) == min(values):
            return f"{mean(values):.{digits}f}"
        return f"{mean(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"

    for name, base in uncut.items():
        labelled = base["top1"] != ""
        measure = "top1" if labelled else "agreement"
        print(f"\n{name}: {measure} in % (uncut {100 * float(base[measure]):.1f}), spread over seeds")
        for lam in dict.fromkeys(row["lambda"] for row in rows if row["network"] == name and row["lambda"] != "full"):
            here = pick(network=name, **{"lambda": lam})
            print(f"  lambda {lam}, {int(here[-1]['parameters']):,} parameters")
            cut = mean([float(row[measure]) for row in here if row["method"] == "projection"] or [float("nan")])
            cut_kl = mean([float(row["kl"]) for row in here if row["method"] == "projection"] or [float("nan")])
            for method in dict.fromkeys(row["method"] for row in here):
                for count in dict.fromkeys(row["images"] for row in here if row["method"] == method):
                    of_method = [row for row in here if row["method"] == method and row["images"] == count]
                    if method == "projection" and count != "32":
                        continue
                    values = [100 * float(row[measure]) for row in of_method]
                    kls = [float(row["kl"]) for row in of_method]
                    recovered = f"KL recovered {100 * (1 - mean(kls) / cut_kl):6.1f} %"
                    lost = 100 * (float(base[measure]) - cut)
                    if lost >= 1:
                        recovered += f"   {measure} recovered {100 * (mean(values) - 100 * cut) / lost:6.1f} %"
                    print(f"    {method:20} {count:>4}  {spread(values):22} KL {mean(kls):.4f}  {recovered}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ["resnet_mnist5k", "wrn16_4_mnist5k", "resnet18_elpv", "efficientnet_lite0"]
    parser.add_argument("--networks", nargs="+", default=every, choices=every)
    parser.add_argument("--images", nargs="+", type=int, default=[32, 128, 512])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    if not args.summary:
        run(args.networks, args.images, args.seeds, args.threads)
    summary()


if __name__ == "__main__":
    main()
