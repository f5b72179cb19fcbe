"""A QLoRA step that is sharded over the GPUs, beside the same step on a whole model: seconds, bytes per card, bytes between them.

    python -m benchmarks.sharded                                       # one CUDA device: what sharding costs where nothing is to share
    torchrun --nproc-per-node 2 -m benchmarks.sharded                  # 2, 4 or 8 of them
    torchrun --nproc-per-node 2 -m benchmarks.sharded --smoke          # small shapes, on the CPU, in seconds
    python -m benchmarks.sharded --only "Llama-2-70B, 1×2048"

Saves the recorded result "sharded_N" for N cards. Models have the shape of Llama-2-7B and 70B and random weights, r = 16 on all linears,
float32 adapters under AdamW, checkpointing, NF4 in blocks of 64 with double quantization, bf16 products, reference.llama. Every card trains
on as many rows as are named. Seconds are medians of whole steps after warm-up, of the slowest card.

- "replicated" has the whole model on every card, and adds the adapters' gradients up in one message (data parallel);
- "sharded" is reference.sharded;
- "16 bits" is the same engine over a model that is not quantized: what it sends is four times as large;
- "peft" is peft + bitsandbytes on the Hugging Face library's Llama, under the same engine.

Predicted, for all but the last, are what a card holds between steps, the peak (that of "replicated", with shares and gathered layers in
place of the whole model) and the bytes received; the rate is those bytes over what the step takes longer than "replicated".
"""

import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from benchmarks.cases import ALPHA, PEERS, RANK, Case, build, random_weights
from benchmarks.cli import failed, message, options
from benchmarks.meters import Extra, Meter, timed
from benchmarks.qlora_step import build_ours, library_loss
from course.lab import recorded
from course.lab.meters import show_bytes
from course.lab.tables import columns, wrapped
from reference.llama import Llama
from reference.lora import inject_lora
from reference.memory import received_bytes, sharded_memory
from reference.model_shapes import LLAMA_2_7B, LLAMA_2_70B, ModelShape
from reference.sharded import on_first, processes, quantize_and_shard
from reference.sharded.engine import fully_shard

RATE, PEFT = 1e-4, "peft"
Task = tuple[ModelShape, int, int]  # shape, rows on each card, tokens of a row
CASES: list[Task] = [(LLAMA_2_7B, 1, 512), (LLAMA_2_7B, 4, 2048), (LLAMA_2_70B, 1, 2048)]
SMOKE: list[Task] = [(ModelShape("smoke", 128, 2, 4, 2, 32, 192, 301), 1, 16)]


def named(case: Task) -> str:
    shape, rows, tokens = case
    return f"{shape.name}, {rows}×{tokens}"


def replicated(shape: ModelShape, mesh: DeviceMesh, device: torch.device) -> Llama:
    return build_ours(shape, device)


def sharded(shape: ModelShape, mesh: DeviceMesh, device: torch.device) -> Llama:
    with torch.device("meta"):
        model = Llama(shape).bfloat16()
    quantize_and_shard(model, random_weights({name: p.shape for name, p in model.named_parameters()}, device), mesh, RANK, ALPHA)
    return model


@torch.no_grad()
def dense(shape: ModelShape, mesh: DeviceMesh, device: torch.device) -> Llama:
    """Sharded in 16 bits; every card draws values of its own, on which nothing measured depends."""
    with torch.device("meta"):
        model = Llama(shape).bfloat16().requires_grad_(False)
    outer = [model.model.embed_tokens, model.model.norm, model.lm_head]
    for part in [*model.model.layers, *outer]:
        part.to_empty(device=device)
        for parameter in part.parameters():
            parameter.normal_(std=0.02)
        if part not in outer:
            inject_lora(part, RANK, ALPHA)
            fully_shard(part, mesh)
    model.tie_weights()
    fully_shard(model, mesh)
    return model


def library(shape: ModelShape, mesh: DeviceMesh, device: torch.device) -> nn.Module:
    """Packed whole on every card, then sharded; bitsandbytes keeps the scales whole in its layers."""
    model = build(PEERS, Case(shape, True, ()), device, Extra(Meter(device)))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh)
    fully_shard(model, mesh)
    return model


WAYS = {"replicated": replicated, "sharded": sharded, "16 bits": dense, PEFT: library}


