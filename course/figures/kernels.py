"""Figures of unit 13: what operators move, what a warp touches, the roofline, what is busy, and how far from the floor it all is."""

import matplotlib.pyplot as plt
import torch

from course.claims import qlora
from course.claims.kernels import SECTOR, WARP, floor_percent, product_rate
from course.figures import Figure
from course.lab import plotting, recorded
from course.lab.traffic import MovedBytes
from reference.blockwise import midpoints
from reference.nf4 import NF4_CODEBOOK

PAGE, APPENDIX, TRIED = "lessons/13_kernels.md", "lessons/appendix/13_kernels.md", "lessons/appendix/13_tried.md"
CARDS = {"H100": "h100", "H200": "h200"}
WHO = {
    "ours": ("NF4, here", plotting.BLUE, "o-"),
    "bitsandbytes": ("NF4, bitsandbytes", plotting.ORANGE, "s--"),
    "floor": ("the least for NF4", plotting.BLACK, ":"),
}
WORKS = {
    "quantize": ("quantize", None),
    "dequantize": ("dequantize", None),
    "dequantize,\ndouble\nquantization": ("dequantize, double quantization", None),
    "layer,\n1 row": ("linear", 1),
    "layer,\n16 rows": ("linear", 16),
}
PARTS = {"dram": "memory", "issue": "starting instructions", "alu": "integers and logic", "tensor": "tensor cores"}


def traffic_data() -> dict[str, dict[str, float]]:
    """Way -> step -> bytes per weight, to decode eight-bit codes in blocks of 64 to bfloat16."""
    codes, steps = torch.ones(1 << 16, dtype=torch.int8), torch.ones(1 << 10)
    found, parts = {}, []
    for name, work in {
        "codes to float32": lambda: parts.append(codes.to(torch.float32)),
        "a step for each": lambda: parts.append(steps.repeat_interleave(64)),
        "product": lambda: parts.append(parts[0] * parts[1]),
        "to bfloat16": lambda: parts[2].to(torch.bfloat16),
    }.items():
        with MovedBytes() as moved:
            work()
        found[name] = moved.bytes / codes.numel()
    return {"four operators\nof torch": found, "one kernel": {"codes and steps in, weights out": 1 + 4 / 64 + 2}}


def traffic(data: dict[str, dict[str, float]]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(8.4, 2.1))
    colours = iter((plotting.ORANGE, plotting.SKY, plotting.PINK, plotting.GREEN, plotting.BLUE))
    for way, steps in data.items():
        start = 0.0
        for name, count in steps.items():
            axes.barh(way, count, left=start, color=next(colours), label=f"{name}: {count:.1f}", height=0.6)
            start += count
    axes.invert_yaxis()
    axes.set(xlabel="bytes that cross the memory bus, per weight")
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=3, fontsize=9)
    return figure


def sectors_data() -> dict[str, list[int]]:
    """What a warp reads -> how many of its threads read in the first, second, … 32nd sector that it touches."""
    counts = {}
    for name, stride in {"neighbours": 1, "every second number": 2, "every fourth": 4, "a column": 32}.items():
        touched = [thread * stride * 4 // SECTOR for thread in range(WARP)]
        counts[name] = [touched.count(sector) for sector in dict.fromkeys(touched)]
    return counts


def sectors(data: dict[str, list[int]]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(8.4, 1.9))
    axes.imshow([[1] * len(row) + [0] * (32 - len(row)) for row in data.values()], cmap="Blues", vmin=0, vmax=1.4, aspect="auto")
    for y, row in enumerate(data.values()):
        for x, count in enumerate(row):
            axes.text(x, y, count, ha="center", va="center", fontsize=8, color="white")
    labels = [f"{name}: {len(row)} sectors" for name, row in data.items()]
    axes.set_yticks(range(len(data)), labels)
    axes.set_xticks([x - 0.5 for x in range(33)], minor=True)
    axes.set_yticks([y - 0.5 for y in range(len(data) + 1)], minor=True)
    axes.grid(False)
    axes.grid(which="minor", color="white", lw=2)
    axes.tick_params(which="both", length=0)
    axes.set_xticks([0, 7, 15, 23, 31], ["1st", "8th", "16th", "24th", "32nd"])
    axes.set_xlabel("32-byte sectors fetched, and how many of the 32 threads read in each")
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def roofline_data() -> dict[str, dict]:
    """Card -> its two limits, and for bf16 and NF4 weights operations per byte and 10¹² operations per second, by rows."""
    found = {}
    for card, device in CARDS.items():
        result = recorded.load("nf4_kernels", device)["result"]
        side = result["side"]
        rows = [row for row in result["rows"] if row["work"] == "linear"]
        found[card] = {
            "memory": result["copy_gigabytes_per_second"] / 1e3,
            "products": product_rate(device),
            "rows": [r["rows"] for r in rows],
        }
        for who, weight in (("bf16 weights", 2.0), ("ours", qlora.FOUR_BITS)):
            intensity = [2 * r["rows"] * side / (weight * side + 4 * r["rows"]) for r in rows]
            found[card][who] = [intensity, [2 * r["rows"] * side**2 / (1e9 * r[who]) for r in rows]]
    return found


def roofline(data: dict[str, dict]) -> plt.Figure:
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.9), sharey=True)
    for each, (card, limits) in zip(axes, data.items(), strict=True):
        ridge = limits["products"] / limits["memory"]
        each.plot(
            [0.7, ridge, 2e4], [0.7 * limits["memory"], *[limits["products"]] * 2], color=plotting.BLACK, lw=1.4, label="the roofline"
        )
        for who, label, colour, marker in (
            ("bf16 weights", "bf16 weights", plotting.ORANGE, "s"),
            ("ours", "NF4, here", plotting.BLUE, "o"),
        ):
            each.plot(*limits[who], marker, color=colour, markersize=5, label=label)
        for count in (1, 16, 2048):
            i = limits["rows"].index(count)
            name = f"{count:,} row{'s' * (count > 1)}"
            each.annotate(name, (limits["ours"][0][i], limits["ours"][1][i]), (6, -11), textcoords="offset points", fontsize=8)
        each.axvline(ridge, color="#999999", lw=1, ls=":")
        each.set(xscale="log", yscale="log", xlabel="operations per byte that must move", title=card)
    axes[0].set_ylabel("10¹² operations per second")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    return figure


