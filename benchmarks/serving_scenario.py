"""A hundred tenants on one card: a 70B-shaped NF4 base with 1, 5, 25 and 100 live adapters, beside a merged model and merging in turn.

    python -m benchmarks.serving_scenario            # a CUDA device with 80 GB, some minutes; saves the recorded result "serving_scenario"
    python -m benchmarks.serving_scenario --smoke    # the tiny model's shape on the CPU; saves to a temporary folder

The base has the shape of Llama 3 70B and random weights: time and memory don't depend on their values. It is quantized while it is made.
100 adapters (r = 16, all linears, bfloat16) lie in pinned RAM. The pool on the card holds fewer than all of them, so at 100 live tenants
adapters come and go while it serves. The whole process keeps to a cap of 80 GB.

All requests are there at the start, in turn from the live tenants; prompts and answers have fixed lengths. "merged" is the base with one
adapter in its codes and no other. "in turn" serves five tenants by merging: the base's codes are copied back from RAM, the next adapter is
merged, its requests are served. Tokens per second count generated ones. Times are the host's clock: a request's first token, and the gaps
after it, over all requests.

Tokens after the first come from CUDA graphs (reference.multi_lora.serving.graphs), which are recorded before anything is timed.
"no graphs" is one number of live adapters served without.

"costs" are what reference.multi_lora.simulation asks for, fitted to single steps ("steps"), with the largest error of the fit. Its "token"
comes from one prompt that is read alone, which is all launches: prompts that are read together cost far less each. Unit 11's claims
(course/claims/multi_lora.py) take that from the runs, by subtraction, and compare the simulation with what was measured.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from benchmarks.cases import random_weights, tiny_shape
from benchmarks.cli import record, rounded
from benchmarks.meters import free
from benchmarks.qlora_caps import cap_process
from course.lab.devices import device
from course.lab.serving import copy_rate, measured_costs, random_adapter
from course.lab.tables import columns, short, wrapped
from reference.llama import Llama
from reference.model_shapes import LLAMA_3_70B, ModelShape
from reference.multi_lora import Factors, MultiLoRA, bytes_of
from reference.multi_lora.serving import AdapterPool, Engine, Request
from reference.multi_lora.simulation import quantile
from reference.qlora import NF4Linear, quantize_linears


@dataclass(frozen=True)
class Setting:
    """Sizes of a run; bytes, tokens, counts."""

    shape: ModelShape
    cap: int
    pool: int
    kv: int
    tenants: int = 100
    live: tuple[int, ...] = (1, 5, 25, 100)
    without_graphs: int = 25
    in_turn: int = 5
    r: int = 16
    rows: int = 32
    requests: int = 100
    prompt: int = 128
    new: int = 32
    repeats: int = 5


FULL = Setting(LLAMA_3_70B, cap=80 * 10**9, pool=24 * 10**9, kv=6 * 10**9)


def smoke() -> Setting:
    """The tiny model's shape, and a pool that holds three of its six adapters."""
    shape = replace(tiny_shape(), layers=2)
    adapter = 2 * shape.adapter_parameters(4)
    return Setting(shape, 10**9, 3 * adapter + 1000, 10**6, 6, (1, 6), 3, 2, 4, 3, 6, 5, 3, 2)


def build(setting: Setting, where: torch.device) -> Llama:
    """The base: linears in NF4, the rest in bfloat16, never more than one weight of it in 16 bits."""
    with torch.device("meta"):
        model = Llama(setting.shape, checkpointing=False).bfloat16()
    weights = random_weights({name: p.shape for name, p in model.named_parameters()}, where)
    quantize_linears(model, device=where, weights=weights)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, nn.Parameter(weights(name), requires_grad=False))
    model.tie_weights()
    return model.eval()


