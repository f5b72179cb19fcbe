"""Figures of unit 06: where the bytes of a step go, what formats cost a real model, what LoRA wins back, errors of three merges."""

import math

import matplotlib.pyplot as plt

from course.claims.qlora import merge_error
from course.figures import Figure
from course.lab import plotting, recorded

PAGE = "lessons/06_qlora.md"
HOWS = {"LoRA": "LoRA", "QLoRA": "QLoRA", "QLoRA, peft + bitsandbytes, prepared": "QLoRA,\nrest cast to\nfloat32"}
STEPS = {
    "Llama-2-7B, 4 × 512 tokens": ("Llama-2-7B", 4, 512),
    "Gemma 3 270M's sizes, 1 × 128 tokens": ("Llama with Gemma-3-270M's sizes", 1, 128),
}
WAYS = {
    "original": ("into the original weight", plotting.RED, "-."),
    "requantized": ("requantized", plotting.ORANGE, "--"),
    "dequantized": ("into the decoded weight, bfloat16", plotting.BLUE, "-"),
}


def memory_data() -> dict[str, dict]:
    """Step -> way -> GB of each part. Adam's moments are two numbers for each of an adapter's."""
    found = {}
    for title, (shape, batch, sequence) in STEPS.items():
        found[title] = {}
        for how, label in HOWS.items():
            row = recorded.row("qlora_memory", "h100", how=how, shape=shape, batch=batch, sequence=sequence)
            adapters = (row["held"] - row["built"]) / 2
            parts = {
                "frozen weights": row["built"] - adapters,
                "adapters, Adam's moments": 3 * adapters,
                "what comes and goes in a step": row["peak"] - row["held"],
            }
            found[title][label] = {part: count / 1e9 for part, count in parts.items()}
    return found


def memory(data: dict[str, dict]) -> plt.Figure:
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.7))
    for each, (title, bars) in zip(axes, data.items(), strict=True):
        parts = {part: [bar[part] for bar in bars.values()] for part in next(iter(bars.values()))}
        totals = plotting.stacked(each, list(bars), parts, width=0.62)
        for i, total in enumerate(totals):
            each.annotate(f"{total:.1f}" if total > 3 else f"{total:.2f}", (i, total), (0, 3), textcoords="offset points", ha="center")
        each.set(title=title, ylim=(0, 1.14 * max(totals)))
        each.grid(axis="x", visible=False)
    axes[0].set_ylabel("peak of a training step, GB")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    return figure


def quality_data() -> dict[str, dict]:
    """Text -> format -> what perplexity rises by, in percent: estimate and the ends of its 95 % interval."""
    lost = recorded.load("quantization_quality_gemma", "h100")["result"]["lost"]
    kinds, texts = ("INT8", "NF4", "NF4+DQ", "FP4", "INT4"), {"prose": "passages", "Python code": "code"}
    ends = ("estimate", "low", "high")
    return {
        label: {kind: {end: 100 * math.expm1(lost[kind][text][end]) for end in ends} for kind in kinds} for label, text in texts.items()
    }


def quality(data: dict[str, dict]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(7.2, 3.6))
    for shift, colour, mark, (label, formats) in zip((-0.12, 0.12), (plotting.BLUE, plotting.ORANGE), "os", data.items(), strict=True):
        estimates = [each["estimate"] for each in formats.values()]
        below = [each["estimate"] - each["low"] for each in formats.values()]
        above = [each["high"] - each["estimate"] for each in formats.values()]
        places = [i + shift for i in range(len(formats))]
        axes.errorbar(places, estimates, [below, above], fmt=mark, color=colour, capsize=3, markersize=5, label=label)
    names = next(iter(data.values()))
    axes.axhline(2, color=plotting.RED, lw=1.2, ls="--", label="tolerance of 2 %")
    axes.set_xticks(range(len(names)), [name.replace("NF4+DQ", "NF4 + double\nquantization") for name in names])
    axes.set(ylabel="rise of perplexity, %", ylim=(-5, 110))
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper left")
    return figure


def won_back_data() -> dict[str, dict]:
    """Text -> format -> gaps to the 16-bit base in nats per token, before LoRA, and after it for each seed."""
    rows = recorded.load("quantization_quality_gemma", "h100")["result"]["won_back"][1:]
    texts = {"Python code, which is trained on": "code", "prose, which is not": "passages"}
    return {label: {row["kind"]: [row[text]["gap_before"], *row[text]["gap_after"]] for row in rows} for label, text in texts.items()}


def won_back(data: dict[str, dict]) -> plt.Figure:
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 3.3), sharey=True)
    for each, (title, gaps) in zip(axes, data.items(), strict=True):
        for i, (before, *after) in enumerate(gaps.values()):
            each.plot(i, before, "_", color=plotting.RED, markersize=20, markeredgewidth=2.5, label="before LoRA")
            each.plot([i] * len(after), after, "o", color=plotting.BLUE, alpha=0.6, label="after LoRA on both bases, three seeds")
        each.set_xticks(range(len(gaps)), list(gaps))
        each.set(title=title, xlim=(-0.6, len(gaps) - 0.4), ylim=(0, 0.75))
        each.grid(axis="x", visible=False)
    axes[0].set_ylabel("gap to the 16-bit base,\nnats per token")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles[:2], labels[:2], loc="outside lower center", ncols=2, fontsize=9)
    return figure


def merges_data() -> dict[str, list]:
    """Way -> (size of the update over the weight, error over the update), to three digits: the order of a sum may move one code."""
    sizes = [2.0**-i for i in range(11)]
    return {way: [(size, float(f"{merge_error(way, size):.3g}")) for size in sizes] for way in WAYS}


def draw_merges(axes: plt.Axes, data: dict[str, list]) -> None:
    """Error over the size of the update, both relative."""
    for way, points in data.items():
        label, colour, dashes = WAYS[way]
        axes.plot(*zip(*points, strict=True), dashes, color=colour, marker="o", markersize=3.5, label=label)
    axes.axhline(1, color=plotting.BLACK, lw=0.8)
    where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate("as large as the update", (0.99, 1), (0, 3), fontsize=9, ha="right", **where)
    axes.set(xscale="log", yscale="log", xlabel="size of the update, ‖ΔW‖ / ‖W‖", ylabel="error of the merge / ‖ΔW‖")
    axes.legend(fontsize=9)


def merges(data: dict[str, list]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(7.2, 3.8))
    draw_merges(axes, data)
    return figure


FIGURES = [
    Figure("qlora_memory", PAGE, memory_data, memory),
    Figure("qlora_quality", PAGE, quality_data, quality),
    Figure("qlora_won_back", "lessons/appendix/06_qlora.md", won_back_data, won_back),
    Figure("qlora_merges", PAGE, merges_data, merges),
]