def busy_data() -> dict[str, dict[str, float]]:
    """Kernel -> part of the GPU -> percent of what it can do."""
    kernels = recorded.load("nf4_profile", "h100")["result"]["kernels"]
    return {name: {label: kernel[part] for part, label in PARTS.items()} for name, kernel in kernels.items()}


def busy(data: dict[str, dict[str, float]]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(8.4, 3.3))
    for i, part in enumerate(PARTS.values()):
        bars = axes.bar([x + 0.2 * (i - 1.5) for x in range(len(data))], [each[part] for each in data.values()], 0.19, label=part)
        axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=1)
    axes.set_xticks(range(len(data)), [f"layer, {name}" if "row" in name else name for name in data])
    axes.set(ylabel="percent of what it can do", ylim=(0, 100))
    axes.grid(axis="x", visible=False)
    figure.legend(loc="outside upper center", ncols=4, fontsize=9)
    return figure


def floors_data() -> dict[str, dict]:
    """Card -> who -> floor over time, in percent, for each work."""
    return {
        card: {who: [floor_percent(work, who, rows, device) for work, rows in WORKS.values()] for who in ("ours", "bitsandbytes")}
        for card, device in CARDS.items()
    }


def floors(data: dict[str, dict]) -> plt.Figure:
    figure, axes = plt.subplots(1, 2, figsize=(8.8, 3.6), sharey=True)
    for each, (card, ways) in zip(axes, data.items(), strict=True):
        for shift, who, label, colour in ((-0.2, "ours", "here", plotting.BLUE), (0.2, "bitsandbytes", "bitsandbytes", plotting.ORANGE)):
            bars = each.bar([x + shift for x in range(len(WORKS))], ways[who], 0.38, color=colour, label=label)
            each.bar_label(bars, fmt="%.0f", fontsize=8, padding=1)
        each.set_xticks(range(len(WORKS)), list(WORKS), fontsize=7)
        each.axhline(100, color=plotting.BLACK, lw=1.2, ls=":", label="floor")
        each.set(title=card, ylim=(0, 110))
        each.grid(axis="x", visible=False)
    axes[0].set_ylabel("floor / time, percent")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    return figure


LIMITS = {
    "quantize": ("quantize", None),
    "dequantize": ("dequantize", None),
    "dequantize,\ndouble\nquantization": ("dequantize, double quantization", None),
} | {f"layer,\n{rows} row{'s' * (rows > 1)}": ("linear", rows) for rows in (1, 16, 32, 64, 128)}
KINDS = {  # of candidates, by how their names begin
    "loop": ("a loop over tiles", plotting.GREEN, "D"),
    "ours": ("the same in other sizes", plotting.BLUE, "o"),
    "words": ("a thread decodes what it writes", plotting.ORANGE, "s"),
    "ahead": ("ask the cache first for all", plotting.RED, "v"),
    "stages": ("x several steps ahead", plotting.SKY, "^"),
    "scaled": ("… and scales into the levels", plotting.PINK, "P"),
}


def _limits() -> dict[str, dict]:
    return {name: recorded.row("kernel_limits", "h200", work=work, rows=rows) for name, (work, rows) in LIMITS.items()}


def bars_data() -> dict[str, dict[str, float]]:
    """Work -> percent reached by the kernels of the course, by bitsandbytes and by the fastest candidate; and the goal."""
    found = {}
    for name, row in _limits().items():
        against = row["bf16 weights" if row.get("rows", 1) > 1 else "floor"]
        fastest = min(each["ms"] for each in row["candidates"] if "ms" in each)
        times = {"ours": row["ours"], "bitsandbytes": row["bitsandbytes"], "other": fastest}
        found[name] = {who: 100 * against / ms for who, ms in times.items()} | {"goal": 100 * row["bar"]}
    return found


