"""What unit 11 states: bytes and seconds of a hundred adapters, merges and what they keep, ten thousand tenants simulated."""

import functools
import math
import statistics

from course.claims.shared import normal
from course.lab import recorded
from reference.memory.recipes import nf4_bytes
from reference.model_shapes import LLAMA_3_8B, LLAMA_3_70B, ModelShape
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


# Ten thousand tenants


ROWS, PROMPT, NEW = 64, 512, 128
MANY = 10_000
SOURCES = {"RAM": None, "disk": 5e9, "network": 1e9}  # bytes per second; the last two are assumed, not measured
KINDS = {"small": (8, "q, v"), "large": (16, "all")}


def costs(kind: str = "small", source: str = "RAM") -> Costs:
    """Of a 70B-shaped NF4 base on an H200: measured products of one 8192² layer, as often as they fit into the model.

    Attention's reading of the cache and the factors are bytes over the copy's rate. What is left out: attention's arithmetic, norms,
    launches. Merging is the copying of the base's codes from RAM.
    """
    shape: ModelShape = LLAMA_3_70B
    layers = shape.linear_parameters / 8192**2

    def seconds(rows: int) -> float:
        return layers * recorded.row("nf4_kernels", H200, work="linear", rows=rows)["ours, double quantization"] / 1e3

    row = (seconds(64) - seconds(1)) / 63 + (PROMPT + NEW / 2) * kv_bytes() / copy_rate()
    adapter = 1e6 * adapter_mb(*KINDS[kind]) / copy_rate()
    return Costs(seconds(1), row, adapter, seconds(2048) / 2048, SOURCES[source] or bus_rate(), restore_s())


@functools.cache
def tenants(
    how: str = "unmerged", rate: float = 3.0, places: int = 500, zipf: float = 1.0, source: str = "RAM", kind: str = "small",
    requests: int = 1500,
) -> Outcome:  # fmt: skip
    """10,000 tenants on one card: prompts of 512 tokens, answers of 128, 64 rows. "small" adapters have r = 8 on q and v."""
    size = int(1e6 * adapter_mb(*KINDS[kind]))
    load = Load(MANY, rate, zipf, PROMPT, NEW, size)
    return simulate(load, costs(kind, source), ROWS, places * size, requests, how, warm=True)


def capacity(how: str = "unmerged", kind: str = "small") -> float:
    """Requests per second where a request always waits."""
    return tenants(how, 1e6, kind=kind, requests=600).per_second


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
