"""How the cost of a QLoRA step grows with model size, tokens and rank: measured points beside what reference.memory predicts.

    python -m benchmarks.growth                   # up to 70B, 8,192 tokens and r = 256 on a CUDA device with 80 GB;
                                                  # on a CPU smaller models and fewer tokens, about five minutes; saves the result "growth"
    python -m benchmarks.growth --exact           # tokens and rank without what is not the step's own; saves "growth_exact"
    python -m benchmarks.growth --only rank       # one of the three; saves to a temporary folder
    python -m benchmarks.growth --smoke           # small shapes on the CPU, in seconds; saves to a temporary folder

One thing changes at a time, from a step with 1 × 512 tokens, r = 16 on all linears and checkpointing (reference.qlora, reference.lora,
AdamW). Tokens are varied with checkpointing, without it, and, over fewer lengths, with attention that stores its scores. A row is
measured once, also where two lines cross in it. Models have random weights and are built as benchmarks.cases does.

Bytes are those of a step after the first (Adam's moments exist by then): on CUDA the allocator's peak less the matrix library's
workspaces, on a CPU the tensors that exist before the step, added up, and those that operations hand out during it, counted. What an
operation needs inside itself is therefore not in a CPU's figure. Seconds are of whole steps, without the counting.

Two things in these bytes are not the step's own. torch's allocator leaves up to a mebibyte at the end of a cached block unused and counts
it. And the library's switch makes the embedding's output ask for a gradient, and leaves that so when checkpointing is switched off.
--exact lets the allocator split all blocks (expandable segments), and takes back what the switch has done.
"""

import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import ALPHA, CHECKPOINTING, LIKE_GEMMA, OURS, RANK, Case, build, tiny_shape
from benchmarks.cli import failed, message, options
from benchmarks.meters import Extra, Meter, take_step
from course.lab import recorded
from course.lab.live import storage_bytes
from course.lab.meters import show_bytes
from course.lab.tables import columns, short
from reference.memory import training_memory
from reference.memory.recipes import QLORA
from reference.model_shapes import LLAMA_2_7B, LLAMA_2_13B, LLAMA_2_70B, LLAMA_3_2_1B, LLAMA_33B, ModelShape

TOKENS = 512
SWEEPS = "size", "tokens", "rank"
# Gemma's embedding is larger than all its layers, and its loss than its embedding: with fewer words the rest can be seen on a CPU, too.
SMALL = dataclasses.replace(LIKE_GEMMA, name="Gemma-3-270M's layers, 32,000 words", vocab=32_000)


