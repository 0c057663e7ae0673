"""Write the tables of docs/benchmarks from benchmarks/results.

python docs/tables.py            # replaces what is between `<!-- table: NAME -->` and `<!-- end of table -->`
python docs/tables.py --check    # exit code 1 if a table is not what the results say
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs" / "benchmarks").glob("*.md"))
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def results(name: str) -> list[dict[str, str]]:
    """Return the rows of a table in benchmarks/results."""
    with (ROOT / "benchmarks" / "results" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown."""
    headings = list(headings)
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def share(text: str) -> str:
    """Return a share of 1 as a percentage."""
    return f"{100 * float(text):.1f} %" if text else ""


def number(text: str) -> str:
    """Return a number with two digits that count."""
    return f"{float(text):.2g}" if text else ""


def coding(network: str) -> str:
    """All rates of one network: the means of all draws of calibration inputs, and the range of the divergence."""
    rates: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in results("coding"):
        if row["network"] == network:
            rates.setdefault((row["method"], row["setting"]), []).append(row)

    def average(rows: list[dict[str, str]], field: str) -> float:
        return mean(float(row[field]) for row in rows)

    def shares(rows: list[dict[str, str]], field: str) -> str:
        return share(str(average(rows, field))) if rows[0][field] else ""

    def divergence(rows: list[dict[str, str]]) -> str:
        values = [float(row["kl"]) for row in rows]
        spread = f" ({min(values):.2g} to {max(values):.2g})" if len(values) > 1 else ""
        return f"{mean(values):.2g}{spread}"

    order = sorted(rates.items(), key=lambda one: (one[0][0] != "ours", one[0][0], average(one[1], "bits")))
    return table(
        ("method", "bits per weight", "bytes", "KL or relative squared error", "as the original", "top-1", "draws"),
        (
            (
                method, f"{average(rows, 'bits'):.2f}", f"{average(rows, 'bytes'):,.0f}", divergence(rows),
                shares(rows, "agreement"), shares(rows, "top1"), str(len(rows)),
            )
            for (method, _), rows in order
        ),
    )  # fmt: skip


def deployment(network: str) -> str:
    """Times and agreement of one network in each runtime and precision, on each processor."""
    rows = [row for row in results("deploy") if row["network"] == network]
    parts = []
    for processor in dict.fromkeys(row["processor"] for row in rows):
        lines = (
            (
                row["cut"] or "whole", row["way"], f"{float(row['median_ms']):.1f}", row["ratio"], row["twin"],
                share(row["spread"]), share(row["agreement"]), number(row["kl"]),
            )
            for row in rows if row["processor"] == processor
        )  # fmt: skip
        columns = ("cut", "way", "ms", "speed", "against dense", "spread", "same top-1", "KL")
        parts.append(f"Processor: {processor}\n\n{table(columns, lines)}")
    return "\n\n".join(parts)


AMX = "Intel(R) Xeon(R) Processor, VNNI, BF16, AMX"
WAYS = {
    "eager f32": "eager, float32, channels_last",
    "ONNX Runtime f32": "ONNX Runtime, float32",
    "OpenVINO f32": "OpenVINO, float32",
    "eager bf16": "eager, bfloat16, channels_last",
    "torch.compile bf16": "torch.compile, bfloat16",
    "OpenVINO bf16": "OpenVINO, bfloat16",
    "ONNX Runtime's quantiser": "ONNX Runtime's quantiser, int8",
    "ours, ONNX Runtime with int8, max drop 100 %": "**ours**, int8 in ONNX Runtime",
    "NNCF": "NNCF, int8 in OpenVINO",
    "ours, OpenVINO with int8, max drop 100 %": "**ours**, int8 in OpenVINO",
}


def deployment_exact() -> str:
    """Speed and exactness of the ways to deploy EfficientNet-Lite0 as a whole, with AMX."""
    rows = [row for row in results("deploy") if (row["network"], row["processor"]) == ("efficientnet_lite0", AMX)]
    return table(
        ("", "ms", "speed", "same top-1", "KL", "layers in floating point"),
        (
            (
                WAYS.get(row["way"].replace("max drop 1 %", "max drop 100 %"), row["way"])
                + (", `--max-drop 1`" if row["way"].endswith("max drop 1 %") else "")
                + (", `--max-drop 100`" if row["way"].endswith("max drop 100 %") else ""),
                f"{float(row['median_ms']):.1f}", row["ratio"], share(row["agreement"]), number(row["kl"]),
                row["float_layers"],
            )
            for row in rows if not row["cut"]
        ),
    )  # fmt: skip


