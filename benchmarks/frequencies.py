"""Which frequencies should a layer keep: the lowest, the strongest, or those that its output needs most?

    python benchmarks/frequencies.py             # appends to results/frequencies.csv; skips existing rows
    python benchmarks/frequencies.py --summary

There is no search: every layer that a policy may cut keeps the same share of its frequencies, so that only the choice
of frequencies differs. The lowest frequencies are those of a lambda if a lambda keeps that many. All plans are
calibrated on the same 128 images. Measures top-1 and KL on images that selected nothing, for three random choices of
images.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import cast

import calibration as common
import torch
from table import appended

import harmconvert as hc
from harmconvert.calibration import CalibrationSettings, calibration_set
from harmconvert.kernels import Frequency, all_frequencies
from harmconvert.network import find_layers, trace
from harmconvert.plan import Frequencies, LayerPlan, cut_layer
from harmconvert.search import items_of, orders_by_energy, orders_by_error, whole_plan

RESULTS = Path(__file__).parent / "results" / "frequencies.csv"
KEYS = ["network", "kept", "seed", "frequencies"]
FIELDS = [*KEYS, "top1", "agreement", "kl", "torch"]
SHARES = {"resnet_mnist5k": [n / 9 for n in (7, 6, 5, 4, 3, 2)], "ear_notes": [1 / 2, 1 / 4, 1 / 8]}
IMAGES = 128


def cut(layer: LayerPlan, order: tuple[Frequency, ...], share: float) -> LayerPlan:
    """Return the plan of a layer that keeps a share of its frequencies: the last ones of ``order``."""
    every = all_frequencies(layer.kernel_size)
    count = max(1, round(share * len(every)))
    return cut_layer(layer.name, layer.kernel_size, tuple(sorted(order[-count:], key=every.index)))


def rows(name: str, seed: int, done: set[tuple[str, ...]]) -> Iterator[dict[str, object]]:
    subject = common.subject(name)
    model, uncut = subject.model, common.logits(subject.model, subject.images)
    images, settings = subject.calibration(IMAGES, seed), CalibrationSettings(seed=seed)
    whole = whole_plan(find_layers(model, trace(model, subject.images[:1])))
    items = items_of(whole, {})
    harmonic = hc.convert(model, whole).model
    data = calibration_set(images, settings.inputs)
    by_error = orders_by_error(model, harmonic, items, data, settings, lambda *_: None)
    orders = {
        "lowest": {item.names[0]: cast(Frequencies, item.choices[0][0]).frequencies[::-1] for item in items},
        "strongest": {item.names[0]: order.frequencies for item, order in orders_by_energy(model, items)},
        "output error": {item.names[0]: order.frequencies for item, order in by_error},
    }
    for share in SHARES[name]:
        for how, order in orders.items():
            key = (name, f"{share:.3f}", str(seed), how)
            if key in done:
                continue
            layers = [cut(p, order[p.name], share) if p.name in order else p for p in whole.layers]
            plan = replace(whole, layers=tuple(layers))
            network = hc.convert(model, plan, calibration=images, settings=settings).model
            scores = common.scores(network, subject, uncut)
            yield {**dict(zip(KEYS, key, strict=True)), **scores, "torch": torch.__version__}


def summary() -> None:
    with RESULTS.open() as file:
        table = list(csv.DictReader(file))
    for name, kept, how in dict.fromkeys((row["network"], row["kept"], row["frequencies"]) for row in table):
        of_order = [row for row in table if (row["network"], row["kept"], row["frequencies"]) == (name, kept, how)]
        values = [100 * float(row["top1"]) for row in of_order]
        kl = mean(float(row["kl"]) for row in of_order)
        print(f"{name:16} {kept} {how:13} {mean(values):6.2f} ({min(values):.1f}-{max(values):.1f})  KL {kl:.5f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(SHARES), choices=list(SHARES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.summary:
        with appended(RESULTS, FIELDS, KEYS) as (done, write):
            for name in args.networks:
                for seed in args.seeds:
                    for row in rows(name, seed, done):
                        write(row)
    summary()


if __name__ == "__main__":
    main()
