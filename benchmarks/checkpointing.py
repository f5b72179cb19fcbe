"""Checkpointing of 64 layers: bytes against segments and beside the formula, seconds beside torch.utils.checkpoint.

    python -m benchmarks.checkpointing               # a CUDA device, about a minute; saves the recorded result "checkpointing"
    python -m benchmarks.checkpointing --smoke       # small shapes on the CPU, in seconds; saves to a temporary folder

64 layers of a Llama (reference.llama) in bf16 with random weights, all trained, forward and backward of 4 × 2,048 tokens. Every parameter
has its gradient before the measurement, so that what comes and goes is activations and their gradients. No optimizer.

- "memory": in k segments, the last of them not checkpointed. "kept" is what the forward leaves, "peak" the height of the step. The
  formula is k·b + ⌈N/k⌉·a, with b the bytes of a layer's input and a what one layer keeps, counted tensor by tensor; "predicted" adds the
  gradients that are there while an MLP runs backward (reference.memory.activations).
- "time": one layer per segment, the last one too, as libraries do it. Variants take turns; medians by CUDA events after warm-up.
"""

import functools
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torchs

from benchmarks.cli import failed, message, options, rounded
from benchmarks.meters import Meter, timed
from course.lab import recorded
from course.lab.live import SavedForBackward
from course.lab.meters import show_bytes
from course.lab.tables import columns
from reference.checkpointing import activation_cost, checkpoint, checkpoint_by_hooks, checkpoint_sequential
from reference.llama.model import Layer, rotation
from reference.lora import inject_lora
from reference.memory.activations import Run, temporaries
from reference.model_shapes import ModelShape

SHAPE, BATCH = ModelShape("64 layers", 2048, 64, 16, 16, 128, 5632, 32_000), (4, 2048)
SMOKE_SHAPE, SMOKE_BATCH = ModelShape("smoke", 64, 8, 4, 4, 16, 176, 100), (2, 32)
SEGMENTS = (1, 2, 4, 8, 16, 32, 64)
HOWS: dict[str, Callable] = {
    "none": lambda layer, x: layer(x),
    "ours": checkpoint,
    "ours, hooks": checkpoint_by_hooks,
    "torch, re-entrant": functools.partial(torchs, use_reentrant=True),
    "torch": functools.partial(torchs, use_reentrant=False),
}
PEER = {"ours": "torch, re-entrant", "ours, hooks": "torch"}  # the same way of doing it


class Placed(nn.Module):
    """A decoder layer that knows the positions: a function of x alone."""

    def __init__(self, layer: Layer, positions: tuple[Tensor, Tensor]):
        super().__init__()
        self.layer, self.positions = layer, positions

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, tuple(table[: x.shape[1]] for table in self.positions))


def chain(shape: ModelShape, length: int, device: torch.device, lora: bool = False) -> nn.Sequential:
    """The layers alone: no embedding, no head."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(device):
        layers = nn.ModuleList(Layer(shape, 1e-5) for _ in range(shape.layers)).to(dtype)
    if lora:
        inject_lora(layers.requires_grad_(False), 16, 32)
    positions = rotation(length, shape.head_dim, 1e4, device, dtype)
    return nn.Sequential(*(Placed(layer, positions) for layer in layers))


def with_gradients(model: nn.Module) -> None:
    """So that no gradient is new in a step."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None


def one_by_one(layers: nn.Sequential, how: Callable, x: Tensor) -> Tensor:
    for layer in layers:
        x = how(layer, x)
    return x


def take(forward: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor, meter: Meter | None = None) -> dict:
    """A forward and a backward; with a meter, the bytes that the forward leaves and the peak."""
    if meter is None:
        forward(x).backward(direction)
        return {}
    meter.start()
    y = forward(x)
    kept = meter.now - y.nbytes
    y.backward(direction)
    return {"kept": kept, "peak": meter.peak}


def layer_bytes(layers: nn.Sequential, x: Tensor) -> int:
    """What one layer keeps, its input included."""
    with SavedForBackward(layers[1]) as saved:
        layers[1](x * 1)
    positions = sum(table.nbytes for table in layers[1].positions)  # of all layers, and there before
    return saved.bytes - positions


