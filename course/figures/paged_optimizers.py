"""Figures of unit 07: copies beside updates, which page is where, a step under budgets, and passes through layers that are fetched."""

import matplotlib.pyplot as plt
import torch
from torch import nn

from course.claims.paged_optimizers import GPU
from course.figures import Figure
from course.lab import plotting, recorded
from reference.paging import PagedAdamW

PAGE = "lessons/07_paged_optimizers.md"
LANES = {"in": (2, plotting.ORANGE, "copy in"), "update": (1, plotting.BLACK, "update"), "out": (0, plotting.SKY, "copy out")}
WAYS = {
    "one stream": "One stream: everything in turn",
    "three streams, mru": "Three streams, MRU: the load waits for the store",
    "three streams": "Three streams, LRU",
}
KINDS = {"in": plotting.ORANGE, "hit": plotting.BLUE}


def lanes_data() -> dict[str, list]:
    """Way -> [lane, start, end] in milliseconds, as torch's profiler saw them."""
    found = recorded.load("paged_adamw", GPU)["result"]["timeline"]
    return {name: found[name] for name in WAYS}


def lanes(data: dict[str, list]) -> plt.Figure:
    figure, axes = plt.subplots(len(data), 1, figsize=(7.4, 4.6), sharex=True)
    for each, (name, spans) in zip(axes, data.items(), strict=True):
        for lane, start, end in spans:
            place, colour, _ = LANES[lane]
            edge = colour if lane == "update" else "white"  # an update is so short that a white edge would hide it
            each.barh(place, end - start, left=start, height=0.8, color=colour, edgecolor=edge, linewidth=0.8)
        places = {place: label for place, _, label in LANES.values()}
        each.set_yticks(list(places), list(places.values()))
        each.set_title(WAYS[name], fontsize=10)
        each.grid(axis="y", visible=False)
    axes[-1].set(xlabel="milliseconds")
    return figure


def scan(policy: str, pages: int = 12, frames: int = 8, steps: int = 4) -> list[list]:
    """[step, kind, page] for every page that was used, from the second step on."""
    p = nn.Parameter(torch.zeros(128 * pages))
    optimizer = PagedAdamW([p], resident_bytes=1024 * frames, page_bytes=1024, policy=policy)
    for _ in range(steps):
        p.grad = torch.ones_like(p)
        optimizer.step()
    return [list(event) for event in optimizer.trace if event.kind != "out" and event.step > 1]


def trace_data() -> dict[str, list]:
    return {policy: scan(policy) for policy in ("lru", "mru", "alternate")}


def trace(data: dict[str, list]) -> plt.Figure:
    titles = {"lru": "LRU", "mru": "MRU", "alternate": "LRU, every other step backwards"}
    figure, axes = plt.subplots(1, len(data), figsize=(8.4, 3.4), sharey=True)
    for each, (policy, events) in zip(axes, data.items(), strict=True):
        pages = 1 + max(page for *_, page in events)
        for kind, colour in KINDS.items():
            chosen = [(place, page) for place, (_, found, page) in enumerate(events) if found == kind]
            marks = {"color": colour, "marker": "s", "s": 26, "label": {"in": "copied in", "hit": "was there"}[kind]}
            each.scatter(*(zip(*chosen, strict=True) if chosen else ([], [])), **marks)
        for step in range(1, len(events) // pages):
            each.axvline(step * pages - 0.5, color="#AAAAAA", lw=0.8)
        each.set_xticks(
            [pages * (i + 0.5) - 0.5 for i in range(len(events) // pages)], [f"step {i + 2}" for i in range(len(events) // pages)]
        )
        hits = sum(kind == "hit" for _, kind, _ in events)
        each.set_title(f"{titles[policy]}:\n{hits} of {len(events)} were there", fontsize=10)
        each.grid(visible=False)
    axes[0].set(ylabel="page")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def budgets_data() -> dict[str, list]:
    """Measured (share of the state that fits, milliseconds), and what the bus allows at best."""
    result = recorded.load("paged_adamw", GPU)["result"]
    rows = sorted((r for r in result["paged"] if r["policy"] == "alternate" and r["streams"] == 3), key=lambda r: r["frames"])
    rate = result["bus"]["both"]
    shares = [min(1.0, row["frames"] / row["pages"]) for row in rows]
    bytes_ = rows[0]["pages"] * result["page"]
    return {
        "measured": [(share, 1e3 * row["seconds"]) for share, row in zip(shares, rows, strict=True)],
        "bus": [(share, bytes_ * (1 - share) / rate / 1e6) for share in (0, 1)],
        "foreach": [r["ms"] for r in result["resident"] if (r["model"], r["how"]) == ("a billion", "torch, foreach")],
    }


def budgets(data: dict[str, list]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(7.2, 3.5))
    axes.plot(*zip(*data["bus"], strict=True), "--", color=plotting.BLACK, lw=1.2, label="pages that are not there, at the rate of the bus")
    axes.plot(*zip(*data["measured"], strict=True), "o", color=plotting.BLUE, label="measured")
    axes.axhline(data["foreach"][0], color=plotting.ORANGE, lw=1.2, ls=":", label="torch's AdamW (foreach), all on the card")
    axes.set(xlabel="share of the state that fits into the frames", ylabel="milliseconds of a step", ylim=(0, None))
    axes.legend()
    return figure


def passes_data() -> dict[str, list]:
    """Way -> (tokens, milliseconds of a forward pass per layer)."""
    result = recorded.load("offloaded_layers", GPU)["result"]
    rows = result["rows"]

    def points(how: str, what: str = "seconds") -> list[tuple]:
        """Files were tried with fewer layers."""
        layers = {row["how"]: result["layers"] * row["weights"] / result["weights"] for row in rows}
        return [(row["tokens"], 1e3 * row[what] / layers[how]) for row in rows if row["how"] == how]

    return {how: points(how) for how in ("resident", "memory", "disk", "accelerate")} | {"predicted": points("memory", "predicted")}


def passes(data: dict[str, list]) -> plt.Figure:
    ways = {
        "accelerate": ("accelerate's cpu_offload", plotting.ORANGE, "s"),
        "disk": ("from files", plotting.PINK, "^"),
        "memory": ("from host memory, two slots", plotting.BLUE, "o"),
        "resident": ("all weights on the card", plotting.GREEN, "v"),
    }
    figure, axes = plt.subplots(figsize=(7.2, 3.8))
    axes.plot(*zip(*data["predicted"], strict=True), "--", color=plotting.BLACK, lw=1.2, label="the longer of copying and computing")
    for how, (label, colour, mark) in ways.items():
        if data[how]:
            axes.plot(*zip(*data[how], strict=True), mark, ls="-", lw=1, color=colour, label=label, markersize=5)
    axes.set(xscale="log", yscale="log", xlabel="tokens in a pass", ylabel="milliseconds per layer, forward", ylim=(0.3, 800))
    axes.legend(fontsize=9, loc="upper left", ncols=2)
    return figure


FIGURES = [
    Figure("paging_lanes", PAGE, lanes_data, lanes),
    Figure("paging_trace", PAGE, trace_data, trace),
    Figure("paging_budgets", PAGE, budgets_data, budgets),
    Figure("offloaded_passes", PAGE, passes_data, passes),
]
