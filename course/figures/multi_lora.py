"""Figures of unit 11: a mixed batch, the bytes of a step, a hundred tenants, kernels, what merges keep, ten thousand tenants."""

import statistics

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, Rectangle

from course.claims import multi_lora as claims
from course.figures import Figure
from course.lab import plotting

PAGE, APPENDIX = "lessons/11_multi_lora.md", "lessons/appendix/11_kernels.md"
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


def measured_data() -> dict:
    """Requests per second and ms between tokens of the measured scenario, by live adapters and by other ways of serving."""
    live, setting = claims.scenario()["setting"]["live"], claims.scenario()["setting"]
    others = {"base": 0, "merged": 1, "in_turn": setting["in_turn"], "no_graphs": setting["without_graphs"]}
    found = {"live": live, "requests": [claims.per_second(n) for n in live], "others": {who: claims.per_second(who) for who in others}}
    found["at"] = others
    found["gaps"] = {share: [claims.gap_ms(n, share) for n in live] for share in ("p50", "p99")}
    found["base gaps"] = {share: claims.gap_ms("base", share) for share in ("p50", "p99")}
    return found


def draw_measured(data: dict) -> plt.Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.5))
    places, others = range(len(data["live"])), data["others"]
    left.plot(places, data["requests"], "o-", color=plotting.BLUE, markersize=5)
    left.text(2.05, data["requests"][2] - 1.3, "unmerged", color=plotting.BLUE, ha="center", fontsize=9)
    left.axhline(others["base"], color=plotting.BLACK, linestyle="--", linewidth=1.2)
    left.text(3.3, others["base"] + 0.35, "base alone, or one adapter merged", ha="right", fontsize=9)
    for who, words, mark, up in (("in_turn", "merged in turn", "s", 9), ("no_graphs", "unmerged, without CUDA graphs", "^", -17)):
        x = data["live"].index(data["at"][who])
        left.plot(x, others[who], mark, color=plotting.RED, markersize=7)
        left.annotate(words, (x, others[who]), (0, up), textcoords="offset points", ha="center", fontsize=9)
    left.set(ylabel="requests per second", ylim=(0, 13.8), title="what one card serves")
    for (share, gaps), style in zip(data["gaps"].items(), ("o-", "s--"), strict=True):
        right.plot(places, gaps, style, color=plotting.BLUE, markersize=5, label=f"unmerged, {share}")
        right.axhline(data["base gaps"][share], color=plotting.BLACK, linestyle=style[1:], linewidth=1.0, label=f"base alone, {share}")
    right.set(ylabel="milliseconds", ylim=(0, 130), title="between two tokens")
    right.legend(fontsize=8.5, loc="upper left")
    for axes in (left, right):
        axes.set(xlabel="live adapters", xlim=(-0.3, 3.35))
        axes.set_xticks(list(places), [str(n) for n in data["live"]])
    return figure


PEERS = {"loop": "s-", "gather + bmm": "^-", "grouped_mm": "D-", "vLLM": "o-", "floor": ":"}
MIXES = ("distinct", "uniform", "zipf", "identical")


def kernels_data() -> dict:
    """Time of each peer over ours by mix and rows: the median of three shapes and four ranks."""
    cells = claims.updates("cells")
    rows, found = sorted({cell["batch"] for cell in cells}), {mix: {peer: [] for peer in PEERS} for mix in MIXES}
    for mix in MIXES:
        for batch in rows:
            times = [c["milliseconds"] | {"floor": c["floor"]} for c in cells if (c["mix"], c["batch"]) == (mix, batch)]
            for peer, values in found[mix].items():
                values.append(statistics.median(each[peer] / each["ours"] for each in times))
    return {"rows": rows, "ratios": found}


def draw_kernels(data: dict) -> plt.Figure:
    figure, panels = plt.subplots(1, 4, figsize=(10.4, 3.3), sharey=True)
    words = {"distinct": "all distinct", "uniform": "√rows, equal", "zipf": "√rows, zipf 1.5", "identical": "one adapter"}
    colours = {"loop": plotting.RED, "gather + bmm": plotting.ORANGE, "grouped_mm": plotting.GREEN, "vLLM": plotting.BLUE}
    for axes, (mix, ratios) in zip(panels, data["ratios"].items(), strict=True):
        for peer, values in ratios.items():
            axes.plot(data["rows"], values, PEERS[peer], color=colours.get(peer, "#777777"), markersize=3.8, label=peer)
        axes.axhline(1, color=plotting.BLACK, linewidth=1.3)
        axes.set(xscale="log", yscale="log", xlabel="rows", title=words[mix])
        axes.set_xticks(data["rows"], [str(n) for n in data["rows"]])
        axes.minorticks_off()
    panels[0].set_ylabel("time over ours")
    panels[0].set_yticks([0.03, 0.1, 0.3, 1, 3, 10, 30, 100], ["0.03", "0.1", "0.3", "1", "3", "10", "30", "100"])
    panels[0].set_ylim(0.015, 350)
    panels[-1].legend(fontsize=8, loc="upper center", ncols=2, columnspacing=0.9, handlelength=1.4)
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
    places = {"sum": (-28, 5), "mean": (9, 4), "linear on A and B": (-84, 6), "DARE": (8, 5), "TIES": (9, -9), "DARE and TIES": (-77, -4)}
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
    left.set_title("loss on each task")
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
    left.set_title("hits, by how uneven the load is")
    left.legend(title="exponent (zipf)", fontsize=8.5, loc="center right", bbox_to_anchor=(1.0, 0.45))
    words = {"RAM": "RAM, 54 GB/s", "disk": "disk, 5 GB/s", "network": "network, 1 GB/s"}
    for (source, seconds), style in zip(data["first"].items(), ("o-", "s--", "^:"), strict=True):
        right.plot(data["large places"], seconds, style, label=words[source], markersize=4)
    right.set(
        xlabel="adapters of 414 MB on the card",
        ylabel="seconds to the first token, p99",
        ylim=(0, 2.2),
        title="misses, by where adapters come from",
    )
    right.set_xticks(data["large places"])
    right.legend(fontsize=8.5)
    return figure


FIGURES = [
    Figure("tenants_batch", PAGE, batch_data, draw_batch),
    Figure("tenants_step", PAGE, step_data, draw_step),
    Figure("tenants_measured", PAGE, measured_data, draw_measured),
    Figure("tenants_kernels", APPENDIX, kernels_data, draw_kernels),
    Figure("tenants_merges", PAGE, merges_data, draw_merges),
    Figure("tenants_simulated", PAGE, simulated_data, draw_simulated),
]
