"""AdamW with its state on the host: paged and offloaded steps beside torch, bitsandbytes and torchao, and the bus they share.

    python -m benchmarks.paged_adamw              # a CUDA device with 24 GB and a host with 40 GB free, about two minutes; "paged_adamw"
    python -m benchmarks.paged_adamw --only bus paged
    python -m benchmarks.paged_adamw --smoke      # small shapes on the CPU, in seconds; saves to a temporary folder

A list of float32 tensors with the shapes of a Llama of a billion parameters, random values, random gradients. Pages of 64 MiB.

- "bus": copies of 64 MiB between pinned memory and the card: in, out, and both at once, each direction's rate.
- "bits": how many numbers differ from those of torch's loop after 20 steps.
- "resident": milliseconds of a step when all state fits on the card, by CUDA events; also of the 448 factors of LoRA on Llama-2-7B, r = 16.
- "paged": a step under budgets, policies, and with all copies in the computing stream; pages in and out, their rate, and its share of
  what the bus gave for both directions at once.
- "timeline": which page was copied and updated when, by torch's profiler, with one stream and with three.
- "offloaded": a training iteration, forward, backward and step, with the step on the CPU, beside torchao's CPUOffloadOptimizer.
"""

import gc
import statistics
import time
import traceback
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.cli import failed, message, options, rounded
from course.lab import recorded
from course.lab.meters import milliseconds
from course.lab.tables import columns
from reference.model_shapes import LLAMA_2_7B
from reference.paging import POLICIES, OffloadedAdamW, PagedAdamW

PAGE, BUDGET = 1 << 26, 10**9
LAYER = ((2048, 2048),) * 4 + ((5632, 2048),) * 3 + ((2048,),) * 2
BILLION = ((32000, 2048), *LAYER * 18, (2048,), (32000, 2048))
SMALL_PAGE, SMALL = 1 << 12, ((100, 20), *((20, 20), (50, 20), (20,)) * 4)
RATE = 1e-3


def factors(rank: int = 16) -> list[tuple[int, int]]:
    """Shapes of LoRA's A and B on all linears of Llama-2-7B."""
    one = [shape for out, width in LLAMA_2_7B.linears.values() for shape in ((rank, width), (out, rank))]
    return one * LLAMA_2_7B.layers


