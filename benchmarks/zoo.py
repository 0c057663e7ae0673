"""Does the whole basis convert every architecture exactly? Compare each timm and torchvision model with the original.

    python benchmarks/zoo.py                     # skips architectures that are in results/zoo.csv
    python benchmarks/zoo.py --match 'resnet*' --output /tmp/zoo.csv
    python benchmarks/zoo.py --summary
    python benchmarks/zoo.py --ranks             # half of the full rank instead; writes results/zoo_ranks.csv
    python benchmarks/zoo.py --sources           # small networks of other libraries; writes results/zoo_sources.csv

The weights are random, so that no downloads are needed. Constant parameters and batch-norm statistics are random, too,
so that every branch has an effect. Limits: relative difference of the logits (largest difference / largest logit) <=
1e-12 in float64 and <= 1e-5 in float32, and the same top-1. `own32` is the float32 error of the original (float32
compared with float64); compare `error32` with it. With such statistics, some deep networks amplify every rounding so
much that their logits have no meaning. If a limit is exceeded, the check therefore runs again with batch-norm
statistics that are estimated on a random batch, as in training; the note has the first values. `check` is `full` at the
network's own input size, `shrunk` at a smaller size, and `meta` if only the structure was checked (over 350M
parameters: keys, shapes and a run on the meta device).

With --ranks, each network is converted with half of the full rank, without data. `error32` is then the difference
between the dense form and the form of two layers, in float32; `kept` is the share of the parameters, counted in the
converted network, which must be the cost that the conversion reports.

With --sources, the networks are those of `zoo_networks.py`: transformers, segmentation-models-pytorch, MONAI, diffusers
and restoration networks. After the comparison with the whole basis, each network is cut to lambda 2 and coded with 4
bits per weight, calibrated on 32 random inputs, saved, and read back. `coded` is the relative difference of the outputs
from those of the uncut network, `read_back` the difference between the file and the network in memory, and `bytes` the
size of the file as a share of that of the parameters in float32; in small networks, most of it is the header.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import fnmatch
import logging
import multiprocessing
import os
import tempfile
import time
import traceback
from copy import deepcopy
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

from harmconvert.errors import HarmconvertError
from harmconvert.network import call, convolutions, evaluating, factor, fuse, kernel_size, tensors_in
from harmconvert.pipeline import convert, save
from harmconvert.plan import parameter_count
from harmconvert.sources import load

RESULTS = Path(__file__).parent / "results" / "zoo.csv"
FIELDS = [
    "library", "architecture", "status", "check", "input", "native_input", "parameters", "convs_over_1x1", "skipped",
    "classes", "error64", "error32", "own32", "same_top1", "seconds", "note",
]  # fmt: skip
RANKS = RESULTS.with_name("zoo_ranks.csv")
RANK_FIELDS = [
    "library", "architecture", "status", "input", "parameters", "kept", "layers", "error32", "seconds", "note",
]  # fmt: skip
BOUND_64, BOUND_32 = 1e-12, 1e-5
SOURCES = RESULTS.with_name("zoo_sources.csv")
SOURCE_FIELDS = [
    "library", "architecture", "status", "input", "parameters", "skipped", "error64", "error32", "own32", "same_top1",
    "bytes", "coded", "read_back", "seconds", "note",
]  # fmt: skip
META_OVER = 350e6
SMALL = 128


class DetectorHeads(nn.Module):
    """A torchvision detector that returns the raw outputs of its heads on fixed boxes.

    The boxes that a detector returns cannot be compared: thresholds and non-maximum suppression can remove a box
    because of a difference in the last bit.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> Any:
        detector: Any = self.detector
        features = detector.backbone(images)
        features = {"0": features} if isinstance(features, Tensor) else features
        if not hasattr(detector, "rpn"):
            return detector.head(list(features.values()))
        outputs = [detector.rpn.head(list(features.values()))]
        heads, side = detector.roi_heads, images.shape[-1]
        boxes = [torch.tensor([[4.0, 4.0, side / 2, side / 2], [8.0, 8.0, side - 8.0, side - 8.0]], dtype=images.dtype)]
        for kind in ("box", "mask", "keypoint"):
            pool = getattr(heads, f"{kind}_roi_pool", None)
            if pool is not None:
                pooled = pool(features, boxes * len(images), [(side, side)] * len(images))
                outputs.append(getattr(heads, f"{kind}_predictor")(getattr(heads, f"{kind}_head")(pooled)))
        return outputs