def tenants_of(served: MultiLoRA, setting: Setting) -> dict[str, dict[str, Factors]]:
    """An adapter each: the same factors in RAM under scales of their own, so that a pool packs and copies each for itself."""
    one = random_adapter(served, setting.r, torch.bfloat16)
    return {f"t{k}": {name: Factors(f.A, f.B, f.scaling + k / 64) for name, f in one.items()} for k in range(setting.tenants)}


def serve(engine: Engine, names: Sequence[str | None], setting: Setting, where: torch.device) -> dict:
    """All requests, in turn from ``names``, there at once; what they took."""
    g = torch.Generator().manual_seed(0)
    loads, before = engine.pool.counts["loads"], engine.pool.counts["hits"]
    if where.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for i in range(setting.requests):
        prompt = torch.randint(1, setting.shape.vocab, (setting.prompt,), generator=g).tolist()
        engine.submit(Request(names[i % len(names)], prompt, setting.new))
    ended = engine.run()
    seconds = time.perf_counter() - began
    first = [request.times[0] - request.submitted for request in ended]
    gaps = [b - a for request in ended for a, b in zip(request.times, request.times[1:], strict=False)]
    return {
        "live": len(names),
        "seconds": seconds,
        "requests_per_second": len(ended) / seconds,
        "tokens_per_second": sum(len(request.tokens) for request in ended) / seconds,
        "first_token": {"p50": quantile(first, 0.5), "p99": quantile(first, 0.99)},
        "between_tokens": {"p50": quantile(gaps, 0.5), "p99": quantile(gaps, 0.99)},
        "loads": engine.pool.counts["loads"] - loads,
        "hits": engine.pool.counts["hits"] - before,
    }


def record_steps(engine: Engine, names: Sequence[str | None], setting: Setting, where: torch.device) -> None:
    """Requests that make a step of each size that will occur, which is compiled or recorded at its first time."""
    rows = setting.rows
    while rows:
        serve(engine, names, replace(setting, requests=rows, new=2), where)
        rows //= 2


class Base:
    """The base's codes and scales in RAM, from which they are copied back before another adapter is merged.

    On the device they stay where they lie: recorded steps read them there.
    """

    PARTS = ("weight", "absmax", "nested_absmax", "offset")

    def __init__(self, served: MultiLoRA):
        self.layers = {name: layer.base for name, layer in served.layers.items()}
        self.kept = {
            name: {part: getattr(layer, part).detach().to("cpu", copy=True) for part in self.PARTS if getattr(layer, part) is not None}
            for name, layer in self.layers.items()
        }

        self.places = {name: {part: getattr(self.layers[name], part) for part in parts} for name, parts in self.kept.items()}

    @torch.no_grad()
    def restore(self) -> None:
        for name, parts in self.kept.items():
            for part, kept in parts.items():
                self.places[name][part].copy_(kept)

    @torch.no_grad()
    def merge(self, adapter: dict[str, Factors]) -> float:
        """Put the plain base back, then the adapter into it; seconds."""
        began = time.perf_counter()
        self.restore()
        for name, layer in self.layers.items():
            assert isinstance(layer, NF4Linear)
            layer.merge_delta(adapter[name].to(layer.weight.device).delta())
            for part, place in self.places[name].items():
                place.copy_(getattr(layer, part))
                setattr(layer, part, place)
        if layer.weight.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began


