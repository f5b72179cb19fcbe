"""Layers whose weights are in host memory or on disk: seconds and rates of a pass, beside accelerate's cpu_offload and the bus.

    python -m benchmarks.offloaded_layers          # a CUDA device with 16 GB and a host with 40 GB free, about a minute; "offloaded_layers"
    python -m benchmarks.offloaded_layers --only memory
    python -m benchmarks.offloaded_layers --smoke  # small shapes on the CPU, in seconds; saves to a temporary folder

Sixteen layers of Llama-2-7B's shape with random bfloat16 weights, 6.5 GB, on a card that may use 4 GB. A pass is a forward without
gradients over 1 × T tokens. "copying" is what the pass's bytes take at the rate of pinned copies in the same run, "computing" the time of
the same pass with all weights on the card, measured before the cap. A pass should take the longer of the two.
"""

import gc
import time
import traceback
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.cli import message, options, rounded
from course.lab import recorded
from course.lab.meters import milliseconds
from reference.llama.model import Layer, rotation
from reference.lora import inject_lora
from reference.model_shapes import LLAMA_2_7B, ModelShape
from reference.offload import OffloadedSequential

TOKENS = (16, 512, 2048, 4096, 8192, 16384, 32768)
CAP = 4 * 10**9
SMOKE_SHAPE = ModelShape("smoke", 64, 3, 4, 4, 16, 96, 100)


