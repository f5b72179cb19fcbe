"""Figures of unit 14: memory of four plans, when full fine-tuning is right, what measured plans learned and forgot."""

import functools
import statistics

import matplotlib.pyplot as plt
import numpy as np

from course.capstone.plan import Plan, predict
from course.figures import Figure
from course.lab import plotting, recorded
from course.lab.forgetting import mean_of
from reference.model_shapes import LLAMA_3_8B

PAGE, CARD = "lessons/14_capstone.md", "h200"
LADDER = {  # name -> method, checkpointing
    "full fine-tuning": ("full", True),
    "LoRA": ("lora", False),
    "LoRA + checkpointing": ("lora", True),
    "QLoRA + checkpointing": ("qlora", True),
}
CARDS = (24, 48, 80)  # GB
KINDS = ("weights", "trained", "activations", "the loss")


# The ladder


@functools.cache
def ladder(name: str):
    """The memory of Llama-3-8B, 4 rows of 2,048 tokens, r = 16 on all linears, bfloat16 weights."""
    method, checkpointing = LADDER[name]
    settings = {"base": "x", "method": method, "checkpointing": checkpointing, "dtype": "bfloat16", "batch": 4, "max_length": 2048}
    return predict(Plan(**settings), LLAMA_3_8B)


def grouped(name: str) -> dict[str, float]:
    """GB at the fullest moment, by kind."""
    memory = ladder(name)
    found = dict.fromkeys(KINDS, 0.0)
    for kind, size in memory.moments[memory.moment].items():
        if kind == "weights":
            group = "weights"
        elif kind in ("log-probabilities", "loss gradients"):
            group = "the loss"
        elif kind in ("activations", "recomputed layer", "temporaries"):
            group = "activations"
        else:
            group = "trained"
        found[group] += size / 1e9
    return found


def memory_data() -> dict[str, dict]:
    return {name: grouped(name) for name in LADDER}


def memory(data: dict[str, dict]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(8.0, 3.0))
    labels = {"weights": "weights", "trained": "gradients, masters, Adam's moments", "activations": "activations", "the loss": "the loss"}
    parts = {labels[kind]: [row[kind] for row in data.values()] for kind in KINDS}
    totals = plotting.stacked(axes, list(data), parts, horizontal=True, height=0.62)
    for i, total in enumerate(totals):
        axes.text(
            total + 1.5,
            i,
            f"{total:.0f} GB",
            va="center",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
            zorder=3,
        )
    for card in CARDS:
        axes.axvline(card, color=plotting.RED, lw=1.2, ls="--")
        axes.text(card, -0.62, f"{card} GB", color=plotting.RED, fontsize=9, ha="center")
    axes.set(xlabel="GB at the fullest moment of a step", xlim=(0, 1.12 * max(totals)))
    axes.grid(axis="y", visible=False)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.45, -0.22), ncols=4)
    return figure


# When full fine-tuning is right

FEW, MANY = "16", "64"
FOREIGN = ("LoRA r=1", "LoRA r=4", "LoRA r=16", "LoRA r=64", "LoRA r=16 + embeddings and head", "full fine-tuning")
NEAR = ("full fine-tuning", "replay", "LoRA + replay")


def near(method: str, level: float = 0.25) -> list[float]:
    """Nats of general text that a method of unit 09's study forgot when it had so much left to learn about clinic notes, of each seed."""
    rows = recorded.load("forgetting", CARD)["result"]["frontier"]["levels"]
    return next(row["forgotten"] for row in rows if row["method"] == method and row["level"] == level)


def far(method: str) -> dict:
    """What a method of unit 09 had left to learn of the foreign language after all steps: numbers trained, nats of each seed."""
    row = next(row for row in recorded.load("forgetting", CARD)["result"]["foreign"] if row["method"] == method)
    return {"trained": row["trained"], "left": [values[-1] for values in row["left"]]}


def few(method: str, rows: str) -> list[float]:
    """Percent right of unit 10's few-shot task with so many examples, of each seed, on the tiny model."""
    found = next(row for row in recorded.load("peft_family", "cpu")["result"]["methods"] if row["method"] == method)
    return [100 * value for value in found["few"]["lm"][rows]]


REAL = ("all-linear r=1", "all-linear r=4", "all-linear r=16", "all-linear r=64", "full fine-tuning")


