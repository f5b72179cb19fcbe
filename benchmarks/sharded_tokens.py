"""Seconds of a sharded QLoRA step by the tokens of a card: what limits it, messages, arithmetic, or the processor that starts the kernels.

    torchrun --nproc-per-node 2 -m benchmarks.sharded_tokens           # two CUDA devices, about three minutes
    python -m benchmarks.sharded_tokens --smoke                        # a small shape on the CPU, in seconds

Saves the recorded result "sharded_tokens_N" for N cards. The model has the shape of Llama-2-70B; how it is cut and trained is that of
:mod:`benchmarks.sharded`. With 16 tokens a GPU has next to nothing to multiply, and a step takes as long as it takes Python to start its
kernels. The copy on each card, which sends next to nothing, tells this time from that of messages. Seconds are medians of steps on the
wall clock, of the slower card, after warm-up; all cards begin together.
"""

import gc
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.cli import options
from benchmarks.sharded import SMOKE, WAYS, make_step, own, save, slowest
from course.lab.tables import columns
from reference.model_shapes import LLAMA_2_70B, ModelShape
from reference.sharded import processes

ORDER = ("sharded", "16 bits", "replicated")
STEPS = {(1, 16): 4, (1, 2048): 5, (4, 2048): 2}  # rows and tokens of a card -> steps that are timed


def seconds(step: Callable[[], Tensor], steps: int, device: torch.device) -> list[float]:
    """Of each step; whoever is done first waits for the others."""
    found = []
    for _ in range(steps):
        synchronize(device)
        dist.barrier()
        synchronize(device)
        began = time.perf_counter()
        step()
        synchronize(device)
        found.append(slowest(time.perf_counter() - began))
    return found


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(way: str, shape: ModelShape, mesh, device: torch.device) -> list[dict]:
    """A row for each number of tokens; the model is made once."""
    torch.manual_seed(mesh.get_local_rank())
    model, rows = WAYS[way](shape, mesh, device).train(), []
    for (batch, sequence), steps in STEPS.items():
        sequence = sequence if device.type == "cuda" else min(sequence, 32)
        step = make_step(way, model, torch.randint(shape.vocab, (batch, sequence), device=device))
        for _ in range(2 if batch == 1 else 1):
            step()
        found = seconds(step, steps, device)
        times = {"seconds": statistics.median_high(found), "least": min(found), "most": max(found)}
        rows.append({"how": way, "batch": batch, "sequence": sequence, **times})
    del model, step
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def table(result: dict) -> str:
    head = (f"{result['model']}, {result['cards']} cards", "tokens of a card", "s/step", "least", "most")
    lines = [
        (row["how"], f"{row['batch']} × {row['sequence']:,}", *(row[key] for key in ("seconds", "least", "most"))) for row in result["rows"]
    ]
    return columns(head, lines, ".3f")


def main() -> None:
    given = options("sharded_tokens", __doc__)
    shape = SMOKE[0][0] if given.smoke else LLAMA_2_70B
    with processes(600, given.device.type) as mesh:
        device = own(given.device)
        result = {"model": shape.name, "cards": mesh.size(), "rows": []}
        for way in ORDER:
            result["rows"] += measure(way, shape, mesh, device)
        save("sharded_tokens", result, table, mesh, given.out, device)


if __name__ == "__main__":
    main()
