"""Figures of unit 05: what scales cost, how they are distributed, the map that codes them, and what the bits can buy."""

import matplotlib.pyplot as plt
import numpy as np
from scipy.special import ndtr

from course.claims import double_quantization as claims
from course.figures import Figure
from course.lab import plotting, scaled
from reference.blockwise import int_codebook
from reference.double_quant import dynamic_codebook

COLOURS = {"as they are": plotting.ORANGE, "mean subtracted": plotting.BLUE}


def bits_data() -> dict[str, dict[str, float]]:
    """Bits per weight of the parts of scales, for rows in the order of the figure."""
    rows = {}
    for block in (64, 32):
        rows[f"blocks of {block}, float32 scales"] = {"float32 scales": claims.scale_bits(block, None)}
        parts = {"8-bit codes of scales": 8 / block, "scales of scales": claims.scale_bits(block) - 8 / block}
        rows[f"blocks of {block}, double quantization"] = parts
    return rows


def draw_bits(data: dict[str, dict[str, float]]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(7.4, 2.5))
    kinds = list(dict.fromkeys(kind for parts in data.values() for kind in parts))
    parts = {kind: [row.get(kind, 0.0) for row in data.values()] for kind in kinds}
    total = plotting.stacked(axes, list(data), parts, horizontal=True, colours=(plotting.ORANGE, plotting.BLUE, plotting.BLACK))
    for height, bits in enumerate(total):
        axes.text(bits + 0.012, height, f"4 + {bits:.3f}", va="center", fontsize=9)
    axes.set(xlabel="bits per weight for scales, beside the 4 of its code", xlim=(0, 1.24))
    axes.grid(axis="y", visible=False)
    axes.legend(fontsize=9, loc="upper right", bbox_to_anchor=(1, 1.06))
    return figure


def density_of_scales(x: np.ndarray, block: int = 64) -> np.ndarray:
    """Of the largest of ``block`` absolute values from N(0, 1)."""
    return block * (2 * ndtr(x) - 1) ** (block - 1) * 2 * np.exp(-x * x / 2) / np.sqrt(2 * np.pi)


def shares_of_largest(centre: bool, second: int = 256, points: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Scales over the largest absolute value of their block of ``second``, in strips of [−1, 1]: middles, and the share in each.

    Given the largest, the other values of the block are independent, and smaller. The largest of each block is left out.
    """
    offset = scaled.largest(64).mean() if centre else 0.0

    def below(x: np.ndarray) -> np.ndarray:  # probability that a scale is less than x
        return (2 * ndtr(np.maximum(x, 0)) - 1) ** 64

    def inside(x: np.ndarray) -> np.ndarray:  # that it is less than x away from the offset
        return below(offset + x) - below(offset - x)

    grid = np.linspace(1e-6, 6, 60_001)
    p = (np.arange(scaled.NODES) + 0.5) / scaled.NODES
    largest = np.interp(p ** (1 / second), inside(grid), grid)[:, None]  # equally likely: (NODES, 1)
    edges = np.linspace(-1, 1, points + 1)
    return (edges[1:] + edges[:-1]) / 2, (np.diff(below(offset + edges * largest)) / inside(largest)).mean(0)


def scales_data() -> dict[str, list[float]]:
    x = np.linspace(1, 5, 161)
    found = {"x": x.tolist(), "density": density_of_scales(x).tolist()}
    for label in COLOURS:
        places, shares = shares_of_largest(label == "mean subtracted")
        found |= {"share of largest": places.tolist(), label: (100 * shares).round(4).tolist()}
    return found


def draw_scales(data: dict[str, list[float]]) -> plt.Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.8, 3.1), width_ratios=(1, 1.25))
    left.fill_between(data["x"], data["density"], color=plotting.SKY, linewidth=0)
    left.set(xlabel="scale: largest of 64 |weights|, in σ", ylabel="density", xlim=(0, 5), ylim=(0, 1.15))
    for label, colour in COLOURS.items():
        right.fill_between(data["share of largest"], data[label], color=colour, alpha=0.75, linewidth=0, label=label)
    right.set(xlabel="scale / largest of its block of 256 scales", ylabel="density", xlim=(-1, 1), ylim=(0, 4.3))
    right.set_xticks([-1, -0.5, 0, 0.5, 1])
    right.legend(loc="upper left", fontsize=9)
    return figure


def map_data() -> dict:
    """Gaps between neighbouring levels above zero, and where the middle nine tenths of centred scales lie."""
    places, shares = shares_of_largest(centre=True, points=4000)
    order = np.abs(places).argsort()
    size, below = np.abs(places)[order], shares[order].cumsum() / shares.sum()
    found: dict = {"nine tenths": np.interp((0.05, 0.95), below, size).round(4).tolist()}
    for name, levels in (("dynamic map", dynamic_codebook()), ("INT8", int_codebook(8))):
        above = levels[levels >= 0]
        found[name] = {"level": above[:-2].tolist(), "gap": above.diff()[:-1].tolist()}  # without the half gap below 1
    return found


def draw_map(data: dict) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(7.4, 3.2))
    axes.axvspan(*data["nine tenths"], color="#EEEEEE", zorder=0)
    axes.text(data["nine tenths"][0] * 1.1, 1.5e-4, "nine tenths of centred\nscales (normal weights)", fontsize=9)
    for name, colour, style in (("dynamic map", plotting.BLUE, "-"), ("INT8", plotting.RED, "--")):
        places = np.maximum([*data[name]["level"], 1], 1e-9)  # zero has no place on a logarithmic axis
        axes.step(places, [*data[name]["gap"], data[name]["gap"][-1]], style, where="post", color=colour, label=name)
    axes.set(xscale="log", yscale="log", xlim=(5e-5, 1), ylim=(1e-5, 0.15))
    axes.set(xlabel="size of the value / largest of its block", ylabel="distance to the next level")
    axes.legend(loc="upper left")
    return figure


BLOCKS = (16, 32, 64, 128, 256)


def tradeoff_data() -> dict[str, list[list[float]]]:
    """[bits per weight, root mean square error in percent of σ] for ``BLOCKS``."""
    kinds = {"float32 scales": (None, False), "double quantization": (256, True)}
    return {
        kind: [[claims.bits(block, second), round(claims.rmse_percent(block, double), 3)] for block in BLOCKS]
        for kind, (second, double) in kinds.items()
    }


def draw_tradeoff(data: dict[str, list[list[float]]]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(7.4, 3.2))
    looks = {"float32 scales": ("o--", plotting.ORANGE, (6, 4), "left"), "double quantization": ("o-", plotting.BLUE, (-7, -9), "right")}
    for kind, (style, colour, shift, side) in looks.items():
        axes.plot(*zip(*data[kind], strict=True), style, color=colour, label=kind, markersize=5)
        for block, point in zip(BLOCKS, data[kind], strict=True):
            axes.annotate(str(block), point, shift, textcoords="offset points", ha=side, fontsize=9)
    axes.set(xlabel="bits per weight, scales included", ylabel="error, % of σ", xlim=(3.85, 6.2), ylim=(7.8, 10.2))
    axes.legend(title="block sizes beside the points", fontsize=9)
    return figure


PAGE = "lessons/05_double_quantization.md"
FIGURES = [
    Figure("double_quantization_bits", PAGE, bits_data, draw_bits),
    Figure("double_quantization_scales", PAGE, scales_data, draw_scales),
    Figure("double_quantization_map", PAGE, map_data, draw_map),
    Figure("double_quantization_tradeoff", PAGE, tradeoff_data, draw_tradeoff),
]
