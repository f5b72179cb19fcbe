"""Figures of unit 02: the two factors to scale, learning rates for ranks and scales, and what is learned against what is forgotten."""

import math
import statistics
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from course.claims.shared import CPU, GPU
from course.figures import Figure
from course.lab import plotting, recorded

SIDE, RANK = 4096, 64
LESSON = "lessons/02_lora.md"


def factors_data() -> dict[str, Any]:
    """Shapes (rows, columns)."""
    return {"W": (SIDE, SIDE), "B": (SIDE, RANK), "A": (RANK, SIDE)}


def factors(shapes: dict[str, Any]) -> plt.Figure:
    """W, and beside it B and A, to one scale."""
    figure, axes = plt.subplots(figsize=(7.2, 3.3))
    side, gap = shapes["W"][0], 700
    left = {"W": 0, "B": side + 3 * gap, "A": side + 3 * gap + shapes["B"][1] + gap}
    for name, (rows, columns) in shapes.items():
        colour = "#BBBBBB" if name == "W" else plotting.BLUE
        axes.add_patch(Rectangle((left[name], side - rows), columns, rows, color=colour, linewidth=0))
    numbers = {name: rows * columns for name, (rows, columns) in shapes.items()}
    axes.text(side / 2, side / 2, f"W, frozen\n{side:,} × {side:,}\n{numbers['W'] / 1e6:.1f} million numbers", ha="center", va="center")
    axes.text(left["A"] - gap / 2, side, "·", ha="center", va="center", fontsize=13)
    axes.text(left["B"] - 1.5 * gap, side / 2, "+  s ·", ha="center", va="center", fontsize=13)
    labels = {name: f"{name}, trained\n{rows:,} × {columns:,}\n{rows * columns:,} numbers" for name, (rows, columns) in shapes.items()}
    axes.text(left["B"] + shapes["B"][1] + gap / 3, side * 0.35, labels["B"], va="center", color=plotting.BLUE)
    axes.text(left["A"] + side / 2, side - shapes["A"][0] - gap / 2, labels["A"], ha="center", va="top", color=plotting.BLUE)
    axes.set(xlim=(-100, left["A"] + side + 100), ylim=(-100, side + 100), aspect="equal")
    axes.set_axis_off()
    return figure


def rates_data() -> dict[str, Any]:
    sweeps = recorded.load("lora_sweeps", CPU)["result"]
    return {name: sweeps[name] for name in ("rank_and_rate", "alpha_and_rate")}


def draw_grid(axes: plt.Axes, grid: dict[str, Any]) -> None:
    """Scale against learning rate; the best rate of each scale in bold."""
    means = [[statistics.fmean(seeds) for seeds in row] for row in grid["scores"]]
    axes.imshow(
        [[math.log10(max(mean, 0.1)) for mean in row] for row in means], origin="lower", cmap=plotting.SEQUENTIAL + "_r", aspect="auto"
    )
    for i, row in enumerate(means):
        for j, mean in enumerate(row):
            weight, colour = "bold" if mean == min(row) else "normal", "white" if mean > 1 else "black"
            axes.text(j, i, f"{mean:.2f}", ha="center", va="center", weight=weight, color=colour, fontsize=8)
            if mean == min(row):
                axes.add_patch(Rectangle((j - 0.48, i - 0.46), 0.96, 0.92, fill=False, color=plotting.RED, linewidth=1.8))
    axes.set_xticks(range(len(grid["rates"])), [f"{rate:g}" for rate in grid["rates"]], fontsize=8, rotation=45)
    axes.set_yticks(range(len(grid["scales"])), [f"{scale:g}" for scale in grid["scales"]])
    axes.set(xlabel="learning rate of both factors", ylabel="scale α/r")
    axes.grid(False)


