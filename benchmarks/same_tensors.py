"""Do two releases write the same tensors? Convert the samples with both, read the files, and compare every bit.

    python benchmarks/same_tensors.py /path/to/checkout-of-the-other-release

Each release converts in a separate process, with the features of format version 1: the whole basis, lambda 2,
progressive, calibration, other bases, a budget, and both forms. The script prints a row for each file; its exit code is
1 if any tensor differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]

# Runs in each release, so it uses only functions that both have.
CONVERT = r"""
import hashlib, json, sys, torch
import harmconvert as hc

def digest(tensor):
    values = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(values.numpy().tobytes()).hexdigest()}"

torch.manual_seed(0)
torch.set_num_threads(1)
cases = {
    "whole": {"lam": "full"}, "lambda 2": {"lam": 2}, "progressive": {"lam": "progressive"},
    "haar": {"lam": 2, "basis": "haar"}, "klt": {"lam": 2, "basis": "klt"}, "l1": {"lam": 2, "normalization": "l1"},
    "by pattern": {"lam": {"stage3.*": 2}}, "calibrated": {"lam": 2, "calibration": True},
    "budget by energy": {"budget": {"params": 0.5}}, "budget": {"budget": {"params": 0.5}, "calibration": True},
}
digests = {}
for name, case in cases.items():
    network = hc.open_source("sample:resnet_mnist5k")
    images = torch.linspace(-1, 1, 64 * 784).sin().reshape(64, 1, 28, 28)
    if case.pop("calibration", False):
        case["calibration"] = [images]
    conversion = hc.convert(network.model, **case)
    path = f"{sys.argv[1]}/{name.replace(' ', '-')}.safetensors"
    hc.save(conversion, path, source=network.source)
    for form in ("harmonic", "dense"):
        state = hc.load(path, form=form).state_dict()
        digests[f"{name}, {form}"] = {key: digest(tensor) for key, tensor in state.items()}
print(json.dumps(digests))
"""


def tensors_of(checkout: Path) -> dict[str, dict[str, str]]:
    """Return the digest of every tensor that the release in a checkout writes, by file and key."""
    with TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        command = [sys.executable, "-c", CONVERT, folder]
        process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    if process.returncode:
        raise SystemExit(f"{checkout}: {process.stderr}")
    digests: dict[str, dict[str, str]] = json.loads(process.stdout.splitlines()[-1])
    return digests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="a checkout of the other release")
    other, ours = tensors_of(parser.parse_args().other.resolve()), tensors_of(ROOT)
    differing = 0
    for name in ours:
        keys = [key for key in {**ours[name], **other[name]} if ours[name].get(key) != other[name].get(key)]
        differing += len(keys)
        print(f"{name:<28} {len(ours[name]):>4} tensors  " + (f"DIFFER: {', '.join(keys[:5])}" if keys else "the same"))
    raise SystemExit(1 if differing else 0)


if __name__ == "__main__":
    main()
