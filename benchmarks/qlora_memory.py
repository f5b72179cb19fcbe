"""Memory of QLoRA: ours beside peft + bitsandbytes, 16-bit LoRA beside both, and what reference.memory predicts.

    python -m benchmarks.qlora_memory               # a CUDA device, about two minutes; saves the recorded result "qlora_memory"
    python -m benchmarks.qlora_memory --smoke       # small shapes on the CPU, bytes of tensors counted; saves to a temporary folder

Models have the shape of Llama-2-7B and of smaller ones, and random weights: memory does not depend on the values. Each model is made on the
meta device and filled layer by layer on the GPU, so that no 16-bit copy of it ever exists: "extra" is the most that was there while one
layer was worked on, beyond the result so far. Then four steps with AdamW; the last one counts (Adam's moments exist by then). r = 16 on all
linears, NF4 in blocks of 64 with double quantization, bf16 products, float32 adapters.

Each way of building has a process of its own, and its peak is the allocator's ``max_memory_allocated`` less the matrix library's workspaces
(benchmarks.meters).

- "QLoRA" is reference.qlora; "QLoRA, peft + bitsandbytes" is Linear4bit under peft's layer.
- "…, prepared" passes the model through peft's prepare_model_for_kbit_training, which the usual recipe calls: it casts all that is not
  quantized (embeddings, head, norms) to float32; products run under bf16 autocast.
- "LoRA" and "LoRA, peft" keep the base in bf16.
"""

import contextlib
import dataclasses
import json
import subprocess
import sys
import time

import torch
from torch import nn

from benchmarks.cases import DENSE, DENSE_PEFT, LIKE_GEMMA, OURS, PEERS, PREPARED, RANK, Case, build, tiny_shape
from benchmarks.cli import failed, message, options
from benchmarks.meters import Extra, Meter, take_step
from course import ROOT
from course.lab import recorded
from course.lab.meters import show_bytes
from course.lab.tables import columns, wrapped
from reference.memory import training_memory
from reference.memory.recipes import LORA, QLORA, Recipe
from reference.model_shapes import LLAMA_2_7B, LLAMA_3_2_1B, ModelShape

STEPS = 4
RECIPES: dict[str, Recipe | None] = {  # what reference.memory knows about; in the order of running
    OURS: QLORA,
    PEERS: dataclasses.replace(QLORA, input_copies=True),
    DENSE: LORA,
    PREPARED: None,
    DENSE_PEFT: dataclasses.replace(LORA, input_copies=True),
}


def cases(smoke: bool) -> list[Case]:
    if smoke:
        small = ModelShape("smoke", 128, 3, 4, 2, 32, 320, 300)
        return [Case(small, True, ((2, 32), (1, 64))), Case(dataclasses.replace(small, name="smoke, tied", tied=True), False, ((1, 16),))]
    return [
        Case(tiny_shape(), False, ((1, 32),)),
        Case(LIKE_GEMMA, False, ((1, 128), (4, 512))),
        Case(LLAMA_3_2_1B, False, ((1, 128), (4, 512))),
        Case(LLAMA_2_7B, True, ((4, 512), (1, 2048), (1, 512), (4, 2048))),
    ]


def measure_case(how: str, case: Case, meter: Meter, device: torch.device) -> list[dict]:
    """A row for each batch shape; one that fails is a row with an error."""
    meter.start()
    began, extra = time.perf_counter(), Extra(meter)
    model = build(how, case, device, extra)
    built = meter.now
    seconds = time.perf_counter() - began
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    row = {
        "shape": case.shape.name,
        "how": how,
        "checkpointing": case.checkpointing,
        "frozen_parameter_bytes": frozen,
        "built": built,
        "building_extra": extra.bytes,
        "largest_layer_16_bit": 2 * max(out * into for out, into in case.shape.linears.values()),
        "embedding_16_bit": 2 * case.shape.embedding,
        "seconds_building": seconds,
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=1e-4, foreach=True)  # what a GPU takes by default
    rows = []
    for batch in case.batches:
        try:
            rows.append(row | {"batch": batch[0], "sequence": batch[1], **train(how, model, adam, batch, meter, device)})
        except Exception as error:
            rows.append(row | {"batch": batch[0], "sequence": batch[1], "error": message(error)})
            adam.zero_grad(set_to_none=True)
    return rows


