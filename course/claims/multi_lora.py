"""What unit 11 states: bytes, seconds and requests of a hundred adapters, merges and what they keep, ten thousand tenants simulated."""

import functools
import math
import statistics
from dataclasses import replace

from course.claims.shared import normal
from course.lab import recorded
from reference.memory.recipes import nf4_bytes
from reference.model_shapes import LLAMA_3_8B, LLAMA_3_70B
from reference.multi_lora import Factors, combine, merged_update
from reference.multi_lora.simulation import Costs, Load, Outcome, expected_hits, simulate

H200 = "h200"
SHAPES = {"70B": LLAMA_3_70B, "8B": LLAMA_3_8B}
TARGETS = {"all": "all-linear", "attention": ("q_proj", "k_proj", "v_proj", "o_proj"), "q, v": ("q_proj", "v_proj")}


# Bytes


def adapter_mb(r: int = 16, targets: str = "all", model: str = "70B") -> float:
    """Of an adapter in 16 bits."""
    return 2 * SHAPES[model].adapter_parameters(r, TARGETS[targets]) / 1e6


def rank_of_mb(targets: str = "all", mb: float = 100, model: str = "70B") -> float:
    """The rank at which an adapter takes so many MB."""
    return mb / adapter_mb(1, targets, model)


def base_bytes(model: str = "70B") -> int:
    """Linears in NF4 with double quantization, the rest in 16 bits."""
    shape = SHAPES[model]
    packed = shape.layers * sum(nf4_bytes(out * into) for out, into in shape.linears.values())
    return packed + 2 * (shape.parameters - shape.linear_parameters)


def base_gb(bits: int = 4, model: str = "70B") -> float:
    return base_bytes(model) / 1e9 if bits == 4 else 2 * SHAPES[model].parameters / 1e9


def kv_bytes(model: str = "70B") -> int:
    """Of one token, in 16 bits."""
    shape = SHAPES[model]
    return 4 * shape.layers * shape.kv_heads * shape.head_dim


def kv_kb(model: str = "70B") -> float:
    return kv_bytes(model) / 1e3


def kv_gb(rows: int, context: int, model: str = "70B") -> float:
    return rows * context * kv_bytes(model) / 1e9


def tokens_per_adapter(mb: float = 100) -> float:
    """Tokens whose keys and values take as much."""
    return mb * 1e6 / kv_bytes()


def slots_gb(count: int = 100, r: int = 64, targets: str = "all") -> float:
    """Of places made for adapters of rank ``r``."""
    return count * adapter_mb(r, targets) / 1e3


def padded_times(largest: int = 64, r: int = 8) -> float:
    """How many times its size an adapter of rank ``r`` takes in a place for the largest rank."""
    return largest / r


def adapters_beside(card_gb: float = 80, rows: int = 32, context: int = 1024, r: int = 16) -> int:
    """Adapters that a card holds beside the 4-bit base and the caches of a batch."""
    return int((card_gb - base_gb() - kv_gb(rows, context)) * 1e3 / adapter_mb(r))


# Seconds


def copy_rate() -> float:
    """Bytes per second that a copy reads and writes on an H200."""
    return 1e9 * recorded.load("nf4_kernels", H200)["result"]["copy_gigabytes_per_second"]


def bus_rate() -> float:
    """Bytes per second from RAM to an H200."""
    return 1e9 * recorded.load("offloaded_layers", H200)["result"]["bus"]


def bus_gb() -> float:
    return bus_rate() / 1e9


def swap_ms(mb: float = 100) -> float:
    """An adapter over the bus."""
    return 1e3 * mb * 1e6 / bus_rate()


def read_ms(bits: int = 4) -> float:
    """The least time to read the base once."""
    return 1e3 * base_gb(bits) * 1e9 / copy_rate()


def adapter_read_ms(r: int = 16) -> float:
    """The least time to read an adapter once."""
    return 1e9 * adapter_mb(r) / copy_rate()


def restore_s() -> float:
    """The least time to copy the 4-bit base from RAM again."""
    return base_bytes() / bus_rate()