def in_turn(engine: Engine, base: Base, tenants: dict, setting: Setting, where: torch.device) -> dict:
    """Tenants one after another, each merged: its share of the requests, and the merges."""
    share, merges, runs = replace(setting, requests=max(1, setting.requests // setting.in_turn)), [], []
    began = time.perf_counter()
    for name in list(tenants)[: setting.in_turn]:
        merges.append(base.merge(tenants[name]))
        runs.append(serve(engine, [None], share, where))
    seconds = time.perf_counter() - began
    served = share.requests * setting.in_turn
    return {"live": setting.in_turn, "merge_seconds": merges, "seconds": seconds, "requests_per_second": served / seconds}


def measure(setting: Setting = FULL, where: torch.device | None = None) -> dict:
    where, cuda = where or device(), (where or device()).type == "cuda"
    context = cap_process(setting.cap) if cuda else 0
    began = time.perf_counter()
    served = MultiLoRA(build(setting, where))
    tenants = tenants_of(served, setting)
    size = bytes_of(next(iter(tenants.values())))
    found = {"setting": {**vars(setting), "shape": setting.shape.name}, "context_bytes": context, "adapter_bytes": size}
    found["base_bytes"] = sum(t.nbytes for t in [*served.model.parameters(), *served.model.buffers()])
    found["seconds_building"] = time.perf_counter() - began
    pool = AdapterPool(served, setting.pool, (setting.tenants + 1) * (size + 4096 * len(served.layers)))
    for name, adapter in tenants.items():
        pool.register(name, adapter)
    engine = Engine(served, pool, setting.rows, setting.kv, cuda_graphs=True)
    names = list(tenants)
    for who in ([None], names[:1]):
        record_steps(engine, who, setting, where)
    found["base"] = serve(engine, [None], setting, where)
    found["unmerged"] = []
    for live in setting.live:
        found["unmerged"].append(serve(engine, names[:live], setting, where))
        print(found["unmerged"][-1], flush=True)
    graphs, engine.graphs = engine.graphs, None
    found["no_graphs"] = serve(engine, names[: setting.without_graphs], setting, where)
    engine.graphs = graphs
    for name in pool.resident:
        pool.evict(name)  # what follows has adapters of its own on the device
    on_device = [{name: f.to(where) for name, f in tenants[t].items()} for t in names[: setting.rows]]
    base = Base(served)
    merge = base.merge(tenants[names[0]])
    found["merged"] = serve(engine, [None], setting, where)
    found["in_turn"] = in_turn(engine, base, tenants, setting, where)
    costs, steps = measured_costs(
        served, on_device, setting.prompt, copy_rate(served, tenants[names[0]]), merge, None, setting.repeats, True
    )
    explained = [costs.base + costs.row * s["rows"] + costs.adapter * s["distinct"] for s in steps]
    worst = max(abs(1e3 * e / s["milliseconds"] - 1) for e, s in zip(explained, steps, strict=True))
    found |= {"costs": vars(costs), "steps": steps, "fit_error": worst}
    if cuda:
        found |= {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}
        free()
    return rounded(found)


def table(result: dict) -> str:
    named = {"base alone": result["base"], "merged": result["merged"]}
    named |= {f"{row['live']} live": row for row in result["unmerged"]}
    named[f"{result['no_graphs']['live']} live, no graphs"] = result["no_graphs"]
    rows = []
    for name, row in named.items():
        first, gap = row["first_token"], row["between_tokens"]
        times = (f"{first['p50']:.3f}", f"{first['p99']:.3f}", f"{1e3 * gap['p50']:.1f}", f"{1e3 * gap['p99']:.1f}")
        rows.append((name, row["requests_per_second"], f"{row['tokens_per_second']:.1f}", *times, row["loads"]))
    turn, costs = result["in_turn"], result["costs"]
    rows.append((f"merged in turn, {turn['live']}", turn["requests_per_second"], *[""] * 6))
    about = "first token in s, gap between tokens in ms"
    about += f"; a merge takes up to {max(turn['merge_seconds']):.2f} s; the bus carries {costs['bus'] / 1e9:.1f} GB/s"
    times = ", ".join(f"{name} {short(1e3 * cost)} ms" for name, cost in costs.items() if name != "bus")
    heads = ("", "req/s", "tokens/s", "first p50", "p99", "gap p50", "p99", "loads")
    return "\n".join([columns(heads, rows), wrapped(about), wrapped(f"costs: {times}")])


def main() -> None:
    record("serving_scenario", __doc__, measure, table, small={"setting": smoke(), "where": torch.device("cpu")})


if __name__ == "__main__":
    main()
