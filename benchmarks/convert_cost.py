"""What does a conversion cost, compared with loading and saving the same file?

    python benchmarks/convert_cost.py            # about three minutes; appends to results/convert_cost.csv

The script writes a file of random weights for each ResNet. Then two jobs run in turns, each time in a new process: (a)
load the file into a network and save it; (b) load the file, convert the network with the whole basis, and save a
harmonic checkpoint. Both files are flushed to disk. Imports are not measured. `time_ratio` is (b)/(a) and includes
building the network; `bare_ratio` does not include it. Peak memory is the growth of the process after building.
Limits: (b) takes at most 1.5 times as long as (a), and at most 3 times the size of the file in memory. The last row is
the start-up time of `harmconvert --help`, limit 0.5 s.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from table import appended

RESULTS = Path(__file__).parent / "results" / "convert_cost.csv"
FIELDS = (
    "network", "file_mb", "roundtrip_s", "convert_s", "time_ratio", "spread", "bare_ratio", "bare_spread",
    "roundtrip_peak_x", "convert_peak_x", "machine",
)  # fmt: skip
NETWORKS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def run_job(mode: str, name: str, weights: str, output: str) -> None:
    import safetensors.torch
    import timm
    import torch

    from harmconvert import save
    from harmconvert.pipeline import convert
    from harmconvert.storage import Source

    torch.set_num_threads(2)
    torch.ones(8, 8) @ torch.ones(8, 8)
    begin = time.perf_counter()
    model = timm.create_model(name).eval()
    before = _resident()
    start = time.perf_counter()
    state = safetensors.torch.load_file(weights)
    model.load_state_dict(state)
    del state
    if mode == "convert":
        save(convert(model), output, source=Source("timm", name))
    else:
        safetensors.torch.save_file(model.state_dict(), output)
        descriptor = os.open(output, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    end = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(json.dumps({"seconds": end - begin, "bare": end - start, "peak": peak}))


def _resident() -> int:
    """Return the resident memory. It is also the peak so far, because building the network needed the most memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(mode: str, name: str, weights: Path, output: Path) -> dict[str, float]:
    output.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--child", mode, name, str(weights), str(output)]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_job(*args.child)
        return
    import safetensors.torch
    import timm

    machine = f"{os.cpu_count()} cores {platform.machine()}, torch {__import__('torch').__version__}"
    with appended(args.output, FIELDS) as (_, write), tempfile.TemporaryDirectory() as folder:
        for name in NETWORKS:
            weights, output = Path(folder) / f"{name}.safetensors", Path(folder) / "out.safetensors"
            safetensors.torch.save_file(timm.create_model(name).state_dict(), weights)
            size = weights.stat().st_size
            pairs = [
                (measure("roundtrip", name, weights, output), measure("convert", name, weights, output))
                for _ in range(args.repeats)
            ]
            ratios = sorted(b["seconds"] / a["seconds"] for a, b in pairs)
            bare = sorted(b["bare"] / a["bare"] for a, b in pairs)
            row = [
                name,
                f"{size / 1e6:.1f}",
                f"{statistics.median(a['seconds'] for a, _ in pairs):.3f}",
                f"{statistics.median(b['seconds'] for _, b in pairs):.3f}",
                f"{statistics.median(ratios):.2f}",
                f"{ratios[0]:.2f}-{ratios[-1]:.2f}",
                f"{statistics.median(bare):.2f}",
                f"{bare[0]:.2f}-{bare[-1]:.2f}",
                f"{max(a['peak'] for a, _ in pairs) / size:.2f}",
                f"{max(b['peak'] for _, b in pairs) / size:.2f}",
                machine,
            ]
            write(dict(zip(FIELDS, row, strict=True)))
            weights.unlink()
        starts = []
        for _ in range(args.repeats):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-m", "harmconvert", "--help"], capture_output=True, check=True)
            starts.append(time.perf_counter() - start)
        seconds, spread = f"{statistics.median(starts):.3f}", f"{min(starts):.3f}-{max(starts):.3f}"
        write({"network": "harmconvert --help", "convert_s": seconds, "spread": spread, "machine": machine})


if __name__ == "__main__":
    main()
