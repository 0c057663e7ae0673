"""Does a cut make a network faster? Measure forms of a network, eager and compiled, and other ways to deploy it.

    python benchmarks/speed.py                              # results/speed.csv and results/speed_layers.csv
    python benchmarks/speed.py --networks wrn28_10 --lambdas 2
    python benchmarks/speed.py --device cuda --batch 256 --amp bfloat16 --networks wrn28_10
    python benchmarks/speed.py --summary

The networks have random weights, because time does not depend on them, and run without gradients. For each network and
lambda, these forms run in turns: the dense original as loaded (contiguous), in channels_last, and in channels_last
under torch.compile; the factored form that `factor` chooses, eager and compiled; two forms that merge the kernels at
each call, our harmonic form and that of the reference implementation; ONNX Runtime on the dense and on the factored
export. `ratio` is the time of the original divided by that of the row, `ratio_dense` the time of the faster eager dense
form divided by that of the row. Limits, on a CPU, at lambda 2, for `ratio`: WRN-28-10 2.2, VGG16-BN 1.8, ResNet-18 1.5;
never slower than dense.

speed_layers.csv (alone: --layers): each distinct layer of WRN-28-10 and ResNet-18 at lambda 2, and one of 256 channels
on maps of 28x28, in float32 and, where the processor has instructions for it, in bfloat16. Each is dense and factored,
and compared with a lower bound: the matrix product alone (a 1x1 convolution on responses that are already computed). It
also has the bytes that a layer must move. The limit for the layer of 256 channels in bfloat16 is 1.15 times the speed
of the dense form.
"""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import timm
import torch
from table import appended, processor
from torch import Tensor, nn
from torch.nn import functional

import harmconvert as hc
import harmconvert.models
from harmconvert.deploy import Target, factor_for, onnx_bytes
from harmconvert.deploy.runtime_rows import has_bfloat16
from harmconvert.layers import (
    FactoredMixin,
    HarmonicMixin,
    in_turns,
    kernels_to_channels_last,
    reason_not_factorable,
    to_dense,
    to_factored,
)
from harmconvert.network import factoring, fuse, layer_inputs, replace_module

FOLDER = Path(__file__).parent / "results"
NETWORKS = {"wrn28_10": (32, 16), "resnet18": (224, 16), "resnet50": (224, 16), "vgg16_bn": (224, 4)}  # size, batch
LAMBDAS: tuple[int | str, ...] = (1, 2, 3, "progressive")
KEYS = ["network", "lambda", "way", "device", "amp", "batch", "threads"]
FIELDS = [*KEYS, "factored_layers", "median_ms", "spread", "ratio", "ratio_dense", "turns", "torch"]
LAYER_FIELDS = [
    *("layer", "dtype", "channels", "out", "size", "stride", "batch", "threads", "dense_ms", "factored_ms"),
    *("product_ms", "over_product", "speedup", "moved_mb", "processor", "torch"),
]
Ways = dict[str, Callable[[], Any]]


