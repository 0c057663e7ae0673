"""How fast and how exact is a network as it would be deployed, beside what a user would pick instead?

    python benchmarks/deploy.py                               # writes results/deploy.csv
    python benchmarks/deploy.py efficientnet_lite0 --turns 30
    python benchmarks/deploy.py --summary

Networks: efficientnet_lite0 (ImageNet weights) and resnet_mnist5k, with the test images of coding.py, and networks with
random weights, whose accuracy says nothing. All ways of a network run in turns; `ratio` is the time of `eager f32`
divided by that of the row. `agreement` and `kl` compare with the network itself, on test images that the calibration
did not see. Calibration: 256 images.

Ways: torch (channels_last) in float32 and bfloat16, ONNX Runtime, OpenVINO; in 8 bits: `ours` is export --precision
int8 with --max-drop 100 (all layers in 8 bits) or 1 (layers in floating point until at most 1 % of the images held back
change their top-1); `ONNX Runtime's quantiser` is quantize_static with a scale for each channel; `NNCF` is
nncf.quantize with its defaults. NNCF's rows need `nncf`.
"""

from __future__ import annotations

import argparse
import copy
import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import coding
import photographs
import timm
import torch
from table import appended, processor
from torch import Tensor, nn

from harmconvert.calibration import CalibrationContext, CalibrationSettings
from harmconvert.deploy import Target, onnx_bytes
from harmconvert.deploy.quantised_graphs import quantise_within, to_int8
from harmconvert.deploy.runtime_rows import has_bfloat16
from harmconvert.layers import in_turns, kernels_to_channels_last

RESULTS = Path(__file__).parent / "results" / "deploy.csv"
KEYS = ["network", "way", "batch", "threads"]
FIELDS = [*KEYS, "median_ms", "spread", "ratio", "agreement", "kl", "bytes", "float_layers", "processor", "torch"]
TRAINED = ("efficientnet_lite0", "resnet_mnist5k")
RANDOM = ("resnet18", "resnet50", "mobilenetv2_100")
INPUTS, BATCH = 256, 8


def subject(name: str) -> coding.Subject:
    if name in TRAINED:
        return coding.subject(name, INPUTS)
    torch.manual_seed(0)
    draws = partial(photographs.calibration_crops, INPUTS, 224)
    return coding.Subject(
        timm.create_model(name).eval(), lambda draw: [*draws(seed=draw).split(32)], torch.zeros(0), None
    )


class Way:
    """A network as it would be deployed: how to run it, its bytes, and its layers in floating point."""

    def __init__(self, run: Callable[[Any], Any], size: int | None = None, float_layers: int | None = None) -> None:
        self.run, self.size, self.float_layers = run, size, float_layers


def nncf_model(graph: bytes, batches: list[Tensor]) -> Any:
    import nncf
    import openvino

    return nncf.quantize(openvino.Core().read_model(graph), nncf.Dataset([batch.numpy() for batch in batches]))


def in_openvino(model: Any) -> Callable[[Tensor], Tensor]:
    import openvino

    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(model, "CPU", hints)
    return lambda x: torch.from_numpy(compiled(x.numpy())[0].copy())


def ours(model: nn.Module, batches: list[Tensor], target: Target, max_drop: float) -> tuple[bytes, int]:
    """Return the graph that `export` writes, as ONNX, and the number of layers in floating point."""
    context = CalibrationContext.of(model, batches, CalibrationSettings(inputs=INPUTS))
    make = partial(onnx_bytes, example_input=batches[0][:1])
    quantised, _ = quantise_within(model, make, target, context, max_drop, lambda what: None)
    return quantised.content, len(quantised.held_back.float_layers)


