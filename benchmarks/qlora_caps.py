"""QLoRA training steps of 7B- to 70B-shaped models in a process that may use no more than so many bytes of the GPU.

    python -m benchmarks.qlora_caps               # a CUDA device with 48 GB free, about two minutes; saves the recorded result "qlora_caps"
    python -m benchmarks.qlora_caps --only 70B    # one of them
    python -m benchmarks.qlora_caps --smoke       # small shapes on the CPU, without a cap; saves to a temporary folder

The QLoRA paper's headline is a 65B model on one GPU of 48 GB. Here each model has the shape of a real one and random weights: memory does
not depend on the values, and no checkpoint of 140 GB has to exist. It is quantized while it is made, one weight at a time, r = 16 on all
linears, float32 adapters under AdamW, checkpointing. Then it takes 20 steps on one batch; the loss must fall.

The cap is on the whole process: what CUDA keeps for itself is measured and taken off, and the allocator may reserve no more than the rest.
"""

import dataclasses
import os
import time

import torch

from benchmarks.cases import ALPHA, OURS, RANK, Case, build
from benchmarks.cli import failed, options
from benchmarks.meters import Extra, Meter, take_step
from course.lab import recorded
from course.lab.meters import show_bytes
from course.lab.tables import columns
from reference.memory import training_memory
from reference.memory.recipes import QLORA
from reference.model_shapes import LLAMA_2_7B, LLAMA_2_13B, LLAMA_2_70B, LLAMA_33B, ModelShape

STEPS, RATE = 20, 1e-3


@dataclasses.dataclass(frozen=True)
class Capped:
    shape: ModelShape
    cap: int  # bytes
    batch: int = 1
    sequence: int = 512


CASES = {
    "70B": Capped(LLAMA_2_70B, 48 * 10**9),
    "7B": Capped(LLAMA_2_7B, 6 * 10**9),
    "13B": Capped(LLAMA_2_13B, 11 * 10**9),
    "33B": Capped(LLAMA_33B, 24 * 10**9),
}
SMOKE = {"smoke": Capped(ModelShape("smoke", 128, 3, 4, 2, 32, 320, 300), 10**9, 2, 32)}


def cap_process(cap: int) -> int:
    """Let this process use ``cap`` bytes of the GPU, all told; returns what CUDA itself takes of them."""
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()  # nobody else may use the card
    torch.cuda.set_per_process_memory_fraction((cap - context) / total)
    return context


def train(name: str, meter: Meter, device: torch.device) -> dict:
    """One model under its cap; ``peaks`` are of the last step, ``reserved`` is the most that was ever taken from the card."""
    case = {**CASES, **SMOKE}[name]
    row = {"name": name, "shape": case.shape.name, "cap": case.cap, "batch": case.batch, "sequence": case.sequence}
    torch.manual_seed(0)
    meter.start()
    row |= {"context": cap_process(case.cap) if meter.cuda else 0, "reserved": 0}

    began, extra = time.perf_counter(), Extra(meter)
    model = build(OURS, Case(case.shape, True, ()), device, extra)
    row |= {"built": meter.now, "building_extra": extra.bytes, "seconds_building": time.perf_counter() - began}
    trained = [p for p in model.parameters() if p.requires_grad]
    row["adapters"] = sum(p.nbytes for p in trained)
    adam = torch.optim.AdamW(trained, lr=RATE, foreach=True)
    ids = torch.randint(case.shape.vocab, (case.batch, case.sequence), device=device)
    losses, seconds, peaks = [], [], {}

    def note(phase: str) -> None:
        if meter.cuda:
            row["reserved"] = max(row["reserved"], torch.cuda.max_memory_reserved())
        peaks[phase] = meter.peak
        meter.reset()

    meter.reset()
    for _ in range(STEPS):
        began = time.perf_counter()
        losses.append(take_step(model, adam, ids, note))
        seconds.append(time.perf_counter() - began)
    row |= {"losses": losses, "seconds": sorted(seconds)[STEPS // 2], "peaks": peaks, "peak": max(peaks.values()), "held": meter.now}
    expected = training_memory(case.shape, QLORA, case.batch, case.sequence, RANK, checkpointing=True)
    parts = {kind: line.bytes for kind, line in expected.lines.items()}
    return row | {"predicted": expected.peak, "predicted_moment": expected.moment, "predicted_parts": parts}


def attempt(name: str, meter: Meter, device: torch.device) -> dict:
    """:func:`train`, or why it could not."""
    try:
        return train(name, meter, device)
    except torch.OutOfMemoryError as error:
        return {"name": name, "error": str(error).splitlines()[0][:200]}


def table(result: dict) -> str:
    rows, lines = [], []
    for row in result["rows"]:
        if "error" in row:
            lines.append(failed(row["name"], row["error"]))
            continue
        sizes = [show_bytes(x) for x in (row["cap"], row["built"], row["peak"], row["predicted"], row["context"] + row["reserved"])]
        name = f"{row['shape']}, {row['batch']}×{row['sequence']}"
        rows.append([name, *sizes, row["seconds"], f"{row['losses'][-1] - row['losses'][0]:+.2f}"])
    heads = ("", "cap", "built", "peak", "predicted", "taken", "s/step", "loss")
    return "\n".join([columns(heads, rows), *lines, f"taken: by the whole process; loss: of step {result['steps']} less that of the first"])


def main() -> None:
    given = options("qlora_caps", __doc__, only={"nargs": "+", "choices": list(CASES), "help": "which of them"})
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # read at the first allocation: no memory lost in pieces
    rows = []
    with Meter(given.device) as meter:
        for name in SMOKE if given.smoke else given.only or CASES:
            rows.append(attempt(name, meter, given.device))
            result = {"rank": RANK, "alpha": ALPHA, "rate": RATE, "steps": STEPS, "rows": rows}
            path = recorded.save("qlora_caps", result, given.out, given.device)
            print(table(result | {"rows": rows[-1:]}), flush=True)
    print(table(result))
    print("saved to", path)


if __name__ == "__main__":
    main()
