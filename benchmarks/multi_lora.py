"""Updates of many adapters in one batch: the grouped kernels beside a loop, gather + bmm, grouped_mm, vLLM and peft; one row; a swap.

    python -m benchmarks.multi_lora             # a CUDA device, some minutes; saves the recorded result "multi_lora"
    python -m benchmarks.multi_lora --smoke     # small, also on a CPU; saves to a temporary folder

*Cells*: y += s·B·A·x in bfloat16 for batches of one token a row. Rows have adapters of their own ("distinct"), one of √batch with equal
chances ("uniform") or with chances k^(−1.5) ("zipf"), or one adapter for all ("identical"). Every contestant is replayed from a CUDA graph,
a chain of layers with factors of their own, so that no factor waits in the cache; times are per layer. "Floor" is the bytes of the factors
and of x, y and y', over the rate that a copy reaches here. "Error" is the largest distance from float64, relative to the largest entry.
peft's mixed batch, which loops over names and does more than a graph can hold, is timed whole, against our whole layer.

vLLM's kernels (shrink and expand, Apache-2.0) are measured where they can be imported, else their row says "not installed". They need an
environment with vLLM, or its wheel unpacked anywhere outside this repository: `pip download --no-deps vllm==0.20.2` (that version is for
torch 2.11), then run with the folder that holds vllm/lora/ops/triton_ops on PYTHONPATH. They get what they ask for: the factors of one
rank stacked, their LoRAKernelMeta made before and not timed, as many programs as there are adapters, and their own choice of sizes.

"Ratios" are a contestant's time over ours, for each mix: the median of the cells and the least of them, which is the one that ours does
worst in. The floor's ratio says which share of the roofline is reached.

*One row*: a chain of 4096² layers, bare, with one adapter selected, and as unmerged LoRA layers with float32 factors; and rivals, from
:mod:`benchmarks.candidates_multi_lora`. The bare layer is cuBLAS's; "base, 1 × all, 4 warps" is our own product with W alone, the stricter
measure of what an adapter costs. *Swap*: adapters from pinned RAM through the pool, beside one large pinned copy: for a chain of
4096² layers, and for all linear layers of Llama-3-70B (weights shared: only the adapters are of full size). Once the adapter is only
acquired, as ahead of its turn; once all layers look at their factors, too.
"""

import functools
import importlib
import math
import os
import statistics
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: kernels then run on the CPU
import peft
from torch import Tensor, nn

from benchmarks.cli import failed, message, record, rounded
from benchmarks.lora_layer import replayed
from course.lab.devices import device
from course.lab.meters import milliseconds
from course.lab.tables import columns, wrapped
from reference.lora import LoRALinear
from reference.model_shapes import LLAMA_3_70B, ModelShape
from reference.multi_lora import Factors, MultiLoRA, MultiLoRALinear
from reference.multi_lora.serving import AdapterPool
from reference.multi_lora.serving.packed import Layout

if TYPE_CHECKING:
    from benchmarks.candidates_multi_lora import OneRow

SHAPES = ((4096, 4096), (11008, 4096), (8192, 8192))  # out, in
BATCHES, RANKS, MIXES = (1, 4, 16, 64, 256), (8, 16, 32, 64), ("distinct", "uniform", "zipf", "identical")
COLD = 192 << 20  # bytes of factors in a chain, more than any cache holds
TINY = ModelShape("tiny", hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=96, vocab=40)
SCALE = 2.0
WRONG = 2**-5  # an error above it is no rounding
VLLM = "vllm.lora.ops.triton_ops"


def mixed(mix: str, batch: int, seed: int = 0) -> list[int]:
    """Which adapter each row uses, numbered from 0 without gaps."""
    g = torch.Generator().manual_seed(seed)
    if mix in ("distinct", "identical"):
        return list(range(batch)) if mix == "distinct" else [0] * batch
    chances = torch.arange(1, math.isqrt(batch) + 1, dtype=torch.float64) ** (-1.5 if mix == "zipf" else 0.0)
    drawn = torch.multinomial(chances, batch, replacement=True, generator=g).tolist()
    place = {which: i for i, which in enumerate(dict.fromkeys(drawn))}
    return [place[which] for which in drawn]


class Layer:
    """One layer's adapters in the forms in which contestants want them, made once and not timed."""

    def __init__(self, count: int, r: int, n_out: int, n_in: int, where: torch.device):
        from reference.kernels.multi_lora import tables  # here and below: Triton is not needed to show a table

        self.A = (torch.randn(count, r, n_in, device=where) / n_in**0.5).bfloat16()
        self.B = (torch.randn(count, n_out, r, device=where) / r**0.5).bfloat16()
        self.factors = [Factors(a, b, SCALE) for a, b in zip(self.A, self.B, strict=True)]
        (self.table,) = tables([self.factors], where)


