"""Is this release as fast as another one? Time the same work in both, in turns, and compare.

    python benchmarks/same_speed.py /path/to/checkout-of-the-other-release      # writes results/same_speed.csv

Each release runs in its own process, which keeps its networks between the turns: a training step of ResNet-50 in
harmonic form (as step_cost.py), conversion and saving of ResNet-50 (convert_cost.py), calibration of ResNet-18 on 32
images (calibration_cost.py), and forwards of WRN-28-10 at lambda 2 in three forms (speed.py). The releases take turns
and change their order each time, so that other work on the machine affects both equally. `ratio` is the median of the
ratios of neighbouring runs, this release over the other one; `low` and `high` are its quartiles.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "same_speed.csv"
CASES = {"step": 21, "convert": 31, "calibrate": 9, "dense": 61, "harmonic": 61, "factored": 61}  # name -> turns

# Runs in each release, so it uses only functions that both have.
WORKER = r"""
import sys, time
import timm, torch
import harmconvert as hc
import harmconvert.models

torch.manual_seed(0)
torch.set_num_threads(int(sys.argv[2]))
folder, made = sys.argv[1], {}

def make(case):
    if case == "step":
        model = hc.convert(timm.create_model("resnet50"), "progressive").model
        model = model.to(memory_format=torch.channels_last).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        x, y = torch.randn(8, 3, 224, 224).to(memory_format=torch.channels_last), torch.randint(1000, (8,))
        def step():
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        return step
    if case == "convert":
        model = timm.create_model("resnet50").eval()
        def convert():
            hc.save(hc.convert(model, 2), f"{folder}/out.safetensors", force=True)
        return convert
    if case == "calibrate":
        model, x = timm.create_model("resnet18").eval(), torch.randn(32, 3, 224, 224).split(16)
        return lambda: hc.convert(model, 2, calibration=x)
    if "wrn" not in made:
        x = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
        made["wrn"] = hc.convert(timm.create_model("wrn28_10").eval(), 2, example_input=x).model, x
    model, x = made["wrn"]
    if case == "harmonic":
        network = model
    else:
        network = hc.fuse(model) if case == "dense" else hc.factor(model, x)
    network = network.to(memory_format=torch.channels_last)
    def forward():
        with torch.no_grad():
            network(x)
    return forward

for line in sys.stdin:
    case = line.strip()
    if case not in made:
        made[case] = make(case)
        made[case]()
    start = time.perf_counter()
    made[case]()
    print(f"seconds {time.perf_counter() - start}", flush=True)
"""


def worker(checkout: Path, folder: Path, threads: int) -> subprocess.Popen[str]:
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(checkout), "HARMCONVERT_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", WORKER, str(folder), str(threads)],
        cwd=folder, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def seconds_of(process: subprocess.Popen[str], case: str) -> float:
    ends: tuple[IO[str] | None, IO[str] | None] = process.stdin, process.stdout
    assert ends[0] is not None
    assert ends[1] is not None
    ends[0].write(f"{case}\n")
    ends[0].flush()
    for line in ends[1]:
        if line.startswith("seconds "):
            return float(line.split()[1])
    raise SystemExit(f"{case} failed in one of the releases")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    args = parser.parse_args()
    with TemporaryDirectory() as folder, RESULTS.open("a", newline="") as file:
        writer = csv.writer(file)
        if not file.tell():
            writer.writerow(["case", "turns", "other_s", "this_s", "ratio", "low", "high", "threads", "machine"])
        this = worker(ROOT, Path(folder) / "this", args.threads)
        other = worker(args.other.resolve(), Path(folder) / "other", args.threads)
        for case in args.cases:
            for process in (this, other):
                seconds_of(process, case)
            pairs = []
            for turn in range(CASES[case]):
                order = (this, other) if turn % 2 else (other, this)
                times = {process: seconds_of(process, case) for process in order}
                pairs.append((times[other], times[this]))
            ratios = [mine / its for its, mine in pairs]
            low, _, high = quantiles(ratios, n=4)
            figures = [median(its for its, _ in pairs), median(mine for _, mine in pairs), median(ratios), low, high]
            row = [case, len(pairs), *(f"{figure:.3f}" for figure in figures), args.threads, platform.machine()]
            writer.writerow(row)
            file.flush()
            print(*row, flush=True)


if __name__ == "__main__":
    main()
