"""What 16 bits buy: seconds and bytes of a training step in float32, under autocast, in pure 16 bits and with master weights.

    python -m benchmarks.precision_step               # a CUDA device, about 20 seconds; saves the recorded result "precision_step"
    python -m benchmarks.precision_step --smoke       # small shapes on the CPU, in seconds; saves to a temporary folder

16 layers of a Llama (reference.llama), random weights, forward, backward and AdamW (foreach) on 4 × 2,048 tokens. "kept" is what the
forward leaves for the backward, "peak" all that the allocator handed out. Medians by CUDA events after warm-up.

- "float32" multiplies in float32, "float32, TF32 products" lets the tensor cores round the factors to 10 bits;
- "autocast …" keeps float32 weights and casts them for each product; with float16 the loss is scaled (reference.precision);
- "bfloat16" holds weights, gradients and Adam's moments in bfloat16; "bfloat16, masters" adds float32 weights (reference.precision).
"""

import contextlib
import functools
import gc
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.checkpointing import SHAPE, SMOKE_BATCH, SMOKE_SHAPE, chain
from benchmarks.cli import failed, message, options, rounded
from benchmarks.meters import Meter, timed
from course.lab import recorded
from course.lab.meters import show_bytes
from course.lab.tables import columns
from reference.model_shapes import ModelShape
from reference.precision import LossScaler, MasterWeights

DEPTH, BATCH = 16, (4, 2048)
WAYS = {  # weights, autocast, products
    "float32": (torch.float32, None, "highest"),
    "float32, TF32 products": (torch.float32, None, "high"),
    "autocast bfloat16": (torch.float32, torch.bfloat16, "highest"),
    "autocast float16, scaled": (torch.float32, torch.float16, "highest"),
    "bfloat16": (torch.bfloat16, None, "highest"),
    "bfloat16, masters": (torch.bfloat16, None, "highest"),
}


def step(way: str, layers: nn.Module, optimizer, x: Tensor, note: Callable[[], None] = lambda: None) -> None:
    cast, scaler = WAYS[way][1], LossScaler() if "scaled" in way else None
    around = torch.autocast(x.device.type, cast) if cast else contextlib.nullcontext()
    with around:
        loss = layers(x).float().square().mean()
    note()
    (scaler.scale(loss) if scaler else loss).backward()
    del loss
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    optimizer.zero_grad()


def measure_way(way: str, shape: ModelShape, batch: tuple[int, int], meter: Meter, device: torch.device, rounds: int) -> dict:
    dtype, _, products = WAYS[way]
    torch.set_float32_matmul_precision(products)
    layers = chain(shape, batch[1], device).to(dtype)
    for layer in layers:
        layer.positions = tuple(table.to(dtype) for table in layer.positions)
    kind = functools.partial(torch.optim.AdamW, lr=1e-5, foreach=True)
    optimizer = MasterWeights(layers.parameters(), kind) if "masters" in way else kind(layers.parameters())
    x = torch.randn(*batch, shape.hidden, device=device, dtype=dtype)
    work = functools.partial(step, way, layers, optimizer, x)
    work()  # Adam's moments exist from here on
    meter.start()
    held, kept = meter.held(), []
    work(note=lambda: kept.append(meter.now))
    peak = meter.peak
    seconds = [timed(work, meter.cuda)[0] for _ in range(rounds)]
    return {
        "held": held,
        "kept": kept[0],
        "peak": held + peak,
        "seconds": statistics.median(seconds),
        "parameters": sum(p.numel() for p in layers.parameters()),
    }


class Whole(Meter):
    """Also what was there before: on a GPU the allocator knows."""

    def held(self) -> int:
        return torch.cuda.memory_allocated() - self.libraries if self.cuda else 0


def measure(smoke: bool, device: torch.device) -> dict:
    shape, batch = (SMOKE_SHAPE, SMOKE_BATCH) if smoke else (ModelShape(**{**vars(SHAPE), "layers": DEPTH}), BATCH)
    rows = []
    before = torch.get_float32_matmul_precision()
    with Whole(device) as meter:
        for way in WAYS:
            try:
                rows.append({"way": way, **measure_way(way, shape, batch, meter, device, 1 if smoke else 5)})
            except Exception as error:
                rows.append({"way": way, "error": message(error)})
            gc.collect()
            if meter.cuda:
                torch.cuda.empty_cache()
    torch.set_float32_matmul_precision(before)
    return rounded({"layers": shape.layers, "hidden": shape.hidden, "batch": list(batch), "rows": rows})


def table(result: dict) -> str:
    keys = "held", "kept", "peak"
    good = [row for row in result["rows"] if "error" not in row]
    rows = [(row["way"], row["seconds"], *(show_bytes(row[key]) for key in keys)) for row in good]
    failures = [failed(row["way"], row["error"]) for row in result["rows"] if "error" in row]
    return "\n".join([columns(("", "seconds", *keys), rows, ".4f"), *failures])


def main() -> None:
    given = options("precision_step", __doc__)
    result = measure(given.smoke, given.device)
    print(table(result))
    print("saved to", recorded.save("precision_step", result, given.out, given.device))


if __name__ == "__main__":
    main()
