"""Seconds and peak bytes of a QLoRA training step: ours beside peft + bitsandbytes, and what each trick brings.

    python -m benchmarks.qlora_step               # a CUDA device, about two minutes; saves the recorded result "qlora_step"
    python -m benchmarks.qlora_step --only peft "llama, compiled, graph"
    python -m benchmarks.qlora_step --smoke       # small shapes on the CPU, in seconds; saves to a temporary folder

The model has the shape of Llama-2-7B and random weights, r = 16 on all linears, float32 adapters under AdamW, checkpointing, NF4 in blocks
of 64 with double quantization, bf16 products; everything runs in one process, one variant after the other, with memory freed in between.
The variants on reference.llama share one model, quantized once. Seconds are medians by CUDA events after warm-up, of whole steps: forward,
backward, optimizer. "Busy" is the share of such a step in which the GPU runs a kernel, by torch's profiler: the rest waits for launches.

- "peft" is peft + bitsandbytes on the Hugging Face library's Llama, "library" is reference.qlora on that same model;
- "llama" is reference.qlora on reference.llama, whose loss never makes the logits whole; "whole logits" makes them;
- "plain update" computes the adapters' float32 products outside the tensor cores (reference.lora.mixed);
- "compiled" compiles each layer, "graph" records the step in a CUDA graph (reference.llama.step).
"""

import gc
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import ALPHA, OURS, PEERS, RANK, Case, build, fill, random_weights
from benchmarks.cli import failed, message, options
from benchmarks.meters import Extra, Meter, timed
from course.lab import recorded
from course.lab.meters import show_bytes
from course.lab.tables import columns, wrapped
from reference.llama import Llama
from reference.llama.loss import IGNORED, next_tokens
from reference.llama.step import GraphedStep, capturable_adamw, compile_layers
from reference.lora import inject_lora, mixed
from reference.model_shapes import LLAMA_2_7B, ModelShape
from reference.qlora import quantize_linears

RATE = 1e-4
SMALL, LARGE = (1, 512), (4, 2048)
# Most important first: a run that is cut short has them.
ORDER = [
    ("peft", SMALL),
    ("peft", LARGE),
    ("llama, graph", SMALL),
    ("llama", LARGE),
    ("llama", SMALL),
    ("llama, compiled, graph", SMALL),
    ("llama, compiled, graph", LARGE),
    ("llama, compiled", LARGE),
    ("llama, compiled", SMALL),
    ("llama, graph", LARGE),
    ("llama, plain update", LARGE),
    ("llama, plain update", SMALL),
    ("llama, whole logits", LARGE),
    ("library", SMALL),
    ("library", LARGE),
]
PROFILED = {("peft", SMALL), ("llama", SMALL), ("llama, compiled, graph", SMALL), ("llama", LARGE)}
SMOKE_SHAPE = ModelShape("smoke", 128, 2, 4, 2, 32, 192, 300)


def build_ours(shape: ModelShape, device: torch.device) -> Llama:
    """reference.llama with adapters over packed weights; no 16-bit copy of the model ever exists."""
    with torch.device("meta"):
        model = Llama(shape).bfloat16().requires_grad_(False)
    weights = random_weights({name: p.shape for name, p in model.named_parameters()}, device)
    quantize_linears(model, device=device, weights=weights)
    fill(model, weights)
    inject_lora(model, RANK, ALPHA)
    return model.train()


def whole_loss(model: Llama, ids: Tensor) -> Tensor:
    return F.cross_entropy(model.logits(ids).float().flatten(0, 1), next_tokens(ids).flatten(), ignore_index=IGNORED)


