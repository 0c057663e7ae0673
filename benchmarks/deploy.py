"""How fast and how exact is a network as it would be deployed, beside what a user would pick instead?

    python benchmarks/deploy.py                               # writes results/deploy.csv
    python benchmarks/deploy.py efficientnet_lite0 --turns 30
    python benchmarks/deploy.py --summary
    python benchmarks/deploy.py --nncf                        # ours beside NNCF's alone; results/deploy_nncf.csv

Networks: efficientnet_lite0 (ImageNet weights) and resnet_mnist5k, with the test images of coding.py, and networks with
random weights, whose accuracy says nothing. All ways of a network run in turns; `ratio` is the time of `eager f32`
divided by that of the row. `agreement` and `kl` compare with the network itself, on test images that the calibration
did not see. Calibration: 256 images; 32 for random weights, whose rounding has no feedback, which does not change the
time.

`cut` is empty for the whole network; `lambda 2`, or `half the MACs` (ranks and frequencies of --budget macs=50%), for
a smaller one, which is calibrated where the weights are trained. Its ways are those of `factor` and of export --form
factored, which take the faster form of each layer in the runtime and the precision, and no row where they leave all
layers dense, because no layer is faster or the whole is not; `twin` is the time of the whole network in the same way
(with our 8 bits) divided by that of the row, so 1.00 is the speed of the dense form.

Ways: torch (channels_last) in float32 and bfloat16, ONNX Runtime, OpenVINO; in 8 bits: `ours` is export --precision
int8 with --max-drop 100 (all layers in 8 bits) or 1 (layers in floating point until at most 1 % of the images held back
change their top-1); `ONNX Runtime's quantiser` is quantize_static with a scale for each channel; `NNCF` is
nncf.quantize with its defaults. NNCF's rows need `nncf`.

deploy_nncf.csv: these two graphs alone, in turns; `ratio` is NNCF's time divided by ours. `kernels` counts the
operators that OpenVINO executes; `only_ours` and `only_nncf` are those that the other graph lacks.
"""

from __future__ import annotations

import argparse
import copy
import csv
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import coding
import photographs
import timm
import torch
from table import appended, processor
from torch import Tensor, nn

import harmconvert as hc
import harmconvert.models
from harmconvert.calibration import CalibrationContext, CalibrationSettings
from harmconvert.deploy import Target, factor_for, onnx_bytes
from harmconvert.deploy.graph_files import times_of
from harmconvert.deploy.quantised_graphs import quantise_within, to_int8
from harmconvert.deploy.runtime_rows import has_bfloat16
from harmconvert.deploy.runtimes import InRuntime, openvino_core
from harmconvert.layers import in_turns, kernels_to_channels_last
from harmconvert.layers.timing import SETTLING
from harmconvert.network import factoring, fuse
from harmconvert.search import SearchSettings

assert harmconvert.models

RESULTS = Path(__file__).parent / "results" / "deploy.csv"
KEYS = ["network", "cut", "way", "batch", "threads", "processor"]
FIELDS = [*KEYS, "median_ms", "spread", "ratio", "twin", "agreement", "kl", "bytes", "float_layers", "torch"]
PAIRS = RESULTS.with_name("deploy_nncf.csv")
KEYS_OF_PAIRS = ["network", "batch", "threads", "processor"]
PAIR_FIELDS = [*KEYS_OF_PAIRS, "ours_ms", "nncf_ms", "ratio", "spread", "kernels", "only_ours", "only_nncf"]
TRAINED = ("efficientnet_lite0", "resnet_mnist5k")
RANDOM = ("resnet18", "resnet50", "wrn28_10", "vgg16_bn", "mobilenetv2_100")
CUTS: dict[str, dict[str, Any]] = {"lambda 2": {"lam": 2}, "half the MACs": {"budget": "macs=50%"}}
INPUTS, BATCH = 256, 8


