"""Draw the pictures of README and docs/concepts.md from numbers and from benchmarks/results.

python docs/pictures.py          # writes docs/images/*.svg
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from math import cos, pi, sqrt
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "images"
# The same text for the same numbers, and readable on light and dark pages.
STYLE = {
    "svg.hashsalt": "harmconvert", "svg.fonttype": "path", "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "figure.facecolor": "white", "axes.facecolor": "white",
}  # fmt: skip
OURS, OTHERS = "#00796b", ("#c62828", "#1565c0", "#6a1b9a", "#777777")


def results(name: str) -> list[dict[str, str]]:
    """Return the rows of a table in benchmarks/results."""
    with (ROOT / "benchmarks" / "results" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def rate_distortion() -> Figure:
    """Bytes of the file against the agreement with the original, for two networks."""
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.2), layout="constrained")
    rows = results("coding")
    for axis, network in zip(axes, ("efficientnet_lite0", "resnet_mnist5k"), strict=True):
        own = [row for row in rows if row["network"] == network and row["draw"] == "0"]
        for method, colour, marker in (
            ("ours", OURS, "o"), ("NNCodec", OTHERS[0], "s"), ("int8", OTHERS[1], "D"), ("int4", OTHERS[2], "^"),
            ("float16 + zstd", OTHERS[3], "v"),
        ):  # fmt: skip
            found = [row for row in own if row["method"] == method]
            points = sorted((int(row["bytes"]) / 1e6, 100 * float(row["agreement"])) for row in found)
            label = "harmconvert --bits 1 ... 5" if method == "ours" else method
            axis.plot(*zip(*points, strict=True), marker + "-", color=colour, label=label, markersize=5)
        axis.set(title=network, xlabel="bytes of the file, MB", xscale="log", ylim=(0, 103))
        ticks = (0.5, 1, 2, 3, 5, 9) if network == "efficientnet_lite0" else (0.02, 0.05, 0.1, 0.2, 0.5)
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("same top-1 as the original, %")
    axes[1].legend(frameon=False, loc="lower right")
    return figure


def cosine(frequency: int) -> np.ndarray:
    """Return one vector of the orthonormal DCT of three positions."""
    return sqrt((2 if frequency else 1) / 3) * np.array([cos(pi / 3 * (x + 0.5) * frequency) for x in range(3)])


def frequencies() -> Figure:
    """The nine kernels of the DCT of 3x3, with the level of each, and what a lambda keeps."""
    figure, axes = plt.subplots(3, 3, figsize=(4.6, 4.8), layout="constrained")
    for u in range(3):
        for v in range(3):
            waves = [cosine(k) for k in (u, v)]
            kernel = np.outer(*waves)
            axis = axes[u, v]
            axis.imshow(kernel, cmap="RdBu", vmin=-0.7, vmax=0.7)
            axis.set(xticks=[], yticks=[], title=f"({u}, {v}), level {u + v}")
            for side in axis.spines.values():
                side.set(visible=True, color=OURS if u + v < 2 else "#bbbbbb", linewidth=3 if u + v < 2 else 1)
    figure.suptitle("Framed: what lambda 2 keeps (levels 0 and 1)")
    return figure


def calibration() -> Figure:
    """Top-1 after a cut, plain and calibrated, from benchmarks/results/calibration.csv."""
    figure, axis = plt.subplots(figsize=(6.4, 2.8), layout="constrained")
    rows = [row for row in results("calibration") if row["network"] == "resnet_mnist5k"]
    lambdas = ("3", "2", "1")
    for place, (method, images, colour, label) in enumerate(
        (
            ("projection", "128", OTHERS[3], "plain cut"),
            ("convert --calibrate", "128", OURS, "calibrated on 128 images, no labels"),
        )
    ):
        heights = []
        for lam in lambdas:
            found = [
                100 * float(row["top1"]) for row in rows
                if row["lambda"] == lam and row["method"] == method and row["images"] == images
            ]  # fmt: skip
            heights.append(sum(found) / len(found))
        bars = axis.bar(np.arange(3) + 0.36 * place, heights, 0.34, color=colour, label=label)
        axis.bar_label(bars, fmt="%.1f")
    axis.set_xticks(np.arange(3) + 0.18, [f"lambda {lam}" for lam in lambdas])
    axis.set(ylabel="top-1, %", ylim=(0, 135), title="resnet_mnist5k")
    axis.legend(frameon=False, loc="upper center", ncols=2)
    return figure


def _matrix(axis: Axes, place: tuple[float, float], size: tuple[float, float], text: str, colour: str) -> None:
    axis.add_patch(Rectangle(place, *size, facecolor=colour, alpha=0.25, edgecolor=colour))
    axis.text(place[0] + size[0] / 2, place[1] + size[1] / 2, text, ha="center", va="center")


def _blank(size: tuple[float, float], limits: tuple[float, float]) -> tuple[Figure, Axes]:
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    axis.set(xlim=(0, limits[0]), ylim=(0, limits[1]), aspect="equal")
    axis.axis("off")
    return figure, axis


def ranks() -> Figure:
    """A weight as the product of two matrices."""
    figure, axis = _blank((6.4, 2.4), (16, 6))
    _matrix(axis, (0.2, 0.7), (4.5, 4.5), "weight W\n64 x 64\n4,096 values", OTHERS[3])
    axis.text(5.5, 3, "=", fontsize=16, ha="center", va="center")
    _matrix(axis, (6.3, 0.7), (1.6, 4.5), "B\n64 x 16", OURS)
    axis.text(8.5, 3, "x", fontsize=13, ha="center", va="center")
    _matrix(axis, (9.1, 2.1), (4.5, 1.6), "A, 16 x 64", OURS)
    axis.text(9.1, 1.2, "together 2,048 values:\ntwo smaller layers", va="center")
    return figure


def coding() -> Figure:
    """Weights, and the multiples of a step to which they are rounded."""
    figure, axis = plt.subplots(figsize=(6.4, 2.8), layout="constrained")
    weights = np.random.default_rng(0).normal(0, 1, 20000)
    step = 1.2
    counts = np.unique(np.round(weights / step), return_counts=True)
    shares = counts[1] / counts[1].sum()
    entropy = -(shares * np.log2(shares)).sum()
    axis.hist(weights, 120, density=True, color="#bbbbbb", label="weights before")
    axis.bar(counts[0] * step, shares, 0.14, color=OURS, label="share of each integer")
    for place, number in zip(counts[0] * step, counts[0], strict=True):
        axis.text(place, -0.02, f"{number:+.0f}" if number else "0", ha="center", va="top")
    axis.set(xticks=[], yticks=[], ylim=(-0.08, 0.56))
    axis.set_title(f"Rare integers get long codes: {entropy:.2f} bits per weight here")
    axis.legend(frameon=False)
    return figure


def forms() -> Figure:
    """The three forms of a layer."""
    figure, axis = _blank((7.6, 3), (19, 7.4))
    for y, name, boxes in (
        (5.1, "harmonic", ("coefficients x basis,\nmerged at each call", "K x K convolution")),
        (2.7, "dense", ("K x K convolution\nwith the merged kernel",)),
        (0.3, "factored", ("fixed filters,\none per frequency", "1 x 1 convolution\nwith the coefficients")),
    ):
        axis.text(0.1, y + 0.9, name, va="center", weight="bold")
        for place, text in enumerate(boxes):
            _matrix(axis, (3.6 + 6.6 * place, y), (5.6, 1.8), text, OURS)
            if place:
                axis.annotate("", (3.6 + 6.6 * place, y + 0.9), (9.2, y + 0.9), arrowprops={"arrowstyle": "->"})
    for y, use in ((5.1, "training"), (2.7, "any runtime"), (0.3, "speed")):
        axis.text(16.2, y + 0.9, f"for {use}", va="center")
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "rate-distortion": rate_distortion, "frequencies": frequencies, "calibration": calibration, "ranks": ranks,
    "coding": coding, "forms": forms,
}  # fmt: skip


def draw(name: str, folder: Path = FOLDER) -> Path:
    """Draw one picture; return its path."""
    path = folder / f"{name}.svg"
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[Any, Any] = STYLE
    with mpl.rc_context(settings):
        figure = PICTURES[name]()
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
    return path


if __name__ == "__main__":
    mpl.use("Agg")
    for one in PICTURES:
        print(draw(one).relative_to(ROOT))