def real(config: str) -> dict:
    """Gemma 3 270M on Python code (unit 02, H100): numbers trained; loss on test code, nats per token: mean and ends over seeds."""
    rows = [row for row in recorded.load("gemma_lora", "h100")["result"]["summary"] if row["config"] == config]
    best = min(rows, key=lambda row: row["code"][0])
    return {"trained": best["parameters"], "code": best["code"]}


def full_data() -> dict[str, dict]:
    return {
        "real": {config: real(config) for config in REAL},
        "base": recorded.load("gemma_lora", "h100")["result"]["base"]["code"],
        "near": {method: list(mean_of(near(method))) for method in NEAR},
        "far": {method: {"trained": far(method)["trained"], "left": list(mean_of(far(method)["left"]))} for method in FOREIGN},
        "few": {method: {rows: few(method, rows) for rows in (FEW, MANY, "256")} for method in ("full fine-tuning", "LoRA")},
    }


COLOURS = {"full fine-tuning": plotting.BLACK, "replay": plotting.SKY, "LoRA + replay": plotting.BLUE, "LoRA": plotting.BLUE}


def full(data: dict[str, dict]) -> plt.Figure:
    figure, ((left, middle), (right, last)) = plt.subplots(2, 2, figsize=(8.6, 6.6), width_ratios=(1, 1.3))
    names = {"full fine-tuning": "full", "replay": "full,\nreplay", "LoRA + replay": "LoRA,\nreplay"}
    for i, (method, (mean, low, high)) in enumerate(data["near"].items()):
        left.bar(i, mean, color=COLOURS[method], width=0.6)
        left.errorbar(i, mean, [[mean - low], [high - mean]], color=plotting.RED, capsize=4, lw=1.4)
    left.set_xticks(range(3), names.values())
    left.grid(axis="x", visible=False)
    left.set(title="near: words it knows", ylabel="forgotten at equal learning,\nnats per token")
    for method, row in data["far"].items():
        mean, low, high = row["left"]
        colour = plotting.BLACK if method == "full fine-tuning" else plotting.ORANGE if "+" in method else plotting.BLUE
        middle.errorbar(row["trained"], mean, [[mean - low], [high - mean]], fmt="o", color=colour, capsize=3, ms=6)
        label = method.replace("full fine-tuning", "full").replace(" + embeddings and head", ",\nembeddings and head").replace("LoRA ", "")
        above = "+" not in method and method != "full fine-tuning"
        place = {"xytext": (0, 3), "ha": "center", "va": "bottom"} if above else {"xytext": (-10, -4), "ha": "right", "va": "center"}
        at = (row["trained"], high if above else mean)
        middle.annotate(label, at, textcoords="offset points", color=colour, fontsize=8.5, **place)
    middle.set(xscale="log", yscale="log", xlim=(6e3, 2.2e6), ylim=(0.15, 3.2), xlabel="numbers trained", title="far: a foreign language")
    middle.set_ylabel("left to learn, nats per token")
    middle.set_yticks((0.2, 0.5, 1, 2), ("0.2", "0.5", "1", "2"))
    middle.minorticks_off()
    for method, rows in data["few"].items():
        sizes = [int(each) for each in rows]
        means = [statistics.fmean(values) for values in rows.values()]
        right.plot(sizes, means, color=COLOURS[method], label=method.replace(" fine-tuning", ""))
        for size, values in zip(sizes, rows.values(), strict=True):
            right.plot([size] * len(values), values, "o", color=COLOURS[method], ms=4, alpha=0.6)
    right.set(xscale="log", xlabel="labelled examples", ylabel="right, %", ylim=(0, 100), title="few examples, 30 steps")
    right.set_xticks((16, 64, 256), ("16", "64", "256"))
    right.minorticks_off()
    right.legend(fontsize=9)
    for config, row in data["real"].items():
        mean, low, high = row["code"]
        colour = plotting.BLACK if config == "full fine-tuning" else plotting.BLUE
        last.errorbar(row["trained"], mean, [[mean - low], [high - mean]], fmt="o", color=colour, capsize=3, ms=6)
        label = config.replace("all-linear ", "").replace(" fine-tuning", "")
        last.annotate(label, (row["trained"], mean), (0, 8), textcoords="offset points", color=colour, ha="center", fontsize=8.5)
    last.axhline(data["base"], color=plotting.BLACK, lw=1, ls="--")
    last.text(3e5, data["base"] - 0.004, "before training", fontsize=8.5, va="top")
    last.set(xscale="log", xlim=(1e5, 9e8), ylim=(1.895, 2.055), xlabel="numbers trained", ylabel="loss on code, nats per token")
    last.set_title("a real model on Python code")
    return figure


