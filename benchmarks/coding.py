"""How small can a file be at the same accuracy, and what does each part of the coder contribute?

    python benchmarks/coding.py                       # writes results/coding.csv; hours
    python benchmarks/coding.py resnet_mnist5k --draws 1
    python benchmarks/coding.py efficientnet_lite0 --draws 1 --method ours --bits 3.8
    HARMCONVERT_NNCODEC=/path/to/venv/bin/python python benchmarks/coding.py     # also NNCodec, from its own venv
    python benchmarks/coding.py --summary

Networks: efficientnet_lite0 (ImageNet weights; no labels: agreement and KL on crops of photographs that calibration did
not see), resnet_mnist5k, wrn16_4_mnist5k and resnet18_elpv (networks.py; labelled test images), super_resolution
(PSNR to the output of the original). `bytes` are those of the whole file with all tensors and its header; `kl` is the
mean KL divergence of the outputs in nats, or the relative squared difference for super_resolution. Each draw takes
other calibration inputs; no choice is made on the test inputs.

Methods:

- `ours`: --bits on 256 calibration inputs (column `inputs`); `ours, no inputs`: --bits alone,
- `ours, lambda 3` and `ours, lambda 2`: the same after a cut; `ours, pixels`: the same without the DCT,
- `equal steps`: rounding with feedback and equal steps in each layer (GPTQ), with our metric, levels and entropy coder,
- `plain rounding`: one step in each layer, the same relative error in all layers, with our entropy coder,
- `int8`, `int4`: one scale for each output channel, not compressed further,
- `float16 + zstd`: level 19,
- `NNCodec`: the reference software of ISO/IEC 15938-17 with dependent quantisation and optimised parameters, at
  several qp.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean

import calibration as common
import networks
import numpy as np
import numpy.typing as npt
import photographs
import torch
from table import appended
from torch import Tensor, nn

import harmconvert as hc
from harmconvert.calibration import CalibrationSettings
from harmconvert.codecs import Layout, Quantised, codec_of, step_indices
from harmconvert.network import find_layers, tensors_of
from harmconvert.plan import BitsSetting as Setting
from harmconvert.plan import Plan, coded_weights, make_plan, tensor_bytes

Integers = npt.NDArray[np.int32]

RESULTS = Path(__file__).parent / "results" / "coding.csv"
KEYS = ["network", "method", "setting", "draw"]
FIELDS = [*KEYS, "inputs", "bits", "bytes", "kl", "agreement", "top1", "psnr"]
NETWORKS = ["resnet_mnist5k", "super_resolution", "efficientnet_lite0", "wrn16_4_mnist5k", "resnet18_elpv"]
BITS = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0)
INPUTS, BATCH = 256, 32  # as many inputs as `convert` takes by default
QPS = (-12, -16, -20, -24, -28, -32, -36)


@dataclass(frozen=True)
class Subject:
    """A network, a function from a draw to calibration batches, test inputs, and their labels or None."""

    model: nn.Module
    calibration: Callable[[int], list[Tensor]]
    test: Tensor
    labels: Tensor | None


def subject(name: str, inputs: int = INPUTS) -> Subject:
    """Return a network with so many calibration inputs in each draw."""
    if name == "efficientnet_lite0":
        model = hc.open_source("sample:efficientnet_lite0").model.eval()
        test = photographs.crops(photographs.TEST, 140, 224, 999)
        return Subject(model, lambda draw: [*photographs.calibration_crops(inputs, 224, draw).split(BATCH)], test, None)
    if name == "super_resolution":

        def grey(images: Tensor) -> Tensor:
            return networks.halved(images.mean(1, keepdim=True))

        test = grey(photographs.crops(photographs.TEST, 56, 128, 999, 0.0, 1.0))
        draws = partial(photographs.calibration_crops, inputs, 96, mean=0.0, std=1.0)
        return Subject(networks.trained(name), lambda draw: [*grey(draws(seed=draw)).split(BATCH)], test, None)
    known = common.subject(name)
    return Subject(known.model.eval(), lambda draw: known.calibration(inputs, draw), known.images, known.labels)


def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(batch) for batch in inputs.split(56)]).double()


def scores(model: nn.Module, subject: Subject, original: Tensor) -> dict[str, object]:
    actual = outputs(model, subject.test)
    if original.dim() != 2:
        error = (actual - original).square().mean()
        return {"kl": f"{error / original.square().mean():.4g}", "psnr": f"{-10 * error.log10():.2f}"}
    p, q = original.log_softmax(1), actual.log_softmax(1)
    kl = (p.exp() * (p - q)).sum(1).mean().item()
    result: dict[str, object] = {
        "kl": f"{kl:.4g}",
        "agreement": f"{(actual.argmax(1) == original.argmax(1)).double().mean():.4f}",
    }
    if subject.labels is not None:
        result["top1"] = f"{(actual.argmax(1) == subject.labels).double().mean():.4f}"
    return result


@dataclass(frozen=True)
class Coded:
    """A network with coded weights, the bytes of its file, and the bits per coded weight."""

    model: nn.Module
    bytes: int
    bits: float


def in_file(conversion: hc.Conversion) -> Coded:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        hc.save(conversion, path)
        size = path.stat().st_size
    streams = sum(codec_of(entry).bytes(entry) for entry in conversion.coded.values())
    return Coded(conversion.model, size, 8 * streams / sum(int(np.prod(e.shape)) for e in conversion.coded.values()))


def ours(subject: Subject, bits: float, draw: int | None, lam: str | int | Plan = "full") -> Coded:
    batches = None if draw is None else subject.calibration(draw)
    settings = CalibrationSettings(seed=draw or 0)
    return in_file(hc.convert(subject.model, lam, bits=bits, calibration=batches, settings=settings))


def in_pixels(subject: Subject, bits: float, draw: int) -> Coded:
    plan = make_plan(find_layers(subject.model), "full", bits=Setting.of(bits))
    pixels = plan.map_layers(lambda layer: type(layer)(layer.name, layer.kernel_size, (layer.on("precision"),)))  # type: ignore[arg-type]
    return in_file(
        hc.convert(
            subject.model, pixels, calibration=subject.calibration(draw), settings=CalibrationSettings(seed=draw)
        )
    )


def equal_steps(subject: Subject, bits: float, draw: int) -> Coded:
    """Rounding with feedback and equal steps (GPTQ): the steps of a layer are set to their geometric mean."""
    from harmconvert.calibration import weight_coding

    before = weight_coding.affordable_steps

    def equal(steps_GN: Integers, layout: Layout) -> Integers:
        return np.full_like(steps_GN, round(float(steps_GN.mean())))

    weight_coding.affordable_steps = equal
    try:
        return ours(subject, bits, draw)
    finally:
        weight_coding.affordable_steps = before


def plain_rounding(subject: Subject, bits: float) -> Coded:
    """One step in each layer, in proportion to its root mean square; the step that gives these bits is searched."""
    conversion = hc.convert(subject.model, bits=bits)
    weights = coded_weights(conversion.model, conversion.plan)
    originals = hc.convert(subject.model).model
    values = {weight.key: tensors_of(originals)[weight.key].double().numpy() for weight in weights}
    count = sum(weight.count for weight in weights)
    low, high = -12.0, 4.0
    for _ in range(12):
        middle, entries = (low + high) / 2, {}
        for weight in weights:
            matrices = weight.layout.to_matrices(values[weight.key])
            step = step_indices(np.sqrt(np.mean(matrices**2, keepdims=True))[0] * 2.0**middle)
            steps = np.broadcast_to(step, (weight.layout.groups, weight.layout.columns)).astype(np.int32)
            quantised = Quantised(np.rint(matrices / 2.0 ** (steps[:, None] / 4)).astype(np.int32), steps)
            if np.abs(quantised.integers_GON).max() > 8000:
                break
            weight.write(quantised)
            entries[weight.key] = weight.entry(quantised)
        size = sum(codec_of(entry).bytes(entry) for entry in entries.values())
        fine = len(entries) == len(weights) and 8 * size / count < bits
        low, high = (low, middle) if fine else (middle, high)
    return in_file(hc.Conversion(conversion.model, conversion.plan, conversion.layers, conversion.cost, coded=entries))


def integers(subject: Subject, bits: int) -> Coded:
    """Integers with one scale for each output channel, as int8 and int4 kernels hold them."""
    conversion = hc.convert(subject.model, bits=8)
    plan = conversion.plan
    converted = hc.convert(subject.model, plan.without("precision")).model
    size = tensor_bytes(converted)
    for weight in coded_weights(converted, plan):
        matrices = weight.matrices()
        most = 2 ** (bits - 1) - 1
        scale = matrices.abs().amax(-1, keepdim=True).clamp_min(1e-30) / most
        rounded = (matrices / scale).round().clamp(-most, most) * scale
        with torch.no_grad():
            weight.parameter.copy_(torch.from_numpy(weight.layout.from_matrices(rounded.numpy())))
        size += -(-weight.count * bits // 8) + 4 * scale.numel() - 4 * weight.count
    return Coded(converted, size, bits)


def float16_zstd(subject: Subject) -> Coded:
    import zstandard

    data = io.BytesIO()
    for tensor in subject.model.state_dict().values():
        data.write((tensor.half() if tensor.is_floating_point() else tensor).numpy().tobytes())
    model = hc.convert(subject.model).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    return Coded(model, len(zstandard.ZstdCompressor(level=19).compress(data.getvalue())), 16.0)


NNCODEC = """
import sys
import numpy as np
from nncodec import nnc
source, target, qp = sys.argv[1], sys.argv[2], int(sys.argv[3])
tensors = dict(np.load(source))
stream = nnc.compress(tensors, bitstream_path=target + ".nnc", qp=qp, use_dq=True, opt_qp=True, return_bitstream=True)
np.savez(target, **nnc.decompress(target + ".nnc"))
print(len(stream))
"""


def nncodec(subject: Subject, qp: int) -> Coded:
    """The state of the network through NNCodec in its own virtual environment; integer tensors are left out."""
    state = {k: v.numpy() for k, v in subject.model.state_dict().items() if v.is_floating_point()}
    with tempfile.TemporaryDirectory() as folder:
        source, target = f"{folder}/source.npz", f"{folder}/target.npz"
        np.savez(source, **state)
        command = [os.environ["HARMCONVERT_NNCODEC"], "-c", NNCODEC, source, target, str(qp)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        size = int(done.stdout.split()[-1])
        decoded = {key: torch.from_numpy(value) for key, value in np.load(target).items()}
    model = hc.fuse(hc.convert(subject.model).model)
    model.load_state_dict(decoded, strict=False)
    weights = sum(v.size for k, v in state.items() if v.ndim > 1)
    return Coded(model, size, 8 * size / weights)


def methods(subject: Subject, draw: int, rates: Sequence[float]) -> Iterator[tuple[str, str, Callable[[], Coded]]]:
    for bits in rates:
        yield "ours", str(bits), partial(ours, subject, bits, draw)
    if draw == 0:
        for bits in rates:
            yield "ours, no inputs", str(bits), partial(ours, subject, bits, None)
            yield "plain rounding", str(bits), partial(plain_rounding, subject, bits)
        yield "int8", "8", partial(integers, subject, 8)
        yield "int4", "4", partial(integers, subject, 4)
        yield "float16 + zstd", "19", partial(float16_zstd, subject)
        if "HARMCONVERT_NNCODEC" in os.environ:
            for qp in QPS:
                yield "NNCodec", str(qp), partial(nncodec, subject, qp)
    for bits in rates:
        yield "equal steps", str(bits), partial(equal_steps, subject, bits, draw)
    for bits in rates[:4]:
        yield "ours, pixels", str(bits), partial(in_pixels, subject, bits, draw)
        for lam in (3, 2):
            yield f"ours, lambda {lam}", str(bits), partial(ours, subject, bits, draw, lam)


def run(names: list[str], draws: int, only: list[str], rates: Sequence[float]) -> None:
    with appended(RESULTS, FIELDS, KEYS) as (done, write):
        for draw in range(draws):
            for name in names:
                own = subject(name)
                original = outputs(own.model, own.test)
                for method, setting, make in methods(own, draw, rates):
                    if only and method not in only:
                        continue
                    key = {"network": name, "method": method, "setting": setting, "draw": draw}
                    if tuple(map(str, key.values())) in done:
                        continue
                    coded = make()
                    with_inputs = method.startswith(("ours", "equal")) and method != "ours, no inputs"
                    row = {
                        **key,
                        "inputs": INPUTS if with_inputs else "",
                        "bits": f"{coded.bits:.3f}",
                        "bytes": coded.bytes,
                    }
                    row |= scores(coded.model, own, original)
                    write(row)


def bytes_at(points: list[tuple[float, float]], kl: float) -> float | None:
    """Return the bytes at a divergence by interpolation of logarithms; None outside the measured range."""
    points = sorted(points)
    for (size, high), (larger, low) in itertools.pairwise(points):
        if high >= kl >= low > 0:
            share = (np.log(high) - np.log(kl)) / max(np.log(high) - np.log(low), 1e-12)
            return float(np.exp(np.log(size) + share * (np.log(larger) - np.log(size))))
    return None


def summary() -> None:
    with RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == name]
        print(f"\n{name}\nmethod            setting   bits     bytes        kl   agreement   top-1    psnr   draws")
        curves: dict[str, list[tuple[float, float]]] = {}
        for method, setting in dict.fromkeys((row["method"], row["setting"]) for row in own):
            same = [row for row in own if (row["method"], row["setting"]) == (method, setting)]

            def value(field: str, same: list[dict[str, str]] = same) -> float:
                return mean(float(row[field]) for row in same if row[field]) if same[0][field] else float("nan")

            curves.setdefault(method, []).append((value("bytes"), value("kl")))
            print(
                f"{method:17} {setting:>7} {value('bits'):6.2f} {value('bytes'):9,.0f} {value('kl'):9.2g} "
                f"{value('agreement'):11.2%} {value('top1'):7.2%} {value('psnr'):7.2f} {len(same):7}"
            )
        for method, points in curves.items():
            ratios = [
                size / other
                for size, kl in curves["ours"]
                if (other := bytes_at(points, kl)) is not None and method != "ours"
            ]
            if ratios:
                print(f"ours / {method}: bytes at equal divergence {min(ratios):.2f} to {max(ratios):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS, metavar="NETWORK")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--method", action="append", default=[], metavar="METHOD", help="only this one; repeatable")
    parser.add_argument("--bits", type=float, action="append", default=[], help="only this rate; repeatable")
    parser.add_argument("--summary", action="store_true", help="print the results only")
    args = parser.parse_args()
    if not args.summary:
        run(args.networks, args.draws, args.method, args.bits or BITS)
    summary()


if __name__ == "__main__":
    main()
