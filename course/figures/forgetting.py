"""Figures of unit 09: a parabola and its ellipse, the estimators, the frontier, five tasks, a far domain, a real model."""

import functools
import statistics

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Ellipse
from torch import Tensor, nn
from torch.nn import functional as F

from course.figures import Figure
from course.lab import permuted, plotting, recorded
from course.lab.forgetting import mean_of
from reference.ewc import fisher_diagonal

PAGE, CARD = "lessons/09_forgetting.md", "h200"
WITHOUT = {  # what keeps no old text: method -> colour, dashes
    "full fine-tuning": (plotting.BLACK, "-"),
    "full fine-tuning, scaled back": (plotting.BLACK, ":"),
    "full, embeddings and head fixed": (plotting.BLACK, "--"),
    "LoRA": (plotting.BLUE, "-"),
    "LoRA, embeddings and head too": (plotting.BLUE, "--"),
    "LoRA, scaled back": (plotting.BLUE, ":"),
    "L2 to the start": (plotting.ORANGE, "-"),
    "EWC": (plotting.GREEN, "-"),
    "EWC, batch Fisher": (plotting.GREEN, "--"),
    "LoRA + EWC on ΔW": (plotting.PINK, "-"),
    "LoRA + EWC on A, B": (plotting.PINK, "--"),
    "distillation, new text": (plotting.RED, "-"),
}
WITH = {  # what keeps some
    "full fine-tuning": (plotting.BLACK, "-"),
    "replay": (plotting.BLUE, "-"),
    "LoRA + replay": (plotting.PINK, "-"),
    "distillation, old text": (plotting.RED, "-"),
    "DER++": (plotting.GREEN, "-"),
    "A-GEM": (plotting.ORANGE, "-"),
    "progressive column": (plotting.SKY, "-"),
}


# A parabola and its ellipse


@functools.cache
def odd_or_even() -> tuple[nn.Linear, Tensor, Tensor]:
    """Softmax regression of odd against even digits from 4 × 4 coarse pixels, at the optimum of its loss; float64."""
    x, y = permuted.digits()
    x, y = x.double().view(-1, 4, 2, 4, 2).mean((2, 4)).flatten(1), y % 2
    model = nn.Linear(16, 2).double()
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y) + 1e-7 * model.weight.square().sum()  # for one optimum and not a line of them
        loss.backward()
        return loss

    optimizer.step(closure)
    return model, x, y


PIXELS = (5, 9)  # one above the other, in the middle of the picture


def curvature_data() -> dict[str, list]:
    """The loss over two weights around the optimum, and the Fisher of both."""
    model, x, y = odd_or_even()
    fisher = fisher_diagonal(model, [(x, y)])["weight"][1]
    steps, start = torch.linspace(-5, 5, 61, dtype=torch.float64), model.weight.detach().clone()

    def loss(a: float, b: float) -> float:
        weight = start.clone()
        weight[1, PIXELS[0]] += a
        weight[1, PIXELS[1]] += b
        return F.cross_entropy(F.linear(x, weight, model.bias.detach()), y).item()

    surface = [[loss(a, b) for a in steps.tolist()] for b in steps.tolist()]
    return {
        "steps": steps.tolist(),
        "rise": [[value - loss(0, 0) for value in row] for row in surface],
        "F": [fisher[p].item() for p in PIXELS],
    }


LEVEL = 0.05  # nats


def draw_curvature(axes: plt.Axes, data: dict[str, list]) -> None:
    """Contours of the loss's rise, and the ellipse ½ F₁δ₁² + ½ F₂δ₂² = LEVEL."""
    levels, widths = [0.01, LEVEL, 0.15, 0.4], [0.9, 2.4, 0.9, 0.9]
    contours = axes.contour(data["steps"], data["steps"], np.array(data["rise"]), levels, colors=[plotting.BLUE], linewidths=widths)
    axes.clabel(contours, fmt="%g", fontsize=8)
    sizes = [2 * (2 * LEVEL / f) ** 0.5 for f in data["F"]]
    axes.add_patch(Ellipse((0, 0), *sizes, fill=False, color=plotting.RED, lw=2.4))
    axes.plot(0, 0, "+", color=plotting.BLACK, ms=9)
    axes.plot([], [], color=plotting.BLUE, label="the loss rises by so many nats")
    axes.plot([], [], color=plotting.RED, lw=2.4, label=f"the Fisher says {LEVEL:g} nats")
    axes.set(xlabel="change of one weight", ylabel="change of its neighbour's weight", aspect="equal")
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=9)


def curvature(data: dict[str, list]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(6.6, 3.9))
    draw_curvature(axes, data)
    return figure


# Estimators


