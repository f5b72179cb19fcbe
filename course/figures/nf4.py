"""Figures of unit 04: where sixteen levels lie, what their bins hold, and how far their error is from the least."""

import matplotlib.pyplot as plt
import numpy as np

from course.claims import nf4 as claims
from course.figures import Figure
from course.lab import plotting, scaled

COLOURS = {"NF4": plotting.RED, "INT4": plotting.BLUE, "FP4": plotting.GREEN}
BLOCKS = [32, 64, 128, 256, 512, 1024, 2048, 4096]
EVEN = 100 / 16  # percent of the values, if all bins held the same


def levels_data() -> dict:
    """Density of normal values in blocks of 64 after absmax scaling, in 200 strips, the largest of each block left out."""
    inner = scaled.distribution(64)[1][1:-1].reshape(200, -1).sum(1)
    return {"density": (100 * inner).tolist(), "levels": {name: levels.tolist() for name, levels in claims.LEVELS.items()}}


def draw_levels(data: dict) -> plt.Figure:
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(7.4, 3.9), sharex=True, height_ratios=(1.9, 1))
    edges = np.linspace(-1, 1, len(data["density"]) + 1)
    upper.fill_between((edges[1:] + edges[:-1]) / 2, data["density"], color=plotting.SKY, linewidth=0)
    for end, side in ((-1, "left"), (1, "right")):
        upper.annotate("", (end, 0.62), (end, 0), arrowprops={"arrowstyle": "-|>", "color": plotting.BLACK})
        upper.text(end * 0.98, 0.66, "the largest\nof each block", ha=side, fontsize=9)
    upper.set(ylabel="density", ylim=(0, 1.2))
    for height, (name, levels) in enumerate(reversed(data["levels"].items())):
        lower.plot(levels, [height] * len(levels), "|", markersize=17, markeredgewidth=2, color=COLOURS[name])
    lower.set_yticks(range(3), list(reversed(data["levels"])))
    lower.set(xlabel="weight / largest absolute weight of its block", xlim=(-1.04, 1.04), ylim=(-0.6, 2.6))
    for axes in (upper, lower):
        axes.grid(False)
    return figure


def bins_data() -> dict[str, list[float]]:
    return {f"blocks of {block}": (100 * scaled.occupancy(scaled.NF4, block)).tolist() for block in (64, 4096)}


def draw_bins(data: dict[str, list[float]]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(7.4, 3.3))
    for shift, colour, (label, percents) in zip((-0.2, 0.2), (plotting.BLUE, plotting.ORANGE), data.items(), strict=True):
        axes.bar(np.arange(16) + shift, percents, width=0.4, color=colour, label=label)
    axes.axhline(EVEN, color=plotting.BLACK, linestyle="--", linewidth=1.2)
    axes.text(15.5, EVEN + 0.2, "one sixteenth: 6.25 %", ha="right", fontsize=9)
    axes.set(xlabel="code (7 is zero)", ylabel="share of the weights, %", xticks=range(16), xlim=(-0.6, 15.6), ylim=(0, 14))
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper left")
    return figure


LINES = {True: ("the best that keep −1, 0 and 1", "--"), False: ("the best sixteen", "-")}


def minimum_data() -> dict[str, dict]:
    """Percent by which NF4's error is above the least, by kind of error, kept levels and block size; the least is zero to four digits."""
    return {
        measure: {str(kept): [round(claims.above_best(block, measure, kept), 4) for block in BLOCKS] for kept in LINES}
        for measure in ("absolute", "squared")
    }


def draw_minimum(data: dict[str, dict]) -> plt.Figure:
    figure, panels = plt.subplots(1, 2, figsize=(7.8, 3.3), sharey=True)
    for axes, (measure, lines) in zip(panels, data.items(), strict=True):
        for kept, (label, style) in LINES.items():
            axes.plot(BLOCKS, lines[str(kept)], style, marker="o", markersize=4, label=f"above {label}")
        axes.axvline(64, ymax=0.8, color=plotting.BLACK, linestyle=":", linewidth=1)
        axes.set(xlabel="block size", title=f"mean {measure} error", xscale="log", ylim=(0, 27))
        axes.set_xticks(BLOCKS, BLOCKS, fontsize=8)
        axes.minorticks_off()
    panels[0].set_ylabel("NF4's error above the least, %")
    panels[1].text(68, 20.4, "QLoRA's block size", fontsize=9)
    panels[0].legend(loc="upper left", fontsize=9)
    return figure


PAGE = "lessons/04_nf4.md"
FIGURES = [
    Figure("nf4_levels", PAGE, levels_data, draw_levels),
    Figure("nf4_bins", PAGE, bins_data, draw_bins),
    Figure("nf4_minimum", PAGE, minimum_data, draw_minimum),
]
