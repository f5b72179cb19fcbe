"""Figures of unit 00: what fills the GPU, when in a step, and how the cost grows.

Bars are predicted by :func:`reference.memory.training_memory`, marks are recorded peaks.
"""

import dataclasses

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D

from course.figures import Figure
from course.lab import plotting, recorded
from reference.memory import RECIPES, SHAPES, activations, training_memory
from reference.memory.activations import Run
from reference.memory.recipes import QLORA
from reference.model_shapes import ModelShape

ADAM, GRADIENTS = ("optimizer states", "master weights", "step buffer"), ("gradients",)
ADAPTERS = ("adapter weights", "adapter gradients", "adapter states")
PASSING = {
    "activations, temporaries": ("activations", "recomputed layer", "temporaries", "scores' gradients"),
    "loss": ("log-probabilities", "loss gradients"),
}
# label -> kinds of tensors in a breakdown, from the bottom of a bar; adapters alone would be too thin to see
OF_RECIPES = {"weights": ("weights",), "gradients, Adam, adapters": GRADIENTS + ADAM + ADAPTERS} | PASSING
OF_MOMENTS = {"weights": ("weights",), "Adam's averages, master copy": ADAM, "gradients": GRADIENTS} | PASSING
COLOURS = {
    "weights": plotting.BLUE,
    "gradients, Adam, adapters": plotting.SKY,
    "Adam's averages, master copy": plotting.SKY,
    "gradients": plotting.GREEN,
    "activations, temporaries": plotting.ORANGE,
    "loss": plotting.RED,
}
CARDS = {"h100": "H100", "h200": "H200"}
MODEL, STEPS = "Llama-3.2-1B", {"512 tokens": (1, 512), "8,192 tokens": (4, 2048)}


def parts_gb(there: dict[str, int], parts: dict[str, tuple[str, ...]] = OF_RECIPES) -> dict[str, float]:
    """What is there at a moment, in GB, by the labels of ``parts``."""
    return {label: sum(there.get(kind, 0) for kind in kinds) / 1e9 for label, kinds in parts.items()}


def stacks(axes: plt.Axes, names: list[str], bars: list[dict[str, float]]) -> np.ndarray:
    """A bar for each of ``names``, made of what :func:`parts_gb` gives; returns their heights."""
    parts = {label: [bar[label] for bar in bars] for label in bars[0]}
    return plotting.stacked(axes, names, parts, colours=[COLOURS[label] for label in parts], width=0.62)


def recipes_at_their_peak(axes: plt.Axes, shape: ModelShape, **settings) -> None:
    """Six recipes at the fullest moment of a step; ``settings`` are those of ``training_memory``."""
    names = [name for name in RECIPES if name != "LoRA, peft's layer"]
    budgets = [training_memory(shape, RECIPES[name], **settings) for name in names]
    labels = [name.replace("mixed precision", "mixed").replace(" ", "\n") for name in names]
    heights = stacks(axes, labels, [parts_gb(budget.moments[budget.moment]) for budget in budgets])
    for card in (24, 80):
        if card < heights.max():
            axes.axhline(card, color=plotting.BLACK, linestyle=":", linewidth=1)
            axes.text(len(names) + 0.35, card, f"{card} GB", va="bottom", ha="right", fontsize=9)
    axes.set_xlim(-0.6, len(names) + 0.4)  # room for the cards' names beside the bars
    tokens = settings["batch"] * settings["sequence"]
    axes.set_title(f"{shape.name}, {tokens:,} tokens{', checkpointing' * settings['checkpointing']}")
    axes.tick_params(axis="x", labelsize=8.5)
    axes.grid(axis="x", visible=False)


def layer_kb(shape: ModelShape, run: Run) -> dict[str, float]:
    """What one layer keeps, in kB per token."""
    groups = {
        "norms": ("norm",),
        "attention": ("q, k, v", "quer", "softmax", "attention"),
        "MLP": ("gate", "down"),
        "copies of inputs": ("copies",),
    }
    kept = activations.layer(shape, run)
    return {
        part: sum(count for group, count in kept.items() if any(word in group for word in words)) / run.tokens / 1e3
        for part, words in groups.items()
    }