def batch_shares(sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)) -> dict[str, list]:
    """The batch estimator's F over the exact one, in sum, by the size of a batch; labels of the data, and labels drawn from the model."""
    model, x, y = odd_or_even()
    drawn = torch.bernoulli(model(x).softmax(-1)[:, 1].detach(), generator=torch.Generator().manual_seed(0)).long()
    exact = total(fisher_diagonal(model, [(x, None)]))
    shares = {
        label: [total(fisher_diagonal(model, zip(x.split(size), labels.split(size), strict=True), "batch")) / exact for size in sizes]
        for label, labels in (("labels of the data", y), ("labels drawn from the model", drawn))
    }
    return {"sizes": list(sizes), **shares}


def total(fisher: dict[str, Tensor]) -> float:
    return sum(value.sum().item() for value in fisher.values())


# The frontier


def levels(method: str) -> list[dict]:
    """The recorded rows of a method, from the least learned to the most."""
    rows = recorded.load("forgetting", CARD)["result"]["frontier"]["levels"]
    return [row for row in rows if row["method"] == method]


def frontier_data() -> dict[str, dict]:
    """Group -> method -> level -> mean forgotten and the ends of its 95 % interval, nats per token."""
    found = {}
    for title, group in (("no old text is kept", WITHOUT), ("old text is kept, or a column", WITH)):
        found[title] = {m: [[row["level"], *mean_of(row["forgotten"])] for row in levels(m)] for m in group}
    return found


def frontier(data: dict[str, dict]) -> plt.Figure:
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 5.2), sharey=True)
    for each, (title, methods), styles in zip(axes, data.items(), (WITHOUT, WITH), strict=True):
        for method, points in methods.items():
            if not points:
                continue
            colour, dashes = styles[method]
            level, mean, low, high = np.array(points).T
            each.plot(level, mean, dashes, color=colour, label=method, marker="o", markersize=3)
            each.fill_between(level, low, high, color=colour, alpha=0.15, linewidth=0)
        each.set(title=title, xscale="log", xlabel="left to learn about clinic notes, nats per token above the floor")
        each.set_yscale("symlog", linthresh=0.05, linscale=0.6)
        each.set_xticks((1.5, 1, 0.5, 0.25, 0.12), ("1.5", "1", "0.5", "0.25", "0.12"))
        each.minorticks_off()
        each.invert_xaxis()
        each.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, handlelength=3.2, markerscale=0)
    axes[0].set_yticks((0, 0.05, 0.1, 0.2, 0.5, 1, 2, 5), ("0", "0.05", "0.1", "0.2", "0.5", "1", "2", "5"))
    axes[0].set(ylabel="forgotten of general text, nats per token", ylim=(-0.01, 6))
    return figure


# Five tasks of digits

FIVE = ("plain", "L2 to the start", "EWC", "A-GEM", "replay", "DER++", "all tasks at once", "progressive")


def tasks_data() -> dict[str, list]:
    """Method -> mean accuracy on each of the five tasks at the end, in percent, and the mean of all with its interval."""
    runs = {row["method"]: row for row in recorded.load("permuted_digits", "cpu")["result"]["runs"] if row["chosen"]}
    found = {}
    for method in FIVE:
        ends = [[100 * value for value in table[-1]] for table in runs[method]["tables"]]
        found[method] = {
            "each": [statistics.fmean(values) for values in zip(*ends, strict=True)],
            "all": list(mean_of([statistics.fmean(end) for end in ends])),
        }
    return found


def tasks(data: dict[str, dict]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(7.2, 3.6))
    shades = plt.get_cmap("viridis")(np.linspace(0.05, 0.85, 5))
    for i, entry in enumerate(data.values()):
        mean, low, high = entry["all"]
        axes.bar(i, mean, color="#DDDDDD", width=0.7, label="mean of the five, with its 95 % interval" if i == 0 else None)
        axes.errorbar(i, mean, [[mean - low], [high - mean]], color=plotting.BLACK, capsize=4, lw=1.2)
        for k, value in enumerate(entry["each"]):
            axes.plot(i - 0.26 + 0.13 * k, value, "o", color=shades[k], ms=5, label=f"task {k + 1}" if i == 0 else None)
    axes.axhline(10, color=plotting.RED, lw=1, ls="--", label="guessing")
    axes.set_xticks(range(len(data)), [name.replace(" ", "\n", 1) for name in data], fontsize=9)
    axes.set(ylabel="right after all five tasks, %", ylim=(0, 100))
    axes.grid(axis="x", visible=False)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4)
    return figure


# Far from pre-training


def foreign_data() -> dict[str, dict]:
    """Method -> steps, and what is left to learn: mean and ends of its interval."""
    rows = sorted(
        recorded.load("forgetting", CARD)["result"]["foreign"],
        key=lambda row: ("embeddings" in row["method"], row["method"] != "full fine-tuning", row["trained"]),
    )
    return {
        row["method"]: {"steps": row["steps"], "left": [list(mean_of(values)) for values in zip(*row["left"], strict=True)]} for row in rows
    }


