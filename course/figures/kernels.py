"""Figures of the appendix on kernels: the table that replaces comparisons, and the NF4 layer's time over the rows of its input."""

import matplotlib.pyplot as plt
import torch

from course.figures import Figure
from course.lab import plotting, recorded
from reference.blockwise import midpoints
from reference.nf4 import NF4_CODEBOOK

PAGE = "lessons/appendix/06_kernels.md"
CARDS = {"H100": "h100", "H200": "h200"}
WHO = {
    "ours": ("NF4, here", plotting.BLUE, "o-"),
    "bitsandbytes": ("NF4, bitsandbytes", plotting.ORANGE, "s--"),
    "floor": ("the least for NF4", plotting.BLACK, ":"),
}


def cells_data() -> dict[str, list[float]]:
    """Edges of 32 equal cells, and the midpoints between NF4's levels."""
    edges = (torch.arange(33) - 16.5) / 15
    return {"edges": edges.tolist(), "midpoints": midpoints(NF4_CODEBOOK).tolist()}


def cells(data: dict[str, list[float]]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(8.4, 1.5))
    axes.vlines(data["edges"], 0, 1, color="#999999", lw=1, label="edge of a cell")
    axes.vlines(data["midpoints"], 0.1, 0.9, color=plotting.RED, lw=2.5, label="midpoint between two levels")
    axes.set(xlabel="weight / absmax of its block", yticks=[], xlim=(-1.12, 1.12))
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    figure.legend(loc="outside upper right", ncols=2, fontsize=9)
    return figure


def rows_data() -> dict[str, list]:
    """Card -> rows of x, and each time over that of bf16 weights."""
    found = {}
    for card, device in CARDS.items():
        rows = [row for row in recorded.load("nf4_kernels", device)["result"]["rows"] if row["work"] == "linear"]
        found[card] = {"rows": [row["rows"] for row in rows]} | {who: [row[who] / row["bf16 weights"] for row in rows] for who in WHO}
    return found


def rows(data: dict[str, dict]) -> plt.Figure:
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.7), sharey=True)
    for each, (card, times) in zip(axes, data.items(), strict=True):
        for who, (label, colour, style) in WHO.items():
            each.plot(times["rows"], times[who], style, color=colour, markersize=4, label=label)
        each.axhline(1, color="#777777", lw=1.2, label="bf16 weights")
        each.set(xlabel="rows of x", title=card, xscale="log")
        each.set_xticks([1, 8, 64, 512, 8192], ["1", "8", "64", "512", "8,192"])
        each.minorticks_off()
    axes[0].set_ylim(0)
    axes[0].set_ylabel("time / time with bf16 weights")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    return figure


FIGURES = [Figure("nf4_cells", PAGE, cells_data, cells), Figure("nf4_rows", PAGE, rows_data, rows)]