def randomise(model: nn.Module) -> None:
    """Set constant parameters and batch-norm statistics to random values, so that zero-initialised branches count."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_meta or not parameter.numel() or not parameter.is_floating_point():
                continue
            low, high = parameter.aminmax()
            if low == high:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(low + 0.1 * noise if low > 0.5 else 0.2 * noise)
        for module in model.modules():
            mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
            if isinstance(mean, Tensor) and isinstance(variance, Tensor) and not mean.is_meta:
                mean.copy_(0.1 * torch.randn(mean.shape, generator=generator))
                variance.copy_(0.5 + torch.rand(variance.shape, generator=generator))


def estimate_batch_norm(model: nn.Module, inputs: Any) -> bool:
    """Estimate batch-norm statistics on a batch, as training does; return False if there are no batch norms."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        call(model, inputs)
    model.eval()
    return bool(norms)


def build_timm(name: str, device: str, shrink: bool) -> tuple[nn.Module, tuple[int, ...], tuple[int, ...]]:
    """Return the network, the input size to use, and the network's own input size."""
    cfg = timm.get_pretrained_cfg(name)
    native = tuple(cfg.input_size)
    channels, side = native[0], native[-1]
    with torch.device(device):
        if shrink and cfg.fixed_input_size and side > 224:
            for smaller in (224, 256):
                with contextlib.suppress(Exception):  # not every architecture takes img_size
                    return timm.create_model(name, img_size=smaller), (channels, smaller, smaller), native
        size = native
        if shrink and not cfg.fixed_input_size and side > SMALL:
            smaller = max(SMALL, cfg.min_input_size[-1] if cfg.min_input_size else 0)
            size = (channels, smaller, smaller)
        return timm.create_model(name), size, native


def build_torchvision(name: str, device: str, shrink: bool) -> tuple[nn.Module, tuple[int, ...], tuple[int, ...]]:
    builder = torchvision.models.get_model_builder(name)
    with torch.device(device):
        arguments = {"weights": None} if "quantized" in name else {"weights": None, "weights_backbone": None}
        try:
            model = builder(**arguments)
        except (TypeError, ValueError):
            model = builder(weights=None)
    module = builder.__module__
    if ".detection" in module:
        side = 300 if name.startswith("ssd300") else 320 if name.startswith("ssdlite") else 800
        return (
            DetectorHeads(model),
            (3, min(side, 320), min(side, 320)) if side < 800 else (3, 160, 160),
            (3, side, side),
        )
    if ".segmentation" in module:
        return model, (3, SMALL, SMALL), (3, 520, 520)
    if ".optical_flow" in module:
        return model, (3, SMALL, SMALL), (3, 520, 960)
    if ".video" in module:
        if name.startswith(("mvit", "swin")):
            return model, (3, 16, 224, 224), (3, 16, 224, 224)
        return model, (3, 8, 64, 64) if shrink else (3, 16, 224, 224), (3, 16, 112, 112)
    if name.startswith(("vit", "swin", "maxvit")):
        side = {"vit_h_14": 224}.get(name, 224)
        return model, (3, side, side), (3, side, side)
    side = 299 if "inception" in name else 224
    return model, ((3, side, side) if "inception" in name else (3, SMALL, SMALL)), (3, side, side)


def relative_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    worst = 0.0
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape, (a.shape, b.shape)
        if b.is_floating_point() and b.numel():
            worst = max(worst, ((a.double() - b.double()).abs().max() / b.double().abs().max()).item())
    return worst


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    with evaluating(model):
        torch.manual_seed(0)
        return tensors_in(call(model, inputs))


def build(library: str, name: str, device: str, shrink: bool) -> tuple[nn.Module, tuple[int, ...], tuple[int, ...]]:
    make = build_timm if library == "timm" else build_torchvision
    torch.manual_seed(0)
    return make(name, device, shrink)


def check(library: str, name: str, ranks: bool = False) -> dict[str, Any]:
    """Return one row of the table; use the network's own input size if a smaller one fails."""
    one = attempt_ranks if ranks else attempt
    try:
        return one(library, name, shrink=True)
    except HarmconvertError:
        raise
    except Exception:
        torch.set_default_dtype(torch.float32)
        return one(library, name, shrink=False)