def foreign(data: dict[str, dict]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(7.2, 3.6))
    colours = dict(zip(data, (plotting.BLACK, plotting.SKY, plotting.GREEN, plotting.BLUE, plotting.PINK, plotting.ORANGE), strict=True))
    for method, entry in data.items():
        mean, low, high = np.array(entry["left"]).T
        axes.plot(entry["steps"], mean, "--" if "embeddings" in method else "-", color=colours[method], marker="o", ms=3, label=method)
        axes.fill_between(entry["steps"], low, high, color=colours[method], alpha=0.15, linewidth=0)
    axes.set(xlabel="training steps", ylabel="left to learn,\nnats per token above the floor", yscale="log")
    axes.set_yticks((0.1, 0.2, 0.5, 1, 2, 5, 10), ("0.1", "0.2", "0.5", "1", "2", "5", "10"))
    axes.minorticks_off()
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1))
    return figure


# A real model

GEMMA = {  # plan -> colour, dashes, name
    ("full fine-tuning", 1e-4): (plotting.BLACK, "-", "full fine-tuning"),
    ("full fine-tuning", 3e-5): (plotting.BLACK, "--", "full, a rate three times lower"),
    ("LoRA r=16", 1e-3): (plotting.BLUE, "-", "LoRA"),
    ("LoRA r=16", 3e-4): (plotting.BLUE, "--", "LoRA, a rate three times lower"),
    ("EWC", 1e-4): (plotting.GREEN, "-", "EWC"),
    ("replay 10 %", 1e-4): (plotting.ORANGE, "-", "replay"),
    ("LoRA r=16 + replay 10 %", 1e-3): (plotting.PINK, "-", "LoRA + replay"),
}


def gemma_data() -> dict:
    """Plan -> each seed's path: left to learn and forgotten; and LoRA's update times a share, after one seed's training."""
    result = recorded.load("gemma_forgetting", CARD)["result"]
    before, paths = result["base"]["old"], {}
    for (method, lr), (_, _, name) in GEMMA.items():
        runs = [run for run in result["runs"] if (run["method"], run["lr"]) == (method, lr)]
        paths[name] = [[run["new"][1:], [old - before for old in run["old"][1:]]] for run in runs]
    hasty = next(run for run in result["runs"] if "scaled" in run)
    scaled = [hasty["scaled"]["new"][1:] + hasty["new"][-1:], [old - before for old in hasty["scaled"]["old"][1:] + hasty["old"][-1:]]]
    return {"paths": paths, "level": result["level"], "scaled": scaled}


def gemma(data: dict) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(7.2, 4.9))
    styles = {name: (colour, dashes) for colour, dashes, name in GEMMA.values()}
    for name, runs in data["paths"].items():
        colour, dashes = styles[name]
        for i, (left, forgotten) in enumerate(runs):
            axes.plot(left, forgotten, dashes, color=colour, lw=1.1, label=None if i else name)
            axes.plot(left[-1], forgotten[-1], "o", color=colour, ms=5)
    axes.plot(*data["scaled"], ":", color=plotting.BLUE, lw=1.4, marker="D", ms=5, mfc="white", label="LoRA, ¼, ½, ¾ of its update")
    axes.axvline(data["level"], color=plotting.RED, lw=1)
    axes.text(data["level"] * 1.03, 3.45, "compared here", color=plotting.RED, fontsize=9, ha="right", va="top")
    axes.set(xscale="log", xlabel="left to learn about clinic notes, nats per word above the floor")
    axes.set(ylabel="forgotten of English passages, nats per token")
    axes.set_xticks((1.5, 1, 0.7, 0.5, 0.35, 0.25, 0.15), ("1.5", "1", "0.7", "0.5", "0.35", "0.25", "0.15"))
    axes.minorticks_off()
    axes.invert_xaxis()
    axes.set_ylim(0, 3.8)
    axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.46, -0.14), ncols=2, handlelength=3)
    return figure


# Estimators, by the size of a batch


def draw_shares(axes: plt.Axes, data: dict[str, list]) -> None:
    sizes = data["sizes"]
    for (label, shares), mark in zip(((key, value) for key, value in data.items() if key != "sizes"), "os", strict=True):
        axes.plot(sizes, shares, marker=mark, ms=4, label=label)
    axes.plot(sizes, [1 / size for size in sizes], "--", color=plotting.BLACK, lw=1, label="1 / rows in a batch")
    axes.set(xscale="log", yscale="log", xlabel="rows in a batch", ylabel="sum of F, over the exact one")
    axes.set_xticks(sizes, sizes)
    axes.minorticks_off()
    axes.legend(fontsize=9)


FIGURES = [
    Figure("forgetting_curvature", PAGE, curvature_data, curvature),
    Figure("forgetting_tasks", PAGE, tasks_data, tasks),
    Figure("forgetting_frontier", PAGE, frontier_data, frontier),
    Figure("forgetting_foreign", PAGE, foreign_data, foreign),
    Figure("forgetting_gemma", PAGE, gemma_data, gemma),
]
