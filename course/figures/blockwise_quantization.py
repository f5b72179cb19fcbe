"""Figures of unit 03: one block under three scales, what bits buy, and the map of 4-bit formats."""

from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from course.claims import blockwise_quantization as claims
from course.claims import four_bit_formats
from course.figures import Figure
from course.lab import plotting
from reference.blockwise import int_codebook, relative_rmse

SIZES = (8, 16, 32, 64, 128, 256, 1024, 4096)
LEVELS = ("INT3", "INT4", "INT5")
MARKS = ("o-", "s--", "^-.")
MATRIX = "layers.3.mlp.down_proj"
OF = {"normal": "normal numbers", "tiny": "the tiny model's linears", MATRIX: "one of its matrices, with outliers"}


def draw_comb(axes: plt.Axes, weights: Tensor, absmax: float, label: str) -> None:
    """INT4's levels under a scale as lines, and the weights that have to take one of them as dots."""
    levels = int_codebook(4) * absmax
    nearest = levels[(weights[:, None] - levels).abs().argmin(1)]
    axes.vlines(levels, -1, 1, color=plotting.ORANGE, linewidth=1.4)
    axes.plot(weights, torch.zeros(len(weights)), "o", markersize=4.5, alpha=0.6, color=plotting.BLUE)
    used, error = len(nearest.unique()), 100 * relative_rmse(weights, nearest)
    axes.set_title(f"{label}: {used} level{'s' * (used > 1)} in use, relative error {error:.0f} %")
    axes.set(yticks=[], ylim=(-1, 1))
    axes.grid(False)
    axes.spines["left"].set_visible(False)


def combs(weights: Tensor, outliers: list[float]) -> plt.Figure:
    """The notebook's: ``weights``, in standard deviations, under the scale that each of ``outliers`` sets."""
    figure, panels = plt.subplots(len(outliers), 1, figsize=(8, 0.6 + 0.95 * len(outliers)), sharex=True, squeeze=False)
    for axes, size in zip(panels[:, 0], outliers, strict=True):
        draw_comb(axes, weights, size, f"an outlier of {size:g}σ")
    panels[-1, 0].set(xlabel="weight, standard deviations", xlim=(-4, 4))
    return figure


def levels_data() -> dict[str, Any]:
    """A block in the middle of the matrix: of the row with the median absmax, the block with the median one."""
    matrix = claims.data(MATRIX)
    row = matrix[matrix.abs().amax(1).median(0).indices]
    blocks = row.view(-1, 64)
    block = blocks[blocks.abs().amax(1).median(0).indices]
    scales = {"tensor": matrix, "row": row, "block of 64": block}
    return {"weights": block.tolist(), "absmax": {name: x.abs().max().item() for name, x in scales.items()}}


def levels(data: dict[str, Any]) -> plt.Figure:
    weights = torch.tensor(data["weights"])
    figure, panels = plt.subplots(3, 1, figsize=(7.4, 3.7), sharex=True)
    for axes, (name, absmax) in zip(panels, data["absmax"].items(), strict=True):
        draw_comb(axes, weights, absmax, f"one scale per {name}")
    limit = 1.08 * data["absmax"]["row"]
    panels[-1].set(xlabel="weight", xlim=(-limit, limit))
    return figure


def price_data() -> dict[str, Any]:
    """(bits per weight, relative error in %) by levels, for blocks from 8 to 4096, of the tiny model's weights."""
    return {name: [(claims.bits(name, size), claims.error_percent("tiny", name, size)) for size in SIZES] for name in LEVELS}


def price(data: dict[str, Any]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(7.4, 4.3))
    points = [point for line in data.values() for point in line]
    best = [(bits, error) for bits, error in points if all(e >= error for b, e in points if b <= bits)]
    for (name, line), mark in zip(data.items(), MARKS, strict=True):
        axes.plot(*zip(*line, strict=True), mark, markersize=4, label=name)
    axes.plot(*zip(*best, strict=True), "o", color=plotting.BLACK, markersize=9, fillstyle="none", label="nothing cheaper is better")
    for size in (4096, 256, 64, 32, 16, 8):
        axes.annotate(str(size), data["INT4"][SIZES.index(size)], (3, 7), textcoords="offset points", fontsize=9)
    axes.set(yscale="log", xlabel="bits per weight: codes and float32 scales", ylabel="relative error, %", xlim=(2.9, 9.2), ylim=(3, 70))
    ticks = [3, 5, 10, 20, 50]
    axes.set_yticks(ticks, ticks)
    axes.minorticks_off()
    axes.legend(loc="upper right")
    return figure


def formats_data() -> dict[str, Any]:
    """Format -> its bits per weight, and its relative error in % on each of ``OF``."""
    known = [name for name, each in four_bit_formats.FORMATS.items() if each.restored]
    return {name: {"bits": four_bit_formats.bits(name)} | {of: four_bit_formats.error_percent(name, of) for of in OF} for name in known}


def formats(data: dict[str, Any]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(7.4, 4.2))
    order = sorted(data, key=lambda name: data[name]["tiny"])
    for place, name in enumerate(order):
        errors = [data[name][of] for of in OF]
        axes.plot([min(errors), max(errors)], [place, place], color="#BDBDBD", linewidth=1.5, zorder=1)
    for (of, label), mark, colour in zip(OF.items(), "osD", (plotting.SKY, plotting.BLUE, plotting.RED), strict=True):
        axes.plot([data[name][of] for name in order], range(len(order)), mark, markersize=6, color=colour, label=label)
    axes.set_yticks(range(len(order)), [f"{name}, {data[name]['bits']:.2f} bits" for name in order])
    axes.invert_yaxis()
    axes.set(xlabel="relative error, %", xlim=(6.5, 18))
    axes.legend(loc="upper right")
    return figure


FIGURES = [
    Figure("block_levels", "lessons/03_blockwise_quantization.md", levels_data, levels),
    Figure("bits_to_spend", "lessons/03_blockwise_quantization.md", price_data, price),
    Figure("four_bit_formats", "lessons/appendix/03_blockwise_quantization.md", formats_data, formats),
]