def memory(layers: nn.Sequential, shape: ModelShape, batch: tuple[int, int], x: Tensor, direction: Tensor, meter: Meter) -> list[dict]:
    count, b = len(layers), x.nbytes
    a = layer_bytes(layers, x)
    passing = temporaries(shape, Run(*batch, compute_bytes=x.element_size(), trained=True))
    rows = []
    for k in (k for k in SEGMENTS if k <= count):
        formula = b * activation_cost(count, k, a / b)
        row = {"work": "memory", "layers": count, "segments": k, "input_bytes": b, "layer_bytes": a, "formula": formula}
        forward = functools.partial(checkpoint_sequential, layers, segments=k)
        seconds, found = timed(functools.partial(take, forward, x, direction, meter), meter.cuda)
        predicted = formula + passing
        rows.append(row | found | {"predicted": predicted, "ratio": predicted / found["peak"], "seconds": seconds})
    return rows


def times(layers: nn.Sequential, x: Tensor, direction: Tensor, meter: Meter, rounds: int) -> list[dict]:
    """A row for each way; one that fails is a row with an error."""
    works = {how: functools.partial(take, functools.partial(one_by_one, layers, each), x, direction) for how, each in HOWS.items()}
    rows, seconds = {how: {"work": "time", "how": how} for how in HOWS}, {how: [] for how in HOWS}
    for how in HOWS:
        try:
            rows[how] |= works[how](meter=meter)
        except Exception as error:
            rows[how]["error"] = message(error)
            del works[how]
    for turn in range(rounds + 1):
        for how, work in works.items():
            passed, _ = timed(work, meter.cuda)
            seconds[how] += [passed] * (turn > 0)
    for how in works:
        found = seconds[how]
        rows[how] |= {"seconds": statistics.median(found), "least": min(found), "most": max(found)}
        rows[how]["extra_percent"] = 100 * (rows[how]["seconds"] / rows["none"]["seconds"] - 1)
    for how, peer in PEER.items():
        if how in works and peer in works:
            rows[how]["over_torch"] = rows[how]["seconds"] / rows[peer]["seconds"]
    return list(rows.values())


def inputs(layers: nn.Sequential, shape: ModelShape, batch: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """x, which has its gradient too, and the gradient of the output."""
    p = next(layers.parameters())
    x = torch.randn(*batch, shape.hidden, device=p.device).to(p.dtype).requires_grad_()
    x.grad = torch.zeros_like(x)
    return x, torch.randn_like(x)


def measure(smoke: bool, device: torch.device) -> dict:
    shape, batch = (SMOKE_SHAPE, SMOKE_BATCH) if smoke else (SHAPE, BATCH)
    with Meter(device) as meter:
        layers = chain(shape, batch[1], device)
        x, direction = inputs(layers, shape, batch)
        with_gradients(layers)
        take(functools.partial(one_by_one, layers, HOWS["ours"]), x, direction)  # warm-up
        rows = memory(layers, shape, batch, x, direction, meter) + times(layers, x, direction, meter, 1 if smoke else 5)
    return rounded({"shape": shape.name, "batch": list(batch), "rows": rows})


def table(result: dict) -> str:
    keys = "kept", "peak", "predicted"
    memory = [row for row in result["rows"] if row["work"] == "memory"]
    rows = [[str(row["segments"]), *(show_bytes(row[key]) for key in keys), row["ratio"], f"{row['seconds']:.4f}"] for row in memory]
    return "\n".join([columns(("segments", *keys, "ratio", "seconds"), rows, ".3f"), "", table_of_times(result["rows"])])


def table_of_times(rows: list[dict]) -> str:
    lines = [
        [
            row["how"],
            *(f"{row[key]:.4f}" for key in ("seconds", "least", "most")),
            f"{row['extra_percent']:.1f}",
            f"{row['over_torch']:.4f}" if "over_torch" in row else "",
            show_bytes(row["peak"]),
        ]
        for row in rows
        if row.get("work") == "time" and "error" not in row
    ]
    failures = [failed(row["how"], row["error"]) for row in rows if "error" in row]
    return "\n".join([columns(("", "seconds", "least", "most", "extra %", "over torch", "peak"), lines), *failures])


def main() -> None:
    given = options("checkpointing", __doc__)
    result = measure(given.smoke, given.device)
    print(table(result))
    print("saved to", recorded.save("checkpointing", result, given.out, given.device))


if __name__ == "__main__":
    main()