def adapters_add_percent(distinct: int, r: int = 16, rows: int = 32, context: int = 1024) -> float:
    """Of the bytes that a step reads without adapters, what so many distinct ones add."""
    return 100 * distinct * adapter_mb(r) / 1e3 / (base_gb() + kv_gb(rows, context))


def intensity(n: int, m: int, r: int) -> float:
    """Operations per byte of the updates of n tokens by m adapters: n·r / (m·r + n)."""
    return n * r / (m * r + n)


def generation_percent(rows: int = 1, graph: bool = False, who: str = "peft") -> float:
    """What an unmerged layer that is written with torch, as peft's is, adds to the base's time on an H200."""
    found = recorded.load("lora_layer", H200)["result"]["generation"]["float32 factors, α/r = 2"]
    times = found[f"{rows} row{'s' * (rows > 1)}{', one launch' * graph}"]
    return 100 * (times[who] / times["base"] - 1)


def merged_percent() -> float:
    """How far the merged layer's time is from the base's, at one row from a CUDA graph."""
    return abs(generation_percent(1, True, "merged"))


def flops_percent(r: int = 16, width: int = 4096) -> float:
    """Of the base's multiplications, those of an update: r·(in + out) / (in·out)."""
    return 100 * 2 * r / width


# Combining


@functools.cache
def _pair() -> tuple[Factors, Factors]:
    """Two random adapters of a layer, r = 8, scale 2."""
    return tuple(Factors(normal(8, 96, seed=i), normal(64, 8, seed=10 + i), 2.0) for i in (1, 2))


def _settings(how: str) -> dict:
    settings = {"method": how.partition(" ")[0], "on": "factors" if "factors" in how else "update"}
    return settings | ({"rank": 16} if how == "svd" else {}) | ({"density": 0.5} if how.startswith("ties") else {})


def combine_error(how: str, w: float = 0.7, scale: float = 1) -> float:
    """How far a combination is from w·ΔW₁ + (1 − w)·ΔW₂, relative; 100 is its scale in percent. "linear factors" works on A and B apart."""
    pair, weights = _pair(), [w, 1 - w]
    exact = merged_update(pair, weights).double()
    return scale * ((combine(pair, weights, **_settings(how)).delta().double() - exact).norm() / exact.norm()).item()


def exact(how: str) -> bool:
    """To the roundings of float32."""
    return combine_error(how) < 1e-6


def flip_changes(how: str, scale: float = 1) -> float:
    """How far the result moves, relative, if one adapter is written as (−A, −B), which is the same adapter."""
    one, two = _pair()
    settings = _settings(how)
    if settings["on"] == "update" and settings["method"] == "ties":
        before, after = (merged_update((each, two), [1.0, 1.0], "ties", 0.5) for each in (one, Factors(-one.A, -one.B, one.scaling)))
    else:
        before, after = (combine((each, two), [1.0, 1.0], **settings).delta() for each in (one, Factors(-one.A, -one.B, one.scaling)))
    return scale * ((after - before).norm() / before.norm()).item()


# Merging, measured


def runs(kind: str, name: str | float) -> list[dict]:
    """Of the recorded study, one for each seed."""
    rows = recorded.load("merging", "cpu")["result"]["rows"]
    return [row for row in rows if (row["kind"], row["name"]) == (kind, name)]


def merge(name: str, domain: str, of: str = "mean") -> float:
    """Nats per token above the floor after a method; "mean", "least" or "most" of three seeds."""
    values = [row[domain] for row in runs("method", name)]
    return {"mean": statistics.fmean, "least": min, "most": max}[of](values)


def alone(adapter: str, domain: str) -> float:
    """Of one adapter; "both" was trained on both kinds of text."""
    return statistics.fmean(row[domain] for row in runs("alone", adapter))


def scaled(scale: float, domain: str) -> float:
    """The sum of both updates, times ``scale``."""
    return statistics.fmean(row[domain] for row in runs("scale", scale))


def untouched(domain: str) -> float:
    return recorded.load("merging", "cpu")["result"]["before"][domain]