class MergedEachCall(nn.Module):
    """Merge the kernel at each call as the reference implementation does: compute all products, then sum them."""

    def __init__(self, conv: HarmonicMixin) -> None:
        super().__init__()
        self.conv = to_dense(conv)
        self.coefficients = nn.Parameter(conv.coefficients.detach()[..., None, None])
        size = cast("tuple[int, ...]", conv.kernel_size)
        self.basis = nn.Parameter(conv.kernels.float().reshape(1, 1, len(conv.frequencies), *size))

    def forward(self, x: Tensor) -> Tensor:
        kernel = (self.coefficients * self.basis).sum(2)
        conv: Any = self.conv
        return functional.conv2d(x, kernel, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def merged_each_call(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    for module in [m for m in copied.modules() if isinstance(m, HarmonicMixin)]:
        copied = replace_module(copied, module, MergedEachCall(module))
    return copied


def ways(name: str, lam: int | str, args: argparse.Namespace) -> tuple[Ways, int]:
    """Return functions that run one forward pass each, by form, and the number of factored layers."""
    size, batch = NETWORKS[name]
    batch = args.batch or batch
    torch.manual_seed(0)
    plain = timm.create_model(name).eval()
    x = torch.randn(batch, 3, size, size, device=args.device)
    last = x.contiguous(memory_format=torch.channels_last)
    model = hc.convert(plain, lam, example_input=x[:1].cpu()).model.to(args.device)
    plain = plain.to(args.device)
    amp = (lambda: torch.autocast(args.device, torch.bfloat16)) if args.amp else nullcontext

    def runner(network: Any, input: Tensor) -> Callable[[], Any]:
        def run() -> Any:
            with amp():
                return network(input)

        return run

    chosen = factoring(model, x)
    factored = chosen.model
    networks = {
        "original": (plain, x), "dense, channels_last": (kernels_to_channels_last(fuse(plain)), last),
        "dense, compiled": (torch.compile(kernels_to_channels_last(fuse(plain))), last),
        "factored": (factored, last), "factored, compiled": (torch.compile(factored), last),
        "harmonic": (kernels_to_channels_last(model), last),
        "merged at each call, as the reference does": (merged_each_call(model), x),
    }  # fmt: skip
    if args.no_compile:
        networks = {way: pair for way, pair in networks.items() if "compiled" not in way}
    functions: Ways = {way: runner(*pair) for way, pair in networks.items()}
    if args.device == "cpu" and not args.no_onnx:
        functions |= onnx_ways(model, x)
    return functions, len(chosen.factored)


def onnx_ways(model: nn.Module, x: Tensor) -> Ways:
    """Return functions that run the dense network, and the factored one if it differs, in ONNX Runtime."""
    functions: Ways = {}
    networks = {"ONNX Runtime, dense": fuse(model).eval()}
    runtime = Target("onnx")
    cut = factor_for(runtime, model, x, lambda what: None).model
    if any(isinstance(module, FactoredMixin) for module in cut.modules()):
        networks["ONNX Runtime, factored"] = cut
    for way, network in networks.items():
        functions[way] = partial(runtime.open(onnx_bytes(network, x)), x)
    return functions


def run(args: argparse.Namespace) -> None:
    results = FOLDER / "speed.csv"
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    with appended(results, FIELDS, KEYS) as (done, write), torch.no_grad():
        for name, lam in itertools.product(args.networks, args.lambdas):
            batch = args.batch or NETWORKS[name][1]
            key = {
                "network": name,
                "lambda": lam,
                "device": device,
                "amp": args.amp,
                "batch": batch,
                "threads": args.threads,
            }
            if tuple(str(key.get(k, "original")) for k in KEYS) in done:
                continue
            candidates, layers = ways(name, lam, args)
            times = in_turns(candidates, args.turns, 5, 240.0)
            dense = min(times[way].median for way in ("original", "dense, channels_last"))
            for way, time in times.items():
                write(
                    {
                        **{k: way if k == "way" else key[k] for k in KEYS},
                        "factored_layers": layers,
                        "median_ms": f"{1e3 * time.median:.1f}",
                        "spread": f"{time.spread:.3f}",
                        "ratio": f"{times['original'].median / time.median:.2f}",
                        "ratio_dense": f"{dense / time.median:.2f}",
                        "turns": len(time.seconds),
                        "torch": torch.__version__,
                    }
                )


def distinct_layers() -> Iterator[tuple[str, Any, tuple[int, ...]]]:
    """Yield the name, the harmonic convolution, and the shape of its input."""
    for name in ("wrn28_10", "resnet18"):
        size, batch = NETWORKS[name]
        x = torch.randn(batch, 3, size, size)
        model = hc.convert(timm.create_model(name).eval(), 2, example_input=x[:1]).model
        convs = {
            n: m for n, m in model.named_modules() if isinstance(m, HarmonicMixin) and not reason_not_factorable(m)
        }
        seen = set()
        for layer, layer_input in layer_inputs(model, convs, x).items():
            conv: Any = convs[layer]
            kind = (layer_input.shape, conv.out_channels, conv.stride)
            if kind not in seen:
                seen.add(kind)
                yield f"{name} {layer}", conv, layer_input.shape
    wide: Any = hc.convert(nn.Sequential(nn.Conv2d(256, 256, 3, padding=1)), {"0": 2}).model
    yield "256 channels", wide[0], (8, 256, 28, 28)


def layers(args: argparse.Namespace) -> None:
    keys = ["layer", "dtype", "batch", "threads", "processor"]
    dtypes = (torch.float32, torch.bfloat16) if has_bfloat16() else (torch.float32,)
    with appended(FOLDER / "speed_layers.csv", LAYER_FIELDS, keys) as (done, write), torch.no_grad():
        for (name, conv, shape), dtype in itertools.product(distinct_layers(), dtypes):
            key = {"layer": name, "dtype": str(dtype).split(".")[1], "batch": shape[0], "threads": args.threads}
            key["processor"] = processor()
            if tuple(str(key[k]) for k in keys) not in done:
                write({**key, **one_layer(copy.deepcopy(conv).to(dtype), shape)})


def one_layer(conv: Any, shape: tuple[int, ...]) -> dict[str, object]:
    dtype = conv.coefficients.dtype
    dense, factored = kernels_to_channels_last(to_dense(conv)), to_factored(conv).eval()
    x = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
    y = dense(x)
    kept = len(conv.frequencies)
    responses = torch.randn(shape[0], kept * shape[1], *y.shape[2:]).to(dtype)
    responses = responses.contiguous(memory_format=torch.channels_last)
    product = torch.randn(conv.out_channels, kept * shape[1], 1, 1).to(dtype)
    forms = {"dense": lambda: dense(x), "factored": lambda: factored(x)}
    forms["product"] = lambda: functional.conv2d(responses, product)
    times = in_turns(forms, 31, 9, 5.0)
    seconds = {way: found.median for way, found in times.items()}
    return {
        "channels": shape[1], "out": conv.out_channels, "size": shape[2], "stride": conv.stride[0],
        **{f"{way}_ms": f"{1e3 * value:.3f}" for way, value in seconds.items()},
        "over_product": f"{seconds['factored'] / seconds['product']:.2f}",
        "speedup": f"{seconds['dense'] / seconds['factored']:.2f}",
        "moved_mb": f"{1e-6 * dtype.itemsize * (x.numel() + y.numel() + product.numel()):.1f}",
        "torch": torch.__version__,
    }  # fmt: skip


def summary() -> None:
    with (FOLDER / "speed.csv").open() as file:
        rows = list(csv.DictReader(file))
    print("Time of the original (contiguous, eager) divided by that of each form")
    for network, lam in dict.fromkeys((row["network"], row["lambda"]) for row in rows):
        of_network = [row for row in rows if (row["network"], row["lambda"]) == (network, lam)]
        print(f"  {network}, lambda {lam}: " + "; ".join(f"{row['way']} {row['ratio']}" for row in of_network))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--lambdas", nargs="+", default=list(LAMBDAS), type=lambda t: int(t) if t.isdecimal() else t)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int)
    parser.add_argument("--amp", default="", choices=["", "bfloat16"])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-onnx", action="store_true")
    parser.add_argument("--layers", action="store_true", help="only speed_layers.csv")
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.summary:
        if args.device == "cpu":
            layers(args)
        if args.layers:
            return
        run(args)
    summary()


if __name__ == "__main__":
    main()
