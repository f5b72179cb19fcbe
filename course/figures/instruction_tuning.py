"""Figures of unit 12: which tokens are targets, borders of packed rows, the same tokens and other behaviour, few good rows against many."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle

from course.claims import instruction_tuning as claims
from course.figures import Figure
from course.lab import plotting, recorded
from course.lab.chat import chat_tokenizer
from reference.instruct import IGNORED, Example, border_mask, encode, pack, packed_batch

PAGE = "lessons/12_instruction_tuning.md"
SHOWN = [
    {"role": "user", "content": "Are you?"},
    {"role": "assistant", "content": "I am."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
]
MASKS = ("assistant's turns", "last turn only", "masked by the id of padding", "all tokens")


def masks_data() -> dict:
    """Tokens of a ChatML conversation, padded with its end of turn, and which are targets under four rules."""
    tokenizer = chat_tokenizer("ChatML", pad_is_eos=True)
    rows = {"assistant's turns": encode(tokenizer, SHOWN), "last turn only": encode(tokenizer, SHOWN, "last")}
    end = tokenizer.eos_token_id
    whole = rows["assistant's turns"]
    rows["masked by the id of padding"] = Example(
        whole.ids, tuple(IGNORED if i == end else label for i, label in zip(whole.ids, whole.labels, strict=True))
    )
    rows["all tokens"] = encode(tokenizer, SHOWN, "all")
    padding = 2
    tokens = [tokenizer.decode([i]).replace("\n", "↵") for i in whole.ids] + [tokenizer.decode([end])] * padding
    targets = {name: [label != IGNORED for label in rows[name].labels] + [False] * padding for name in MASKS}
    return {"tokens": tokens, "padding": padding, "targets": targets}


def draw_masks(data: dict) -> plt.Figure:
    n, names = len(data["tokens"]), list(data["targets"])
    figure, axes = plt.subplots(figsize=(8.6, 3.3))
    for row, name in enumerate(names):
        for i, target in enumerate(data["targets"][name]):
            filled = i >= n - data["padding"]
            colour = plotting.BLUE if target else "#F4F4F4" if filled else "#D9D9D9"
            axes.add_patch(Rectangle((i + 0.06, -row + 0.12), 0.88, 0.76, color=colour, linewidth=0))
    for i, token in enumerate(data["tokens"]):
        axes.text(i + 0.5, 1.1, token, rotation=90, ha="center", va="bottom", fontsize=8, family="monospace")
    axes.text(n - data["padding"] / 2, -len(names) + 0.85, "padding", ha="center", va="top", fontsize=8)
    axes.set(xlim=(0, n), ylim=(-len(names) + 0.45, 3.6), yticks=[0.5 - row for row in range(len(names))], xticks=[])
    axes.set_yticklabels([f"{row}: {name}" for row, name in enumerate(names, 1)])
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def borders_data() -> dict:
    """Who sees whom in a packed row of 5, 4 and 3 tokens, and the leaks that were measured."""
    rows = pack([Example(tuple(range(n)), tuple(range(n))) for n in (5, 4, 3)], 12)
    mask = packed_batch(rows, 0)["attention_mask"][0, 0] == 0
    plain = border_mask(packed_batch(rows, 0, "none")["attention_mask"])[0, 0] == 0
    leaks = {
        "mask with borders": claims.leaks("mask"),
        "positions alone": claims.leaks("positions"),
        "positions, with a cache": claims.leaks("positions", cache=True),
        "positions, mask of ones": claims.leaks("positions", ones=True),
        "no borders": claims.leaks("none"),
    }
    return {
        "plain": plain.int().tolist(),
        "borders": mask.int().tolist(),
        "leaks": {k: 0.0 if v < 1e-4 else round(v, 2) for k, v in leaks.items()},
    }


def draw_borders(data: dict) -> plt.Figure:
    figure, axes = plt.subplots(1, 3, figsize=(9.2, 3.0), width_ratios=(1, 1, 1.15))
    for each, (name, title) in zip(axes, (("plain", "one mask for the row"), ("borders", "a mask with borders")), strict=False):
        each.imshow(1 - np.array(data[name]), cmap="Blues_r", vmin=-0.35, vmax=1.02)
        for edge in (4.5, 8.5):
            each.axhline(edge, color=plotting.RED, linewidth=1)
            each.axvline(edge, color=plotting.RED, linewidth=1)
        each.set(title=title, xticks=[2, 6.5, 10], yticks=[2, 6.5, 10], xlabel="sees")
        each.set_xticklabels(["A", "B", "C"])
        each.set_yticklabels(["A", "B", "C"])
        each.tick_params(length=0)
        each.grid(visible=False)
    axes[0].set_ylabel("a token of")
    last, names = axes[2], list(data["leaks"])
    values = list(data["leaks"].values())
    last.barh(names, values, color=[plotting.BLUE if v < 0.01 else plotting.ORANGE for v in values])
    for i, value in enumerate(values):
        last.text(value + 0.1, i, f"{value:.1f}" if value else "0", va="center", fontsize=9)
    last.invert_yaxis()
    last.set(title="measured leak", xlabel="change of another's logits", xlim=(0, 1.18 * max(values)))
    last.grid(axis="y", visible=False)
    return figure


KINDS = {
    "pre-training text": "pre-training\ntext",
    "no end of turn": "instructions,\nend masked",
    "all tokens": "instructions,\nall tokens",
    "good": "instructions,\nanswers only",
}


def behaviour_data() -> dict:
    """Data -> percent that begin right, are right and stop; and nats lost on general text; each run."""
    return {data: {what: [row[what] for row in claims.runs(data, 192)] for what in ("begins", "right", "general")} for data in KINDS}


def draw_behaviour(data: dict) -> plt.Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.2), width_ratios=(1.5, 1))
    places = np.arange(len(data))
    for shift, what, colour, label in (
        (-0.2, "begins", plotting.SKY, "begins with the right answer"),
        (0.2, "right", plotting.BLUE, "and ends there"),
    ):
        runs = [100 * np.array(row[what]) for row in data.values()]
        left.bar(places + shift, [r.mean() for r in runs], 0.36, color=colour, label=label)
        for place, r in zip(places, runs, strict=True):
            left.plot([place + shift] * len(r), r, "o", color=plotting.BLACK, markersize=3)
    lost = [np.array(row["general"]) for row in data.values()]
    right.bar(places, [r.mean() for r in lost], 0.5, color=plotting.ORANGE)
    for place, r in zip(places, lost, strict=True):
        right.plot([place] * len(r), r, "o", color=plotting.BLACK, markersize=3)
    for axes in (left, right):
        axes.set_xticks(places, [KINDS[name] for name in data], fontsize=8)
        axes.grid(axis="x", visible=False)
    right.set_xticks(places, [KINDS[name].replace("instructions,\n", "").replace(" ", "\n") for name in data], fontsize=8)
    left.set(ylabel="% of requests", ylim=(0, 118), title="on requests")
    left.legend(loc="upper left", fontsize=9, ncols=2)
    right.set(ylabel="nats per token above the floor", title="on general text")
    return figure


def quality_data() -> dict:
    """Data -> rows -> percent right of each seed."""
    found = {"all answers right": ("good", (12, 48, 192, 768)), "40 % of the answers wrong": ("40% wrong", (192, 768))}
    return {label: {str(n): [100 * row["right"] for row in claims.runs(data, n)] for n in sizes} for label, (data, sizes) in found.items()}


def draw_quality(data: dict) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(7.2, 3.2))
    for (label, rows), colour, style in zip(data.items(), (plotting.BLUE, plotting.RED), ("o-", "s--"), strict=True):
        sizes = [int(n) for n in rows]
        axes.plot(sizes, [np.mean(values) for values in rows.values()], style, color=colour, label=label)
        for n, values in zip(sizes, rows.values(), strict=True):
            axes.plot([n] * len(values), values, ".", color=colour, alpha=0.5, markersize=5)
    axes.set(xscale="log", xlabel="rows of instruction data", ylabel="% of requests answered right", ylim=(0, 100))
    axes.set_xticks([12, 48, 192, 768], ["12", "48", "192", "768"])
    axes.minorticks_off()
    axes.legend(loc="upper left", fontsize=9)
    return figure


GEMMA = {  # method of the record -> name, colour
    claims.OURS: ("LoRA on NF4", plotting.BLUE),
    claims.LIBRARIES: ("the same with\npeft + bitsandbytes", plotting.RED),
    "full fine-tuning": ("full fine-tuning", plotting.BLACK),
}


def gemma_data() -> dict:
    """Name -> percent with form and right, and nats of prose lost, each seed's; and the losses of training."""
    asked = {f"{n} examples\nin the prompt": {what: [claims.gemma_prompted(n, what)] for what in ("form", "right")} for n in (0, 7)}
    before, losses = recorded.load("gemma_instructions", "h200")["result"]["base"]["passages"], {}
    for method, (name, _) in GEMMA.items():
        found = claims.gemma_runs(method)
        asked[name] = {what: [100 * run["followed"]["all"][what] for run in found] for what in ("form", "right")}
        asked[name]["lost"] = [run["english"]["passages"] - before for run in found]
        losses[name] = [run["losses"] for run in found]
    return {"asked": asked, "losses": {name: losses[name] for name in losses if name != "full fine-tuning"}}


