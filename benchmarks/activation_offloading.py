"""Activations in host memory: ours beside torch's save_on_cpu, beside checkpointing, and what the bus allows.

    python -m benchmarks.activation_offloading               # a CUDA device, about a minute; saves "activation_offloading"
    python -m benchmarks.activation_offloading --smoke       # small shapes on the CPU, in seconds; saves to a temporary folder

Four layers of Llama-2-7B (reference.llama) in bf16 with random weights, all of them trained, forward and backward of 4 × 2,048 tokens, no
optimizer; every parameter has its gradient before. "peak" is all that the allocator handed out, weights and gradients too; "activations" is
the peak less those. Variants take turns; medians by CUDA events after two rounds of warm-up, in which host memory is made.

"limit" is about what the bus allows: the forward takes as long as its products or its copies, whichever takes longer, and so does the
backward. Bytes over the bandwidth of large pinned copies in the same run, and the seconds of both halves without offloading.
"""

import contextlib
import functools
import gc
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.checkpointing import SMOKE_BATCH, SMOKE_SHAPE, chain, one_by_one, with_gradients
from benchmarks.cli import failed, message, options, rounded
from benchmarks.meters import Meter, timed
from course.lab import recorded
from course.lab.meters import show_bytes
from course.lab.tables import columns, wrapped
from reference.checkpointing import OffloadActivations, checkpoint
from reference.model_shapes import LLAMA_2_7B, ModelShape

DEPTH, BATCH = 4, (4, 2048)
AHEAD = {"ours": 1 << 28, "ours, 0.5 GB ahead": 1 << 29, "ours, 0.1 GB ahead": 10**8, "ours, nothing ahead": 0}  # bytes
THEIRS = "save_on_cpu"


def bandwidth(device: torch.device, count: int) -> dict[str, float]:
    """Bytes per second of a large pinned copy, out of the device and back."""
    if device.type != "cuda":
        return {"out": 1e9, "back": 1e9}
    host, there = torch.empty(count, dtype=torch.uint8, pin_memory=True), torch.empty(count, dtype=torch.uint8, device=device)
    ways = {"out": functools.partial(host.copy_, there, True), "back": functools.partial(there.copy_, host, True)}
    return {way: count / statistics.median(timed(copy, True)[0] for _ in range(5)) for way, copy in ways.items()}


def plainly(layers: nn.Sequential, x: Tensor) -> Tensor:
    return layers(x)


def checkpointed(layers: nn.Sequential, x: Tensor) -> Tensor:
    return one_by_one(layers, checkpoint, x)


def variants(layers: nn.Sequential, min_bytes: int) -> dict[str, tuple[Callable, contextlib.AbstractContextManager]]:
    """Name -> forward, and what it runs in."""
    return {
        "none": (plainly, contextlib.nullcontext()),
        THEIRS: (plainly, torch.autograd.graph.save_on_cpu(pin_memory=True)),
        **{name: (plainly, OffloadActivations(layers, min_bytes, ahead)) for name, ahead in AHEAD.items()},
        "checkpoint": (checkpointed, contextlib.nullcontext()),
        "checkpoint, inputs by save_on_cpu": (checkpointed, torch.autograd.graph.save_on_cpu(pin_memory=True)),
        "checkpoint, inputs offloaded": (checkpointed, OffloadActivations(layers, min_bytes)),
    }


def take(forward: Callable, around: contextlib.AbstractContextManager, layers: nn.Sequential, x: Tensor, direction: Tensor) -> None:
    with around:
        y = forward(layers, x)
    y.backward(direction)


def halves(layers: nn.Sequential, x: Tensor, direction: Tensor, cuda: bool) -> tuple[float, float]:
    """Seconds of a forward and of a backward, medians."""
    found = []
    for _ in range(5):
        forward, y = timed(lambda: layers(x), cuda)
        backward, _ = timed(functools.partial(y.backward, direction), cuda)
        found.append((forward, backward))
        del y
    return tuple(statistics.median(half) for half in zip(*found[1:], strict=True))


def measure(smoke: bool, device: torch.device) -> dict:
    shape = SMOKE_SHAPE if smoke else ModelShape(**{**vars(LLAMA_2_7B), "layers": DEPTH})
    batch, rounds = (SMOKE_BATCH, 1) if smoke else (BATCH, 5)
    with Meter(device) as meter:
        return measured(meter, shape, batch, 1000 if smoke else 1 << 16, rounds, device)


def measured(meter: Meter, shape: ModelShape, batch: tuple[int, int], min_bytes: int, rounds: int, device: torch.device) -> dict:
    meter.start()
    layers = chain(shape, batch[1], device)
    x = torch.randn(*batch, shape.hidden, device=device).to(next(layers.parameters()).dtype).requires_grad_()
    x.grad, direction = torch.zeros_like(x), torch.randn_like(x)
    with_gradients(layers)
    speed = bandwidth(device, 1 << (20 if device.type == "cpu" else 30))
    works, rows, held = {}, {}, meter.now
    for name, (forward, around) in variants(layers, min_bytes).items():
        works[name] = functools.partial(take, forward, around, layers, x, direction)
        rows[name] = {"how": name, "seconds": [], "first": 0.0}
        try:
            began = time.perf_counter()
            works[name]()
            rows[name]["first"] = time.perf_counter() - began
            meter.start()
            works[name]()
            rows[name] |= {"peak": held + meter.peak, "activations": meter.peak}
            if isinstance(around, OffloadActivations):
                rows[name] |= {"copied": around.copied_bytes, "host": around.host_bytes}
        except Exception as error:
            rows[name]["error"] = message(error)
        gc.collect()
    forward_seconds, backward_seconds = halves(layers, x, direction, meter.cuda)
    for _ in range(rounds):
        for name, work in works.items():
            if "error" not in rows[name]:
                rows[name]["seconds"].append(timed(work, meter.cuda)[0])
    for row in rows.values():
        if "error" in row:
            continue
        found = row["seconds"]
        row |= {"seconds": statistics.median(found), "least": min(found), "most": max(found)}
        if "copied" in row and row["how"].startswith("ours"):
            out, back = (row["copied"] / speed[way] for way in ("out", "back"))
            row["limit"] = max(forward_seconds, out) + max(backward_seconds, back)
    result = {"shape": shape.name, "layers": shape.layers, "batch": list(batch), "bytes_per_second": speed, "held": held}
    halves_ = {"forward_seconds": forward_seconds, "backward_seconds": backward_seconds}
    return rounded(result | halves_ | {"rows": list(rows.values())})


def table(result: dict) -> str:
    rate = result["bytes_per_second"]
    times = f"forward {result['forward_seconds']:.4f} s, backward {result['backward_seconds']:.4f} s"
    rates = f"bus {rate['out'] / 1e9:.1f} GB/s out, {rate['back'] / 1e9:.1f} GB/s back"
    lines = [wrapped(f"{times}; {rates}; s: the median, and the most")]
    rows = []
    for row in result["rows"]:
        if "error" in row:
            lines.append(failed(row["how"], row["error"]))
            continue
        times = [f"{row[key]:.3f}" if key in row else "" for key in ("seconds", "most", "limit")]
        rows.append([row["how"], *times, *(show_bytes(row[key]) if key in row else "" for key in ("peak", "activations", "copied"))])
    return "\n".join([*lines, columns(("", "s", "most", "limit", "peak", "kept", "copied"), rows)])


def main() -> None:
    given = options("activation_offloading", __doc__)
    result = measure(given.smoke, given.device)
    print(table(result))
    print("saved to", recorded.save("activation_offloading", result, given.out, given.device))


if __name__ == "__main__":
    main()