def bars(data: dict[str, dict[str, float]]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(8.4, 3.6))
    for shift, who, label, colour in ((-0.2, "ours", "here", plotting.BLUE), (0.2, "bitsandbytes", "bitsandbytes", plotting.ORANGE)):
        drawn = axes.bar([x + shift for x in range(len(data))], [each[who] for each in data.values()], 0.38, color=colour, label=label)
        axes.bar_label(drawn, fmt="%.0f", fontsize=8, label_type="center", color="white")
    axes.plot(
        [x - 0.2 for x in range(len(data))], [each["other"] for each in data.values()], "D", color=plotting.GREEN, markersize=6, mec="white"
    )
    axes.plot([], [], "D", color=plotting.GREEN, markersize=6, mec="white", label="fastest other way")
    left, right = [x - 0.42 for x in range(len(data))], [x + 0.02 for x in range(len(data))]
    axes.hlines([each["goal"] for each in data.values()], left, right, color=plotting.BLACK, lw=2, label="goal")
    axes.axvline(3.5, color="#999999", lw=1, ls=":")
    axes.set_xticks(range(len(data)), list(data), fontsize=8)
    axes.set(ylabel="floor / time, percent", ylim=(0, 135))
    axes.text(3.6, 128, "bf16 weights' time / time, percent", fontsize=8, va="center")
    axes.grid(axis="x", visible=False)
    figure.legend(loc="outside lower center", ncols=4, fontsize=9)
    return figure


def tried_data() -> dict[str, dict[str, list[float]]]:
    """Work -> kind of candidate -> the speed of each, over that of the kernel of the course."""
    found = {}
    for name, row in _limits().items():
        found[name.replace("\n", " ")] = {
            kind: [row["ours"] / each["ms"] for each in row["candidates"] if each["way"].startswith(kind) and "ms" in each]
            for kind in KINDS
        }
    return found


def tried(data: dict[str, dict[str, list[float]]]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(8.4, 3.9))
    for i, (kind, (label, colour, marker)) in enumerate(KINDS.items()):
        points = [(speed, y + 0.1 * (i - 2.5)) for y, kinds in enumerate(data.values()) for speed in kinds[kind]]
        axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=5, label=label)
    axes.axvline(1, color=plotting.BLACK, lw=1.4, label="the kernel of the course")
    axes.axvspan(1, 1.03, color="#dddddd", lw=0, label="a gain below 3 %")
    axes.set_yticks(range(len(data)), list(data), fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="speed / speed of the kernel of the course", xlim=(0.55, 1.12))
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    return figure


def cells_data() -> dict[str, list[float]]:
    """Edges of 32 equal cells, and the midpoints between NF4's levels."""
    edges = (torch.arange(33) - 16.5) / 15
    return {"edges": edges.tolist(), "midpoints": midpoints(NF4_CODEBOOK).tolist()}


def cells(data: dict[str, list[float]]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(8.4, 1.5))
    axes.vlines(data["edges"], 0, 1, color="#999999", lw=1, label="edge of a cell")
    axes.vlines(data["midpoints"], 0.1, 0.9, color=plotting.RED, lw=2.5, label="midpoint between two levels")
    axes.set(xlabel="weight / absmax of its block", yticks=[], xlim=(-1.12, 1.12))
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    figure.legend(loc="outside upper right", ncols=2, fontsize=9)
    return figure


def rows_data() -> dict[str, list]:
    """Card -> rows of x, and each time over that of bf16 weights."""
    found = {}
    for card, device in CARDS.items():
        rows = [row for row in recorded.load("nf4_kernels", device)["result"]["rows"] if row["work"] == "linear"]
        found[card] = {"rows": [row["rows"] for row in rows]} | {who: [row[who] / row["bf16 weights"] for row in rows] for who in WHO}
    return found


def rows(data: dict[str, dict]) -> plt.Figure:
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.7), sharey=True)
    for each, (card, times) in zip(axes, data.items(), strict=True):
        for who, (label, colour, style) in WHO.items():
            each.plot(times["rows"], times[who], style, color=colour, markersize=4, label=label)
        each.axhline(1, color="#777777", lw=1.2, label="bf16 weights")
        each.set(xlabel="rows of x", title=card, xscale="log")
        each.set_xticks([1, 8, 64, 512, 8192], ["1", "8", "64", "512", "8,192"])
        each.minorticks_off()
    axes[0].set_ylim(0)
    axes[0].set_ylabel("time / time with bf16 weights")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    return figure


FIGURES = [
    Figure("kernels_traffic", PAGE, traffic_data, traffic),
    Figure("kernels_sectors", PAGE, sectors_data, sectors),
    Figure("kernels_roofline", PAGE, roofline_data, roofline),
    Figure("nf4_cells", PAGE, cells_data, cells),
    Figure("kernels_busy", PAGE, busy_data, busy),
    Figure("kernels_bars", PAGE, bars_data, bars),
    Figure("kernels_floors", TRIED, floors_data, floors),
    Figure("kernels_tried", TRIED, tried_data, tried),
    Figure("nf4_rows", APPENDIX, rows_data, rows),
]
