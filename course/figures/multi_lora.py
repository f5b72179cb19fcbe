"""Figures of unit 11: a mixed batch, the bytes of a step, what merges keep, ten thousand tenants."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, Rectangle

from course.claims import multi_lora as claims
from course.figures import Figure
from course.lab import plotting

PAGE = "lessons/11_multi_lora.md"
PALE = ("#BBBBBB", plotting.ORANGE)
TENANTS = {"sql": plotting.BLUE, "clinic": plotting.ORANGE, "legal": plotting.GREEN, "base alone": "#BBBBBB"}


def batch_data() -> dict:
    """The rows of a batch by their tenant, and by the groups in which their updates are computed."""
    rows = ["sql", "clinic", "sql", "base alone", "legal", "sql", "clinic", "legal"]
    return {"rows": rows, "groups": [[name, [i for i, row in enumerate(rows) if row == name]] for name in ("sql", "clinic", "legal")]}


def _box(axes, x: float, y: float, width: float, height: float, colour: str, text: str = "", **style) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="white", linewidth=1.5))
    axes.text(
        x + width / 2,
        y + height / 2,
        text,
        ha="center",
        va="center",
        **{"fontsize": 9, "color": plotting.BLACK if colour in PALE else "white"} | style,
    )


def _arrow(axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color="#777777", linewidth=1.1))


def draw_batch(data: dict) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(8.6, 3.6))
    rows, n = data["rows"], len(data["rows"])
    for i, name in enumerate(rows):
        for x in (0, 9.6):
            _box(axes, x, n - 1 - i, 1.5, 1, TENANTS[name], f"{name}" if x == 0 else f"y of row {i}", fontsize=8)
    _box(axes, 3.2, 4.9, 4.6, 2.4, plotting.BLACK, "W · x\none product, all rows", fontsize=10)
    place, height = 0.1, 0.5
    for name, group in data["groups"]:
        tall = height * len(group)
        _box(axes, 3.2, place, 1.4, tall, TENANTS[name], "rows " + ", ".join(map(str, group)), fontsize=8)
        _box(axes, 4.8, place, 3.0, tall, TENANTS[name], f"s·B·(A·x) of {name}", fontsize=8)
        place += tall + 0.25
    _arrow(axes, (1.6, 6.1), (3.1, 6.1))
    _arrow(axes, (1.6, 2.2), (3.1, 2.2))
    _arrow(axes, (7.9, 6.1), (9.5, 6.1))
    _arrow(axes, (7.9, 2.2), (9.5, 2.2))
    axes.text(8.7, 4.15, "added, each\nback in its row", ha="center", va="center", fontsize=9)
    axes.text(2.35, 4.15, "sorted\nby adapter", ha="center", va="center", fontsize=9)
    axes.set(xlim=(-0.1, 11.2), ylim=(-0.1, n + 0.1))
    axes.axis("off")
    return figure


DISTINCT = (0, 1, 8, 32)


def step_data() -> dict:
    """GB that a decode step of a 70B-shaped NF4 base reads with 32 rows of 1,024 tokens."""
    found = {"base": [claims.base_gb()] * len(DISTINCT), "keys and values": [claims.kv_gb(32, 1024)] * len(DISTINCT)}
    found["adapters, r = 16"] = [n * claims.adapter_mb() / 1e3 for n in DISTINCT]
    return {
        "distinct": list(DISTINCT),
        "parts": found,
        "card": {r: claims.slots_gb(100, r) for r in (16, 64)},
        "base16": claims.base_gb(16),
    }


def draw_step(data: dict) -> plt.Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.0, 3.3), width_ratios=(1.15, 1))
    names = [str(n) for n in data["distinct"]]
    total = plotting.stacked(left, names, data["parts"], colours=[plotting.BLACK, plotting.SKY, plotting.ORANGE], width=0.62)
    for i, value in enumerate(total):
        left.text(i, value + 0.8, f"{value:.0f} GB", ha="center", fontsize=9)
    left.set(xlabel="distinct adapters in a batch of 32 rows", ylabel="GB read by a step", ylim=(0, 88), title="a decode step, 70B in NF4")
    left.legend(loc="upper left", fontsize=8, ncols=3, columnspacing=0.9, handlelength=1.2)
    left.grid(axis="x", visible=False)
    bars = {
        "base, NF4": data["parts"]["base"][0],
        "100 adapters, r = 16": data["card"][16],
        "100 places for r = 64": data["card"][64],
        "base, 16 bits": data["base16"],
    }
    colours = [plotting.BLACK, plotting.ORANGE, plotting.RED, "#777777"]
    right.barh(list(bars), list(bars.values()), color=colours, height=0.6)
    for i, value in enumerate(bars.values()):
        right.text(value + 3, i, f"{value:.0f} GB", va="center", fontsize=9)
    right.invert_yaxis()
    right.set(xlabel="GB on the card", xlim=(0, 205), title="to hold all of them")
    right.grid(axis="y", visible=False)
    return figure


SHOWN = {
    "sum": "sum",
    "mean": "mean",
    "linear on A and B": "A and B apart",
    "DARE": "DARE",
    "TIES": "TIES",
    "DARE and TIES": "DARE and TIES",
}


def merges_data() -> dict:
    """Method -> nats per token of each seed on both tasks and on general text; and of the adapters alone."""
    found = {}
    for kind, names in (("alone", ("sql", "clinic", "both")), ("method", SHOWN)):
        for name in names:
            rows = claims.runs(kind, name)
            found[f"{kind}: {name}"] = {domain: [row[domain] for row in rows] for domain in ("sql", "clinic", "general")}
    return found


def draw_merges(data: dict) -> plt.Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.8), width_ratios=(1.3, 1))
    places = {"sum": (10, 3), "mean": (9, 4), "linear on A and B": (-12, 10), "DARE": (8, 5), "TIES": (9, -9), "DARE and TIES": (-84, -4)}
    for label, row in data.items():
        kind, _, name = label.partition(": ")
        x, y = np.mean(row["sql"]), np.mean(row["clinic"])
        colour = plotting.BLACK if kind == "alone" else plotting.RED if "A and B" in name else plotting.BLUE
        spans = [[[np.mean(row[d]) - min(row[d])], [max(row[d]) - np.mean(row[d])]] for d in ("sql", "clinic")]
        left.errorbar(x, y, xerr=spans[0], yerr=spans[1], fmt="s" if kind == "alone" else "o", color=colour, elinewidth=0.9, markersize=5.5)
        words = {"sql": "sql alone", "clinic": "clinic alone", "both": "one adapter\ntrained on both"}.get(name, SHOWN.get(name))
        offset = places.get(name) or {"sql": (8, -4), "clinic": (-30, 10), "both": (9, -2)}[name]
        left.annotate(words, (x, y), offset, textcoords="offset points", fontsize=8.5)
    left.set(xlabel="sql: nats per token above the floor", ylabel="clinic: nats per token above the floor", xlim=(0, 7.6), ylim=(0, 7.4))
    left.set_title("what is left of each task")
    names = [label for label in data if label != "alone: both"]
    lost = [data[label]["general"] for label in names]
    shown = [label.replace("method: ", "").replace("alone: ", "") for label in names]
    shown = [f"{name} alone" if name in ("sql", "clinic") else SHOWN.get(name, name) for name in shown]
    right.barh(shown, [np.mean(v) for v in lost], color=[plotting.BLACK] * 2 + [plotting.BLUE] * (len(names) - 2), height=0.6)
    for i, values in enumerate(lost):
        right.plot(values, [i] * len(values), "o", color=plotting.ORANGE, markersize=3.5)
    right.invert_yaxis()
    right.set(xlabel="general text: nats per token above the floor", title="what is forgotten")
    right.grid(axis="y", visible=False)
    return figure


PLACES = (25, 50, 100, 200)
EXPONENTS = (0.0, 1.0, 1.5)
SHARES = (50, 200, 1000, 2000)


def simulated_data() -> dict:
    """Hits by places and by zipf's exponent; seconds to the first token by where large adapters come from."""
    hits = {str(z): [claims.hits_percent(p, z) for p in SHARES] for z in EXPONENTS}
    first = {s: [claims.first_token_s("large", s, p) for p in PLACES] for s in ("RAM", "disk", "network")}
    return {"places": list(SHARES), "hits": hits, "large places": list(PLACES), "first": first}


