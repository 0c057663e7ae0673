"""What does a budget search cost? ResNet-18 at 224 on 128 images, two threads: bars 25 minutes, a second budget 10 s.

    python benchmarks/budget_cost.py                       # appends to results/budget_cost.csv; takes long
    python benchmarks/budget_cost.py --frequencies best    # starts from nothing, too
    python benchmarks/budget_cost.py --images 16 --size 64 --trials 1    # does it run?
    python benchmarks/budget_cost.py --probes FILE         # can be stopped and started again

Random weights (the cost does not depend on them) and random crops of the sample photographs. Rows: the whole search for
60 % of the parameters, the network that it delivers included; then, from its probes, a second budget of 40 %: the
search without trials. Its bar is on the search itself: ``seconds`` less those ``of that delivering``, refitting the
network that is delivered. ``load`` is the machine's when it began, beside which the seconds are to be read; ``cpu s``
is the processor time by threads, which other work on the machine lengthens less.
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


class Delivering:
    """Seconds spent on the network that is delivered: the conversions asked for outside of probes and trials."""

    def __init__(self) -> None:
        self.seconds, self.probes = 0.0, 0

    def watch(self, searching: type[Searching]) -> None:
        made: Callable[..., Any] = searching.__call__
        measured: Callable[..., Any] = searching._divergence
        told = self

        def call(self: Searching, *arguments: Any) -> Any:
            convert = self._convert

            def timed(plan: Any, known: Any, settings: CalibrationSettings) -> Any:
                start = time.perf_counter()
                converted = convert(plan, known, settings)
                told.seconds += time.perf_counter() - start if known is not None else 0.0
                return converted

            self._convert = timed  # type: ignore[method-assign]
            return made(self, *arguments)

        def divergence(self: Searching, *arguments: Any, **more: Any) -> Any:
            before = told.seconds
            found = measured(self, *arguments, **more)
            told.seconds = before
            told.probes += 1
            return found

        searching.__call__, searching._divergence = call, divergence  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--probes", type=Path, help="kept there: a run that was stopped goes on, and its rows count that"
    )
    parser.add_argument("--frequencies", choices=["lambda", "best"], default="lambda")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    # With their last batch norms at zero, as timm draws them, no block would change anything.
    model = timm.create_model("resnet18", pretrained=False, zero_init_last=False).eval()
    size = {"input_size": (3, args.size, args.size)}
    batches = list(calibration_images("sample:photographs", model, args.images, 32, overrides=size).batches)
    delivering = Delivering()
    delivering.watch(Searching)
    with appended(RESULTS, FIELDS) as (_, write), tempfile.TemporaryDirectory() as folder:
        for what, share, trials in (("search", 0.6, args.trials), ("second budget", 0.4, 0)):
            delivering.seconds, delivering.probes = 0.0, 0
            kept = args.probes or Path(folder) / "probes.json"
            search = SearchSettings(trials, str(kept), frequencies=args.frequencies)
            start, busy, load = time.perf_counter(), time.process_time(), os.getloadavg()[0]
            hc.convert(model, budget={"params": share}, calibration=batches, search=search)
            seconds, cpu = time.perf_counter() - start, (time.process_time() - busy) / args.threads
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            write({
                "what": what, "frequencies": args.frequencies, "images": args.images, "size": args.size,
                "trials": trials, "probes": delivering.probes, "seconds": f"{seconds:.1f}",
                "of that delivering": f"{delivering.seconds:.1f}", "cpu s": f"{cpu:.1f}", "peak_gb": f"{peak:.1f}",
                "threads": args.threads, "load": f"{load:.1f}", "torch": torch.__version__,
            })  # fmt: skip


if __name__ == "__main__":
    main()