class Batch:
    """Which rows belong together, in the forms in which contestants want it."""

    def __init__(self, rows: list[int], where: torch.device):
        from reference.kernels.multi_lora import Plan

        self.groups = groups_of(rows)
        self.plan = Plan(self.groups, len(rows), 1, where)
        self.indices = [torch.tensor(group, device=where) for group in self.groups]
        self.which = torch.tensor(rows, device=where)
        self.order = torch.cat(self.indices)
        self.ends = torch.tensor([len(group) for group in self.groups], device=where).cumsum(0).to(torch.int32)
        self.vllm: list[Tensor] | None = None  # what vLLM's kernels are told: made at their first call


def groups_of(rows: list[int]) -> list[list[int]]:
    """Row numbers of each adapter, by its number."""
    return [[row for row, which in enumerate(rows) if which == wanted] for wanted in range(max(rows) + 1)]


def ours(y: Tensor, x: Tensor, layer: Layer, batch: Batch) -> None:
    from reference.kernels.multi_lora import add_updates

    add_updates(y, x, layer.table, batch.plan)


def loop(y: Tensor, x: Tensor, layer: Layer, batch: Batch) -> None:
    for f, rows in zip(layer.factors, batch.indices, strict=True):
        y.index_add_(0, rows, (x[rows] @ f.A.T) @ f.B.T, alpha=SCALE)


def gather_bmm(y: Tensor, x: Tensor, layer: Layer, batch: Batch) -> None:
    h = torch.bmm(layer.A[batch.which], x[:, :, None])  # (n, r, 1)
    y.add_(torch.bmm(layer.B[batch.which], h)[:, :, 0], alpha=SCALE)


def grouped_mm(y: Tensor, x: Tensor, layer: Layer, batch: Batch) -> None:
    product = nn.functional.grouped_mm
    h = product(x[batch.order], layer.A.transpose(1, 2), offs=batch.ends)  # (n, r)
    y.index_add_(0, batch.order, product(h, layer.B.transpose(1, 2), offs=batch.ends), alpha=SCALE)


def vllm(y: Tensor, x: Tensor, layer: Layer, batch: Batch) -> None:
    ops = importlib.import_module(VLLM)
    if batch.vllm is None:
        count = len(layer.A)
        meta = ops.LoRAKernelMeta.make(count, len(x), x.device, captured_lora_counts=[count])
        meta.prepare_tensors(batch.which.to(torch.int32))
        batch.vllm = meta.meta_args(len(x), True)
    h = torch.empty(1, len(x), layer.A.shape[1], device=x.device)  # float32, as there
    ops.lora_shrink(x, [layer.A], h, *batch.vllm, SCALE)
    ops.lora_expand(h, [layer.B], y, *batch.vllm, offset_start=0, add_inputs=True)


def forget_vllm() -> None:
    """Its kernels keep every factor that they have seen, as a server never lets go of its stacks."""
    try:
        utils = importlib.import_module(f"{VLLM}.utils")
    except Exception:
        return
    for name in ("_LORA_A_PTR_DICT", "_LORA_B_PTR_DICT"):
        getattr(utils, name, {}).clear()


CONTESTANTS: dict[str, Callable] = {"ours": ours, "loop": loop, "gather + bmm": gather_bmm, "grouped_mm": grouped_mm, "vLLM": vllm}


def copy_rate(where: torch.device, count: int) -> float:
    """Bytes per second, read and written, of a copy on the device."""
    source, target = (torch.empty(count, dtype=torch.uint8, device=where) for _ in range(2))
    return 2 * count / (milliseconds(lambda: target.copy_(source), where=where) / 1e3)


