"""Figure 3: how strongly each layer uses each frequency."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.figure import Figure

from ....errors import counted
from ...figures.canvas import COLOURS, PALE, VERMILION, canvas, label, share_bar
from ...grid import edges
from ...text import layer_name, size_text
from ..spectrum import LayerSpectrum, Spectrum

MAX_HEIGHT = 40.0  # inches: in a higher figure, rows get thinner instead


def draw_spectrum(spectrum: Spectrum) -> Figure:
    """Draw a heat map for each kernel size, with a row for each layer and a column for each frequency."""
    panels = spectrum.panels
    row_height = min(0.2, MAX_HEIGHT / len(spectrum.layers))
    widest = max(len(layers[0].frequencies) for layers in panels.values())
    heights = [max(0.25, row_height * len(layers)) for layers in panels.values()]
    width = min(12.0, max(6.5, 2.5 + 0.16 * widest))
    figure = canvas(width, sum(heights) + 1.1 * len(panels) + 0.8)
    figure.set_layout_engine("constrained", h_pad=0.1)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, height, (size, layers) in zip(axes, heights, panels.items(), strict=True):
        mesh = _panel(ax, size, layers)
        _layer_names(ax, [layer_name(layer.name) for layer in layers], height / len(layers))
        _frequency_names(ax, layers[0], width)
    share_bar(figure, list(axes), "mean |coefficient| of each DCT frequency, relative to the layer's largest", mesh)
    return figure


def _panel(ax: Axes, size: tuple[int, ...], layers: Sequence[LayerSpectrum]) -> QuadMesh:
    """Draw the heat map of one kernel size; white lines separate levels, coloured lines enclose the cut frequencies."""
    count = len(layers[0].frequencies)
    percent = [
        [100 * value if kept else float("nan") for value, kept in zip(layer.relative, layer.kept, strict=True)]
        for layer in layers
    ]
    ax.set_facecolor(PALE)
    mesh = ax.pcolormesh(percent, cmap=COLOURS, vmin=0, vmax=100, linewidth=0, rasterized=count * len(layers) > 20000)
    ax.set(xlim=(0, count), ylim=(len(layers), 0))
    ax.set_title(f"{size_text(size)}, {len(layers)} layer{'s' * (len(layers) > 1)}")
    ax.vlines(_level_starts(layers[0])[1:], 0, len(layers), colors="white", linewidth=1.0)
    ax.add_collection(LineCollection(edges([layer.kept for layer in layers]), colors=[VERMILION], linewidths=1.8))
    return mesh


def _level_starts(layer: LayerSpectrum) -> list[int]:
    """Return the indices of the frequencies at which a new level begins."""
    levels = layer.levels
    return [index for index in range(len(levels)) if index == 0 or levels[index] != levels[index - 1]]


def _layer_names(ax: Axes, names: Sequence[str], row_height: float) -> None:
    size = min(8.0, 72 * row_height * 0.85)
    step = 1
    while size * step < 4.5:  # smaller letters cannot be read: write every second name, every third, ...
        step += 1
    rows = range(0, len(names), step)
    ax.set_yticks([row + 0.5 for row in rows], [label(names[row]) for row in rows])
    ax.tick_params(axis="y", length=0, labelsize=max(size, 4.5))


def _frequency_names(ax: Axes, layer: LayerSpectrum, width: float) -> None:
    """Write the indices below each column if there is room for them, and the levels above."""
    frequencies, starts = layer.frequencies, _level_starts(layer)
    count = len(frequencies)
    room = 72 * (width - 2.8) / count
    if room >= 6:
        labels = [",".join(map(str, frequency)) for frequency in frequencies]
        ax.set_xticks([index + 0.5 for index in range(count)], labels)
        rotate = room < 5 + 5 * max(map(len, labels))
        ax.tick_params(axis="x", length=0, labelsize=min(8.0, room * 0.8), labelrotation=90 if rotate else 0)
        ax.set_xlabel("frequency (indices along the kernel's axes)" if len(frequencies[0]) > 1 else "frequency")
    else:
        ax.set_xticks([])
        ax.set_xlabel(f"{counted(count, 'frequency')}, by level")
    middles = [(first + last) / 2 for first, last in zip(starts, (*starts[1:], count), strict=True)]
    levels: list[int] = []
    for level, middle in enumerate(middles):
        if not levels or (middle - middles[levels[-1]]) * room >= 12:  # a number is 12 points wide
            levels.append(level)
    above = ax.secondary_xaxis("top")
    above.set_xticks([middles[index] for index in levels], map(str, levels))
    above.tick_params(length=0, labelsize=8.0)
    above.set_xlabel("level (λ keeps the levels below λ)")
    above.spines[:].set_visible(False)