# Measured plans


RECORDS = {"tiny": ("capstone_tiny", "cpu"), "gemma": ("capstone_gemma-3-270m", CARD)}


def record(base: str = "tiny") -> dict:
    """The recorded capstone on the tiny model or on Gemma 3 270M."""
    return recorded.load(*RECORDS[base])["result"]


def runs(base: str = "tiny") -> list[dict]:
    """Rows of a recorded capstone, those without an error."""
    return [row for row in record(base)["rows"] if "error" not in row]


def change(row: dict, name: str) -> dict:
    return next(each for each in row["learned"] + row["forgotten"] if each["name"] == name)


def four_bits_alone() -> dict:
    """Nats per token of prose that Gemma 3 270M loses by NF4, with nothing trained (unit 06, H100): estimate, low, high."""
    return recorded.load("quantization_quality_gemma", "h100")["result"]["lost"]["NF4"]["passages"]


def runs_data() -> dict[str, dict]:
    """Base -> plan -> of each seed: percent right, and the rise of the loss on old text; and the interval of one run's percent."""
    found: dict[str, dict] = {base: {} for base in RECORDS}
    for base in RECORDS:
        for row in runs(base):
            entry = found[base].setdefault(row["plan"], {"right": [], "forgotten": []})
            entry["right"].append(100 * change(row, "right answers")["after"])
            entry["forgotten"].append(change(row, "loss on old text")["lost"]["estimate"])
    lost = change(runs("gemma")[0], "right answers")["lost"]
    return found | {"one run": [-100 * lost["high"], -100 * lost["low"]], "four bits": four_bits_alone()["estimate"]}


PLANS = {
    "LoRA r = 16, 10 % replay": plotting.BLUE,
    "LoRA r = 16, no replay": plotting.RED,
    "LoRA r = 4, 10 % replay": plotting.SKY,
    "QLoRA r = 16, 10 % replay": plotting.GREEN,
    "full fine-tuning, 10 % replay": plotting.BLACK,
}


def plans(data: dict[str, dict]) -> plt.Figure:
    figure, sides = plt.subplots(1, 2, figsize=(8.0, 3.7), sharex=True, sharey=True)
    titles = {"tiny": "the tiny model", "gemma": "Gemma 3 270M"}
    for axes, (base, title) in zip(sides, titles.items(), strict=True):
        for name, colour in PLANS.items():
            row = data[base][name]
            axes.plot(np.mean(row["forgotten"]), np.mean(row["right"]), "D", color=colour, ms=8, label=name)
            axes.plot(row["forgotten"], row["right"], "o", color=colour, ms=5, mec="white", mew=0.8, zorder=4)
        axes.set_title(title)
        axes.set(xscale="log", xlabel="old text: rise of the loss, nats per token", xlim=(0.018, 5), ylim=(50, 90))
        axes.set_xticks((0.03, 0.1, 0.3, 1, 3), ("0.03", "0.1", "0.3", "1", "3"))
        axes.minorticks_off()
    sides[0].set_ylabel("instructions answered rightly, %")
    low, high = data["one run"]
    sides[1].plot([2.2, 2.2], [low, high], color=plotting.BLACK, lw=1.4, marker="_", ms=8)
    sides[1].text(2.2, high + 1, "interval of\none run", fontsize=8.5, ha="center", va="bottom")
    sides[1].axvline(data["four bits"], color=PLANS["QLoRA r = 16, 10 % replay"], lw=1.2, ls="--")
    sides[1].text(data["four bits"] / 1.08, 51, "4 bits alone", color=PLANS["QLoRA r = 16, 10 % replay"], fontsize=8.5, ha="right")
    handles, labels = sides[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3)
    return figure


FIGURES = [
    Figure("capstone_memory", PAGE, memory_data, memory),
    Figure("capstone_full", PAGE, full_data, full),
    Figure("capstone_plans", PAGE, runs_data, plans),
]