def marks(axes: plt.Axes, places: list[float], measured: list[dict[str, float]]) -> None:
    """Measured peaks, a mark for each card: they lie on each other."""
    for card, symbol, size in (("h100", "_", 22), ("h200", "d", 5)):
        heights = [each[card] for each in measured]
        axes.plot(
            places, heights, symbol, color=plotting.BLACK, markersize=size, markeredgewidth=1.6, zorder=5, label=f"measured, {CARDS[card]}"
        )


def legend(figure: plt.Figure) -> None:
    """Below the panels: the parts in the order of the bars, then the marks."""
    known = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    labels = [label for label in COLOURS if label in known] + [label for label in known if label not in COLOURS]
    figure.legend([known[label] for label in labels], labels, loc="outside lower center", ncols=3, fontsize=9)


def step_row(recipe: str, batch: int, sequence: int, device: str) -> dict:
    """The recorded step of ``MODEL`` without checkpointing."""
    where = {"shape": MODEL, "recipe": recipe, "batch": batch, "sequence": sequence, "checkpointing": False}
    return recorded.row("memory_peaks", device, **where, targets=None if RECIPES[recipe].trains_base else "all-linear")


WAYS = {"full": "full mixed precision", "LoRA": "LoRA", "QLoRA": "QLoRA"}


def fullest_data() -> dict[str, dict]:
    """Tokens -> way to train -> what is there at the fullest moment, and the measured peaks."""
    found = {}
    for tokens, (batch, sequence) in STEPS.items():
        found[tokens] = {}
        for way, recipe in WAYS.items():
            budget = training_memory(SHAPES[MODEL], RECIPES[recipe], batch, sequence)
            measured = {card: step_row(recipe, batch, sequence, card)["measured"] / 1e9 for card in CARDS}
            found[tokens][way] = {"parts": parts_gb(budget.moments[budget.moment]), "measured": measured}
    return found


def fullest(data: dict[str, dict]) -> plt.Figure:
    figure, both = plt.subplots(1, 2, figsize=(8, 4.4), sharey=True)
    for axes, (tokens, ways) in zip(both, data.items(), strict=True):
        heights = stacks(axes, list(ways), [way["parts"] for way in ways.values()])
        marks(axes, range(len(ways)), [way["measured"] for way in ways.values()])
        for place, height in enumerate(heights):
            axes.text(
                place,
                height + 1.2,
                f"{height:.1f} GB",
                ha="center",
                fontsize=9.5,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
            )
        axes.axhline(24, color=plotting.BLACK, linestyle=":", linewidth=1)
        axes.set(title=f"{tokens} in a step", ylim=(0, 49))
        axes.grid(axis="x", visible=False)
    both[0].set_ylabel("memory at the fullest moment, GB")
    both[0].text(2.4, 24.5, "a 24 GB card", ha="right", fontsize=9)
    legend(figure)
    return figure


def moments_data() -> dict[str, list[dict]]:
    """Tokens -> the moments of a step of full fine-tuning in order of time: what is there, and what was measured, where it was."""
    found, recipe = {}, WAYS["full"]
    for tokens, (batch, sequence) in STEPS.items():
        budget = training_memory(SHAPES[MODEL], RECIPES[recipe], batch, sequence)
        rows = {card: step_row(recipe, batch, sequence, card) for card in CARDS}
        between = {kind: line.bytes for kind, line in budget.lines.items() if kind in ("weights", "optimizer states", "master weights")}
        kept = {kind: budget[kind] for kind in ("activations", "log-probabilities")}
        back = ("at the loss", "embedding back")
        highest = max(back, key=lambda moment: sum(budget.moments[moment].values()))
        steps = {
            "between\nsteps": (between, [row["measured_held"] for row in rows.values()]),
            "forward\ndone": (between | kept, [row["measured_after_forward"] for row in rows.values()]),
        }
        for label, moment in zip(("at the\nloss", "end of\nbackward"), back, strict=True):  # measured is their maximum
            measured = [row["measured_peaks"]["backward"] for row in rows.values()] if moment == highest else []
            steps[label] = budget.moments[moment], measured
        steps["optimizer's\nstep"] = budget.moments["optimizer's step"], [row["measured_peaks"]["step"] for row in rows.values()]
        found[tokens] = [
            {
                "moment": label,
                "parts": parts_gb(there, OF_MOMENTS),
                "measured": dict(zip(CARDS, (each / 1e9 for each in measured), strict=False)),
            }
            for label, (there, measured) in steps.items()
        ]
    return found