@dataclasses.dataclass(frozen=True)
class Point:
    """One step to measure. attention: "fused", or "math", which stores the scores."""

    shape: ModelShape
    sequence: int = TOKENS
    rank: int = RANK
    checkpointing: bool = True
    attention: str = "fused"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is varied: ``shapes`` are for the sweep of sizes; the others are swept on ``shape``."""

    shape: ModelShape
    shapes: tuple[ModelShape, ...]
    lengths: tuple[int, ...]
    scored: tuple[int, ...]  # lengths at which attention stores its scores
    ranks: tuple[int, ...]
    start: int = TOKENS  # tokens of the sweeps of sizes and ranks

    def points(self, sweeps: Iterable[str] = SWEEPS) -> list[Point]:
        """Each once, in the order of measuring: most telling first, the largest model last."""
        found = []
        if "tokens" in sweeps:
            found += [Point(self.shape, n, checkpointing=again) for again in (True, False) for n in self.lengths]
            found += [Point(self.shape, n, checkpointing=False, attention="math") for n in self.scored]
        if "rank" in sweeps:
            found += [Point(self.shape, self.start, rank) for rank in self.ranks]
        if "size" in sweeps:
            found += [Point(shape, self.start) for shape in self.shapes]
        return list(dict.fromkeys(found))


def plan(cuda: bool, smoke: bool = False) -> Plan:
    if smoke:
        small = ModelShape("smoke", 128, 3, 4, 2, 32, 320, 3000)
        larger = dataclasses.replace(small, name="smoke, larger", layers=5, vocab=4000, tied=True)
        return Plan(small, (small, larger), (32, 64), (64,), (4, 16, 32), start=32)
    small = tiny_shape(), SMALL, LIKE_GEMMA, LLAMA_3_2_1B
    if cuda:
        lengths, ranks = (128, 256, 512, 1024, 2048, 4096, 8192), (4, 8, 16, 32, 64, 128, 256)
        return Plan(LLAMA_2_7B, (*small, LLAMA_2_7B, LLAMA_2_13B, LLAMA_33B, LLAMA_2_70B), lengths, (512, 1024, 2048), ranks)
    return Plan(SMALL, small, (128, 256, 512, 1024, 2048), (512, 1024), (4, 8, 16, 32, 64, 128, 256))


def groups(points: Iterable[Point]) -> dict[tuple[ModelShape, int], list[Point]]:
    """Points that one model serves: (shape, rank) -> points."""
    found: dict[tuple[ModelShape, int], list[Point]] = {}
    for point in points:
        found.setdefault((point.shape, point.rank), []).append(point)
    return found


def set_up(point: Point, model: nn.Module, exact: bool = False) -> contextlib.AbstractContextManager:
    """Switch checkpointing, with ``exact`` also what its switch leaves behind; the context in which attention is as the point says."""
    if point.checkpointing:
        model.gradient_checkpointing_enable(**CHECKPOINTING)
    else:
        model.gradient_checkpointing_disable()
        if exact:  # each use of the switch adds a hook, and disable_input_require_grads() takes back the last alone
            model.get_input_embeddings()._forward_hooks.clear()
    return sdpa_kernel(SDPBackend.MATH) if point.attention == "math" else contextlib.nullcontext()


def measure(point: Point, model: nn.Module, adam: torch.optim.Optimizer, meter: Meter, exact: bool = False) -> dict:
    """Peaks of one step, and seconds of others, once Adam's moments exist."""
    place, peaks, losses, seconds = next(model.parameters()).device, {}, [], []
    ids = torch.randint(point.shape.vocab, (1, point.sequence), device=place)
    with set_up(point, model, exact):
        for _ in range(4 if meter.cuda else 1):
            began = time.perf_counter()
            losses.append(take_step(model, adam, ids))
            if meter.cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        if not meter.cuda:  # what is there is added up; what the step makes is counted
            moments = [value for state in adam.state.values() for value in state.values()]
            meter.base = meter.live.bytes - storage_bytes([*model.parameters(), *model.buffers(), *moments, ids])
        held = meter.now

        def note(phase: str) -> None:
            peaks[phase] = meter.peak
            meter.reset()

        with meter:
            meter.reset()
            losses.append(take_step(model, adam, ids, note))
    timed = seconds[1:] or seconds  # on CUDA the first one waits for kernels to be chosen
    return {"peak": max(peaks.values()), "peaks": peaks, "held": held, "seconds": statistics.median(timed), "losses": losses}


def described(point: Point) -> dict:
    """What was asked for and what reference.memory says about it, to stand beside the measurement."""
    budget = training_memory(
        point.shape, QLORA, 1, point.sequence, point.rank, checkpointing=point.checkpointing, attention=point.attention
    )
    row = dataclasses.asdict(point) | {"shape": point.shape.name, "parameters": point.shape.parameters, "batch": 1}
    return row | {"predicted": budget.peak, "predicted_moment": budget.moment, "predicted_weights": budget["weights"]}


