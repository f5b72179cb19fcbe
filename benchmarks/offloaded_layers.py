"""Layers whose weights are in host memory or on disk: seconds and rates of a pass, beside accelerate's cpu_offload and the bus.

    python -m benchmarks.offloaded_layers          # a CUDA device with 16 GB and a host with 40 GB free, about a minute; "offloaded_layers"
    python -m benchmarks.offloaded_layers --smoke  # small shapes on the CPU, in seconds; saves to a temporary folder

Sixteen layers of Llama-2-7B's shape with random bfloat16 weights, 6.5 GB, on a card that may use 4 GB. A pass is a forward without
gradients over 1 × T tokens. "copying" is what the pass's bytes take at the rate of pinned copies in the same run, "computing" the time of
the same pass with all weights on the card, measured before the cap. A pass should take the longer of the two. Files and training are tried
with six of the layers, and without the cap; so is accelerate.
"""

import gc
import time
import traceback
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.cli import failed, message, options, rounded
from course.lab import recorded
from course.lab.meters import milliseconds, show_bytes
from course.lab.tables import columns, wrapped
from reference.llama.model import Layer, rotation
from reference.lora import inject_lora
from reference.model_shapes import LLAMA_2_7B, ModelShape
from reference.offload import OffloadedSequential

TOKENS = (16, 512, 2048, 4096, 8192, 16384)
CAP = 4 * 10**9
SMOKE_SHAPE = ModelShape("smoke", 64, 3, 4, 4, 16, 96, 100)


class Setting:
    def __init__(self, device: torch.device, smoke: bool):
        self.device, self.smoke, self.cuda = device, smoke, device.type == "cuda"
        self.shape, self.depth, self.few = (SMOKE_SHAPE, 4, 3) if smoke else (LLAMA_2_7B, 16, 6)
        self.dtype = torch.bfloat16
        self.tokens = (4, 16) if smoke else TOKENS

    def layers(self, depth: int) -> nn.ModuleList:
        """On the device, the same each time."""
        torch.manual_seed(0)
        with torch.device(self.device):
            return nn.ModuleList(Layer(self.shape, 1e-5).to(self.dtype) for _ in range(depth)).requires_grad_(False)

    def inputs(self, tokens: int) -> tuple[Tensor, tuple]:
        x = torch.randn(1, tokens, self.shape.hidden, device=self.device, dtype=self.dtype)
        return x, rotation(tokens, self.shape.head_dim, 10_000.0, self.device, self.dtype)

    def seconds(self, work: Callable, repeats: int = 3) -> float:
        return milliseconds(work, repeats=1 if self.smoke else repeats, warmup=1, where=self.device) / 1e3

    def free(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.cuda else 0

    def cap(self, count: int | None) -> None:
        if self.cuda:
            torch.cuda.set_per_process_memory_fraction(1.0 if count is None else count / torch.cuda.mem_get_info()[1])


def bus(s: Setting) -> float:
    """GB/s of pinned copies in, of about a layer's size."""
    if not s.cuda:
        return 1.0
    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    card = torch.empty(1 << 28, dtype=torch.uint8, device=s.device)
    return 8 * host.nbytes / s.seconds(lambda: [card.copy_(host, non_blocking=True) for _ in range(8)]) / 1e9


def weights_of(layers: nn.Module) -> int:
    return sum(p.nbytes for p in layers.parameters())


@torch.no_grad()
def run(layers, x: Tensor, positions) -> Tensor:
    for layer in layers:
        x = layer(x, positions)
    return x


class Stack(nn.Module):
    """For accelerate, which wants one module."""

    def __init__(self, layers: nn.ModuleList):
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor, positions) -> Tensor:
        return run(self.layers, x, positions)


def passes(s: Setting, result: dict, how: str, stack: Callable, weights: int, tokens, repeats: int = 3) -> None:
    """Rows of one way; beside each what copying and what computing alone take."""
    for count in tokens:
        row = {"how": how, "tokens": count, "weights": weights}
        try:
            x, positions = s.inputs(count)
            s.free()
            with torch.no_grad():
                row["seconds"] = s.seconds(lambda x=x, positions=positions: stack(x, positions), repeats)
            row["peak"] = s.peak()
            if how != "resident":
                row["copying"] = weights / 1e9 / result["bus"]
                alone = next(r for r in result["rows"] if (r["how"], r["tokens"]) == ("resident", count))
                row["computing"] = alone["seconds"] * weights / alone["weights"]
                row["predicted"] = max(row["copying"], row["computing"])
                row["share"] = row["copying"] / row["seconds"]
        except Exception as error:
            traceback.print_exc()
            row["error"] = message(error)
        result["rows"].append(row)
        x = positions = None


