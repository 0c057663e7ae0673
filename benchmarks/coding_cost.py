"""What does coding cost? ResNet-50 with 256 images of 224 pixels: time and memory to encode, time to decode.

    python benchmarks/coding_cost.py              # writes results/coding_cost.csv, about ten minutes
    python benchmarks/coding_cost.py --summary

Random weights and crops of photographs: times do not depend on the values. `encode` is `hc.convert` with 3 bits per
weight and calibration, in a process of its own, whose largest memory is measured; `decode` is all streams of the file
on one thread, the median of five. The smaller networks show how the time grows with the parameters. Limits: encoding 6
minutes on two cores and 6 GB, decoding 1 s for ResNet-50.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import timm
import torch
from table import appended, processor

import harmconvert as hc
from harmconvert.codecs import codec_of

RESULTS = Path(__file__).parent / "results" / "coding_cost.csv"
KEYS = ["network", "images"]
FIELDS = [*KEYS, "parameters", "bits", "encode_s", "peak_gb", "decode_s", "threads", "machine", "torch"]
NETWORKS = ("resnet18", "resnet34", "resnet50")


def measure(name: str, count: int) -> None:
    """Encode and decode one network, and append the row."""
    import photographs

    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    images = photographs.calibration_crops(count, 224, 0).split(32)
    start = time.perf_counter()
    conversion = hc.convert(model, bits=3, calibration=images)
    encode = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for entry in conversion.coded.values():
            assert entry.stream is not None
            codec_of(entry).decode(entry.stream, entry)
        times.append(time.perf_counter() - start)
    weights = sum(entry.decoded_bytes // 4 for entry in conversion.coded.values())
    size = sum(codec_of(entry).bytes(entry) for entry in conversion.coded.values())
    with appended(RESULTS, FIELDS, KEYS) as (_, write):
        write({
            "network": name, "images": count, "parameters": weights, "bits": f"{8 * size / weights:.2f}",
            "encode_s": f"{encode:.0f}", "peak_gb": f"{peak:.2f}", "decode_s": f"{median(times):.3f}",
            "threads": threads, "machine": f"{os.cpu_count()} cores {processor()}", "torch": torch.__version__,
        })  # fmt: skip


def summary() -> None:
    with RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    print("network     parameters   bits   encode   peak GB   decode   ns per weight")
    for row in rows:
        each = 1e9 * float(row["decode_s"]) / int(row["parameters"])
        print(
            f"{row['network']:10} {int(row['parameters']):12,} {row['bits']:>6} {row['encode_s']:>6} s "
            f"{row['peak_gb']:>9} {row['decode_s']:>6} s {each:9.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--network", choices=NETWORKS, help="measure only this network, in this process")
    parser.add_argument("--summary", action="store_true", help="print the results only")
    args = parser.parse_args()
    if args.network:
        measure(args.network, args.images)
        return
    if not args.summary:
        for name in NETWORKS:
            subprocess.run([sys.executable, __file__, "--network", name, "--images", str(args.images)], check=True)
    summary()


if __name__ == "__main__":
    main()