class Setting:
    def __init__(self, device: torch.device, smoke: bool):
        self.device, self.smoke, self.cuda = device, smoke, device.type == "cuda"
        self.shape, self.depth = (SMOKE_SHAPE, 3) if smoke else (LLAMA_2_7B, 16)
        self.dtype = torch.bfloat16
        self.tokens = (4, 16) if smoke else TOKENS

    def layers(self, adapters: bool = False) -> nn.ModuleList:
        """On the host, the same each time; made on the device, which is faster."""
        torch.manual_seed(0)
        found = nn.ModuleList()
        with torch.device(self.device):
            for _ in range(self.depth):
                layer = Layer(self.shape, 1e-5).to(self.dtype).requires_grad_(False)
                found.append(layer.cpu())
        if adapters:
            inject_lora(found, r=16, lora_alpha=32)
        return found

    def inputs(self, tokens: int) -> tuple[Tensor, tuple]:
        x = torch.randn(1, tokens, self.shape.hidden, device=self.device, dtype=self.dtype)
        return x, rotation(tokens, self.shape.head_dim, 10_000.0, self.device, self.dtype)

    def seconds(self, work: Callable, repeats: int = 3) -> float:
        if self.smoke:
            repeats = 1
        return milliseconds(work, repeats=repeats, warmup=1, where=self.device) / 1e3

    def free(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.cuda else 0


def bus(s: Setting) -> float:
    """GB/s of pinned copies in, of a layer's size."""
    if not s.cuda:
        return 1.0
    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    card = torch.empty(1 << 28, dtype=torch.uint8, device=s.device)
    return 8 * host.nbytes / s.seconds(lambda: [card.copy_(host, non_blocking=True) for _ in range(8)]) / 1e9


@torch.no_grad()
def run(layers, x: Tensor, positions) -> Tensor:
    for layer in layers:
        x = layer(x, positions)
    return x


def passes(s: Setting, rows: list[dict], how: str, stack: Callable, tokens) -> None:
    for count in tokens:
        row = {"how": how, "tokens": count}
        try:
            x, positions = s.inputs(count)
            s.free()
            with torch.no_grad():
                row["seconds"] = s.seconds(lambda x=x, positions=positions: stack(x, positions))
            row["peak"] = s.peak()
        except Exception as error:
            traceback.print_exc()
            row["error"] = message(error)
        rows.append(row)
        x = positions = None


def measure(s: Setting, only: list[str] | None) -> dict:
    layers = s.layers()
    weights = sum(p.nbytes for p in layers.parameters())
    result: dict = {"weights": weights, "layers": s.depth, "bytes per weight": s.dtype.itemsize, "cap": CAP, "bus": bus(s), "rows": []}
    rows = result["rows"]
    x, positions = s.inputs(64 if not s.smoke else 4)
    resident = layers.to(s.device)
    right = run(resident, x, positions).cpu()
    passes(s, rows, "resident", lambda *given: run(resident, *given), s.tokens)
    layers = resident = layers.cpu()
    s.free()
    if s.cuda:
        torch.cuda.set_per_process_memory_fraction(CAP / torch.cuda.mem_get_info()[1])
    try:
        for how, store in (("memory", "cpu"), ("disk", "disk")):
            if only and how not in only:
                continue
            began = time.perf_counter()
            stack = OffloadedSequential(s.layers(), s.device, store)
            result[f"building, {how}"] = time.perf_counter() - began
            with torch.no_grad():
                result[f"equal, {how}"] = torch.equal(stack(x, positions).cpu(), right)
            passes(s, rows, how, stack, s.tokens if how == "memory" else s.tokens[:4:3])
            stack = None
            s.free()
        if not only or "accelerate" in only:
            try:
                from accelerate import cpu_offload

                class Stack(nn.Module):
                    def __init__(self):
                        super().__init__()
                        self.layers = layers

                    def forward(self, x, positions):
                        return run(self.layers, x, positions)

                theirs = cpu_offload(Stack(), execution_device=s.device)
                result["equal, accelerate"] = torch.equal(theirs(x, positions).cpu(), right)
                passes(s, rows, "accelerate", theirs, s.tokens[:4])
            except Exception as error:
                traceback.print_exc()
                result["accelerate"] = message(error)
            layers = resident = theirs = None
            s.free()
        if not only or "training" in only:
            try:
                training(s, result)
            except Exception as error:
                traceback.print_exc()
                result["training"] = message(error)
    finally:
        if s.cuda:
            torch.cuda.set_per_process_memory_fraction(1.0)
    add_shares(result)
    return result


def training(s: Setting, result: dict) -> None:
    """A step of LoRA through offloaded layers: forward, backward with a second forward, AdamW on the adapters."""
    s.free()
    stack = OffloadedSequential(s.layers(adapters=True), s.device)
    adam = torch.optim.AdamW([p for p in stack.parameters() if p.requires_grad], lr=1e-4)
    tokens = s.tokens[1]
    x, positions = s.inputs(tokens)
    losses = []

    def step() -> None:
        loss = stack(x, positions).float().square().mean()
        loss.backward()
        adam.step()
        adam.zero_grad()
        losses.append(loss.detach())

    seconds = s.seconds(step)
    result["training"] = {"tokens": tokens, "seconds": seconds, "peak": s.peak(), "losses": torch.stack(losses).tolist()}
    # Forward and backward bring each layer once, but for the two that are still there at each turn.
    moved = 2 * (s.depth - 2) / s.depth * result["weights"]
    result["training"]["share"] = moved / seconds / 1e9 / result["bus"]


def add_shares(result: dict) -> None:
    """Of the bus, the time that copying alone takes, and that of computing alone."""
    computing = {row["tokens"]: row.get("seconds") for row in result["rows"] if row["how"] == "resident"}
    copying = result["weights"] / 1e9 / result["bus"]
    for row in result["rows"]:
        if "seconds" in row and row["how"] != "resident":
            row |= {"share": copying / row["seconds"], "copying": copying, "computing": computing[row["tokens"]]}
            row["predicted"] = max(copying, computing[row["tokens"]])


def table(result: dict) -> str:
    lines = [f"{key}: {value}" for key, value in result.items() if key != "rows"]
    for row in result["rows"]:
        said = row.get("error") or f"{row['seconds']:9.4f} s {row['peak'] / 1e9:6.2f} GB"
        if "share" in row:
            said += f"  predicted {row['predicted']:.4f} s, {row['share']:.0%} of the bus"
        lines.append(f"{row['how']:12}{row['tokens']:7} tokens {said}")
    return "\n".join(lines)


def main() -> None:
    given = options(
        "offloaded_layers", __doc__, only={"nargs": "+", "choices": ["memory", "disk", "accelerate", "training"], "help": "these"}
    )
    result = rounded(measure(Setting(given.device, given.smoke), given.only))
    print(table(result))
    print("saved to", recorded.save("offloaded_layers", result, given.out, given.device))


if __name__ == "__main__":
    main()