def memory(s: Setting, result: dict) -> nn.ModuleList:
    """All weights on the card, then in host memory under the cap; returns the layers, whose weights are there now."""
    x, positions = s.inputs(16 if s.smoke else 64)
    layers = s.layers(s.depth)
    weights = result["weights"] = weights_of(layers)
    right = run(layers, x, positions)
    passes(s, result, "resident", lambda *given: run(layers, *given), weights, s.tokens)
    began = time.perf_counter()
    stack = OffloadedSequential(layers, s.device)
    result["building"] = time.perf_counter() - began
    s.free()
    s.cap(CAP)
    with torch.no_grad():
        result["equal"] = torch.equal(stack(x, positions), right)
    passes(s, result, "memory", stack, weights, s.tokens)
    return layers


def accelerate(s: Setting, result: dict, layers: nn.ModuleList) -> None:
    from accelerate import cpu_offload

    for p in layers.parameters():
        p.data = p.data.clone()  # ordinary memory, as it is after loading
    theirs = cpu_offload(Stack(layers), execution_device=s.device)
    passes(s, result, "accelerate", theirs, result["weights"], s.tokens[:1] if s.smoke else (16, 4096), repeats=2)


def training(s: Setting, result: dict) -> None:
    """A step of LoRA through a few offloaded layers: forward, backward with a second forward, AdamW on the adapters."""
    layers = s.layers(s.few)
    weights = weights_of(layers)
    inject_lora(layers, r=16, lora_alpha=32)
    stack = OffloadedSequential(layers, s.device)
    s.free()
    adam = torch.optim.AdamW([p for p in stack.parameters() if p.requires_grad], lr=1e-4)
    x, positions = s.inputs(s.tokens[1])
    losses = []

    def step() -> None:
        loss = stack(x, positions).float().square().mean()
        loss.backward()
        adam.step()
        adam.zero_grad()
        losses.append(loss.detach())

    seconds = s.seconds(step)
    row = {"layers": s.few, "weights": weights, "tokens": s.tokens[1], "seconds": seconds, "peak": s.peak()}
    # Forward and backward bring each layer once, but for the two that are still there at each turn.
    row["share"] = 2 * (s.few - 2) / s.few * weights / seconds / 1e9 / result["bus"]
    result["training"] = row | {"losses": torch.stack(losses).tolist()}


def disk(s: Setting, result: dict) -> None:
    """A few layers in files, which the system has in its memory once they were read."""
    stack = OffloadedSequential(layers := s.layers(s.few), s.device, "disk")
    passes(s, result, "disk", stack, weights_of(layers), s.tokens[:1] if s.smoke else (16, 4096), repeats=2)


def measure(s: Setting, save: Callable[[dict], None]) -> dict:
    result: dict = {"layers": s.depth, "bytes per weight": s.dtype.itemsize, "cap": CAP, "bus": bus(s), "rows": []}
    layers = memory(s, result)
    save(result)
    for part in (training, disk, accelerate):
        s.free()
        s.cap(None)
        began = time.perf_counter()
        try:
            part(s, result, *([layers] if part is accelerate else []))
        except Exception as error:
            traceback.print_exc()
            result[f"error in {part.__name__}"] = message(error)
        print(f"{part.__name__}: {time.perf_counter() - began:.1f} s", flush=True)
        save(result)
    return result


def table(result: dict) -> str:
    size = f"{result['layers']} layers, {show_bytes(result['weights'])} of weights, {result['bytes per weight']} bytes each"
    where = f"under a cap of {show_bytes(result['cap'])}, over a bus of {result['bus']:.1f} GB/s"
    same = "" if result["equal"] else "NOT "
    lines = [wrapped(f"{size}, {where}; built in {result['building']:.1f} s; results are {same}those of resident layers")]
    rows = []
    for row in result["rows"]:
        name = f"{row['how']}, {row['tokens']:,} tokens"
        if "error" in row:
            lines.append(failed(name, row["error"]))
            continue
        more = (f"{row['predicted']:.4f}", f"{row['share']:.0%}") if "share" in row else ("", "")
        rows.append([name, f"{row['seconds']:.4f}", show_bytes(row["peak"]), *more])
    lines.append(columns(("a pass", "seconds", "peak", "predicted, s", "of the bus"), rows))
    if step := result.get("training"):
        about = f"a training step of {step['layers']} layers, {step['tokens']} tokens: {step['seconds']:.4f} s"
        lines.append(wrapped(f"{about}, {show_bytes(step['peak'])} at the peak, {step['share']:.0%} of the bus"))
    lines += [failed(key.removeprefix("error in "), said) for key, said in result.items() if key.startswith("error in ")]
    return "\n".join(lines)


def main() -> None:
    given = options("offloaded_layers", __doc__)
    name = "offloaded_layers"
    result = measure(Setting(given.device, given.smoke), lambda found: recorded.save(name, rounded(found), given.out, given.device))
    print(table(result))
    print("saved to", given.out)


if __name__ == "__main__":
    main()
