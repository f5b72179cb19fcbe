"""Figures of unit 10: where each method sits in a block, what it learns with how many numbers, few-shot accuracy of a real model."""

import statistics

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from course.figures import Figure
from course.lab import plotting, recorded
from course.lab.family import FULL

PAGE = "lessons/10_peft_family.md"
KINDS = {  # kind -> label, colour, mark
    "subset": ("the model's own weights", plotting.BLACK, "s"),
    "update": ("updates of weights (LoRA and relatives)", plotting.BLUE, "o"),
    "scale": ("scales (IA³)", plotting.PINK, "D"),
    "adapter": ("adapters", plotting.GREEN, "^"),
    "prompt": ("soft prompts and prefixes", plotting.ORANGE, "v"),
}
NAMED = (  # what each panel names, and where the name stands
    {
        FULL: (-82, -3), "LoRA": (8, 3), "LoRA, r = 1": (8, -9), "OFT": (-10, -14), "IA³": (9, -3), "LN tuning": (9, -3),
        "VeRA": (-30, -12), "LoKr": (8, 0), "adapter, Houlsby": (-7, -16), "adapter, Pfeiffer": (8, 0), "adapter, parallel": (9, -3),
        "prompt, random": (9, 0), "prefix, random": (9, -3),
        "prefix, projected": (9, -3), "prefix, text": (9, -3), "P-tuning, LSTM": (-70, -12),
    },
    {
        FULL: (9, -3), "LoKr": (-8, -14), "LoRA+": (-40, 3), "IA³": (-24, 2), "LN tuning": (9, -3), "adapter, Houlsby": (-44, -15),
        "prefix, text": (9, -3), "prefix, projected": (9, -3), "P-tuning, LSTM": (9, 0), "LoRA, r = 1": (9, 0),
    },
)  # fmt: skip
GREY = "#777777"
GEMMA = {  # Gemma's methods from top to bottom -> colour
    "LoRA": plotting.BLUE, "DoRA": plotting.BLUE, "IA³": plotting.PINK, "adapter, Houlsby": plotting.GREEN,
    "prefix, text": plotting.ORANGE, "prefix, random": plotting.ORANGE, "prompt, text": plotting.ORANGE, "prompt, random": plotting.ORANGE,
}  # fmt: skip


def places_data() -> dict[str, list]:
    """What stands where: text, place (x, y), kind."""
    return {
        "model": [["embedding", 0.0, 0.0], ["attention", 0.0, 1.5], ["feed-forward", 0.0, 3.4]],
        "methods": [
            ["prompt tuning, P-tuning:\nrows before the text's", 2.6, 0.0, "prompt"],
            ["prefix tuning: keys and values\nthat every token sees", 2.6, 1.15, "prompt"],
            ["IA³: scales keys, values,\nand the feed-forward's inner width", 2.6, 2.05, "scale"],
            ["LoRA, DoRA, VeRA, OFT, …:\nchange the weights inside", -2.6, 2.45, "update"],
            ["adapter: a small network\nbehind or beside each part", 2.6, 3.3, "adapter"],
            ["BitFit, LN tuning: train some\nof the numbers that are there", -2.6, 0.75, "subset"],
        ],
        "arrows": [[2.6, 0.0, 0.75, 0.0], [2.6, 1.15, 0.75, 1.4], [2.6, 2.05, 0.75, 1.65], [2.6, 2.05, 0.75, 3.2], [-2.6, 2.45, -0.75, 1.6],
                   [-2.6, 2.45, -0.75, 3.3], [2.6, 3.3, 0.06, 4.05], [2.6, 3.3, 0.0, 2.45], [-2.6, 0.75, -0.75, 1.35]],
    }  # fmt: skip