def cell(shape: tuple[int, int], batch_size: int, r: int, mix: str, where: torch.device, rate: float, repeats: int, most: int) -> dict:
    """Milliseconds of every contestant, its error, and the floor."""
    (n_out, n_in), rows = shape, mixed(mix, batch_size)
    torch.manual_seed(0)
    count = max(rows) + 1
    factor_bytes = 2 * count * r * (n_out + n_in)
    depth = max(2, min(most, COLD // factor_bytes))
    layers, batch = [Layer(count, r, n_out, n_in, where) for _ in range(depth)], Batch(rows, where)
    x = torch.randn(batch_size, n_in, device=where).bfloat16()
    start = torch.randn(batch_size, n_out, device=where).bfloat16()
    exact = start.double()
    for i, which in enumerate(rows):
        f = layers[0].factors[which]
        exact[i] += SCALE * f.B.double() @ (f.A.double() @ x[i].double())
    moved = factor_bytes + 2 * batch_size * (n_in + 2 * n_out)
    found = {
        "out": n_out,
        "in": n_in,
        "batch": batch_size,
        "r": r,
        "mix": mix,
        "adapters": count,
        "depth": depth,
        "floor": 1e3 * moved / rate,
    }
    found |= {"milliseconds": {}, "error": {}}
    for name, work in CONTESTANTS.items():
        try:
            y = start.clone()
            work(y, x, layers[0], batch)
            found["error"][name] = error = ((y.double() - exact).abs().max() / exact.abs().max()).item()
            if not error < WRONG:
                raise ArithmeticError(f"differs by {error:.1g}")
            chain = replayed(lambda work=work, y=y: [work(y, x, layer, batch) for layer in layers], where)
            found["milliseconds"][name] = milliseconds(chain, repeats=repeats, warmup=2, where=where) / depth
        except Exception as problem:
            if name == "ours":
                raise
            missing = isinstance(problem, ModuleNotFoundError)
            found["milliseconds"][name] = "not installed" if missing else message(problem)
    forget_vllm()
    return found


def beside_peft(width: int, batch_size: int, r: int, mix: str, where: torch.device, repeats: int) -> dict:
    """Whole layers, base and updates, without a graph: peft's mixed batch and ours."""
    rows = mixed(mix, batch_size)
    base, names = nn.Linear(width, width, bias=False, device=where, dtype=torch.bfloat16), [f"t{i}" for i in range(max(rows) + 1)]
    layer, config = MultiLoRALinear(base), peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=["0"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(nn.Sequential(base), config, adapter_name=names[0], autocast_adapter_dtype=False)
        for name in names[1:]:
            model.add_adapter(name, config, autocast_adapter_dtype=False)
    theirs = model.base_model.model[0].eval()
    for name in names:
        layer.add(name, Factors(theirs.lora_A[name].weight.detach(), theirs.lora_B[name].weight.detach(), SCALE))
    x, wanted = torch.randn(batch_size, width, device=where).bfloat16(), [names[which] for which in rows]
    layer.select(wanted)
    with torch.no_grad():
        difference = (layer(x).float() - theirs(x, adapter_names=wanted).float()).abs().max().item()
        times = {
            "ours": milliseconds(lambda: layer(x), repeats=repeats, where=where),
            "peft": milliseconds(lambda: theirs(x, adapter_names=wanted), repeats=repeats, where=where),
        }
    return {"batch": batch_size, "r": r, "mix": mix, "difference": difference, "milliseconds": times}


def one_row(width: int, depth: int, r: int, where: torch.device, rounds: int, repeats: int, ways: dict[str, Callable]) -> dict:
    """A generated token's way through a chain of layers, per layer: bare, and with one adapter that is not merged."""
    from benchmarks.candidates_multi_lora import OneRow

    bases = [nn.Linear(width, width, bias=False, device=where, dtype=torch.bfloat16) for _ in range(depth)]
    layers = [MultiLoRALinear(base) for base in bases]
    for layer in layers:
        a, b = torch.randn(r, width, device=where).bfloat16(), torch.randn(width, r, device=where).bfloat16()
        layer.add("t", Factors(a, b, 1e-3))
        layer.select("t")
    x = torch.randn(1, width, device=where).bfloat16()
    unmerged = [LoRALinear(base, r, 1e-3 * r).eval() for base in bases]
    for layer in unmerged:
        nn.init.normal_(layer.lora_B)
    chains = {"base": nn.Sequential(*bases), "one adapter": nn.Sequential(*layers), "LoRALinear": nn.Sequential(*unmerged)}
    rows = [OneRow(layer.weight, layer.adapters["t"].A, layer.adapters["t"].B, 1e-3) for layer in layers]
    problems: dict[str, str] = {}
    with torch.no_grad():
        for name, way in ways.items():
            try:
                check_row(way, rows[0], x, adapted=not name.startswith("base, 1"))
            except Exception as problem:
                problems[name] = message(problem)
                continue
            chains[name] = lambda x, way=way: functools.reduce(lambda y, row: way(row, y), rows, x)
        for chain in chains.values():
            chain(x)  # what is compiled or put on the device once
        graphs = {name: replayed(lambda chain=chain: chain(x), where) for name, chain in chains.items()}
        times: dict[str, list[float]] = {name: [] for name in graphs}
        for _ in range(rounds):
            for name, graph in graphs.items():
                times[name].append(milliseconds(graph, repeats, where=where) / depth)
    found = {name: statistics.median(values) for name, values in times.items()}
    return {
        "width": width,
        "r": r,
        "milliseconds": found,
        "cost": {name: time / found["base"] - 1 for name, time in found.items() if name != "base"},
        "problems": problems,
    }


def check_row(way: Callable, row: "OneRow", x: Tensor, adapted: bool) -> None:
    """Raise unless it gives, twice, what float64 does."""
    right = x.double() @ row.weight.double().T
    if adapted:
        right += row.scaling * (x.double() @ row.A.double().T) @ row.B.double().T
    for _ in range(2):
        error = ((way(row, x).double() - right).abs().max() / right.abs().max()).item()
        if not error < WRONG:
            raise ArithmeticError(f"differs by {error:.1g}")


def linears_of(shape: ModelShape) -> list[tuple[int, int]]:
    """(out, in) of the linear layers of all its blocks."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    block = [(q, shape.hidden), *[(kv, shape.hidden)] * 2, (shape.hidden, q)]
    return [*block, *[(shape.mlp, shape.hidden)] * 2, (shape.hidden, shape.mlp)] * shape.layers


def swap(sizes: list[tuple[int, int]], r: int, where: torch.device, repeats: int) -> dict:
    """Adapters for layers of these (out, in) through a pool that holds one: each acquire is one copy from RAM."""
    weights = {s: nn.Parameter(torch.zeros(s, device=where, dtype=torch.bfloat16), requires_grad=False) for s in sizes}
    factors = {(o, i): Factors(torch.randn(r, i).bfloat16(), torch.randn(o, r).bfloat16()) for o, i in weights}
    layers = []
    for n_out, n_in in sizes:
        layers.append(nn.Linear(n_in, n_out, bias=False, device="meta"))
        layers[-1].weight = weights[n_out, n_in]
    served = MultiLoRA(nn.Sequential(*layers))
    adapter = {name: factors[size] for name, size in zip(served.layers, sizes, strict=True)}
    size = Layout(adapter).bytes
    pool, names = AdapterPool(served, size, 2 * size), ["a", "b"]
    for name in names:
        pool.register(name, adapter)
    turn = iter(range(1 << 30))

    def work(look: bool = False) -> None:
        held = pool.acquire(names[next(turn) % 2])
        if look:
            for _ in held.adapter.values():
                pass
        pool.release(held)

    times = {
        "milliseconds": milliseconds(work, repeats=repeats, where=where),
        "looked_at_milliseconds": milliseconds(lambda: work(look=True), repeats=repeats, where=where),
    }
    source, target = (
        torch.empty(size, dtype=torch.uint8, pin_memory=where.type == "cuda"),
        torch.empty(size, dtype=torch.uint8, device=where),
    )
    copy = milliseconds(lambda: target.copy_(source, non_blocking=True), repeats=repeats, where=where)
    shares = {"share_of_bus": copy / times["milliseconds"], "share_of_bus_looked_at": copy / times["looked_at_milliseconds"]}
    return {"layers": len(sizes), "r": r, "bytes": size, **times, "copy_milliseconds": copy, **shares}


def label(row: dict) -> str:
    """What a cell is called."""
    shape = f"{row['out']}×{row['in']}, " if "out" in row else ""
    return f"{shape}{row['batch']} rows, r {row['r']}, {row['mix']}"


def ratios(result: dict) -> list[dict]:
    """For each peer and mix, and for all mixes: its time over ours, the median of the cells and the one where ours does worst."""
    cells = [(cell, cell["milliseconds"] | {"floor": cell["floor"]}) for cell in result["cells"]]
    cells += [(cell, cell["milliseconds"]) for cell in result["peft"]]
    found: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for cell, times in cells:
        for peer, time in times.items():
            if peer != "ours" and isinstance(time, float):
                for mix in (cell["mix"], "all"):
                    found.setdefault((peer, mix), []).append((time / times["ours"], label(cell)))
    rows = []
    for (peer, mix), known in found.items():
        least, where = min(known)
        rows.append({"peer": peer, "mix": mix, "cells": len(known), "median": statistics.median(r for r, _ in known)})
        rows[-1] |= {"least": least, "least_at": where, "below_1": sum(r < 1 for r, _ in known)}
    return sorted(rows, key=lambda row: (row["peer"], [*MIXES, "all"].index(row["mix"])))


def measure(small: bool = False, where: torch.device | None = None) -> dict:
    """All of it; ``small`` for a machine without a GPU."""
    from benchmarks.candidates_multi_lora import WAYS

    where = where or device()
    if small:
        shapes, batches, ranks, repeats, most, width, depth = ((32, 48),), (1, 4), (8,), 2, 2, 64, 2
    else:
        shapes, batches, ranks, repeats, most, width, depth = SHAPES, BATCHES, RANKS, 20, 16, 4096, 8
    rate = copy_rate(where, 1 << (20 if small else 30))
    with torch.no_grad():
        cells = [cell(s, n, r, mix, where, rate, repeats, most) for s in shapes for n in batches for r in ranks for mix in MIXES]
    found = {"copy_bytes_per_second": rate, "peft_version": peft.__version__, "cells": cells}
    found["peft"] = [beside_peft(width, n, ranks[0], mix, where, repeats) for n in batches[1:] for mix in MIXES]
    found["one_row"] = [one_row(width, depth, r, where, 1 if small else 7, repeats, WAYS) for r in ranks]
    found["swap"] = swap([(width, width)] * (4 if small else 128), 16, where, repeats)
    found["swap_70b"] = swap(linears_of(TINY if small else LLAMA_3_70B), 16, where, repeats)
    found["ratios"] = ratios(found)
    found["largest_error"] = {name: max((c["error"][name] for c in cells if name in c["error"]), default=None) for name in CONTESTANTS}
    return rounded(found)


def table(result: dict) -> str:
    names = (*CONTESTANTS, "floor")
    rows, groups = [], dict.fromkeys((row["mix"], row["batch"]) for row in result["cells"])
    for mix, batch in groups:
        cells = [row["milliseconds"] | {"floor": row["floor"]} for row in result["cells"] if (row["mix"], row["batch"]) == (mix, batch)]
        times = ([cell[name] for cell in cells if isinstance(cell[name], float)] for name in names)
        rows.append([f"{mix}, {batch} row{'s' * (batch > 1)}", *(1e3 * statistics.median(each) if each else None for each in times)])
    lines = ["µs a layer, the median over shapes and ranks", columns(("", *names), rows, ".1f")]
    problems = {(name, time) for row in result["cells"] for name, time in row["milliseconds"].items() if isinstance(time, str)}
    lines += [failed(name, problem) for name, problem in sorted(problems)]

    known = {(row["peer"], row["mix"]): row for row in result["ratios"]}
    mixes, rows = (*MIXES, "all"), []
    for peer in dict.fromkeys(peer for peer, _ in known):
        cells = (known.get((peer, mix)) for mix in mixes)
        rows.append([peer, *(f"{cell['median']:.2f} ({cell['least']:.2f})" if cell else None for cell in cells)])
    lines += ["", "time over ours, the median of all cells (the least)", columns(("", *mixes), rows)]
    below = {peer: row for (peer, mix), row in known.items() if mix == "all" and peer != "floor" and row["below_1"]}
    faster = ", ".join(f"{peer} in {row['below_1']} of {row['cells']} cells" for peer, row in below.items())
    lines.append(f"faster than ours: {faster or 'none'}")

    ranks = [f"r {row['r']}" for row in result["one_row"]]
    rows = [["base", *(f"{1e3 * row['milliseconds']['base']:.2f} µs" for row in result["one_row"])]]
    for name in dict.fromkeys(name for row in result["one_row"] for name in row["cost"]):
        rows.append([name, *(f"{row['cost'][name]:+.1%}" if name in row["cost"] else None for row in result["one_row"])])
    lines += ["", columns(("one row: time of a layer, over the base", *ranks), rows)]
    lines += [failed(f"r {row['r']}, {name}", problem) for row in result["one_row"] for name, problem in row["problems"].items()]
    for row in (result["swap"], result["swap_70b"]):
        shares = f"{row['share_of_bus']:.0%} of the bus, {row['share_of_bus_looked_at']:.0%} if all layers look at their factors"
        lines.append(wrapped(f"swap, {row['layers']} layers, {row['bytes'] / 1e6:.1f} MB: {row['milliseconds']:.3f} ms, {shares}"))
    errors = ", ".join(f"{name} {error:.1e}" for name, error in result["largest_error"].items() if error is not None)
    return "\n".join([*lines, wrapped(f"largest error: {errors}")])


def main() -> None:
    record("multi_lora", __doc__, measure, table, small={"small": True, "where": torch.device("cpu")})


if __name__ == "__main__":
    main()