def measure_group(
    shape: ModelShape, rank: int, points: list[Point], meter: Meter, device: torch.device, exact: bool = False
) -> Iterable[dict]:
    """A row for each point; one that fails is a row with an error, and the others go on."""
    model = adam = None
    meter.start()
    try:
        model = build(OURS, Case(shape, True, (), rank), device, Extra(meter))
        trained = [p for p in model.parameters() if p.requires_grad]
        adam = torch.optim.AdamW(trained, lr=1e-4, foreach=True)  # what a GPU takes by default
        take_step(model, adam, torch.randint(shape.vocab, (1, 16), device=device))  # makes Adam's moments
    except Exception as error:
        yield from (described(point) | {"error": message(error)} for point in points)
        return
    for point in points:
        try:
            row = described(point) | measure(point, model, adam, meter, exact)
            yield row | {"ratio": row["predicted"] / row["peak"]}
        except Exception as error:
            adam.zero_grad(set_to_none=True)
            yield described(point) | {"error": message(error)}


def run(
    points: list[Point], device: torch.device, keep: Callable[[list[dict]], None] = lambda rows: None, exact: bool = False
) -> list[dict]:
    """All rows; ``keep`` is called with those that exist after each one, so that a run which is cut short leaves them."""
    meter, rows = Meter(device), []
    print(HEAD, flush=True)
    for (shape, rank), group in groups(points).items():
        torch.manual_seed(0)
        for row in measure_group(shape, rank, group, meter, device, exact):
            rows.append(row)
            print(line(row), flush=True)
            keep(rows)
    return rows


FORM = "{:38}{:>8}{:>6}{:>15}{:>11}{:>11}{:>8}{:>10}"
HEAD = FORM.format("shape", "tokens", "rank", "", "measured", "predicted", "ratio", "s/step")


def line(row: dict) -> str:
    start = row["shape"], f"{row['sequence']:,}", row["rank"], way_of(row)
    if "error" in row:
        return FORM.format(*start, "", show_bytes(row["predicted"]), "", "") + f"  FAILED {row['error']}"
    return FORM.format(*start, show_bytes(row["peak"]), show_bytes(row["predicted"]), f"{row['ratio']:.3f}", f"{row['seconds']:.2f}")


def table(result: dict) -> str:
    rows = [row for row in result["rows"] if "error" not in row]
    parts = ["Peak of a step; ratio: what is predicted over it."]
    for way in dict.fromkeys(map(way_of, rows)):
        heads = (way or "no checkpointing", "tokens", "rank", "peak", "ratio", "s/step")
        lines = [
            (row["shape"], row["sequence"], row["rank"], show_bytes(row["peak"]), f"{row['ratio']:.4f}", short(row["seconds"]))
            for row in rows
            if way_of(row) == way
        ]
        parts.append(columns(heads, lines))
    failures = [failed(f"{row['shape']}, {row['sequence']:,} tokens", row["error"]) for row in result["rows"] if "error" in row]
    return "\n\n".join([*parts, *failures])


def way_of(row: dict) -> str:
    return "checkpointing" if row["checkpointing"] else "scores stored" if row["attention"] == "math" else ""


def main() -> None:
    given = options(
        "growth",
        __doc__,
        gpu=False,
        only={"nargs": "+", "choices": SWEEPS, "help": "what to vary (default: all three)"},
        exact={"action": "store_true", "help": "tokens and rank, without what is not the step's own: see above"},
    )
    if given.exact:
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # read at the first allocation
    device = given.device
    chosen, began = plan(device.type == "cuda", given.smoke), time.monotonic()
    points = chosen.points(given.only or (("tokens", "rank") if given.exact else SWEEPS))
    shapes = {point.shape.name: dataclasses.asdict(point.shape) for point in points}

    def keep(rows: list[dict]) -> Path:
        about = {"tokens": chosen.start, "rank": RANK, "alpha": ALPHA, "swept": chosen.shape.name, "shapes": shapes}
        return recorded.save("growth_exact" if given.exact else "growth", about | {"rows": rows}, given.out, device)

    path = keep(rows := run(points, device, keep, given.exact))
    print(table({"rows": rows}))
    print(f"{len(rows)} rows in {time.monotonic() - began:.0f} s, {sum('error' in row for row in rows)} failed")
    print("saved to", path)


if __name__ == "__main__":
    main()
