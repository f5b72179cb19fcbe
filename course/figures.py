"""Figures of the README that come from recorded results: ``python -m course.figures`` draws them again after a new measurement.

A picture carries the fingerprint of what it was drawn from, so that a test sees when the results have moved on.
"""

import hashlib
import json
from pathlib import Path

import matplotlib.pyplot as plt

from course import ROOT
from course.lab import plotting, recorded

FIGURE = ROOT / "lessons" / "figures" / "four_bits.png"
RESULTS = ("nf4_kernels", "qlora_caps")


def results() -> dict[str, dict]:
    return {name: recorded.load(name, device="h100") for name in RESULTS}


def fingerprint(entries: dict[str, dict]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()[:16]


def draw_memory(axes: plt.Axes, rows: list[dict]) -> None:
    """Each model's memory by part as a stacked bar, beside the prediction of its peak and its cap."""
    kinds = ("weights, 4 bits", "adapters", "optimizer's states", "other tensors", "CUDA and its allocator")
    for i, row in enumerate(rows):
        parts = [row["built"] - row["adapters"], row["adapters"], row["held"] - row["built"], row["peak"] - row["held"]]
        parts.append(row["context"] + row["reserved"] - row["peak"])
        start = 0
        for kind, part, colour in zip(kinds, parts, (*plotting.COLOURS[:4], "#BDBDBD"), strict=True):
            axes.barh(i, part / 1e9, left=start / 1e9, color=colour, label=None if i else kind)
            start += part
        for at, style, label in ((row["predicted"], "-", "peak of tensors, predicted"), (row["cap"], ":", "cap of the process")):
            axes.plot([at / 1e9] * 2, [i - 0.46, i + 0.46], style, color="black", label=None if i else label)
    axes.set_yticks(range(len(rows)), [row["shape"] for row in rows])
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


def main(path: Path = FIGURE) -> Path:
    """Draw, save and return the figure's path."""
    entries = results()
    plotting.use_style()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.9), width_ratios=(1.25, 1))
    draw_memory(left, sorted(entries["qlora_caps"]["result"]["rows"], key=lambda row: -row["cap"]))
    draw_speed(right, entries["nf4_kernels"]["result"]["rows"][:2])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Source": fingerprint(entries)})
    plt.close(figure)
    return path


if __name__ == "__main__":
    print(main().relative_to(ROOT))