def subject(name: str) -> coding.Subject:
    if name in TRAINED:
        return coding.subject(name, INPUTS)
    torch.manual_seed(0)
    size = 32 if name == "wrn28_10" else 224
    draws = partial(photographs.calibration_crops, 32, size)
    model = timm.create_model(name).eval()
    return coding.Subject(model, lambda draw: [*draws(seed=draw).split(32)], torch.zeros(0), None)


@dataclass(frozen=True)
class Way:
    """A network as it would be deployed: how to run it, its bytes, and its layers in floating point."""

    run: Callable[[Any], Any]
    size: int | None = None
    float_layers: int | None = None


# Makes a network for inputs of one shape, or for any batch.
Maker = Callable[["Tensor | None"], Way]


def nncf_model(graph: bytes, batches: list[Tensor]) -> Any:
    import nncf

    return nncf.quantize(openvino_core().read_model(graph), nncf.Dataset([batch.numpy() for batch in batches]))


def compiled_by_openvino(model: Any) -> Any:
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    return openvino_core().compile_model(model, "CPU", hints)


def in_openvino(compiled: Any) -> nn.Module:
    return InRuntime(lambda arrays: [compiled([arrays["input"]])[0].copy()])


def in_runtime(target: Target, graph: bytes, float_layers: int | None = None) -> Maker:
    return lambda x: Way(target.open(graph, x), len(graph), float_layers)


def in_torch(network: nn.Module, dtype: torch.dtype = torch.float32, compiled: bool = False) -> Maker:
    fast = kernels_to_channels_last(network.to(dtype))
    run = torch.compile(fast) if compiled else fast
    return lambda x: Way(lambda y: run(y.to(dtype)).float())


