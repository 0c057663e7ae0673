"""What does calibration cost? ResNet-50 at 224, lambda 2, random weights, because the cost does not depend on them.

    python benchmarks/calibration_cost.py            # appends to results/calibration_cost.csv, about ten minutes
    python benchmarks/calibration_cost.py --device cuda
    python benchmarks/calibration_cost.py --solvers  # compare the three solvers

Limits: peak memory below 6 GB with 256 images; time linear in the number of images; accumulation of the normal
equations at over 60 % of the GEMM rate of this machine, measured in the same run, in float64 and with the same shape.
Each number of images runs in a separate process, so that its peak memory can be measured.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import timm
import torch
from torch import nn

import harmconvert as hc
from harmconvert.calibration import (
    DAMPINGS,
    ConvCall,
    Kernel,
    NormalEquations,
    Operator,
    Problem,
    Samples,
    choose,
    outputs,
    pick_positions,
    watch_convolutions,
)
from harmconvert.layers import to_harmonic

RESULTS = Path(__file__).parent / "results" / "calibration_cost.csv"
LAYERS = RESULTS.with_name("calibration_cost_layers.csv")
SOLVERS = RESULTS.with_name("calibration_solvers.csv")


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def captured_call(conv: nn.Module, x: torch.Tensor) -> ConvCall:
    calls: list[ConvCall] = []
    watch_convolutions(conv, {"": conv}, x, lambda _, call: calls.extend([call] if call else []))
    return calls[0]


def gemm_rate(rows: int, unknowns: int, device: str) -> float:
    """Return the GFLOP/s of one float64 product of this shape, the best of five."""
    z = torch.randn(rows, unknowns, dtype=torch.float64, device=device)
    best = float("inf")
    for _ in range(5):
        synchronise(device)
        start = time.perf_counter()
        z.T @ z
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * rows * unknowns**2 / best / 1e9


def accumulation(channels: int, size: int, positions: int, device: str) -> dict[str, float]:
    """Return the GFLOP/s of the accumulation of one batch of 32 for a 3x3 layer at lambda 2, all work included."""
    conv = to_harmonic(nn.Conv2d(channels, channels, 3, padding=1, bias=False), [(0, 0), (0, 1), (1, 0)]).to(device)
    x = torch.randn(32, channels, size, size, device=device).contiguous(memory_format=torch.channels_last)
    call = captured_call(conv, x)
    layer = Kernel.of(conv, call).layer(call, False, positions, 0)
    problem = NormalEquations(layer)
    target = outputs(call.output, pick_positions(range(32), (size, size), positions, 0)).contiguous()
    best, rows = float("inf"), 0
    for _ in range(5):
        before = problem.count
        synchronise(device)
        start = time.perf_counter()
        problem.add(call, target, range(32))
        synchronise(device)
        best = min(best, time.perf_counter() - start)
        rows = problem.count - before
    unknowns = layer.unknowns
    achieved = 2 * rows * unknowns * (unknowns + channels) / best / 1e9
    rate = gemm_rate(rows, unknowns, device)
    return {"unknowns": unknowns, "rows": rows, "gflops": achieved, "gemm_gflops": rate, "share": achieved / rate}


def solving(method: type[Problem], unknowns: int, positions: int, device: str) -> dict[str, float]:
    """Return the seconds to accumulate and solve a layer with one method, for all dampings, and the held-back error.

    The layer is 1-d, with 256 outputs and kernels of size 8, half of whose frequencies are kept. Its inputs are
    correlated; its target is the output of the whole kernel plus noise.
    """
    generator = torch.Generator().manual_seed(0)
    channels = unknowns // 4
    torch.manual_seed(0)
    dense = nn.Conv1d(channels, 256, 8, bias=False).to(device)
    harmonic = to_harmonic(dense, [(i,) for i in range(4)])
    problems = []
    start = 0.0
    for count in (positions, positions // 3):
        x = torch.randn(8, channels, count // 8 + 7, generator=generator).to(device)
        x = x + 0.9 * x.roll(1, 2) + 0.6 * x.roll(1, 1)
        call = captured_call(harmonic, x)
        layer = Kernel.of(harmonic, call).layer(call, False, 1 << 30, 0)
        with torch.no_grad():
            target = dense(x)
        noise = torch.randn(target.shape, generator=generator).to(device) * 0.1 * target.std()
        problem = method(layer)
        synchronise(device)
        start -= time.perf_counter()
        problem.add(call, outputs(target + noise), range(8))
        synchronise(device)
        start += time.perf_counter()
        problems.append(problem)
    start -= time.perf_counter()
    fit, held_back = problems
    choice = choose(fit, held_back, DAMPINGS)
    synchronise(device)
    return {"seconds": start + time.perf_counter(), "before": choice.error_before, "after": choice.error_after}


def solvers(device: str, machine: str) -> None:
    """Measure every solver on problems of several sizes, if it fits in memory."""
    with SOLVERS.open("a", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["machine", "method", "unknowns", "positions", "seconds", "error before", "error after"])
        for unknowns in (512, 2048, 4096, 8192):
            for positions in (unknowns // 4, unknowns, 4 * unknowns):
                for method in (NormalEquations, Samples, Operator):
                    if method is Samples and positions > 8192:
                        continue
                    result = solving(method, unknowns, positions, device)
                    figures = [f"{value:.3g}" for value in result.values()]
                    rows.writerow([machine, method.name, unknowns, positions, *figures])
                    file.flush()
                    print(method.name, unknowns, positions, *figures, flush=True)


def one_run(images: int, device: str) -> dict[str, object]:
    torch.manual_seed(0)
    model = timm.create_model("resnet50", pretrained=False).eval().to(device)
    batches = list(torch.randn(images, 3, 224, 224).split(32))
    hc.convert(model, 2)  # warm-up
    start = time.perf_counter()
    conversion = hc.convert(model, 2, calibration=batches)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device != "cpu":
        peak = torch.cuda.max_memory_allocated()
    assert conversion.calibration is not None
    layers = [(r.name, r.unknowns, r.positions, round(r.seconds, 2)) for r in conversion.calibration.layers]
    return {"seconds": round(seconds, 1), "peak_gb": round(peak / 1e9, 2), "layers": layers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--solvers", action="store_true", help="compare the three solvers instead")
    parser.add_argument("--run", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(one_run(args.run, args.device)))
        return
    machine = torch.cuda.get_device_name() if args.device != "cpu" else f"{torch.get_num_threads()} threads"
    if args.solvers:
        solvers(args.device, machine)
        return
    is_new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file, LAYERS.open("a", newline="") as layer_file:
        rows, layer_rows = csv.writer(file), csv.writer(layer_file)
        if is_new:
            rows.writerow(
                ["what", "machine", "images or channels", "seconds", "peak_gb", "gflops", "gemm_gflops", "share"]
            )
            layer_rows.writerow(["machine", "images", "layer", "unknowns", "positions", "seconds"])
        for channels, size, positions in ((64, 56, 171), (128, 28, 171), (256, 14, 196), (512, 7, 49)):
            result = accumulation(channels, size, positions, args.device)
            figures = [f"{result[key]:.2f}" for key in ("gflops", "gemm_gflops", "share")]
            rows.writerow(["accumulate", machine, channels, "", "", *figures])
            print("accumulate", channels, *figures, flush=True)
        for images in args.images:
            command = [sys.executable, __file__, "--run", str(images), "--device", args.device]
            result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            rows.writerow(["resnet50, lambda 2", machine, images, result["seconds"], result["peak_gb"], "", "", ""])
            layer_rows.writerows([machine, images, *layer] for layer in result["layers"])
            file.flush()
            layer_file.flush()
            print("resnet50", images, result["seconds"], "s", result["peak_gb"], "GB", flush=True)


if __name__ == "__main__":
    main()
