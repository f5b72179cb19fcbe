"""Figures of unit 00: how cost grows."""

import dataclasses

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from course.figures import Figure
from course.lab import plotting, recorded
from reference.memory import training_memory
from reference.memory.recipes import QLORA
from reference.model_shapes import ModelShape


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


FIGURES = [Figure("growth", "lessons/00_memory_budget.md", growth_data, growth)]