def draw_gemma(data: dict) -> plt.Figure:
    places = [["asked", "lost"], ["loss", "loss"]]
    figure, panels = plt.subplot_mosaic(places, figsize=(8.0, 5.6), width_ratios=(1.6, 1), height_ratios=(1.2, 1))
    asked, lost, loss = (panels[name] for name in ("asked", "lost", "loss"))
    for i, row in enumerate(data["asked"].values()):
        for shift, what, colour in ((-0.2, "form", plotting.SKY), (0.2, "right", plotting.BLUE)):
            label = {"form": "answers of the form asked for", "right": "right answers"}[what] if i == 0 else None
            asked.barh(i + shift, np.mean(row[what]), 0.36, color=colour, label=label)
            asked.plot(row[what], [i + shift] * len(row[what]), "o", color=plotting.BLACK, markersize=3)
        if "lost" in row:
            lost.barh(i, np.mean(row["lost"]), 0.5, color=plotting.ORANGE)
            lost.plot(row["lost"], [i] * len(row["lost"]), "o", color=plotting.BLACK, markersize=3)
    for axes in (asked, lost):
        axes.set(ylim=(len(data["asked"]) - 0.4, -0.6))
        axes.grid(axis="y", visible=False)
    asked.set_yticks(range(len(data["asked"])), list(data["asked"]), fontsize=9)
    lost.set_yticks([])
    lost.text(0.01, 0.5, "the base: nothing lost", va="center", fontsize=9)
    asked.set(xlabel="% of the test's instructions", xlim=(0, 100))
    asked.legend(fontsize=9, loc="upper right")
    lost.set(xlabel="English prose lost,\nnats per token", xlim=(0, 0.5))
    colours = dict(GEMMA.values())
    for name, curves in data["losses"].items():
        for i, values in enumerate(curves):
            smooth = np.convolve(values, np.ones(9) / 9, "valid")
            mine = name == GEMMA[claims.OURS][0]
            label = f"{name}, seed 0".replace("\n", " ") if i == 0 else "two other seeds" if i == 1 else None
            style = {"lw": 1.8 if i == 0 else 0.9, "ls": "-" if mine else "--", "alpha": 1 if i == 0 else 0.6}
            loss.plot(np.arange(len(smooth)) + 5, smooth, color=colours[name], label=label, **style)
    loss.set(xlabel="step", ylabel="loss, nats per token,\nmean of nine steps", ylim=(0, None))
    loss.legend(fontsize=9, loc="upper right")
    return figure


FIGURES = [
    Figure("instruction_masks", PAGE, masks_data, draw_masks),
    Figure("instruction_behaviour", PAGE, behaviour_data, draw_behaviour),
    Figure("instruction_quality", PAGE, quality_data, draw_quality),
    Figure("instruction_borders", PAGE, borders_data, draw_borders),
    Figure("instruction_gemma", PAGE, gemma_data, draw_gemma),
]