METHODS = ("sum", "mean", "sum, cut to r = 8", "linear on A and B", "largest half", "DARE", "TIES", "TIES, largest fifth", "DARE and TIES")


def no_merge_is_as_good() -> bool:
    """In every seed each method is worse on each task than the adapter of that task."""
    own = {domain: max(row[domain] for row in runs("alone", domain)) for domain in ("sql", "clinic")}
    return all(merge(name, domain, "least") > own[domain] for name in METHODS for domain in own)


def ties_forgets_less() -> bool:
    """Every seed: less of the general text is lost than by the sum."""
    pairs = zip(runs("method", "TIES"), runs("method", "sum"), strict=True)
    return all(ties["general"] < total["general"] for ties, total in pairs)


# Kernels, measured


def updates(name: str) -> list[dict] | dict:
    """Of the recorded comparison of kernels."""
    return recorded.load("multi_lora", H200)["result"][name]


def ratio(peer: str, of: str = "median", mix: str = "all") -> float:
    """A peer's time over ours: of all cells the "median" or the "least", which is the cell where ours does worst."""
    (row,) = (row for row in updates("ratios") if (row["peer"], row["mix"]) == (peer, mix))
    return row[of]


def cells(peer: str = "vLLM") -> int:
    return ratio(peer, "cells")


def slower_cells(peer: str = "vLLM") -> int:
    """Cells in which the peer is faster."""
    return ratio(peer, "below_1")


def ahead_of_all_but_vllm() -> bool:
    """In every cell."""
    return all(ratio(peer, "least") > 1 for peer in ("loop", "gather + bmm", "grouped_mm", "peft"))


def floor_percent(of: str = "median") -> float:
    """Of the time of our kernels, what their bytes take at a copy's rate: the "median" or the "most" of the cells."""
    shares = [100 * cell["floor"] / cell["milliseconds"]["ours"] for cell in updates("cells")]
    return {"median": statistics.median, "most": max}[of](shares)


def update_us(mix: str, batch: int, r: int = 16, width: int = 8192, who: str = "ours") -> float:
    """Microseconds of the updates of one layer."""
    wanted = {"mix": mix, "batch": batch, "r": r, "out": width, "in": width}
    (cell,) = (cell for cell in updates("cells") if wanted.items() <= cell.items())
    return 1e3 * cell["milliseconds"][who]


def update_times(mix: str, batch: int, r: int = 16, width: int = 8192, who: str = "vLLM") -> float:
    """A peer's time for them over ours."""
    return update_us(mix, batch, r, width, who) / update_us(mix, batch, r, width)


OURS_BARE = "base, 1 × all, 4 warps"  # our product of one row with W alone


def one_row_percent(r: int = 16, over: str = "base", who: str = "one adapter") -> float:
    """What an unmerged adapter adds to a layer at one row, from a CUDA graph, over cuBLAS's "base" or over our own kernel for W alone."""
    (row,) = (row for row in updates("one_row") if row["r"] == r)
    times = row["milliseconds"]
    return 100 * (times[who] / times[over] - 1)


def one_row_saves(of: str = "least") -> float:
    """Percent of cuBLAS's base layer that ours, with an adapter, saves: over the ranks."""
    return {"least": min, "most": max}[of](-one_row_percent(row["r"]) for row in updates("one_row"))


def one_row_over_ours(of: str = "least") -> float:
    """Percent over our own product with W alone: over the ranks."""
    return {"least": min, "most": max}[of](one_row_percent(row["r"], OURS_BARE) for row in updates("one_row"))


def swap_share(name: str = "swap_70b", looked: bool = False) -> float:
    """Percent of the bus that a swap through the pool reaches; ``looked`` counts that every layer fetches its factors' addresses."""
    return 100 * updates(name)["share_of_bus" + "_looked_at" * looked]


def swapped_ms(name: str = "swap_70b") -> float:
    """A swap through the pool, of an adapter with r = 16 on all linears of a 70B."""
    return updates(name)["milliseconds"]