def train(how: str, model: nn.Module, adam: torch.optim.Optimizer, batch: tuple[int, int], meter: Meter, device: torch.device) -> dict:
    """Some steps; the peaks of the last one, in bytes."""
    ids = torch.randint(model.config.vocab_size, batch, device=device)
    autocast = torch.autocast(device.type, torch.bfloat16) if how == PREPARED else contextlib.nullcontext()
    losses, peaks = [], {}

    def note(phase: str) -> None:
        peaks[phase] = meter.peak
        meter.reset()

    for _ in range(STEPS):
        meter.reset()
        began = time.perf_counter()
        losses.append(take_step(model, adam, ids, note, autocast))
    return {"peak": max(peaks.values()), "peaks": peaks, "held": meter.now, "seconds": time.perf_counter() - began, "losses": losses}


def predicted(row: dict, shape: ModelShape) -> dict:
    """Ours beside the measurement, where reference.memory knows the recipe."""
    recipe = RECIPES[row["how"]]
    if recipe is None or "error" in row:
        return row
    expected = training_memory(shape, recipe, row["batch"], row["sequence"], RANK, checkpointing=row["checkpointing"])
    return row | {
        "predicted": expected.peak,
        "predicted_weights": expected["weights"],
        "predicted_moment": expected.moment,
        "ratio": expected.peak / row["peak"],
    }


def run(how: str, smoke: bool) -> list[dict]:
    """All cases of one way of building, in this process."""
    device = torch.device("cpu" if smoke else "cuda")
    torch.manual_seed(0)
    rows = []
    with Meter(device) as meter:
        for case in cases(smoke):
            try:
                rows += [predicted(row, case.shape) for row in measure_case(how, case, meter, device)]
            except Exception as error:
                rows.append({"shape": case.shape.name, "how": how, "error": message(error)})
    return rows


def run_apart(how: str, smoke: bool, seconds: float) -> list[dict]:
    """The same in a process of its own; one that dies or takes too long is a row with an error."""
    command = [sys.executable, "-m", "benchmarks.qlora_memory", "--only", how, *(["--smoke"] if smoke else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return [{"shape": "all", "how": how, "error": f"took more than {seconds:.0f} s"}]
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return [{"shape": "all", "how": how, "error": f"exit code {done.returncode}: {last}"[:300]}]


def table(result: dict) -> str:
    parts, good = [], [row for row in result["rows"] if "error" not in row]
    for shape in sorted({row["shape"] for row in good}):
        rows = sorted((row for row in good if row["shape"] == shape), key=lambda row: (row["batch"] * row["sequence"], row["sequence"]))
        lines = [
            (
                row["how"].replace("bitsandbytes", "bnb"),
                f"{row['batch']}×{row['sequence']}",
                *(show_bytes(row[key]) if key in row else None for key in ("built", "building_extra", "peak", "predicted")),
            )
            for row in rows
        ]
        parts.append(columns((shape, "tokens", "built", "extra", "peak", "predicted"), lines))
    failures = [failed(f"{row['shape']}, {row['how']}", row["error"]) for row in result["rows"] if "error" in row]
    ratios = ", ".join(f"{case} {ratio:.3f}" for case, ratio in compared(good).items())
    about = "built: bytes of the model; extra: more that building it took; bnb: bitsandbytes"
    return "\n".join(["\n\n".join(parts), "", *failures, wrapped(about), wrapped(f"our peak over that of {PEERS}: {ratios}")])


def compared(rows: list[dict]) -> dict[str, float]:
    """Our peak over that of peft + bitsandbytes, by case; at most 1.03 is the bar."""
    peaks = {(row["how"], row["shape"], row["batch"], row["sequence"]): row["peak"] for row in rows if "error" not in row}
    return {
        f"{shape} {batch}×{sequence}": peak / peaks[PEERS, shape, batch, sequence]
        for (how, shape, batch, sequence), peak in peaks.items()
        if how == OURS and (PEERS, shape, batch, sequence) in peaks
    }


def main() -> None:
    given = options(
        "qlora_memory",
        __doc__,
        only={"choices": list(RECIPES), "help": "one way of building, in this process; prints its rows as JSON"},
        seconds={"type": float, "default": 90, "help": "longest time for one way of building"},
    )
    if given.only:
        print(json.dumps(run(given.only, given.smoke)))
        return
    rows, began = [], time.monotonic()
    for how in RECIPES:
        rows += run_apart(how, given.smoke, given.seconds)
        result = {"rank": RANK, "steps": STEPS, "rows": rows, "ours_over_peers": compared(rows)}
        path = recorded.save("qlora_memory", result, given.out, given.device)
        print(f"{how}: done after {time.monotonic() - began:.0f} s", flush=True)
    print(table(result))
    print("saved to", path)


if __name__ == "__main__":
    main()
