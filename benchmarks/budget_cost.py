"""What does a budget search cost? ResNet-18 at 224 on 128 images, two threads. Limits: 25 minutes, 10 s for a second.

    python benchmarks/budget_cost.py                       # appends to results/budget_cost.csv; takes long
    python benchmarks/budget_cost.py --frequencies best    # without saved probes
    python benchmarks/budget_cost.py --images 16 --size 64 --trials 1    # a quick test
    python benchmarks/budget_cost.py --probes FILE         # can be interrupted and continued

Uses random weights, because the cost does not depend on them, and random crops of the sample photographs. The first row
is the whole search for 60 % of the parameters, with the refit of the resulting network. The second row is a second
budget of 40 % with the probes of the first search and without trials. The limits are for the search alone: ``seconds``
minus ``of that delivering``, the seconds of the refit of the resulting network. ``load`` is the load of the machine at
the start; a high load makes the seconds longer. ``cpu s`` is the processor time divided by the threads, which depends
less on the load.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from table import appended

import harmconvert as hc
from harmconvert.calibration import CalibrationSettings
from harmconvert.data import calibration_images
from harmconvert.search import Searching, SearchSettings

RESULTS = Path(__file__).parent / "results" / "budget_cost.csv"
FIELDS = ["what", "frequencies", "images", "size", "trials", "probes", "seconds", "of that delivering", "cpu s",
          "peak_gb", "threads", "load", "torch"]  # fmt: skip


class FinalConversion:
    """Measure the seconds of the final conversion: the conversions outside of probes and trials."""

    def __init__(self) -> None:
        self.seconds, self.probes = 0.0, 0

    def watch(self, searching: type[Searching]) -> None:
        made: Callable[..., Any] = searching.__call__
        measured: Callable[..., Any] = searching._divergence
        timer = self

        def call(self: Searching, *arguments: Any) -> Any:
            convert = self._convert

            def timed(plan: Any, known: Any, settings: CalibrationSettings) -> Any:
                start = time.perf_counter()
                converted = convert(plan, known, settings)
                timer.seconds += time.perf_counter() - start if known is not None else 0.0
                return converted

            self._convert = timed  # type: ignore[method-assign]
            return made(self, *arguments)

        def divergence(self: Searching, *arguments: Any, **more: Any) -> Any:
            before = timer.seconds
            value = measured(self, *arguments, **more)
            timer.seconds = before
            timer.probes += 1
            return value

        searching.__call__, searching._divergence = call, divergence  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--probes",
        type=Path,
        help="file for the probes; an interrupted run continues from it, and measures only the rest",
    )
    parser.add_argument("--frequencies", choices=["lambda", "best"], default="lambda")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    # timm initialises the last batch norm of each block with zero, so that cuts in the block would have no effect.
    model = timm.create_model("resnet18", pretrained=False, zero_init_last=False).eval()
    size = {"input_size": (3, args.size, args.size)}
    batches = list(calibration_images("sample:photographs", model, args.images, 32, overrides=size).batches)
    final = FinalConversion()
    final.watch(Searching)
    with appended(RESULTS, FIELDS) as (_, write), tempfile.TemporaryDirectory() as folder:
        for what, share, trials in (("search", 0.6, args.trials), ("second budget", 0.4, 0)):
            final.seconds, final.probes = 0.0, 0
            probes = args.probes or Path(folder) / "probes.json"
            search = SearchSettings(trials, str(probes), frequencies=args.frequencies)
            start, busy, load = time.perf_counter(), time.process_time(), os.getloadavg()[0]
            hc.convert(model, budget={"params": share}, calibration=batches, search=search)
            seconds, cpu = time.perf_counter() - start, (time.process_time() - busy) / args.threads
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            write({
                "what": what, "frequencies": args.frequencies, "images": args.images, "size": args.size,
                "trials": trials, "probes": final.probes, "seconds": f"{seconds:.1f}",
                "of that delivering": f"{final.seconds:.1f}", "cpu s": f"{cpu:.1f}", "peak_gb": f"{peak:.1f}",
                "threads": args.threads, "load": f"{load:.1f}", "torch": torch.__version__,
            })  # fmt: skip


if __name__ == "__main__":
    main()