# A hundred tenants, measured


@functools.cache
def scenario() -> dict:
    """100 adapters (r = 16, all linears) over a 70B-shaped NF4 base on one card, capped at 80 GB."""
    return recorded.load("serving_scenario", H200)["result"]


def served(who: int | str) -> dict:
    """A run: with so many live adapters, or "base", "merged", "in_turn", "no_graphs"."""
    found = scenario()
    return found[who] if isinstance(who, str) else next(row for row in found["unmerged"] if row["live"] == who)


def per_second(who: int | str) -> float:
    return served(who)["requests_per_second"]


def slower_percent(who: int | str, than: int | str = "base") -> float:
    """By how much fewer requests."""
    return 100 * (1 - per_second(who) / per_second(than))


def graphs_times() -> float:
    """How many times the requests CUDA graphs serve."""
    return per_second(scenario()["no_graphs"]["live"]) / per_second("no_graphs")


def gap_ms(who: int | str, share: str = "p50") -> float:
    """Between two tokens of a request."""
    return 1e3 * served(who)["between_tokens"][share]


def waited_s(who: int | str, share: str = "p50") -> float:
    """For the first token; all requests come at once."""
    return served(who)["first_token"][share]


def merge_s(of: str = "least") -> float:
    """The plain base copied in, an adapter merged, everything quantized again: "least" or "most" of five."""
    return {"least": min, "most": max}[of](scenario()["in_turn"]["merge_seconds"])


def step_ms(rows: int, distinct: int) -> float:
    """A decode step."""
    (row,) = (row for row in scenario()["steps"] if (row["rows"], row["distinct"]) == (rows, distinct))
    return row["milliseconds"]


def added_ms(distinct: int, than: int, rows: int = 32) -> float:
    """What more adapters add to a step."""
    return step_ms(rows, distinct) - step_ms(rows, than)


def further_ms() -> float:
    """Of each adapter after the first, with 32 rows."""
    return added_ms(32, 1) / 31


def adapted_layers() -> int:
    return LLAMA_3_70B.layers * len(LLAMA_3_70B.linears)


def layer_us() -> float:
    """What the first adapter adds to a step of 32 rows, for each adapted layer."""
    return 1e3 * added_ms(1, 0) / adapted_layers()


def fit_error_percent() -> float:
    """The farthest that the fitted costs are from a measured step."""
    return 100 * scenario()["fit_error"]


def peak_gb() -> float:
    return scenario()["peak_bytes"] / 1e9


def prompts_s(count: int, who: int | str = "base") -> float:
    """Seconds in which a run's model reads so many prompts of 128 tokens in one pass: 1 (the base), 4 or 32.

    One is timed for itself. The others follow from the run: 100 requests come at once and go in batches of 32, 32, 32 and 4. The median
    request waits for two passes and the first batch's steps, the last one for four passes and three batches' steps.
    """
    found, run = scenario(), served(who)
    costs, steps = found["costs"], found["setting"]["new"] - 1
    gap = run["between_tokens"]["p50"]
    full = (run["first_token"]["p50"] - steps * gap) / 2
    rest = run["first_token"]["p99"] - 3 * full - 3 * steps * gap
    return {1: costs["base"] + found["setting"]["prompt"] * costs["token"], 4: rest, 32: full}[count]


def token_s(count: int) -> float:
    """Seconds for a token of a prompt, if so many prompts are read together."""
    return prompts_s(count) / (count * scenario()["setting"]["prompt"])


def fitted_costs() -> Costs:
    """As they were recorded: a prompt's token from one prompt that is read alone."""
    return Costs(**scenario()["costs"])


@functools.cache
def predicted(who: int | str, alone: bool = False) -> float:
    """Requests per second that the simulation says for the measured scenario; ``alone`` takes the cost of a prompt that is read alone."""
    found = scenario()
    setting, costs = found["setting"], fitted_costs()
    costs = costs if alone else replace(costs, token=token_s(32))
    how = "merged" if isinstance(who, str) else "unmerged"
    live = who if isinstance(who, int) else served(who)["live"]
    costs = replace(costs, merge=0.0) if who in ("base", "merged") else costs
    load = Load(live, 1e9, 0.0, setting["prompt"], setting["new"], found["adapter_bytes"])
    return simulate(load, costs, setting["rows"], setting["pool"], setting["requests"], how).per_second