class Ways:
    """All ways to deploy a network and its cuts.

    Args:
        batches: calibration inputs.
        trained: whether the accuracy is of interest.
    """

    def __init__(self, model: nn.Module, batches: list[Tensor], trained: bool) -> None:
        self.model, self.trained, self.example = model, trained, batches[0][:1]
        self.batches = batches
        self.context = CalibrationContext.of(model, batches, CalibrationSettings(inputs=INPUTS))

    def all(self, x: Tensor) -> Iterator[tuple[tuple[str, str], Maker]]:
        """Yield all ways, with the cut and the name of each."""
        for way, make in self.of_network():
            yield ("", way), make
        for cut, options in CUTS.items():
            for way, make in self.of_cut(options, x):
                yield (cut, way), make

    def of_network(self) -> Iterator[tuple[str, Maker]]:
        """Yield the ways of the whole network: ours, and what a user would pick instead."""
        graph, fit = onnx_bytes(self.model, self.example), self.context.data.fit
        yield "eager f32", in_torch(copy.deepcopy(self.model))
        yield "ONNX Runtime f32", in_runtime(Target("onnx"), graph)
        yield "OpenVINO f32", in_runtime(Target("openvino"), graph)
        if has_bfloat16():
            yield "eager bf16", in_torch(copy.deepcopy(self.model), torch.bfloat16)
            yield "torch.compile bf16", in_torch(copy.deepcopy(self.model), torch.bfloat16, compiled=True)
            yield "OpenVINO bf16", in_runtime(Target("openvino", "bf16"), graph)
        yield "ONNX Runtime's quantiser", in_runtime(Target("onnx", "int8"), to_int8(graph, fit, "onnx"))
        quantised = nncf_model(graph, [batch.input for batch in fit])

        def nncf_way(x: Tensor | None) -> Way:
            own = quantised.clone()
            if x is not None:
                own.reshape(tuple(x.shape))
            return Way(in_openvino(compiled_by_openvino(own)))

        yield "NNCF", nncf_way
        for target in (Target("onnx", "int8"), Target("openvino", "int8")):
            for max_drop in (100.0, 1.0) if self.trained else (100.0,):
                content, count = self.in_8_bits(self.model, target, max_drop)
                yield f"ours, {target}, max drop {max_drop:g} %", in_runtime(target, content, count)

    def of_cut(self, options: Mapping[str, Any], x: Tensor) -> Iterator[tuple[str, Maker]]:
        """Yield the ways of a cut network in factored form, without those that `export` leaves dense."""
        cut = hc.convert(self.model, **options, search=SearchSettings(trials=0), example_input=self.example)
        if self.trained:
            cut = hc.convert(self.model, cut.plan, calibration=self.batches, example_input=self.example)
        for name, dtype in {
            "eager f32": torch.float32,
            **({"eager bf16": torch.bfloat16} if has_bfloat16() else {}),
        }.items():
            fast = factoring(copy.deepcopy(cut.model).to(dtype), x.to(dtype))
            if fast.factored:
                yield name, in_torch(fast.model, dtype)
        targets = [Target("onnx"), Target("openvino"), Target("onnx", "int8"), Target("openvino", "int8")]
        for target in [*targets, *([Target("openvino", "bf16")] if has_bfloat16() else [])]:
            chosen = factor_for(target, cut.model, x, lambda what: None)
            if not chosen.factored:
                continue
            way = f"ours, {target}, max drop 100 %"
            if target.precision != "int8":
                way = f"{Target(target.runtime)} {target.precision}"
            (dense, _), (factored, count) = (self.in_target(form, target) for form in (fuse(cut.model), chosen.model))
            before, after = times_of(target, dense, factored, x)
            if before >= after:
                yield way, in_runtime(target, factored, count)

    def in_target(self, form: nn.Module, target: Target) -> tuple[bytes, int | None]:
        if target.precision == "int8":
            return self.in_8_bits(form.eval(), target, 100.0)
        return onnx_bytes(form.eval(), self.example), None

    def in_8_bits(self, form: nn.Module, target: Target, max_drop: float) -> tuple[bytes, int]:
        """Return the graph that `export` writes, as ONNX, and the number of layers in floating point."""
        make = partial(onnx_bytes, example_input=self.example)
        if not self.trained:
            return to_int8(make(form), self.context.data.fit, target.runtime), 0
        quantised, _ = quantise_within(form, make, target, self.context, max_drop, lambda what: None)
        return quantised.content, len(quantised.held_back.float_layers)


def run(names: list[str], turns: int) -> None:
    with appended(RESULTS, FIELDS, KEYS) as (done, write), torch.no_grad():
        for name in names:
            own, threads = subject(name), torch.get_num_threads()
            keys = {"network": name, "batch": BATCH, "threads": threads, "processor": processor()}
            if tuple(str({**keys, "cut": "", "way": "eager f32"}[key]) for key in KEYS) in done:
                continue
            batches = own.calibration(0)
            x = batches[0][:BATCH].contiguous(memory_format=torch.channels_last)
            ways = Ways(own.model, batches, name in TRAINED)
            made: dict[tuple[str, str], Maker | None] = {}
            fixed: dict[tuple[str, str], Way] = {}
            for name_of_way, maker in ways.all(x):
                fixed[name_of_way] = maker(x)
                made[name_of_way] = maker if len(own.test) else None  # a graph has the size of the network
            runs = {"|".join(way): partial(one.run, x) for way, one in fixed.items()}
            times = in_turns(runs, turns, 3, 20.0 * len(runs), settling=SETTLING)
            median = {way: times["|".join(way)].median for way in made}
            original = coding.outputs(own.model, own.test) if len(own.test) else None
            for (cut, way), make in made.items():
                seconds, one = median[cut, way], fixed[cut, way]
                row = {**keys, "cut": cut, "way": way, "median_ms": f"{1e3 * seconds:.2f}"}
                row |= {
                    "spread": f"{times[f'{cut}|{way}'].spread:.3f}",
                    "ratio": f"{median['', 'eager f32'] / seconds:.2f}",
                }
                row |= {"twin": f"{median['', way] / seconds:.2f}" if cut else "", "torch": torch.__version__}
                row |= {"bytes": one.size, "float_layers": one.float_layers}
                if original is not None and make is not None:
                    found = coding.scores(_Module(make(None).run), own, original)
                    row |= {"agreement": found["agreement"], "kl": found["kl"]}
                write(row)


