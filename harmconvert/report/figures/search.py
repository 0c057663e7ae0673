"""Every plan that a budget search saw: divergence against size."""

from __future__ import annotations

from matplotlib.figure import Figure

from ...budget import Search
from .canvas import BLUE, GREY, PALE, VERMILION, canvas


def draw_search(found: Search) -> Figure:
    """The best scores of every size as a line, the plans tried on the network as points, the one taken ringed."""
    figure = canvas(6.8, 4.2)
    figure.set_layout_engine("constrained", h_pad=0.1)
    axes = figure.subplots()
    shares = [100 * cost / found.whole for cost, _ in found.frontier]
    what = "divergence" if found.scored_by == "divergence" else "energy cut"
    axes.plot(shares, [score for _, score in found.frontier], color=GREY, linewidth=1.0, label=f"{what}, layers summed")
    tried = [(plan, plan.measured) for plan in found.tried if plan.measured is not None]
    for uniform, colour, marker, name in (
        (True, BLUE, "o", "uniform and progressive, tried"),
        (False, VERMILION, "s", "searched, tried"),
    ):
        if plans := [(plan, seen) for plan, seen in tried if plan.origin.startswith("lambda") == uniform]:
            axes.plot(
                [100 * plan.cost / found.whole for plan, _ in plans], [seen for _, seen in plans], marker,
                color=colour, markersize=5, label=name,
            )  # fmt: skip
    if found.best.measured is not None:
        place = 100 * found.best.cost / found.whole, found.best.measured
        axes.plot(*place, "o", markersize=12, markerfacecolor="none", markeredgecolor=VERMILION, label="taken")
    axes.axvline(100 * found.limit / found.whole, color=PALE, linewidth=4.0, zorder=0, label=found.budget)
    values = [score for _, score in found.frontier] + [seen for _, seen in tried]
    positive = [value for value in values if value > 0]
    if positive:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
        axes.set_ylim(min(positive) / 2, max(positive) * 2)
    axes.set_xlabel(f"{found.unit}, % of the uncut network's")
    axes.set_ylabel("KL from the uncut network, nats" if found.scored_by == "divergence" else "energy cut")
    axes.grid(axis="y", color=PALE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(loc="best")
    return figure