def places(data: dict[str, list]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(8.4, 3.9))
    for name, x, y in data["model"]:
        axes.add_patch(FancyBboxPatch((x - 0.7, y - 0.32), 1.4, 0.64, boxstyle="round,pad=0.04", fc="#EEEEEE", ec=plotting.BLACK, lw=1.2))
        axes.text(x, y, name, ha="center", va="center", fontsize=10)
    for low, high in ((0.36, 1.14), (1.86, 3.04), (3.76, 4.45)):
        axes.add_patch(FancyArrowPatch((0, low), (0, high), arrowstyle="-|>", mutation_scale=11, color=plotting.BLACK, lw=1.3))
    for sign, x, y, xx, yy in ((1 if a[0] > 0 else -1, *a) for a in data["arrows"]):
        colour = next(KINDS[kind][1] for _, mx, my, kind in data["methods"] if (mx, my) == (x, y))
        start = (x - sign * 0.55 if sign > 0 else x + 0.55, y)
        axes.add_patch(FancyArrowPatch(start, (xx, yy), arrowstyle="-|>", mutation_scale=9, color=colour, lw=1.2, alpha=0.9))
    for text, x, y, kind in data["methods"]:
        axes.text(
            x - 0.5 if x > 0 else x + 0.5, y, text, ha="left" if x > 0 else "right", va="center", fontsize=9.5, color=KINDS[kind][1],
            bbox={"fc": "white", "ec": "none", "pad": 2},
        )  # fmt: skip
    axes.text(0.08, 4.3, "to the next block", fontsize=8.5, va="center")
    axes.set(xlim=(-4.9, 4.9), ylim=(-0.5, 4.6))
    axes.axis("off")
    return figure


def learned_data() -> dict[str, dict]:
    """Method -> kind, trained numbers, nats on clinic and forgotten, of each seed."""
    rows = recorded.load("peft_family")["result"]["methods"]
    numbers = {row["method"]: row["parameters"] for row in recorded.load("peft_costs")["result"]["methods"]}
    return {row["method"]: {key: row[key] for key in ("kind", "clinic", "forgotten")} | {"trained": numbers[row["method"]]} for row in rows}


def learned(data: dict[str, dict]) -> plt.Figure:
    figure, axes = plt.subplots(1, 2, figsize=(10.2, 4.4), sharey=True)
    for name, row in data.items():
        _, colour, mark = KINDS[row["kind"]]
        middle = statistics.fmean(row["clinic"])
        ends = [[middle - min(row["clinic"])], [max(row["clinic"]) - middle]]
        for each, names, x in zip(axes, NAMED, (row["trained"], statistics.fmean(row["forgotten"])), strict=True):
            each.errorbar([x], [middle], ends, fmt=mark, color=colour, markersize=6, capsize=2, lw=1)
            if name in names:
                each.annotate(name, (x, middle), names[name], textcoords="offset points", fontsize=8, color=colour)
    axes[0].set(xscale="log", yscale="log", ylim=(0.2, 6.5))
    axes[0].set(xlabel="numbers trained (of 1.07 million)", ylabel="clinic: nats per token above the floor")
    axes[1].set(xlabel="forgotten: general text, nats per token above the floor")
    axes[0].set_yticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
    axes[0].minorticks_off()
    marks = [plt.Line2D([], [], color=colour, marker=mark, ls="", label=label) for label, colour, mark in KINDS.values()]
    figure.legend(handles=marks, loc="outside lower center", ncols=3, fontsize=9)
    return figure


def few_shot_data() -> dict[str, dict]:
    """Accuracy by method, losses and number of examples, each seed's; numbers trained; half a 95 % interval of one accuracy of 65 %."""
    result = recorded.load("gemma_few_shot")["result"]
    curves: dict[str, dict] = {}
    for row in result["runs"]:
        curves.setdefault(row["method"], {}).setdefault(row["losses"], {}).setdefault(str(row["size"]), []).append(100 * row["accuracy"])
    lines = result["settings"]["test"] * len(result["packages"])
    return {
        "curves": curves,
        "numbers": {method: cost["parameters"] for method, cost in result["costs"].items()},
        "untrained": 100 * result["zero_shot"]["accuracy"],
        "margin": 100 * 1.96 * (0.65 * 0.35 / lines) ** 0.5,
    }


