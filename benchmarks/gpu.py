"""Does everything work on a GPU, and which form is the fastest there? One command of at most eight minutes.

    python benchmarks/gpu.py                              # writes results/gpu.csv
    python benchmarks/gpu.py --device cpu --quick         # tries the script without a GPU; writes nothing
    python benchmarks/gpu.py --summary

`works`: the flows on the device (conversion with calibration, coding, ranks, a byte budget, one epoch of fine-tuning,
each with sample:resnet_mnist5k), and how far the outputs are from those of the same flow on the CPU. `times`: the forms
of WRN-28-10, ResNet-50 and VGG16-BN with random weights at lambda 2, in float32 and bfloat16, eager and compiled, in
turns; `ratio` is the time of the original network in the same precision, eager and contiguous, divided by that of the
row. Networks for which no time is left are not timed: the last line says so.
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from table import appended
from torch import nn

import harmconvert as hc
import harmconvert.models
from harmconvert.layers import in_turns, kernels_to_channels_last
from harmconvert.network import factoring, fuse
from harmconvert.samples import mnist5k_held_back

assert harmconvert.models
RESULTS = Path(__file__).parent / "results" / "gpu.csv"
KEYS = ["part", "network", "way", "precision", "batch", "device"]
FIELDS = [*KEYS, "result", "seconds", "ratio", "torch"]
NETWORKS = {"wrn28_10": (32, 128), "resnet50": (224, 64), "vgg16_bn": (224, 64)}  # size, batch
SAMPLE = "sample:resnet_mnist5k"
LIMIT = 480.0  # seconds


def flows(device: str) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Yield the name of each flow, and a function that returns its network."""
    images = mnist5k_held_back()[0]
    batches = [part.to(device) for part in images[:256].split(64)]

    def converted(**options: Any) -> nn.Module:
        model = hc.open_source(SAMPLE).model.to(device)
        return hc.convert(model, calibration=batches, example_input=batches[0][:1], **options).model

    def finetuned() -> nn.Module:
        cut = hc.convert(hc.open_source(SAMPLE).model, 2)
        machine = hc.training.MachineSettings(device=torch.device(device))
        return hc.finetune(cut, "sample:mnist5k", epochs=1, crop="none", machine=machine).model

    yield "lambda 2, calibrated", lambda: converted(lam=2)
    yield "3 bits, calibrated", lambda: converted(bits=3)
    yield "half the rank, calibrated", lambda: converted(rank=0.5)
    yield "8 % of the bytes", lambda: converted(budget={"bytes": "8%"})
    yield "lambda 2, one epoch", finetuned


def works(device: str) -> Iterator[dict[str, object]]:
    """Yield a row for each flow: the largest difference of its outputs from those of the flow on the CPU."""
    images = mnist5k_held_back()[0][:200]
    for (name, make), (_, on_cpu) in zip(flows(device), flows("cpu"), strict=True):
        start = time.perf_counter()
        try:
            model, reference = make().eval(), on_cpu().eval()
            with torch.no_grad():
                outputs = model(images.to(next(model.parameters()).device)).cpu()
                expected = reference.cpu()(images)
            difference = float((outputs - expected).abs().max() / expected.abs().max())
            same = float((outputs.argmax(1) == expected.argmax(1)).double().mean())
            result = f"outputs within {difference:.1e} of the CPU's, same top-1 on {same:.1%}"
        except Exception as error:  # the other flows must still be tried
            result = f"FAILED: {type(error).__name__}: {error}".splitlines()[0][:160]
        yield {
            "part": "works", "network": SAMPLE, "way": name, "precision": "float32", "batch": 64, "result": result,
            "seconds": f"{time.perf_counter() - start:.1f}",
        }  # fmt: skip


def times(name: str, precision: str, device: str, quick: bool) -> Iterator[dict[str, object]]:
    """Yield a row for each form of a network, timed in turns."""
    size, batch = NETWORKS[name]
    batch = 1 if quick else batch
    dtype = getattr(torch, precision)
    torch.manual_seed(0)
    plain = timm.create_model(name).eval()
    model = hc.convert(plain, 2, example_input=torch.zeros(1, 3, size, size)).model.to(device)
    x = torch.randn(batch, 3, size, size, device=device)
    chosen = factoring(model, x)
    last = x.to(dtype).contiguous(memory_format=torch.channels_last)
    networks: dict[str, tuple[nn.Module, torch.Tensor]] = {
        "original": (copy.deepcopy(plain).to(device, dtype), x.to(dtype)),
        "dense, channels_last": (kernels_to_channels_last(fuse(model).to(dtype)), last),
        "factored": (copy.deepcopy(chosen.model).to(dtype), last),
        "harmonic": (kernels_to_channels_last(copy.deepcopy(model).to(dtype)), last),
    }
    if not quick:
        for way in ("dense, channels_last", "factored"):
            networks[f"{way}, compiled"] = torch.compile(networks[way][0]), last  # type: ignore[assignment]

    def runner(network: nn.Module, input: torch.Tensor) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                network(input)
            if device != "cpu":
                torch.cuda.synchronize()

        return run

    found = in_turns({way: runner(*pair) for way, pair in networks.items()}, 15, 3, 20.0, warm=3)
    for way, one in found.items():
        yield {
            "part": "times", "network": name, "way": way, "precision": precision, "batch": batch,
            "result": f"{len(chosen.factored)} layers factored", "seconds": f"{one.median:.5f}",
            "ratio": f"{found['original'].median / one.median:.2f}",
        }  # fmt: skip


def run(device: str, quick: bool, write: Callable[[dict[str, object]], None]) -> None:
    start = time.perf_counter()
    for row in works(device):
        write(row)
    for name in list(NETWORKS)[: 1 if quick else None]:
        for precision in ("float32", "bfloat16"):
            used = time.perf_counter() - start
            if used > 0.75 * LIMIT:
                print(f"{name} in {precision} was not timed: {used:.0f} of {LIMIT:.0f} s are used", flush=True)
                continue
            for row in times(name, precision, device, quick):
                write(row)


def summary() -> None:
    with RESULTS.open(newline="") as file:
        for row in csv.DictReader(file):
            ratio = f"{row['ratio']:>6} times the original" if row["ratio"] else ""
            print(f"{row['network']:22} {row['way']:32} {row['precision']:9} {row['seconds']:>9} s {ratio}")
            print(f"{'':22} {row['result']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="one small batch, without torch.compile; write nothing")
    parser.add_argument("--summary", action="store_true", help="print the results only")
    args = parser.parse_args()
    if args.summary:
        summary()
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: try the script with --device cpu --quick")
    if args.quick:
        run(args.device, True, lambda row: print(*row.values(), flush=True))
        return
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    with appended(RESULTS, FIELDS, KEYS) as (done, write):

        def write_new(row: dict[str, object]) -> None:
            row = {**row, "device": name, "torch": torch.__version__}
            if tuple(str(row[key]) for key in KEYS) not in done:
                write(row)

        run(args.device, False, write_new)
    summary()


if __name__ == "__main__":
    main()