def attempt(library: str, name: str, shrink: bool) -> dict[str, Any]:
    start = time.perf_counter()
    row: dict[str, Any] = {"library": library, "architecture": name}
    try:
        model, size, native = build(library, name, "meta", shrink)
    except (NotImplementedError, RuntimeError):  # the builder reads values
        model, size, native = build(library, name, "cpu", shrink)
    row["parameters"] = sum(p.numel() for p in model.parameters())
    over = [c for c in convolutions(model).values() if max(kernel_size(c)) > 1]
    row["convs_over_1x1"] = len(over)
    row["classes"] = " ".join(sorted({type(c).__name__ for c in over}))
    row["native_input"] = "x".join(map(str, native))
    if not over:
        return row | {"status": "none", "note": "no convolution over 1x1"}
    batch = 2 if row["parameters"] < 60e6 and len(size) == 3 else 1
    row["input"] = "x".join(map(str, (batch, *size)))
    x = torch.randn(batch, *size, generator=torch.Generator().manual_seed(2))
    inputs: Any = (x, x.flip(-1)) if name.startswith("raft") else x
    if row["parameters"] > META_OVER:
        row |= {"check": "meta", "status": "ok", "skipped": check_structure(model.to("meta"), inputs.to("meta"))}
        return row | {"seconds": f"{time.perf_counter() - start:.1f}"}
    row["check"] = "full" if size == native else "shrunk"
    model, *_ = build(library, name, "cpu", shrink)
    randomise(model)
    row |= compare(model, inputs)
    if row["status"] == "over bound" and "error64" in row:
        model, *_ = build(library, name, "cpu", shrink)
        randomise(model)
        if estimate_batch_norm(model, torch.cat([x, x.flip(-1)]) if len(x) == 1 else inputs):
            figures = ", ".join(f"{key} {row[key]}" for key in ("error64", "error32", "own32"))
            row |= compare(model, inputs) | {"note": f"with random batch-norm statistics: {figures}"}
    return row | {"seconds": f"{time.perf_counter() - start:.1f}"}


def attempt_ranks(library: str, name: str, shrink: bool) -> dict[str, Any]:
    """Return a row for half of the full rank: the dense form compared with the form of two layers."""
    start = time.perf_counter()
    row: dict[str, Any] = {"library": library, "architecture": name}
    model, size, _ = build(library, name, "cpu", shrink)
    row["parameters"] = sum(p.numel() for p in model.parameters())
    if row["parameters"] > META_OVER / 4:
        return row | {"status": "none", "note": "too large for a decomposition of every layer here"}
    randomise(model)
    keys = {key: value.shape for key, value in model.state_dict().items()}
    x = torch.randn(2, *size, generator=torch.Generator().manual_seed(2))
    inputs: Any = (x, x.flip(-1)) if name.startswith("raft") else x
    row["input"] = "x".join(map(str, x.shape))
    conversion = convert(model, rank=0.5)
    ranked = conversion.plan.on("channels")
    del model
    if not ranked:
        return row | {"status": "none", "note": "no layer becomes smaller"}
    stored = parameter_count(conversion.model)
    dense = fuse(conversion.model, inputs)
    assert {key: value.shape for key, value in dense.state_dict().items()} == keys, "keys or shapes"
    fast = factor(conversion.model, inputs, layers="factored")
    error = relative_error(outputs(fast, inputs), outputs(dense, inputs))
    right = stored == conversion.cost.harmonic_parameters
    row |= {"kept": f"{stored / row['parameters']:.3f}", "layers": len(ranked), "error32": f"{error:.2e}"}
    note = "" if right else f"the cost says {conversion.cost.harmonic_parameters} parameters, there are {stored}"
    return row | {
        "status": "ok" if error <= BOUND_32 and right else "over bound", "note": note,
        "seconds": f"{time.perf_counter() - start:.1f}",
    }  # fmt: skip


