"""What does a training step of the harmonic network cost, compared with the plain network?

    python benchmarks/step_cost.py                       # writes results/step_cost.csv
    python benchmarks/step_cost.py --compile             # compile all forms first
    python benchmarks/step_cost.py --device cuda --batch 256 --amp bfloat16

ResNet-50 at 224 and WRN-28-10 at 32, whole basis and progressive: forward, backward and an SGD step with momentum on
one batch. All forms run in turns, step by step, so that other work on the machine affects them equally. `ratio` is the
ratio of the medians; `ratio_low` and `ratio_high` are the quartiles of the ratios of neighbouring steps. Peak memory is
measured in a separate process for each form (on a GPU by the allocator). Limits: 1.03 times the time, 1.05 times the
memory.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median, quantiles

import timm
import torch
from torch import nn
from torch.nn import functional

import harmconvert as hc
import harmconvert.models
from harmconvert.layers import coefficients_to_channels_last

RESULTS = Path(__file__).parent / "results" / "step_cost.csv"
NETWORKS = {"resnet50": (224, 1000), "wrn28_10": (32, 10)}
FORMS = ("plain", "full", "progressive")
FIELDS = [
    *("network", "form", "device", "compiled", "amp", "batch", "threads", "steps"),
    *("median_s", "ratio", "ratio_low", "ratio_high", "peak_mb", "memory_ratio", "torch"),
]


def network(name: str, form: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False)
    return model if form == "plain" else hc.convert(model, form).model


def step_of(name: str, form: str, args: argparse.Namespace) -> Callable[[], None]:
    """Return a function that runs one training step and waits for its end."""
    size, classes = NETWORKS[name]
    model = network(name, form).to(args.device).to(memory_format=torch.channels_last).train()
    coefficients_to_channels_last(model)  # as `train` does
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)
    images = torch.randn(args.batch, 3, size, size, device=args.device).to(memory_format=torch.channels_last)
    labels = torch.randint(classes, (args.batch,), device=args.device)
    run = torch.compile(model) if args.compile else model

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(args.device, getattr(torch, args.amp)) if args.amp != "float32" else nullcontext():
            loss = functional.cross_entropy(run(images), labels)
        loss.backward()
        optimizer.step()
        if args.device == "cuda":
            torch.cuda.synchronize()

    return step


def peak_memory(name: str, form: str, args: argparse.Namespace) -> float:
    """Return the peak memory in MB of three steps of one form in a new process, minus that of an idle process."""
    own = [*sys.argv[1:], "--measure", name, form]
    process = subprocess.run([sys.executable, __file__, *own], capture_output=True, text=True, check=True)
    return float(json.loads(process.stdout.splitlines()[-1]))


def measure_memory(name: str, form: str, args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    functional.conv2d(
        torch.zeros(1, 3, 8, 8), torch.zeros(4, 3, 3, 3)
    )  # so that the memory of the library is in ``idle``
    idle = peak_resident()
    step = step_of(name, form, args)
    for _ in range(3):
        step()
    if args.device == "cuda":
        print(json.dumps(torch.cuda.max_memory_allocated() / 1e6))
    else:
        print(json.dumps((peak_resident() - idle) / 1e6))


def peak_resident() -> int:
    """Return the peak memory of this process in bytes; getrusage would start at the memory of the parent process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def compare(name: str, args: argparse.Namespace) -> list[dict[str, object]]:
    memory = {form: peak_memory(name, form, args) for form in FORMS}
    steps = {form: step_of(name, form, args) for form in FORMS}
    for step in steps.values():
        step()
        step()
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    for number in range(args.steps):
        for form in (FORMS, FORMS[::-1])[number % 2]:
            start = time.perf_counter()
            steps[form]()
            seconds[form].append(time.perf_counter() - start)
    rows = []
    for form in FORMS:
        ratios = [
            seconds_of_form / plain for seconds_of_form, plain in zip(seconds[form], seconds["plain"], strict=True)
        ]
        low, _, high = quantiles(ratios, n=4)
        ratio = median(seconds[form]) / median(seconds["plain"])
        rows.append(
            {
                "network": name,
                "form": form,
                "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
                "compiled": args.compile,
                "amp": args.amp,
                "batch": args.batch,
                "threads": args.threads,
                "steps": args.steps,
                "median_s": f"{median(seconds[form]):.4f}",
                "ratio": f"{ratio:.3f}",
                "ratio_low": f"{low:.3f}",
                "ratio_high": f"{high:.3f}",
                "peak_mb": f"{memory[form]:.0f}",
                "memory_ratio": f"{memory[form] / memory['plain']:.3f}",
                "torch": torch.__version__,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--amp", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        name, form = args.measure
        measure_memory(name, form, args)
        return
    torch.set_num_threads(args.threads)
    is_new = not RESULTS.exists()
    for name in args.networks:
        rows = compare(name, args)
        with RESULTS.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            if is_new:
                writer.writeheader()
                is_new = False
            writer.writerows(rows)
        for row in rows:
            print(*row.values(), flush=True)


if __name__ == "__main__":
    main()
