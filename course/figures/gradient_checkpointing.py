"""Figures of unit 08: memory in the course of a step, against segments, offloaded; gradients in float16; what vanishes in bfloat16."""

import functools
from collections.abc import Callable, Iterable

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from course.claims.gradient_checkpointing import activation_gradients, trajectory
from course.figures import Figure
from course.lab import plotting, recorded
from course.lab.live import LiveBytes
from reference.checkpointing import activation_cost, checkpoint, checkpoint_sequential

PAGE = "lessons/08_gradient_checkpointing.md"

# Memory in the course of a step


class Timeline(LiveBytes):
    """What is there after each operation, in ``history``."""

    def __init__(self) -> None:
        super().__init__()
        self.history: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(function, types, args, kwargs)
        self.history.append(self.bytes)
        return result


class Block(nn.Module):
    """x + W₂·tanh(W₁·x), four times as wide inside: keeps x, and the inside once."""

    def __init__(self, width: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def timeline(forward: Callable[[Tensor], Tensor], x: Tensor, layers: Iterable[nn.Module]) -> dict:
    """Activations in the course of a step, in units of x ("curve"), and where its backward begins ("turn").

    The gradients of the weights are there before, and are not counted.
    """
    for p in (p for layer in layers for p in layer.parameters()):
        p.grad = torch.zeros_like(p)
    with Timeline() as live:
        y = forward(x)
        turn = len(live.history)
        y.backward(torch.zeros_like(x))
    return {"curve": [round(count / x.nbytes, 2) for count in live.history], "turn": turn}


def timeline_data() -> dict[str, dict]:
    """Ways -> the curve and its turn, of 16 blocks."""
    torch.manual_seed(0)
    width, blocks = 8, 16
    layers, x = nn.Sequential(*(Block(width) for _ in range(blocks))), torch.randn(4096, width)
    how, found = functools.partial(checkpoint, preserve_rng_state=False), {}
    for label, segments in {"nothing recomputed": 1, "4 segments of 4": 4, "one segment per layer": 16}.items():
        found[label] = timeline(functools.partial(checkpoint_sequential, layers, segments=segments, how=how), x, layers)
    return found


def draw_timeline(axes: plt.Axes, data: dict[str, dict]) -> None:
    for (label, each), colour in zip(data.items(), (plotting.RED, plotting.ORANGE, plotting.BLUE), strict=True):
        axes.plot(each["curve"], color=colour, lw=1.4, label=f"{label}: peak {max(each['curve']):.0f}")
        axes.plot(each["turn"], each["curve"][each["turn"] - 1], "o", color=colour, markersize=6)
    axes.set(xlabel="operations so far (dot: the backward begins)", ylabel="activations held,\nin inputs of a layer", ylim=(0, None))
    axes.legend(loc="upper right")


def draw_timeline_figure(data: dict[str, dict]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(7.4, 3.6))
    draw_timeline(axes, data)
    return figure


# Against segments


def segments_data() -> dict[str, list]:
    rows = [row for row in recorded.load("checkpointing", "h200")["result"]["rows"] if row["work"] == "memory"]
    unit, ratio = rows[0]["input_bytes"], rows[0]["layer_bytes"] / rows[0]["input_bytes"]
    extra = (rows[0]["predicted"] - rows[0]["formula"]) / unit
    ks = [row["segments"] for row in rows]
    return {
        "same": [(k, activation_cost(64, k)) for k in ks],
        "formula": [(k, (activation_cost(64, k, ratio) + extra) * unit / 1e9) for k in ks],
        "peak": [(row["segments"], row["peak"] / 1e9) for row in rows],
    }


def segments(data: dict[str, list]) -> plt.Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.5))
    left.plot(*zip(*data["same"], strict=True), color=plotting.BLUE)
    right.plot(*zip(*data["formula"], strict=True), color=plotting.BLUE, label="formula")
    right.plot(*zip(*data["peak"], strict=True), "o", color=plotting.ORANGE, markersize=6, label="measured, H200")
    for axes, curve in ((left, data["same"]), (right, data["formula"])):
        k, least = min(curve, key=lambda point: point[1])
        arrow = {"textcoords": "offset points", "ha": "center", "arrowprops": {"arrowstyle": "->", "shrinkB": 6}}
        axes.annotate(f"least: {k} segments", (k, least), (0, 40), **arrow)
        axes.set_xscale("log", base=2)
        axes.set_xticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])
        axes.set(xlabel="segments k", ylim=(0, None))
    left.set(title="a layer keeps its input alone", ylabel="peak, in inputs of a layer")
    right.set(title="a Llama's layer keeps 19 times as much", ylabel="peak of activations, GB")
    right.legend()
    return figure


# Offloaded

WAYS = {
    "none": ("all kept on the GPU", plotting.RED, "o"),
    "save_on_cpu": ("save_on_cpu", plotting.ORANGE, "s"),
    "ours, nothing ahead": ("offloaded, each copy waited for", plotting.SKY, "D"),
    "ours": ("offloaded, 0.27 GB ahead", plotting.BLUE, "D"),
    "checkpoint": ("checkpointed", plotting.GREEN, "^"),
}