def library_loss(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


class Models:
    """The one model that is there now; variants of one kind share it."""

    def __init__(self, shape: ModelShape, meter: Meter, device: torch.device):
        self.shape, self.meter, self.device, self.kind, self.model = shape, meter, device, None, None

    def get(self, name: str) -> nn.Module:
        kind = "peft" if name == "peft" else "library" if name == "library" else "compiled" if "compiled" in name else "llama"
        if kind == self.kind:
            return self.model
        old = self.model if kind in ("llama", "compiled") and self.kind in ("llama", "compiled") else None
        if old is None:
            self.model = self.kind = None
            self.meter.start()
        case = Case(self.shape, True, ())
        if kind in ("peft", "library"):
            self.model = build(PEERS if kind == "peft" else OURS, case, self.device, Extra(self.meter))
        elif old is None:
            self.model = build_ours(self.shape, self.device)
        else:  # the same module, whose layers forget or learn to be compiled
            self.model = old
        if kind == "compiled":
            compile_layers(self.model, "inductor" if self.meter.cuda else "aot_eager")  # in seconds, where nothing is timed
        elif kind == "llama":
            for layer in self.model.model.layers:
                layer._compiled_call_impl = None
        self.kind = kind
        return self.model


def make_step(name: str, model: nn.Module, ids: Tensor) -> Callable[[], Tensor]:
    """A training step of this variant, with an optimizer of its own."""
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = library_loss if name in ("peft", "library") else whole_loss if "whole" in name else Llama.loss
    if "graph" in name:
        recorded_step = GraphedStep(model, capturable_adamw(trained, RATE), loss, ids)
        return lambda: recorded_step.step(ids)
    adam = torch.optim.AdamW(trained, lr=RATE, fused=ids.is_cuda or None)

    def step() -> Tensor:
        value = loss(model, ids)
        value.backward()
        adam.step()
        adam.zero_grad(set_to_none=True)
        return value.detach()

    return step


def busy(step: Callable[[], Tensor]) -> dict[str, float]:
    """Kernels of one step by the profiler: how many, and their sum of seconds."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    on_device = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [event for event in on_device if not (event.name.startswith(("##", "Optimizer.", "Torch-Compiled")))]  # not: spans of Python
    groups: dict[str, float] = {}
    for event in kernels:
        groups[event.name[:60]] = groups.get(event.name[:60], 0) + event.device_time / 1e6
    top = dict(sorted(groups.items(), key=lambda item: -item[1])[:12])
    return {"kernels": len(kernels), "kernel_seconds": sum(groups.values()), "top": top}


def measure(name: str, batch: tuple[int, int], models: Models) -> dict:
    """One row."""
    meter, device = models.meter, models.device
    began = time.perf_counter()
    model = models.get(name)
    for parameter in model.parameters():
        parameter.grad = None
    mixed.use_tensor_cores("plain update" not in name)
    gc.collect()
    if meter.cuda:
        torch.cuda.empty_cache()
    torch.manual_seed(0)
    ids = torch.randint(models.shape.vocab, batch, device=device)
    weights = meter.now
    meter.reset()
    step = make_step(name, model, ids)  # a graph's memory is taken while it is recorded
    losses = [step().item() for _ in range(2)]
    if "graph" not in name:
        meter.reset()
    first = time.perf_counter()
    step().item()
    once = time.perf_counter() - first
    repeats = max(3, min(10, int(2 / once))) if meter.cuda else 1
    seconds = []
    for _ in range(repeats):
        took, loss = timed(step, meter.cuda)
        seconds.append(took)
    row = {"seconds": statistics.median(seconds), "all_seconds": seconds, "peak": meter.peak, "before": weights}
    row |= {"losses": [*losses, loss.item()], "reserved": torch.cuda.memory_reserved() if meter.cuda else 0}
    if meter.cuda and (name, batch) in PROFILED:
        try:
            row |= busy(step)
            row["busy"] = row["kernel_seconds"] / row["seconds"]
        except Exception as error:
            row["profile_error"] = message(error)
    return row | {"seconds_all_told": time.perf_counter() - began}


def attempt(name: str, batch: tuple[int, int], models: Models) -> dict:
    """:func:`measure`, or why it could not."""
    row = {"how": name, "batch": batch[0], "sequence": batch[1]}
    try:
        return row | measure(name, batch, models)
    except Exception as error:
        return row | {"error": message(error)}
    finally:
        mixed.use_tensor_cores(True)


def compared(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Seconds of peft + bitsandbytes over those of each variant, and its peak over theirs."""
    peers = {(row["batch"], row["sequence"]): row for row in rows if row["how"] == "peft" and "error" not in row}
    return {
        f"{row['how']} {row['batch']}×{row['sequence']}": {
            "faster": peer["seconds"] / row["seconds"],
            "memory": row["peak"] / max(1, peer["peak"]),
        }
        for row in rows
        if "error" not in row and (peer := peers.get((row["batch"], row["sequence"])))
    }


def table(result: dict) -> str:
    good = [row for row in result["rows"] if "error" not in row]
    ratios, rows = compared(good), []
    for row in good:
        tokens = f"{row['batch']}×{row['sequence']}"
        ratio = ratios.get(f"{row['how']} {tokens}", {})
        times = f"{row['seconds']:.4f}", ratio.get("faster"), show_bytes(row["peak"]), ratio.get("memory"), row.get("kernels", "")
        rows.append([f"{row['how']}, {tokens}", *times, f"{row['busy']:.0%}" if "busy" in row else ""])
    about = "×: times faster than peft + bitsandbytes, and the peak over theirs; kernels of a step, how long one runs"
    lines = [columns(("", "s/step", "×", "peak", "×", "kernels", "busy"), rows), wrapped(about)]
    for tokens in dict.fromkeys((row["batch"], row["sequence"]) for row in good):
        losses = [row["losses"][0] for row in good if (row["batch"], row["sequence"]) == tokens]
        lines.append(f"loss of the first step, {tokens[0]}×{tokens[1]}: {min(losses):.4f} to {max(losses):.4f}")
    lines += [failed(f"{row['how']}, {row['batch']}×{row['sequence']}", row["error"]) for row in result["rows"] if "error" in row]
    return "\n".join(lines)


def main() -> None:
    given = options(
        "qlora_step",
        __doc__,
        only={"nargs": "+", "choices": sorted({name for name, _ in ORDER}), "help": "these variants"},
        seconds={"type": float, "default": 150, "help": "begin no further variant after so many seconds"},
    )
    device = given.device
    shape, rows, began = SMOKE_SHAPE if given.smoke else LLAMA_2_7B, [], time.monotonic()
    models = Models(shape, Meter(device), device)  # on a CPU the meter does not count: it would keep torch.compile away
    for name, batch in ORDER:
        if given.only and name not in given.only:
            continue
        if time.monotonic() - began > given.seconds:
            rows.append({"how": name, "batch": batch[0], "sequence": batch[1], "error": "no time was left"})
        else:
            rows.append(attempt(name, tuple(n // 16 + 1 for n in batch) if given.smoke else batch, models))
        last = rows[-1].get("error") or f"{rows[-1]['seconds']:.4f} s/step"
        print(f"{name}, {batch[0]}×{batch[1]}: {last} (after {time.monotonic() - began:.0f} s)", flush=True)
        result = {"shape": shape.name, "rank": RANK, "alpha": ALPHA, "rows": rows, "compared": compared(rows)}
        path = recorded.save("qlora_step", result, given.out, device)
    print(table(result))
    print("saved to", path)


if __name__ == "__main__":
    main()