def predicted_percent(who: int | str, alone: bool = False) -> float:
    """How far the prediction is from what was measured."""
    return 100 * (predicted(who, alone) / per_second(who) - 1)


def off_percent(who: int | str, alone: bool = False) -> float:
    return abs(predicted_percent(who, alone))


# Ten thousand tenants


ROWS, PROMPT, NEW = 32, 512, 128
RATE = 1.5  # requests per second
MANY = 10_000
SOURCES = {"RAM": None, "disk": 5e9, "network": 1e9}  # bytes per second; the last two are assumed, not measured
KINDS = {"small": (8, "q, v"), "large": (16, "all")}


def costs(kind: str = "small", source: str = "RAM") -> Costs:
    """Of a 70B-shaped NF4 base on an H200, from the measured scenario, which has batches of 32 too.

    Base, row, merge and bus are those of the fit. A prompt's token is that of 512 tokens in one pass. Two things are assumed: an adapter's
    cost goes with its bytes, and what the longer cache adds to a row is its bytes over the copy's rate.
    """
    fitted, setting = fitted_costs(), scenario()["setting"]
    more = (PROMPT + NEW / 2 - setting["prompt"]) * kv_bytes() / copy_rate()
    adapter = fitted.adapter * 1e6 * adapter_mb(*KINDS[kind]) / scenario()["adapter_bytes"]
    return Costs(fitted.base, fitted.row + more, adapter, token_s(4), SOURCES[source] or fitted.bus, fitted.merge)


def rate() -> float:
    """At which waits are simulated."""
    return RATE


@functools.cache
def tenants(
    how: str = "unmerged", rate: float = RATE, places: int = 500, zipf: float = 1.0, source: str = "RAM", kind: str = "small",
    requests: int = 1500,
) -> Outcome:  # fmt: skip
    """10,000 tenants on one card: prompts of 512 tokens, answers of 128, 32 rows. "small" adapters have r = 8 on q and v."""
    size = int(1e6 * adapter_mb(*KINDS[kind]))
    load = Load(MANY, rate, zipf, PROMPT, NEW, size)
    return simulate(load, costs(kind, source), ROWS, places * size, requests, how, warm=True)


def capacity(how: str = "unmerged", kind: str = "small") -> float:
    """Requests per second where a request always waits."""
    return tenants(how, 1e6, kind=kind, requests=600).per_second


def unmerged_times(kind: str = "small") -> float:
    """How many times the requests of merging in turn."""
    return capacity("unmerged", kind) / capacity("merged", kind)


def cards(rate: float = 50, how: str = "unmerged") -> int:
    """For so many requests per second, at four fifths of what a card can do."""
    return math.ceil(rate / (0.8 * capacity(how)))


def card_minutes_per_million(how: str = "unmerged") -> float:
    """Minutes of a card for a million generated tokens, their prompts included."""
    return 1e6 / (capacity(how) * NEW) / 60


@functools.cache
def hits_percent(places: int = 500, zipf: float = 1.0) -> float:
    """Of the requests of 10,000 tenants, those whose adapter is on the card."""
    return 100 * expected_hits(MANY, zipf, places)


def miss_percent(places: int, zipf: float = 1.0) -> float:
    return 100 - hits_percent(places, zipf)


def first_token_s(kind: str = "small", source: str = "RAM", places: int = 150, share: float = 0.99) -> float:
    """Seconds to the first token, by where adapters come from: "RAM", "disk" (5 GB/s) or "network" (1 GB/s)."""
    return tenants(places=places, source=source, kind=kind).first_token(share)


def all_adapters_tb(kind: str = "small") -> float:
    """Of 10,000 adapters."""
    return MANY * adapter_mb(*KINDS[kind]) / 1e6