def offload_data() -> dict[str, list]:
    rows = {row["how"]: row for row in recorded.load("activation_offloading", "h200")["result"]["rows"]}
    return {how: [rows[how]["activations"] / 1e9, 1e3 * rows[how]["seconds"]] for how in WAYS}


def offloading(data: dict[str, list]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(7.2, 3.5))
    for how, (gigabytes, milliseconds) in data.items():
        label, colour, mark = WAYS[how]
        axes.plot(gigabytes, milliseconds, mark, color=colour, markersize=9)
        axes.annotate(label, (gigabytes, milliseconds), (9, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set(xlabel="activations at the peak, GB", ylabel="forward and backward, ms", ylim=(0, None), xlim=(0, 7))
    return figure


# float16

BINS = range(-44, 0)


def underflow_data() -> dict[str, list]:
    """Percent of the gradients in each power of two."""
    grads = activation_gradients()
    counts = torch.bincount(grads[grads > 0].log2().floor().clamp(BINS[0], BINS[-1]).long() - BINS[0], minlength=len(BINS))
    return {"percent": [round(value, 2) for value in (100 * counts / counts.sum()).tolist()]}


def draw_underflow(axes: plt.Axes, data: dict[str, list], exponent: int = 0) -> None:
    """Bars over powers of two, multiplied by 2^exponent, with float16's range behind."""
    places = [each + exponent + 0.5 for each in BINS]
    lost = [place < -25 for place in places]
    colours = [plotting.RED if each else plotting.BLUE for each in lost]
    axes.axvspan(-24, -14, color=plotting.ORANGE, alpha=0.18, lw=0, label="fewer digits")
    axes.axvspan(-14, 16, color=plotting.GREEN, alpha=0.14, lw=0, label="all digits")
    axes.bar(places, data["percent"], width=0.9, color=colours)
    share = sum(percent for percent, gone in zip(data["percent"], lost, strict=True) if gone)
    axes.set(title=f"loss × {2**exponent:,}: {share:.1f} % become zero" if exponent else f"as they are: {share:.1f} % become zero")
    axes.set(xlim=(-46, 18), xticks=range(-40, 20, 10), xlabel="log₂ of the gradient")
    axes.grid(axis="x", visible=False)


def underflow(data: dict[str, list]) -> plt.Figure:
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.3), sharey=True)
    for each, exponent in zip(axes, (0, 14), strict=True):
        draw_underflow(each, data, exponent)
    axes[0].set_ylabel("share of gradients, %")
    axes[0].legend(loc="upper right", title="float16 has", fontsize=9)
    return figure


# bfloat16

ADDED = {
    "float32": ("float32", plotting.BLACK, "-"),
    "nearest": ("rounded to nearest", plotting.RED, "-"),
    "stochastic": ("rounded at random", plotting.BLUE, "--"),
    "Kahan": ("Kahan's sum", plotting.GREEN, ":"),
}


def vanish_data() -> dict[str, dict]:
    rows = recorded.load("bf16_training", "cpu")["result"]["rows"]
    ways = ("float32", "masters", "nearest", "stochastic", "Kahan")
    losses = {way: [(row["rate"], row["losses"]) for row in rows if row["way"] == way] for way in ways}
    return {"sums": {how: [round(value, 3) for value in trajectory(how)] for how in ADDED}, "losses": losses}


def vanish(data: dict[str, dict]) -> plt.Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.5))
    for how, curve in data["sums"].items():
        label, colour, dashes = ADDED[how]
        left.plot([50 * i for i in range(len(curve))], curve, dashes, color=colour, label=label)
    left.set(title="1 + 0.0001 + 0.0001 + …", xlabel="steps", ylabel="weight", ylim=(0.99, 1.125))
    left.legend(fontsize=9)
    marks = {"masters": ("float32 masters", plotting.ORANGE, "s")} | {how: (*ADDED[how][:2], "o") for how in ADDED}
    for shift, (how, points) in enumerate(data["losses"].items()):
        label, colour, mark = marks[how]
        for rate, losses in points:
            places = [rate * 1.22 ** (shift - 2)] * len(losses)
            right.plot(places, losses, mark, color=colour, markersize=5, label=label if rate == points[0][0] else None)
    right.set(
        title="the tiny model after 80 steps, 3 seeds",
        xscale="log",
        xlabel="learning rate",
        ylabel="nats per token above the floor",
        ylim=(0, 7),
    )
    right.legend(fontsize=8.5, loc="upper right")
    return figure


FIGURES = [
    Figure("checkpointing_timeline", PAGE, timeline_data, draw_timeline_figure),
    Figure("checkpointing_segments", PAGE, segments_data, segments),
    Figure("activation_offloading", PAGE, offload_data, offloading),
    Figure("fp16_underflow", PAGE, underflow_data, underflow),
    Figure("bf16_vanish", PAGE, vanish_data, vanish),
]