def attempt_source(library: str, name: str) -> dict[str, Any]:
    """Return a row for a network of `zoo_networks.py`: exact, then cut, coded, saved and read back."""
    from zoo_networks import small_network  # this script is also a module of the tests

    start = time.perf_counter()
    torch.manual_seed(0)
    model, sizes = small_network(library, name)
    model.eval()
    randomise(model)
    generator = torch.Generator().manual_seed(2)
    batches = [tuple(torch.randn(8, *size, generator=generator) for size in sizes) for _ in range(5)]
    inputs = tuple(x[:2] for x in batches[-1]) if len(sizes) > 1 else batches[-1][0][:2]
    estimate_batch_norm(model, batches[0] if len(sizes) > 1 else batches[0][0])
    row: dict[str, Any] = {"library": library, "architecture": name}
    row |= {"parameters": sum(p.numel() for p in model.parameters()), "input": " ".join(map(_shape, sizes))}
    row |= compare(deepcopy(model), inputs)
    calibration = [batch if len(sizes) > 1 else batch[0] for batch in batches[:4]]
    conversion = convert(model, 2, bits=4, calibration=[(batch,) if len(sizes) > 1 else batch for batch in calibration])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.safetensors"
        save(conversion, path)
        bytes_in_file, again = path.stat().st_size, load(path, model=model).eval()
    coded, reference = outputs(conversion.model, inputs), outputs(model, inputs)
    difference = relative_error(outputs(again, inputs), coded)
    row |= {"coded": f"{relative_error(coded, reference):.2e}", "read_back": f"{difference:.1e}"}
    row["bytes"] = f"{bytes_in_file / (4 * row['parameters']):.3f}"
    failed = [layer.name for layer in conversion.calibration.failed] if conversion.calibration else []
    if difference or failed:
        row |= {"status": "failed", "note": f"the file differs by {difference}; layers not calibrated: {failed}"}
    return row | {"seconds": f"{time.perf_counter() - start:.1f}"}


def _shape(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size)) or "1"


def check_structure(model: nn.Module, inputs: Any) -> int:
    """Compare keys and shapes of the fused network and of a run on the meta device; return how many are skipped."""
    keys = {key: value.shape for key, value in model.state_dict().items()}
    conversion = convert(model)
    assert {key: value.shape for key, value in fuse(conversion.model).state_dict().items()} == keys, "keys or shapes"
    shapes = [[t.shape for t in outputs(m, inputs)] for m in (model, conversion.model)]
    assert shapes[0] == shapes[1], shapes
    return len(conversion.plan.skipped)