def compare_with_nncf(names: list[str], turns: int) -> None:
    """Time our 8 bits and NNCF's in OpenVINO, these two alone, and compare the kernels that OpenVINO executes."""
    with appended(PAIRS, PAIR_FIELDS, KEYS_OF_PAIRS) as (done, write), torch.no_grad():
        for name in names:
            keys = {"network": name, "batch": BATCH, "threads": torch.get_num_threads(), "processor": processor()}
            if tuple(str(keys[key]) for key in KEYS_OF_PAIRS) in done:
                continue
            own = subject(name)
            batches = own.calibration(0)
            x, ways = batches[0][:BATCH].contiguous(), Ways(own.model, batches, False)
            graph, fit = onnx_bytes(own.model, ways.example), ways.context.data.fit
            models = {
                "ours": openvino_core().read_model(to_int8(graph, fit, "openvino")),
                "nncf": nncf_model(graph, [batch.input for batch in fit]),
            }
            runs, kernels = {}, {}
            for way, model in models.items():
                model.reshape(tuple(x.shape))
                compiled = compiled_by_openvino(model)
                operators = compiled.get_runtime_model().get_ordered_ops()
                info = ("layerType", "primitiveType", "outputPrecisions")
                kernels[way] = Counter(tuple(op.get_rt_info()[key].astype(str) for key in info) for op in operators)
                runs[way] = partial(in_openvino(compiled), x)
            times = in_turns(runs, turns, 3, 60.0, settling=SETTLING)
            ours, nncf = (times[way] for way in ("ours", "nncf"))
            other = [
                "; ".join(f"{count} {' '.join(kernel)}" for kernel, count in (kernels[a] - kernels[b]).items())
                for a, b in (("ours", "nncf"), ("nncf", "ours"))
            ]
            write({
                **keys, "ours_ms": f"{1e3 * ours.median:.3f}", "nncf_ms": f"{1e3 * nncf.median:.3f}",
                "ratio": f"{nncf.median / ours.median:.3f}", "spread": f"{max(ours.spread, nncf.spread):.3f}",
                "kernels": kernels["ours"].total(), "only_ours": other[0], "only_nncf": other[1],
            })  # fmt: skip


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
    title = f"{'cut':14} {'way':42} {'ms':>8} {'spread':>8} {'ratio':>6} {'twin':>5} {'agreement':>9} {'KL':>9}"
    for name, machine in dict.fromkeys((row["network"], row["processor"]) for row in rows):
        print(f"\n{name}, {machine}\n{title}")
        for row in (row for row in rows if (row["network"], row["processor"]) == (name, machine)):
            agreement = f"{float(row['agreement']):9.1%}" if row["agreement"] else " " * 9
            kept = f"  {row['float_layers']} layers in floating point" if row["float_layers"] not in ("", "0") else ""
            print(
                f"{row['cut']:14} {row['way']:42} {float(row['median_ms']):8.1f} {float(row['spread']):8.1%} "
                f"{float(row['ratio']):6.2f} {row['twin']:>5} {agreement} {row['kl']:>9}{kept}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=[*TRAINED, *RANDOM], metavar="NETWORK")
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--summary", action="store_true", help="print the results only")
    parser.add_argument("--nncf", action="store_true", help="only compare our 8 bits with NNCF's in OpenVINO")
    args = parser.parse_args()
    if args.nncf:
        compare_with_nncf(args.networks, args.turns)
        return
    if not args.summary:
        run(args.networks, args.turns)
    summary()


if __name__ == "__main__":
    main()
