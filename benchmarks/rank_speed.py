"""Does half of the multiply-adds make a network faster, in each runtime? Time networks of low rank beside dense ones.

    python benchmarks/rank_speed.py                           # writes results/rank_speed.csv
    python benchmarks/rank_speed.py --networks resnet50 --macs 50
    python benchmarks/rank_speed.py --summary

The networks have random weights, because time does not depend on them, and run without gradients. Plans: `ranks` and
`both` (ranks and frequencies) come from --budget macs= without inputs. Ways: eager with channels_last, ONNX Runtime and
OpenVINO, in float32; eager and OpenVINO in bfloat16, too, where the processor has instructions for it. In each way, the
dense network and the cut one run in turns; `ratio` is the time of the dense network in the same way divided by that of
the row. The cut network is the one of `factor` (eager) or of `export --form factored` (the runtimes).

OpenVINO's rows need `openvino`. Limits for `ratio` of ResNet-50 at half of the MACs: 1.5 in float32, 1.3 in bfloat16.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from table import appended, processor
from torch import Tensor, nn

import harmconvert as hc
from harmconvert.deploy import Target, factor_for, onnx_bytes
from harmconvert.deploy.runtime_rows import has_bfloat16
from harmconvert.layers import in_turns, kernels_to_channels_last
from harmconvert.network import factoring, fuse
from harmconvert.search import SearchSettings

RESULTS = Path(__file__).parent / "results" / "rank_speed.csv"
NETWORKS = {"resnet50": (224, 8), "resnet18": (224, 16), "mobilenetv2_100": (224, 16)}  # size, batch
AXES = {"ranks": ("channels",), "both": ("space", "channels")}
KEYS = ["network", "macs", "plan", "way", "batch", "threads"]
FIELDS = [*KEYS, "split_layers", "dense_ms", "median_ms", "spread", "ratio", "turns", "processor", "torch"]
Pair = tuple[Callable[[], Any], Callable[[], Any]]


WAYS = {"eager", "ONNX Runtime", "OpenVINO"} | ({"eager, bfloat16", "OpenVINO, bfloat16"} if has_bfloat16() else set())


def eager(dense: nn.Module, cut: nn.Module, x: Tensor, dtype: torch.dtype) -> Pair:
    last = x.to(dtype).contiguous(memory_format=torch.channels_last)
    networks = (kernels_to_channels_last(network.to(dtype)) for network in (dense, cut))
    first, second = (partial(network, last) for network in networks)
    return first, second


def in_runtime(target: Target, model: nn.Module, x: Tensor) -> tuple[int, Pair]:
    """Return the number of layers in two parts, and functions that run the dense network and the cut one."""
    chosen = factor_for(target, model, x, lambda what: None)
    first, second = (partial(target.open(onnx_bytes(one, x), x), x) for one in (fuse(model, x), chosen.model))
    return len(chosen.factored), (first, second)


def pairs(model: nn.Module, x: Tensor) -> Iterator[tuple[str, int, Pair]]:
    """Yield each way to run a network with the number of layers in two parts, and a function for dense and for cut."""
    chosen = factoring(model, x)
    layers = len(chosen.factored)
    yield "eager", layers, eager(fuse(model, x), chosen.model, x, torch.float32)
    if has_bfloat16():
        copies = (fuse(model, x), factoring(model, x).model)
        yield "eager, bfloat16", layers, eager(*copies, x, torch.bfloat16)
    yield "ONNX Runtime", *in_runtime(Target("onnx"), model, x)
    yield "OpenVINO", *in_runtime(Target("openvino"), model, x)
    if has_bfloat16():
        yield "OpenVINO, bfloat16", *in_runtime(Target("openvino", "bf16"), model, x)


def run(args: argparse.Namespace) -> None:
    with appended(RESULTS, FIELDS, KEYS) as (done, write), torch.no_grad():
        for name, share, plan in itertools.product(args.networks, args.macs, args.plans):
            size, batch = NETWORKS[name]
            key = {"network": name, "macs": share, "plan": plan, "batch": batch, "threads": args.threads}
            known = {way for way in WAYS if tuple(str({**key, "way": way}[k]) for k in KEYS) in done}
            if known == WAYS:
                continue
            torch.manual_seed(0)
            x = torch.randn(batch, 3, size, size)
            search = SearchSettings(axes=AXES[plan], trials=0)
            plain = timm.create_model(name).eval()
            model = hc.convert(plain, budget=f"macs={share}%", search=search, example_input=x[:1]).model
            for way, layers, (dense, cut) in pairs(model, x):
                if way in known:
                    continue
                times = in_turns({"dense": dense, "cut": cut}, args.turns, 5, 60.0)
                before, after = times["dense"].median, times["cut"].median
                write({
                    **{k: way if k == "way" else key[k] for k in KEYS}, "split_layers": layers,
                    "dense_ms": f"{1e3 * before:.1f}", "median_ms": f"{1e3 * after:.1f}",
                    "spread": f"{times['cut'].spread:.3f}", "ratio": f"{before / after:.2f}",
                    "turns": len(times["cut"].seconds), "processor": processor(), "torch": torch.__version__,
                })  # fmt: skip


def summary() -> None:
    """Print the table for benchmarks/README.md."""
    with RESULTS.open() as file:
        rows = list(csv.DictReader(file))
    ways = list(dict.fromkeys(row["way"] for row in rows))
    print("| network | MACs | plan |", " | ".join(ways), "|\n|---|---|---|" + "---|" * len(ways))
    table: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        table.setdefault((row["network"], row["macs"], row["plan"]), {})[row["way"]] = row["ratio"]
    for (name, share, plan), ratios in table.items():
        print(f"| {name} | {share} % | {plan} |", " | ".join(ratios.get(way, "not run") for way in ways), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--macs", nargs="+", type=int, default=[50])
    parser.add_argument("--plans", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    summary() if args.summary else run(args)


if __name__ == "__main__":
    main()