class Setting:
    """What is measured where: sizes, and whether this is a dry run."""

    def __init__(self, device: torch.device, smoke: bool):
        self.device, self.smoke, self.cuda = device, smoke, device.type == "cuda"
        self.page = SMALL_PAGE if smoke else PAGE
        self.budget = 4 * SMALL_PAGE if smoke else BUDGET
        self.shapes = SMALL if smoke else BILLION

    def tensors(self, shapes=None, gradients: bool = True) -> list[nn.Parameter]:
        torch.manual_seed(0)
        found = [nn.Parameter(0.02 * torch.randn(shape, device=self.device)) for shape in shapes or self.shapes]
        for p in found if gradients else ():
            p.grad = torch.randn_like(p)
        return found

    def paged(self, params, budget: int | None = None, **more) -> PagedAdamW:
        return PagedAdamW(params, lr=RATE, resident_bytes=budget or self.budget, page_bytes=self.page, **more)

    def ms(self, work: Callable, repeats: int = 7) -> float:
        return milliseconds(work, repeats=1 if self.smoke else repeats, warmup=1 if self.smoke else 3, where=self.device)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def free(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


def bus(s: Setting) -> dict:
    """GB/s of each direction; median of five."""
    if not s.cuda:
        return {"in": 1.0, "out": 1.0, "both": 1.0}
    count, copies = s.page, 32
    host = [torch.empty(count, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    card = [torch.empty(count, dtype=torch.uint8, device=s.device) for _ in range(2)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]

    def go(inwards: bool, outwards: bool) -> None:
        here = torch.cuda.current_stream()
        for stream in streams:
            stream.wait_stream(here)
        for _ in range(copies):
            if inwards:
                with torch.cuda.stream(streams[0]):
                    card[0].copy_(host[0], non_blocking=True)
            if outwards:
                with torch.cuda.stream(streams[1]):
                    host[1].copy_(card[1], non_blocking=True)
        for stream in streams:
            here.wait_stream(stream)

    ways = {"in": (True, False), "out": (False, True), "both": (True, True)}
    return {name: copies * count / s.ms(lambda way=way: go(*way), 5) / 1e6 for name, way in ways.items()}


def resident(s: Setting) -> list[dict]:
    """Milliseconds of a step, everything on the card."""
    makers = {
        "torch, loop": lambda p: torch.optim.AdamW(p, lr=RATE, foreach=False),
        "torch, foreach": lambda p: torch.optim.AdamW(p, lr=RATE, foreach=True),
        "torch, fused": lambda p: torch.optim.AdamW(p, lr=RATE, fused=True),
        "paged": lambda p: s.paged(p, 1 << 34),
        "paged, torch's operations": lambda p: s.paged(p, 1 << 34),
        "bitsandbytes, paged": lambda p: bitsandbytes().PagedAdamW32bit(p, lr=RATE),
        "bitsandbytes": lambda p: bitsandbytes().AdamW32bit(p, lr=RATE),
    }
    rows = []
    for model, shapes in (("a billion", s.shapes), ("LoRA factors", SMALL if s.smoke else factors())):
        params = s.tensors(shapes)
        for name, make in makers.items():
            row = {"model": model, "how": name, "numbers": sum(p.numel() for p in params), "tensors": len(params)}
            try:
                optimizer = make(params)
                if name.endswith("operations"):
                    optimizer.kernels = False
                row["ms"] = s.ms(optimizer.step)
            except Exception as error:
                row["error"] = message(error)
            rows.append(row)
            optimizer = None
            s.free()
    return rows


def bitsandbytes():
    import bitsandbytes as library

    return library.optim


def paged(s: Setting, rates: dict) -> list[dict]:
    """Seconds of a step whose state does not fit; rates in GB/s of each direction."""
    params, rows = s.tensors(), []
    total = sum(-(-p.numel() // 64) * 64 * 8 for p in params)
    cases = [(s.budget, policy, 3) for policy in POLICIES] + [(s.budget, "alternate", 1), (s.budget, "mru", 1)]
    cases += [(int(share * total) + s.page, "alternate", 3) for share in (0.05, 0.25, 0.5, 0.75, 1.0)]
    for budget, policy, streams in cases:
        optimizer = s.paged(params, budget, policy=policy)
        if streams == 1 and s.cuda:
            optimizer.pool.incoming.stream = optimizer.pool.outgoing.stream = torch.cuda.current_stream()
        for _ in range(2):
            optimizer.step()
        s.wait()
        optimizer.trace.clear()
        steps = 1 if s.smoke else 4
        began = time.perf_counter()
        for _ in range(steps):
            optimizer.step()
        host = time.perf_counter() - began
        s.wait()
        seconds = (time.perf_counter() - began) / steps
        kinds = [event.kind for event in optimizer.trace]
        counts = {kind: kinds.count(kind) / steps for kind in ("hit", "in", "out")}
        row = {"policy": policy, "streams": streams, "budget": budget, "pages": len(optimizer.layout.pages), "seconds": seconds}
        row |= {"launching": host / steps, "frames": optimizer.pool.most, **counts}
        for way in ("in", "out"):
            row[f"rate {way}"] = counts[way] * s.page / seconds / 1e9
            row[f"share {way}"] = row[f"rate {way}"] / rates["both"]
        rows.append(row)
        optimizer = None
        s.free()
    return rows


def timeline(s: Setting) -> dict[str, list]:
    """Way -> spans (lane, start, end) in milliseconds of one step with 24 pages and 6 frames."""
    numbers = 24 * s.page // 8
    (p,) = s.tensors([(numbers,)])
    found = {}
    for name, policy, streams in (("one stream", "lru", 1), ("three streams", "lru", 3), ("three streams, mru", "mru", 3)):
        optimizer = s.paged([p], 6 * s.page, policy=policy)
        if s.cuda and streams == 1:
            optimizer.pool.incoming.stream = optimizer.pool.outgoing.stream = torch.cuda.current_stream()
        for _ in range(3):
            optimizer.step()
        s.wait()
        found[name] = spans(optimizer.step) if s.cuda else [["in", 0.0, 1.0], ["update", 1.0, 2.0], ["out", 2.0, 3.0]]
        optimizer = None
        s.free()
    return found


def spans(work: Callable) -> list[list]:
    """Copies and kernels of a call by the profiler, from the first one's start."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    found = []
    for event in profiler.events():
        lane = {"Memcpy HtoD": "in", "Memcpy DtoH": "out"}.get(event.name[:11]) or ("update" if "update_kernel" in event.name else None)
        if lane and event.device_type == torch.autograd.DeviceType.CUDA and event.device_time > 5:  # µs: not the tables
            found.append([lane, event.time_range.start / 1e3, event.time_range.end / 1e3])
    first = min((start for _, start, _ in found), default=0)
    return [[lane, round(start - first, 4), round(end - first, 4)] for lane, start, end in sorted(found, key=lambda span: span[1])]


def deep(s: Setting, width: int, depth: int) -> nn.Sequential:
    torch.manual_seed(0)
    with torch.device(s.device):
        return nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())))


def offloaded(s: Setting) -> list[dict]:
    """Seconds of an iteration of linear layers, half a billion float32 parameters; its step alone; bits equal to the fused AdamW's."""
    width, depth, rows = (16, 4, 32) if s.smoke else (4096, 32, 2048)

    def torchao(params):
        from torchao.optim import CPUOffloadOptimizer

        return CPUOffloadOptimizer(params, torch.optim.AdamW, fused=True, lr=RATE)

    makers = {
        "torch, fused": lambda p: torch.optim.AdamW(p, lr=RATE, fused=True),
        "offloaded": lambda p: OffloadedAdamW(p, lr=RATE),
        "torchao": torchao,
        "offloaded, clipped outside": lambda p: OffloadedAdamW(p, lr=RATE),
        "offloaded, clipped inside": lambda p: OffloadedAdamW(p, lr=RATE, max_norm=1.0),
        "paged, nothing resident": lambda p: s.paged(p, 4 * s.page, policy="lru"),
    }
    found = []
    for name, make in makers.items():
        row = {"how": name}
        try:
            model = deep(s, width, depth)
            optimizer = make(list(model.parameters()))
            x = torch.randn(rows, width, device=s.device)

            def iteration(model=model, optimizer=optimizer, x=x, outside="outside" in name) -> tuple[float, float]:
                began = time.perf_counter()
                model(x).square().mean().backward()
                if outside:
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                middle = time.perf_counter()
                optimizer.step()
                optimizer.zero_grad()
                s.wait()
                return time.perf_counter() - began, time.perf_counter() - middle

            s.wait()
            times = [iteration() for _ in range(2 if s.smoke else 9)][1 if s.smoke else 2 :]
            row |= {"seconds": statistics.median(total for total, _ in times), "all_seconds": [total for total, _ in times]}
            row |= {"after_backward": statistics.median(step for _, step in times)}
            row |= {"numbers": sum(p.numel() for p in model.parameters()), "threads": torch.get_num_threads()}
        except Exception as error:
            traceback.print_exc()
            row["error"] = message(error)
        found.append(row)
        model = optimizer = None
        s.free()
    return found


def bits(s: Setting) -> dict:
    """How many numbers of p differ from the loop's after 20 steps, float32: of torch's other ways, and of pages."""
    shapes = SMALL if s.smoke else ((513, 700), (1000, 1031), (77,))
    makers = {
        "torch, loop": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
        "torch, foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
        "torch, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    }
    for policy in POLICIES:
        makers[f"paged, {policy}"] = lambda p, policy=policy: PagedAdamW(p, 1e-2, resident_bytes=3 << 18, page_bytes=1 << 18, policy=policy)
    makers["paged, resident"] = lambda p: PagedAdamW(p, 1e-2, resident_bytes=1 << 30, page_bytes=1 << 22)
    params = {name: s.tensors(shapes) for name in makers}
    optimizers = {name: make(params[name]) for name, make in makers.items()}
    for step in range(20):
        torch.manual_seed(step)
        for i, shape in enumerate(shapes):
            grad = torch.randn(shape, device=s.device) * 10 ** (3 * torch.rand(()).item() - 2)
            for name in makers:
                params[name][i].grad = grad.clone()
        for optimizer in optimizers.values():
            optimizer.step()
    right = params["torch, loop"]
    differ = {name: sum(int((p != q).sum()) for p, q in zip(found, right, strict=True)) for name, found in params.items()}
    return {"numbers": sum(p.numel() for p in right), "differ": differ}


PARTS = ("bus", "bits", "resident", "paged", "timeline", "offloaded")


def table(result: dict) -> str:
    parts = []
    if "bus" in result:
        parts.append("bus, GB/s: " + ", ".join(f"{way} {rate:.1f}" for way, rate in result["bus"].items()))
    if rows := result.get("resident"):
        models = list(dict.fromkeys(row["model"] for row in rows))
        times = {(row["how"], row["model"]): row.get("ms") for row in rows}
        names = dict.fromkeys(row["how"] for row in rows)
        parts.append(columns(("ms a step", *models), [(how, *(times.get((how, model)) for model in models)) for how in names]))
    if rows := result.get("paged"):
        lines = [
            (
                f"{row['policy']}, {row['streams']} stream{'s' * (row['streams'] > 1)}, {row['frames']} of {row['pages']} pages",
                1e3 * row["seconds"],
                *(row[f"rate {way}"] for way in ("in", "out")),
                *(f"{row[f'share {way}']:.0%}" for way in ("in", "out")),
            )
            for row in rows
        ]
        parts.append(columns(("paged, frames", "ms", "GB/s in", "out", "of the bus", "out"), lines, ".1f"))
    if rows := result.get("offloaded"):
        lines = [(row["how"], row.get("seconds"), row.get("after_backward")) for row in rows]
        parts.append(columns(("seconds", "a step", "after backward"), lines, ".3f"))
    parts += [failed(row["how"], row["error"]) for part in ("resident", "offloaded") for row in result.get(part, ()) if "error" in row]
    if bits := result.get("bits"):
        parts.append(columns((f"of {bits['numbers']:,} numbers differ from torch's loop", ""), bits["differ"].items()))
    return "\n\n".join(parts)


def main() -> None:
    given = options("paged_adamw", __doc__, only={"nargs": "+", "choices": PARTS, "help": "these parts"})
    s = Setting(given.device, given.smoke)
    result: dict = {"page": s.page, "budget": s.budget, "numbers": sum(torch.Size(shape).numel() for shape in s.shapes)}
    for part in PARTS:
        if given.only and part not in (*given.only, "bus"):
            continue
        began = time.perf_counter()
        work = {"paged": lambda: paged(s, result["bus"])}.get(part, lambda part=part: globals()[part](s))
        try:
            result[part] = rounded(work())
        except Exception as error:
            traceback.print_exc()
            result[part] = {"error": message(error)}
        s.free()
        print(f"{part}: {time.perf_counter() - began:.1f} s", flush=True)
        path = recorded.save("paged_adamw", result, given.out, given.device)
    print(table(result))
    print("saved to", path)


if __name__ == "__main__":
    main()
