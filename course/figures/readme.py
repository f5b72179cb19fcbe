"""What four bits bring: the README's figure."""

import matplotlib.pyplot as plt

from course.figures import Figure
from course.lab import plotting, recorded


def draw_memory(axes: plt.Axes, rows: list[dict]) -> None:
    """Each model's memory by part as a stacked bar, beside the prediction of its peak and its cap. The first row is the upper one."""
    parts = {
        "weights, 4 bits": [row["built"] - row["adapters"] for row in rows],
        "adapters": [row["adapters"] for row in rows],
        "optimizer's states": [row["held"] - row["built"] for row in rows],
        "other tensors": [row["peak"] - row["held"] for row in rows],
        "CUDA and its allocator": [row["context"] + row["reserved"] - row["peak"] for row in rows],
    }
    parts = {kind: [count / 1e9 for count in counts] for kind, counts in parts.items()}
    plotting.stacked(axes, [row["shape"] for row in rows], parts, horizontal=True, colours=(*plotting.COLOURS[:4], "#BDBDBD"))
    for i, row in enumerate(rows):
        for at, style, label in ((row["predicted"], "-", "peak of tensors, predicted"), (row["cap"], ":", "cap of the process")):
            axes.plot([at / 1e9] * 2, [i - 0.46, i + 0.46], style, color="black", label=None if i else label)
    axes.set(xlabel="GB, a whole training step of 1 × 512 tokens", xlim=(0, 50), title="QLoRA under a cap: measured, predicted")
    axes.legend(fontsize=8, loc="upper right")


def draw_speed(axes: plt.Axes, rows: list[dict]) -> None:
    """Times of quantizing and dequantizing as multiples of the floor."""
    ways = {"torch": "plain torch", "torch.compile": "torch.compile", "bitsandbytes": "bitsandbytes", "ours": "one kernel, here"}
    colours = dict(zip(ways, (plotting.PINK, plotting.GREEN, plotting.ORANGE, plotting.BLUE), strict=True))
    bars = [(f"{row['work']}\n{ways[key]}", row[key], row["floor"], colours[key]) for row in rows for key in ways if key in row]
    for i, (_, time, floor, colour) in enumerate(reversed(bars)):
        axes.barh(i, time / floor - 1, left=1, color=colour)
        axes.annotate(f"{time:.3f} ms, {time / floor:.3g} ×", (time / floor, i), (5, -3), textcoords="offset points", fontsize=8)
    axes.set_yticks(range(len(bars)), [name for name, *_ in reversed(bars)], fontsize=8)
    axes.set(xscale="log", xlim=(1, 400), xlabel="time / floor: the bytes at the rate of a copy", title="NF4, 8192 × 8192 weights")


def four_bits(entries: dict[str, dict]) -> plt.Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.9), width_ratios=(1.25, 1))
    draw_memory(left, sorted(entries["qlora_caps"]["result"]["rows"], key=lambda row: row["cap"]))
    draw_speed(right, entries["nf4_kernels"]["result"]["rows"][:2])
    return figure


def four_bits_data() -> dict[str, dict]:
    return {name: recorded.load(name, device="h100") for name in ("nf4_kernels", "qlora_caps")}


FIGURES = [Figure("four_bits", "README.md", four_bits_data, four_bits)]