def make_step(way: str, model: nn.Module, ids: Tensor) -> Callable[[], Tensor]:
    compute = library_loss if way == PEFT else Llama.loss
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=RATE, fused=ids.is_cuda or None)

    def step() -> Tensor:
        loss = compute(model, ids)
        loss.backward()
        if way == "replicated" and dist.get_world_size() > 1:
            together = torch.cat([p.grad.view(-1) for p in trained])
            dist.all_reduce(together)
            for parameter, grad in zip(trained, together.split([p.numel() for p in trained]), strict=True):
                parameter.grad.copy_(grad.view_as(parameter)).div_(dist.get_world_size())
        adam.step()
        adam.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def slowest(value: float) -> float:
    """The largest of all ranks."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return max(found)


def measure(way: str, case: Task, mesh: DeviceMesh, meter: Meter, device: torch.device) -> dict:
    shape, rows, tokens = case
    meter.start()
    torch.manual_seed(mesh.get_local_rank())
    ids = torch.randint(shape.vocab, (rows, tokens), device=device)
    model = WAYS[way](shape, mesh, device).train()
    step = make_step(way, model, ids)
    losses = [step().item() for _ in range(2)]
    held = meter.now
    meter.reset()
    once, _ = timed(step, meter.cuda)
    repeats = max(3, min(10, int(5 / slowest(once)))) if meter.cuda else 1
    seconds = [slowest(timed(step, meter.cuda)[0]) for _ in range(repeats)]
    row = {"seconds": statistics.median(seconds), "all_seconds": seconds, "held": slowest(held), "peak": slowest(meter.peak)}
    row["tokens_a_second"] = mesh.size() * rows * tokens / row["seconds"]
    return row | {"losses": losses}


def attempt(way: str, case: Task, mesh: DeviceMesh, meter: Meter, device: torch.device) -> dict:
    """:func:`measure` and what was predicted, or why there is no result; an error of memory is one on all cards, and is said."""
    shape, rows, tokens = case
    row = {"case": named(case), "how": way, "cards": mesh.size()}
    try:
        row |= measure(way, case, mesh, meter, device)
    except torch.OutOfMemoryError as error:
        return row | {"error": message(error)}
    if way == PEFT:
        return row
    block = None if way == "16 bits" else 64
    expected = sharded_memory(shape, 1 if way == "replicated" else mesh.size(), RANK, block=block)
    received = expected.received if way != "replicated" else received_bytes("DDP", shape, mesh.size(), tokens * rows * mesh.size(), RANK)
    return row | {"predicted_held": expected.held, "gathered": expected.gathered, "predicted_received": received}


def compared(rows: list[dict]) -> list[dict]:
    """Rows with what follows from the one of "replicated" of their case."""
    whole = {row["case"]: row for row in rows if row["how"] == "replicated" and "error" not in row}
    found = []
    for row in rows:
        base = whole.get(row["case"])
        if base and "error" not in row and row is not base:
            row = row | {"efficiency": base["seconds"] / row["seconds"]}
            if "gathered" in row:
                more = row["seconds"] - base["seconds"]
                row["bytes_a_second"] = row["predicted_received"] / more if more > 0 else None
                row["predicted_peak"] = base["peak"] - base["held"] + row["predicted_held"] + row["gathered"]
        found.append(row)
    return found


def table(result: dict) -> str:
    parts, good = [], [row for row in result["rows"] if "error" not in row]
    for case in dict.fromkeys(row["case"] for row in good):
        rows = [
            (
                row["how"],
                f"{row['seconds']:.4f}",
                f"{row['tokens_a_second']:,.0f}",
                f"{row['efficiency']:.0%}" if "efficiency" in row else "",
                *(show_bytes(row[key]) if key in row else None for key in ("held", "peak", "predicted_received")),
            )
            for row in good
            if row["case"] == case
        ]
        parts.append(columns((case, "s/step", "tokens/s", "share", "held", "peak", "received"), rows))
    lines = [failed(f"{row['case']}, {row['how']}", row["error"]) for row in result["rows"] if "error" in row]
    for key in ("held", "peak"):
        if found := [row[f"predicted_{key}"] / row[key] for row in good if row.get(f"predicted_{key}") and row[key]]:
            lines.append(f"predicted over measured, {key}: {min(found):.3f} to {max(found):.3f}")
    about = "share: of the whole model's speed; held, peak, received: bytes of each card, received as predicted"
    return "\n".join(["\n\n".join(parts), "", wrapped(about), *lines])


def own(device: torch.device) -> torch.device:
    """This process's card."""
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device


def save(name: str, result: dict, table: Callable[[dict], str], mesh: DeviceMesh, out: Path, device: torch.device) -> None:
    """Record and show it, once for all ranks."""
    path = on_first(lambda: str(recorded.save(f"{name}_{mesh.size()}", result, out, device)))
    if mesh.get_local_rank() == 0:
        print(table(result))
        print("saved to", path)


def main() -> None:
    given = options("sharded", __doc__, only={"nargs": "+", "choices": [named(case) for case in CASES], "help": "these cases"})
    rows = []
    with processes(600, given.device.type) as mesh:
        device = own(given.device)
        meter = Meter(device)
        for case in SMOKE if given.smoke else CASES:
            if given.only and named(case) not in given.only and not given.smoke:
                continue
            for way in WAYS:
                rows.append(attempt(way, case, mesh, meter, device))
                if mesh.get_local_rank() == 0:
                    last = rows[-1].get("error") or f"{rows[-1]['seconds']:.4f} s/step"
                    print(f"{named(case)}, {way}: {last}", flush=True)
        result = {"rank": RANK, "alpha": ALPHA, "rows": compared(rows)}
        save("sharded", result, table, mesh, given.out, device)


if __name__ == "__main__":
    main()