def moments(data: dict[str, list[dict]]) -> plt.Figure:
    figure, both = plt.subplots(1, 2, figsize=(8, 4.4), sharey=True)
    for axes, (tokens, steps) in zip(both, data.items(), strict=True):
        heights = stacks(axes, [step["moment"] for step in steps], [step["parts"] for step in steps])
        seen = [place for place, step in enumerate(steps) if step["measured"]]
        marks(axes, seen, [steps[place]["measured"] for place in seen])
        top = int(np.argmax(heights))
        axes.annotate(
            "peak", (top, heights[top] + 0.6), (top, heights[top] + 3.6), ha="center", fontsize=9, arrowprops={"arrowstyle": "->"}
        )
        axes.set(title=f"{tokens} in a step", ylim=(0, 52))
        axes.tick_params(axis="x", labelsize=8.5)
        axes.grid(axis="x", visible=False)
    both[0].set_ylabel("memory, GB")
    legend(figure)
    return figure


@dataclasses.dataclass(frozen=True)
class Point:
    """A measured step of one row of tokens."""

    shape: str
    tokens: int
    rank: int
    checkpointing: bool
    attention: str
    peak: int
    gpu: bool


def points(entries: dict[str, dict]) -> list[Point]:
    """All steps in ``entries`` that failed in nothing, the GPU's first."""
    found = []
    for name, entry in entries.items():
        for row in entry["result"]["rows"]:
            if "error" not in row:
                setting = (row[key] for key in ("shape", "sequence", "rank", "checkpointing", "attention", "peak"))
                found.append(Point(*setting, name == "growth on a GPU"))
    return found


def shapes(entries: dict[str, dict]) -> dict[str, ModelShape]:
    """Every measured shape by its name."""
    return {name: ModelShape(**sizes) for entry in entries.values() for name, sizes in entry["result"]["shapes"].items()}


SETTINGS = {  # (checkpointing, attention) -> (label, colour, dashes)
    (True, "fused"): ("checkpointing", plotting.BLUE, "-"),
    (False, "fused"): ("no checkpointing", plotting.RED, "--"),
    (False, "math"): ("no checkpointing, attention stores its scores", plotting.PINK, ":"),
}
MARKERS = {True: {"markersize": 7.5}, False: {"markersize": 4}}  # on a GPU?
LENGTHS, RANKS, WORDS = [2**i for i in range(7, 14)], [2**i for i in range(2, 9)], 32_000


def mark(axes: plt.Axes, x: float, point: Point, colour: str) -> None:
    """A measured point: a square for the GPU, and for the CPU a smaller disc, so that both are seen where they meet."""
    axes.plot(x, point.peak / 1e9, "s" if point.gpu else "o", **MARKERS[point.gpu], color=colour, markeredgecolor="white", zorder=3)


def peak_gb(shape: ModelShape, **settings) -> float:
    return training_memory(shape, QLORA, 1, **settings).peak / 1e9


def short(count: float) -> str:
    """120,773,760 -> "121M"."""
    return f"{count / 1e6:.0f}M" if count < 1e9 else f"{count / 1e9:.0f}B"


def label_of(shape: ModelShape) -> str:
    """What people call it: "70B" for Llama-2-70B, which has 69 billion parameters."""
    last = shape.name.rpartition("-")[2]
    return last if last[:-1].isdigit() and last.endswith("B") else short(shape.parameters)