def ways(name: str, model: nn.Module, batches: list[Tensor]) -> dict[str, Callable[[Tensor | None], Way]]:
    """Return functions that make each way, for inputs of one shape, or for any batch."""
    graph = onnx_bytes(model, batches[0][:1])
    fit = CalibrationContext.of(model, batches, CalibrationSettings(inputs=INPUTS)).data.fit
    made: dict[str, Callable[[Tensor | None], Way]] = {
        "eager f32": lambda x: Way(kernels_to_channels_last(model)),
        "ONNX Runtime f32": lambda x: Way(Target("onnx").open(graph, x), len(graph)),
        "OpenVINO f32": lambda x: Way(Target("openvino").open(graph, x), len(graph)),
    }
    if has_bfloat16():
        half = kernels_to_channels_last(copy.deepcopy(model).bfloat16())
        made["eager bf16"] = lambda x: Way(lambda y: half(y.bfloat16()).float())
        compiled = torch.compile(half)
        made["torch.compile bf16"] = lambda x: Way(lambda y: compiled(y.bfloat16()).float())
        made["OpenVINO bf16"] = lambda x: Way(Target("openvino", "bf16").open(graph, x))
    plain = to_int8(graph, fit)
    made["ONNX Runtime's quantiser"] = lambda x: Way(Target("onnx", "int8").open(plain, x), len(plain))
    quantised = nncf_model(graph, [batch.input for batch in fit])

    def nncf_way(x: Tensor | None) -> Way:
        own = quantised.clone()
        if x is not None:
            own.reshape(tuple(x.shape))
        return Way(in_openvino(own))

    made["NNCF"] = nncf_way
    for target in (Target("onnx", "int8"), Target("openvino", "int8")):
        for max_drop in (100.0, 1.0) if name in TRAINED else (100.0,):
            content, count = ours(model, batches, target, max_drop)
            made[f"ours, {target}, max drop {max_drop:g} %"] = lambda x, t=target, c=content, n=count: Way(
                t.open(c, x), len(c), n
            )  # type: ignore[misc]
    return made


def run(names: list[str], turns: int) -> None:
    with appended(RESULTS, FIELDS, KEYS) as (done, write), torch.no_grad():
        for name in names:
            own = subject(name)
            batches = own.calibration(0)
            x = batches[0][:BATCH].contiguous(memory_format=torch.channels_last)
            made = ways(name, own.model, batches)
            key = {"network": name, "batch": BATCH, "threads": torch.get_num_threads()}
            fixed = {way: make(x) for way, make in made.items()}
            runs = {way: partial(one.run, x) for way, one in fixed.items()}
            times = in_turns(runs, turns, 3, 120.0, warm=2)
            original = coding.outputs(own.model, own.test) if len(own.test) else None
            for way, make in made.items():
                if tuple(str({**key, "way": way}[k]) for k in KEYS) in done:
                    continue
                row = {**key, "way": way, "median_ms": f"{1e3 * times[way].median:.2f}"}
                row |= {"spread": f"{times[way].spread:.3f}"}
                row |= {"ratio": f"{times['eager f32'].median / times[way].median:.2f}"}
                row |= {"bytes": fixed[way].size, "float_layers": fixed[way].float_layers}
                row |= {"processor": processor(), "torch": torch.__version__}
                if original is not None:
                    found = coding.scores(_Module(make(None).run), own, original)
                    row |= {"agreement": found["agreement"], "kl": found["kl"]}
                write(row)


class _Module(nn.Module):
    def __init__(self, run: Callable[[Any], Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.run(x)
        return result


def summary() -> None:
    with RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name in dict.fromkeys(row["network"] for row in rows):
        print(f"\n{name}\nway                                              ms   spread  ratio  agreement        KL")
        for row in (row for row in rows if row["network"] == name):
            agreement = f"{float(row['agreement']):9.1%}" if row["agreement"] else " " * 9
            kept = f"  {row['float_layers']} layers in floating point" if row["float_layers"] not in ("", "0") else ""
            print(
                f"{row['way']:42} {float(row['median_ms']):8.1f} {float(row['spread']):8.1%} "
                f"{float(row['ratio']):6.2f} {agreement} {row['kl']:>9}{kept}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=[*TRAINED, *RANDOM], metavar="NETWORK")
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--summary", action="store_true", help="print the results only")
    args = parser.parse_args()
    if not args.summary:
        run(args.networks, args.turns)
    summary()


if __name__ == "__main__":
    main()