def few_shot(data: dict[str, dict]) -> plt.Figure:
    figure, panels = plt.subplots(1, 3, figsize=(8.2, 4.7), sharey=True, sharex=True)
    names = list(GEMMA)
    for axes, size in zip(panels, ("16", "64", "256"), strict=True):
        for i, name in enumerate(names):
            for losses, seeds in ((losses, sizes[size]) for losses, sizes in data["curves"][name].items()):
                extra = losses == "t-few"
                colour, y = (GEMMA[name], i) if extra else (GREY, i + 0.3)
                axes.plot([min(seeds), max(seeds)], [y, y], color=colour, lw=1.2)
                axes.plot(seeds, [y] * len(seeds), "|", color=colour, markersize=7, mew=1.2)
                axes.plot(statistics.fmean(seeds), y, "o" if extra else "s", color=colour, markersize=7 if extra else 4.5)
        axes.axvline(data["untrained"], color=plotting.BLACK, lw=1, ls="--")
        axes.errorbar(65, len(names) - 0.1, xerr=data["margin"], color=plotting.BLACK, lw=1, capsize=3)
        axes.set(title=f"{size} lines", xlim=(28, 82), ylim=(len(names) + 0.2, -0.6), xlabel="accuracy, %")
        axes.grid(axis="y", visible=False)
    panels[0].set_yticks(range(len(names)), [f"{name}\n{data['numbers'][name] / 1e3:,.0f} k" for name in names], fontsize=9.5)
    marks = [
        plt.Line2D([], [], color=plotting.BLUE, marker="o", ls="", markersize=7, label="mean"),
        plt.Line2D([], [], color=plotting.BLUE, marker="|", ls="", markersize=7, mew=1.2, label="a seed"),
        plt.Line2D([], [], color=GREY, marker="s", ls="", markersize=4.5, label="cross-entropy alone"),
        plt.Line2D([], [], color=plotting.BLACK, ls="--", lw=1, label="without training"),
        plt.Line2D([], [], color=plotting.BLACK, marker="|", lw=1, label="95 % that 240 lines leave"),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=5, fontsize=9, columnspacing=1.0, handletextpad=0.4)
    return figure


LOSSES = {"lm": ("cross-entropy alone", plotting.SKY, "o-"), "t-few": ("with T-Few's other two", plotting.BLUE, "s-")}


def t_few_data() -> dict[str, dict]:
    """Method -> losses -> number of notes -> accuracy of each seed, percent; the tiny model."""
    rows = {row["method"]: row["few"] for row in recorded.load("peft_family")["result"]["methods"]}
    shown = ("LoRA", "DoRA", "IA³")
    return {m: {losses: {n: [100 * a for a in rows[m][losses][n]] for n in rows[m][losses]} for losses in LOSSES} for m in shown}


def t_few(data: dict[str, dict]) -> plt.Figure:
    figure, panels = plt.subplots(1, 3, figsize=(8.2, 3.1), sharey=True)
    for axes, (method, kinds) in zip(panels, data.items(), strict=True):
        for (losses, sizes), shift in zip(kinds.items(), (0.95, 1.05), strict=True):
            label, colour, style = LOSSES[losses]
            places = [shift * int(n) for n in sizes]
            axes.plot(places, [statistics.fmean(values) for values in sizes.values()], style, color=colour, markersize=5, label=label)
            for place, values in zip(places, sizes.values(), strict=True):
                axes.plot([place] * len(values), values, style[0], color=colour, markersize=3.5, mfc="white", mew=0.9)
        axes.axhline(12.5, color=plotting.BLACK, lw=1, ls="--", label="guessing")
        axes.set(title=method, xscale="log", xlabel="labelled notes", ylim=(0, 85))
        axes.set_xticks([16, 64, 256], ["16", "64", "256"])
        axes.minorticks_off()
    panels[0].set_ylabel("right, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    return figure


FIGURES = [
    Figure("family_places", PAGE, places_data, places),
    Figure("family_learned", PAGE, learned_data, learned),
    Figure("family_few_shot", PAGE, few_shot_data, few_shot),
    Figure("family_t_few", PAGE, t_few_data, t_few),
]