def deployment_ways() -> str:
    """How many times as fast as eager float32 each network is as a whole in each way, with AMX."""
    rows = [row for row in results("deploy") if row["processor"] == AMX and not row["cut"]]
    speeds = {(row["network"], row["way"]): row["ratio"] for row in rows}
    networks = list(dict.fromkeys(row["network"] for row in rows))
    eager = {row["network"]: f"{float(row['median_ms']):.1f} ms" for row in rows if row["way"] == "eager f32"}
    lines = [
        (title, *(eager[one] if way == "eager f32" else speeds.get((one, way), "") for one in networks))
        for way, title in WAYS.items()
    ]
    return table(("", *networks), lines)


def deployment_cuts() -> str:
    """How many times as fast as the whole network in the same way a cut network is, with AMX."""
    rows = [row for row in results("deploy") if row["processor"] == AMX and row["cut"]]
    gains = {(row["network"], row["cut"], row["way"]): row["twin"] for row in rows}
    columns = sorted({(row["network"], row["cut"]) for row in rows}, key=lambda pair: (pair[0], pair[1] != "lambda 2"))
    ways = [way for way in WAYS if any(row["way"] == way for row in rows)]
    lines = [(WAYS[way], *(gains.get((*column, way), "dense") for column in columns)) for way in ways]
    return table(("", *(f"{network}, {cut}" for network, cut in columns)), lines)


def deployment_nncf() -> str:
    """Our 8 bits beside NNCF's, both in OpenVINO."""
    return table(
        ("", "ours, ms", "NNCF, ms", "NNCF's time / ours", "spread"),
        (
            (row["network"], row["ours_ms"], row["nncf_ms"], row["ratio"], share(row["spread"]))
            for row in results("deploy_nncf")
        ),
    )


def rank_speed() -> str:
    """Times as fast as the dense network, for each plan and runtime."""
    rows = results("rank_speed")
    return table(
        ("plan", "runtime", "dense, ms", "ranks, ms", "speed", "layers in two parts"),
        (
            (row["plan"], row["way"], row["dense_ms"], row["median_ms"], row["ratio"], row["split_layers"])
            for row in rows
        ),
    )


def tasks() -> str:
    """The metric of each task, the bytes of the file, and the time, for each way to make a network smaller."""
    return table(
        ("task", "way", "metric", "value", "95 %", "bytes", "ms"),
        (
            (
                row["task"].replace("_", " "), row["way"], row["metric"], row["value"],
                f"{row['low']} to {row['high']}", f"{int(row['bytes']):,}", row["ms"],
            )
            for row in results("tasks")
        ),
    )  # fmt: skip


TABLES: dict[str, Callable[[], str]] = {
    **{
        f"coding-{network}": (lambda network=network: coding(network))  # type: ignore[misc]
        for network in ("resnet_mnist5k", "wrn16_4_mnist5k", "super_resolution", "efficientnet_lite0")
    },
    **{
        f"deployment-{network}": (lambda network=network: deployment(network))  # type: ignore[misc]
        for network in (
            "efficientnet_lite0",
            "resnet_mnist5k",
            "resnet18",
            "resnet50",
            "wrn28_10",
            "mobilenetv2_100",
            "vgg16_bn",
        )
    },
    "deployment-exact": deployment_exact,
    "deployment-ways": deployment_ways,
    "deployment-nncf": deployment_nncf,
    "deployment-cuts": deployment_cuts,
    "rank-speed": rank_speed,
    "tasks": tasks,
}


def updated(text: str) -> str:
    """Return the text of a page with its tables made again."""
    return BLOCK.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", text)


def main() -> int:
    stale = [page for page in PAGES if updated(page.read_text()) != page.read_text()]
    for page in stale:
        print(f"{page.relative_to(ROOT)} {'is not what the results say' if '--check' in sys.argv else 'updated'}")
        if "--check" not in sys.argv:
            page.write_text(updated(page.read_text()))
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
