"""Which stage of `HarmonicBlock2d` is faster: one two-dimensional pass, or rows and then columns?

    python benchmarks/block_stage.py                     # appends to results/block_stage.csv
    python benchmarks/block_stage.py --device cuda

Measures the DCT responses of layers from known networks, whole and cut, forward and backward. Both stages run in turns.
The rule of ``stage="auto"`` comes from this table.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import torch
from table import appended
from torch import Tensor

from harmconvert import HarmonicBlock2d

RESULTS = Path(__file__).parent / "results" / "block_stage.csv"
FIELDS = [
    *("layer", "kernel", "channels", "side", "stride", "batch", "lambda", "pass", "device", "threads", "turns"),
    *("dense_ms", "separable_ms", "ratio", "ratio_low", "ratio_high", "torch"),
]
# name: kernel, channels, side, stride, images
LAYERS = {
    "WRN stem": (3, 3, 32, 1, 128),
    "ResNet stem, no pooling": (7, 3, 224, 4, 16),
    "ResNet stem": (7, 3, 224, 2, 16),
    "3x3, 64 channels": (3, 64, 56, 1, 16),
    "3x3, 512 channels": (3, 512, 7, 1, 16),
    "5x5, 64 channels": (5, 64, 28, 1, 16),
    "7x7, 96 channels": (7, 96, 28, 1, 8),
}
LAMBDAS: tuple[str | int, ...] = ("full", 3, 2)


def seconds_of(stage: Callable[[Tensor], Tensor], x: Tensor, backward: bool) -> float:
    x = x.clone().requires_grad_(backward)
    start = time.perf_counter()
    responses = stage(x)
    if backward:
        torch.autograd.grad(responses.sum(), x)[0].sum().item()
    else:
        responses[0, 0, 0, 0].item()
    return time.perf_counter() - start


def compare(name: str, lam: str | int, backward: bool, args: argparse.Namespace) -> dict[str, object]:
    kernel, channels, side, stride, images = LAYERS[name]
    torch.manual_seed(0)
    block = HarmonicBlock2d(channels, 8, kernel, stride, kernel // 2, lam=lam).to(args.device)
    x = torch.randn(images, channels, side, side, device=args.device)
    seconds: dict[str, list[float]] = {"dense": [], "separable": []}
    with torch.set_grad_enabled(backward):
        for number in range(args.turns + 2):
            for stage in ("dense", "separable")[:: 1 if number % 2 else -1]:
                seconds[stage].append(seconds_of(getattr(block, f"_{stage}"), x, backward))
    dense, separable = (times[2:] for times in seconds.values())
    low, _, high = quantiles([b / a for a, b in zip(dense, separable, strict=True)], n=4)
    return {
        **dict(zip(FIELDS, (name, kernel, channels, side, stride, images, lam), strict=False)),
        "pass": "forward + backward" if backward else "forward",
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "threads": args.threads,
        "turns": args.turns,
        "dense_ms": f"{1000 * median(dense):.3f}",
        "separable_ms": f"{1000 * median(separable):.3f}",
        "ratio": f"{median(separable) / median(dense):.3f}",
        "ratio_low": f"{low:.3f}",
        "ratio_high": f"{high:.3f}",
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with appended(RESULTS, FIELDS) as (_, write):
        for name, lam, backward in itertools.product(LAYERS, LAMBDAS, (False, True)):
            write(compare(name, lam, backward, args))


if __name__ == "__main__":
    main()