def draw_ranks(axes: plt.Axes, sweep: dict[str, Any]) -> None:
    """A curve over learning rates for each rank, at one α; a dot at each best rate."""
    for (r, scores), style in zip(sweep["scores"].items(), ("-", "--", "-.", ":"), strict=True):
        means = [statistics.fmean(seeds) for seeds in scores]
        plotting.with_spread(axes, sweep["rates"], list(zip(*scores, strict=True)), f"r = {r}", linestyle=style)
        best = means.index(min(means))
        axes.plot(sweep["rates"][best], means[best], "o", color=axes.lines[-1].get_color(), markersize=6)
    axes.set(xscale="log", yscale="log", xlabel="learning rate of both factors", ylabel="nats per token above the floor")
    axes.set_xticks(sweep["rates"], [f"{rate:g}" for rate in sweep["rates"]], fontsize=8)
    axes.set_yticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
    axes.minorticks_off()
    axes.legend()


def rates(data: dict[str, Any]) -> plt.Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.9), width_ratios=(5, 4.4))
    draw_grid(left, data["alpha_and_rate"])
    left.set_title("Scale against learning rate, r = 8")
    draw_ranks(right, data["rank_and_rate"])
    right.set_title("Rank against learning rate, α = 16")
    return figure


SHOWN = {  # configuration of the record -> (what a reader calls it, colour, marker)
    "full fine-tuning": ("full fine-tuning", plotting.RED, "s"),
    "all-linear r=1": ("LoRA, r = 1", plotting.SKY, "o"),
    "all-linear r=4": ("LoRA, r = 4", plotting.GREEN, "^"),
    "all-linear r=16": ("LoRA, r = 16", plotting.ORANGE, "D"),
    "all-linear r=64": ("LoRA, r = 64", plotting.BLUE, "v"),
}


def forgetting_data() -> dict[str, Any]:
    """Configuration -> learning rate -> [learned, forgotten] of every seed; and which rate was chosen."""
    result = recorded.load("gemma_lora", GPU)["result"]
    points: dict[str, Any] = {config: {} for config in SHOWN}
    for run in result["runs"]:
        if run["config"] in points and "measures" in run:
            learned = result["base"]["code"] - run["measures"]["code"]
            forgotten = run["measures"]["passages"] - result["base"]["passages"]
            points[run["config"]].setdefault(f"{run['lr']:g}", []).append([learned, forgotten])
    return {"points": points, "chosen": {config: result["chosen_lr"][config] for config in SHOWN}}


LEAST = 0.1  # learned; what learned less is not drawn


def draw_forgetting(axes: plt.Axes, data: dict[str, Any]) -> None:
    """A line a configuration through its learning rates, slowest first; the chosen rate is filled."""
    for config, by_rate in data["points"].items():
        _, colour, marker = SHOWN[config]
        line = []
        for rate in sorted(by_rate, key=float):
            x, y = (statistics.fmean(values) for values in zip(*by_rate[rate], strict=True))
            if x < LEAST:
                continue
            side = (-8, -3, "right") if config.endswith("r=16") else (8, -3, "left")
            axes.annotate(power(rate), (x, y), side[:2], ha=side[2], textcoords="offset points", fontsize=8, color="#444444")
            line.append((x, y))
            chosen = float(rate) == data["chosen"][config]
            axes.plot(x, y, marker, color=colour, markersize=8 if chosen else 5, markerfacecolor=colour if chosen else "white", zorder=3)
        axes.plot(*zip(*line, strict=True), color=colour, linewidth=1.2, alpha=0.7)
    axes.axhline(0, color=plotting.BLACK, linewidth=0.8)
    axes.set(xlabel="learned: fall of the loss on held-out code (nats per token)")
    axes.set_ylabel("forgotten: rise of the loss on prose\n(nats per token)")
    keys = [Line2D([], [], color=colour, marker=marker, linewidth=1.2, label=label) for label, colour, marker in SHOWN.values()]
    axes.legend(handles=keys, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.margins(0.09)


def power(rate: str) -> str:
    """ "3e-05" as people write it."""
    digit, _, exponent = f"{float(rate):.0e}".partition("e-")
    return f"{digit}·10$^{{-{int(exponent)}}}$"


def forgetting(data: dict[str, Any]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(7.2, 4.2))
    draw_forgetting(axes, data)
    return figure


FIGURES = [
    Figure("lora_factors", LESSON, factors_data, factors),
    Figure("lora_rates", LESSON, rates_data, rates),
    Figure("lora_forgetting", LESSON, forgetting_data, forgetting),
]