def draw_simulated(data: dict) -> plt.Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.4))
    for z, hits in data["hits"].items():
        left.plot(data["places"], hits, "o-", label=f"{float(z):g}", markersize=4)
    left.set(xlabel="adapters on the card, of 10,000", ylabel="% of requests that find theirs there", ylim=(0, 103))
    left.set_title("hits, by the exponent of the load")
    left.legend(title="zipf", fontsize=8.5, loc="center right", bbox_to_anchor=(1.0, 0.45))
    words = {"RAM": "RAM, 55 GB/s", "disk": "disk, 5 GB/s", "network": "network, 1 GB/s"}
    for (source, seconds), style in zip(data["first"].items(), ("o-", "s--", "^:"), strict=True):
        right.plot(data["large places"], seconds, style, label=words[source], markersize=4)
    right.set(
        xlabel="adapters of 414 MB on the card",
        ylabel="seconds to the first token, p99",
        yscale="log",
        title="misses, by where adapters come from",
    )
    right.set_xticks(data["large places"])
    right.minorticks_off()
    right.set_yticks([1, 10, 100], ["1", "10", "100"])
    right.legend(fontsize=8.5)
    return figure


FIGURES = [
    Figure("tenants_batch", PAGE, batch_data, draw_batch),
    Figure("tenants_step", PAGE, step_data, draw_step),
    Figure("tenants_merges", PAGE, merges_data, draw_merges),
    Figure("tenants_simulated", PAGE, simulated_data, draw_simulated),
]