def draw_sizes(axes: plt.Axes, entries: dict[str, dict]) -> None:
    """One row of 512 tokens, r = 16, checkpointing, from a million parameters to 70 billion."""
    known, labelled = shapes(entries), set()
    measured = [p for p in points(entries) if (p.tokens, p.rank, p.checkpointing, p.attention) == (512, 16, True, "fused")]
    family = sorted({known[p.shape] for p in measured if known[p.shape].vocab == WORDS}, key=lambda shape: shape.parameters)
    sizes = [shape.parameters for shape in family]
    axes.plot(sizes, [peak_gb(shape, sequence=512, checkpointing=True) for shape in family], color=plotting.BLUE)
    axes.plot(sizes, [training_memory(shape, QLORA)["weights"] / 1e9 for shape in family], "-.", color=plotting.BLACK, linewidth=1)
    axes.annotate("weights\nalone", (7e8, 0.13), fontsize=8)
    for p in measured:
        shape = known[p.shape]
        mark(axes, shape.parameters, p, plotting.BLUE)
        if shape not in family:  # another vocabulary: no point of the line
            axes.plot(
                shape.parameters, peak_gb(shape, sequence=512, checkpointing=True), "_", color=plotting.BLACK, markersize=13, zorder=4
            )
        if shape not in labelled:
            labelled.add(shape)
            words = f"{shape.vocab / 1000:.0f}k" if shape.vocab > 1000 else shape.vocab
            text = label_of(shape) + (f"\n{words} words" if shape not in family else "")
            if shape in family:
                where = 1, 5, "right"
            else:  # the tiny model's label has room on its right, the largest vocabulary's on its left, the third's above
                where = (9, -7, "left") if shape.vocab < 1000 else (-10, -7, "right") if shape.vocab > 2e5 else (-13, 9, "center")
            place = {"xytext": where[:2], "ha": where[2], "textcoords": "offset points"}
            axes.annotate(text, (shape.parameters, p.peak / 1e9), **place, fontsize=8, linespacing=1)
    axes.set(xscale="log", yscale="log", xlim=(6e5, 1.4e11), ylim=(0.005, 90), xlabel="parameters", ylabel="peak of a step, GB")
    axes.set_xticks([10**i for i in range(6, 12)], [short(10**i) for i in range(6, 12)])
    axes.set_title("Model size")


def draw_swept(axes: plt.Axes, entries: dict[str, dict], quantity: str) -> None:
    """Two shapes along ``quantity``, "tokens" or "rank", all else as in the panel of sizes."""
    known = shapes(entries)
    values, key = (LENGTHS, "sequence") if quantity == "tokens" else (RANKS, "rank")
    chosen = SETTINGS if quantity == "tokens" else list(SETTINGS)[:1]
    for name in [entry["result"]["swept"] for entry in entries.values()]:
        for checkpointing, attention in chosen:
            _, colour, dashes = SETTINGS[checkpointing, attention]
            start = {"sequence": 512, "rank": 16, "checkpointing": checkpointing, "attention": attention}
            line = [peak_gb(known[name], **start | {key: value}) for value in values]
            axes.plot(values, line, color=colour, linestyle=dashes, linewidth=1.5)
            if checkpointing:
                axes.annotate(label_of(known[name]), (values[0], line[0]), (0, -13), textcoords="offset points", fontsize=8, ha="left")
            for p in points(entries):
                own = (p.shape, p.checkpointing, p.attention) == (name, checkpointing, attention)
                if own and (p.rank == 16 if quantity == "tokens" else p.tokens == 512):
                    mark(axes, getattr(p, quantity), p, colour)
    axes.set_xscale("log", base=2)
    axes.set(yscale="log", ylim=(0.1, 400) if quantity == "tokens" else (0.2, 30))
    axes.set_xticks(values, [f"{value:,}" for value in values], fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel("tokens in a step" if quantity == "tokens" else "rank r, on all linears")
    axes.set_title(quantity.capitalize())


def growth(entries: dict[str, dict]) -> plt.Figure:
    figure, axes = plt.subplots(1, 3, figsize=(11, 4.3))
    draw_sizes(axes[0], entries)
    draw_swept(axes[1], entries, "tokens")
    draw_swept(axes[2], entries, "rank")
    for each in axes:
        each.yaxis.set_major_formatter(lambda gb, _: f"{gb:g}")
    keys = [Line2D([], [], color=colour, linestyle=dashes, label=f"predicted, {label}") for label, colour, dashes in SETTINGS.values()]
    keys.append(Line2D([], [], color=plotting.BLACK, marker="_", linestyle="", markersize=13, label="predicted, another vocabulary"))
    for symbol, gpu, device in (("s", True, entries["growth on a GPU"]["device"]), ("o", False, "CPU")):
        keys.append(Line2D([], [], color="#777777", marker=symbol, linestyle="", **MARKERS[gpu], label=f"measured, {device}"))
    figure.legend(handles=keys, loc="outside lower center", ncols=3, fontsize=9)
    return figure


def growth_data() -> dict[str, dict]:
    return {"growth on a GPU": recorded.load("growth", device="h100"), "growth on a CPU": recorded.load("growth", device="cpu")}


FIGURES = [
    Figure("memory_fullest", "lessons/00_memory_budget.md", fullest_data, fullest),
    Figure("memory_moments", "lessons/00_memory_budget.md", moments_data, moments),
    Figure("growth", "lessons/appendix/00_memory_budget.md", growth_data, growth),
]