def compare(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Return the errors in float32 and float64; ``model`` is converted to float64."""
    keys = {key: value.shape for key, value in model.state_dict().items()}
    conversion = convert(model)
    skipped = len(conversion.plan.skipped)
    assert {key: value.shape for key, value in fuse(conversion.model).state_dict().items()} == keys, "keys or shapes"
    reference32, actual32 = outputs(model, inputs), outputs(conversion.model, inputs)
    error32 = relative_error(actual32, reference32)
    del conversion
    torch.set_default_dtype(torch.float64)
    try:
        model = model.double()
        doubled = tuple(t.double() for t in inputs) if isinstance(inputs, tuple) else inputs.double()
        reference64 = outputs(model, doubled)
        converted = convert(model).model
        del model
        actual64 = outputs(converted, doubled)
    except RuntimeError as error:  # some networks create float32 tensors in their forward pass
        note = f"does not run in float64 itself: {str(error)[:120]}"
        status = "ok in float32" if error32 <= BOUND_32 else "over bound"
        return {"skipped": skipped, "error32": f"{error32:.2e}", "status": status, "note": note}
    finally:
        torch.set_default_dtype(torch.float32)
    error64, own32 = relative_error(actual64, reference64), relative_error(reference32, reference64)
    good = error64 <= BOUND_64 and error32 <= BOUND_32
    row: dict[str, Any] = {"skipped": skipped}
    row |= {"error64": f"{error64:.2e}", "error32": f"{error32:.2e}", "own32": f"{own32:.2e}"}
    if len(reference32) == 1 and reference32[0].dim() == 2:
        pairs = ((actual32, reference32), (actual64, reference64))
        row["same_top1"] = all(torch.equal(a[0].argmax(1), b[0].argmax(1)) for a, b in pairs)
        good = good and row["same_top1"]
    return row | {"status": "ok" if good else "over bound"}


def worker(library: str, name: str, ranks: bool, pipe: Any) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    try:
        row = check(library, name, ranks) if library in ("timm", "torchvision") else attempt_source(library, name)
    except HarmconvertError as error:
        row = {"library": library, "architecture": name, "status": "failed", "note": str(error)[:300]}
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        note = f"{type(error).__name__}: {str(error)[:200]} ({Path(where.filename).name}:{where.lineno})"
        row = {"library": library, "architecture": name, "status": "failed", "note": note.replace("\n", " ")}
    pipe.send(row)


def summary(path: Path) -> None:
    rows = list(csv.DictReader(path.open()))
    for library in dict.fromkeys(row["library"] for row in rows):
        of_library = [row for row in rows if row["library"] == library]
        counts = {
            s: sum(row["status"] == s for row in of_library)
            for s in ("ok", "ok in float32", "over bound", "failed", "none")
        }
        checks = {c: sum(row.get("check") == c for row in of_library) for c in ("full", "shrunk", "meta")}
        print(library, counts, checks if "check" in rows[0] else "")
        for column in ("error64", "error32", "own32"):
            errors = ((float(row[column]), row["architecture"]) for row in of_library if row.get(column))
            worst = sorted(errors, reverse=True)[:3]
            print(f"  worst {column}:", ", ".join(f"{value:.1e} {name}" for value, name in worst))
    for row in rows:
        if row["status"] in ("over bound", "failed"):
            print(
                row["status"],
                row["architecture"],
                row.get("error64", ""),
                row["error32"],
                row.get("own32", ""),
                row.get("same_top1", ""),
                row["note"],
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--match", default="*", help="shell-style pattern of architecture names")
    parser.add_argument("--output", type=Path, help="default: results/zoo.csv, or results/zoo_ranks.csv")
    parser.add_argument("--ranks", action="store_true", help="check half of the full rank instead of the whole basis")
    parser.add_argument("--sources", action="store_true", help="check the small networks of other libraries instead")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--limit-seconds", type=float, default=600, help="per architecture")
    parser.add_argument("--retry", action="store_true", help="try rows again that are not 'ok'")
    parser.add_argument("--summary", action="store_true", help="print a summary of the table, run nothing")
    args = parser.parse_args()
    args.output = args.output or (SOURCES if args.sources else RANKS if args.ranks else RESULTS)
    if args.summary:
        summary(args.output)
        return
    rows = list(csv.DictReader(args.output.open())) if args.output.exists() else []
    if args.retry:
        fine = ("ok", "ok in float32", "none")
        rows = [row for row in rows if row["status"] in fine or not fnmatch.fnmatch(row["architecture"], args.match)]
    done = {(row["library"], row["architecture"]) for row in rows}
    names = [("torchvision", name) for name in torchvision.models.list_models()]
    names += [("timm", name) for name in timm.list_models()]
    if args.sources:
        from zoo_networks import NAMES, import_libraries

        names = [*NAMES]
        import_libraries()  # once, for all processes
    todo = [n for n in names if n not in done and fnmatch.fnmatch(n[1], args.match)]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    with args.output.open("w", newline="") as file:
        fields = SOURCE_FIELDS if args.sources else RANK_FIELDS if args.ranks else FIELDS
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        file.flush()
        running: dict[tuple[str, str], tuple[BaseProcess, Any, float]] = {}
        while todo or running:
            while todo and len(running) < args.jobs:
                job = todo.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                started = context.Process(target=worker, args=(*job, args.ranks, theirs))
                started.start()
                theirs.close()
                running[job] = (started, ours, time.monotonic())
            time.sleep(0.05)
            for job, (process, pipe, begun) in list(running.items()):
                late = time.monotonic() - begun > args.limit_seconds
                if not (pipe.poll() or late or not process.is_alive()):
                    continue
                try:
                    row = pipe.recv() if pipe.poll() else None
                except EOFError:
                    row = None
                if row is None:
                    note = "took too long" if late else f"the process died ({process.exitcode})"
                    row = {"library": job[0], "architecture": job[1], "status": "failed", "note": note}
                process.kill()
                process.join()
                del running[job]
                writer.writerow(row)
                file.flush()
                print(
                    row["status"],
                    *job,
                    row.get("error64", ""),
                    row.get("error32", ""),
                    row.get("seconds", ""),
                    row.get("note", ""),
                    flush=True,
                )


if __name__ == "__main__":
    main()
