"""Memory of QLoRA: ours beside peft + bitsandbytes, 16-bit LoRA beside both, and what reference.memory predicts.

    python benchmarks/qlora_memory.py               # a CUDA device, about two minutes; saves the recorded result "qlora_memory"
    python benchmarks/qlora_memory.py --smoke       # small shapes on the CPU, bytes of tensors counted; saves to a temporary folder

Models have the shape of Llama-2-7B and of smaller ones, and random weights: memory does not depend on the values. Each model is made on the
meta device and filled layer by layer on the GPU, so that no 16-bit copy of it ever exists: "extra" is the most that was there while one
layer was worked on, beyond the result so far. Then four steps with AdamW; the last one counts (Adam's moments exist by then). r = 16 on all
linears, NF4 in blocks of 64 with double quantization, bf16 products, float32 adapters.

Each way of building has a process of its own, and its peak is the allocator's ``max_memory_allocated`` less the matrix library's workspaces
(see benchmarks/memory_peaks.py, whose parts are used here).

- "QLoRA" is reference.qlora; "QLoRA, peft + bitsandbytes" is Linear4bit under peft's layer.
- "…, prepared" passes the model through peft's prepare_model_for_kbit_training, which the usual recipe calls: it casts all that is not
  quantized (embeddings, head, norms) to float32; products run under bf16 autocast.
- "LoRA" and "LoRA, peft" keep the base in bf16.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from memory_peaks import config_of, free, held_by_libraries, optimizer
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from course.lab import models, recorded
from course.lab.live import LiveBytes
from course.lab.meters import show_bytes
from reference.lora import inject_lora
from reference.memory import training_memory
from reference.memory.recipes import LORA, QLORA, Recipe
from reference.model_shapes import GEMMA_3_270M, LLAMA_2_7B, LLAMA_3_2_1B, ModelShape
from reference.qlora import quantize_linears

RANK, ALPHA, STEPS = 16, 32, 4
OURS, PEERS, PREPARED = "QLoRA", "QLoRA, peft + bitsandbytes", "QLoRA, peft + bitsandbytes, prepared"
DENSE, DENSE_PEFT = "LoRA", "LoRA, peft"
RECIPES: dict[str, Recipe | None] = {  # what reference.memory knows about; in the order of running
    OURS: QLORA,
    PEERS: dataclasses.replace(QLORA, input_copies=True),
    DENSE: LORA,
    PREPARED: None,
    DENSE_PEFT: dataclasses.replace(LORA, input_copies=True),
}
# With Gemma's sizes and Llama's layer: what the prediction is exact for.
LIKE_GEMMA = dataclasses.replace(GEMMA_3_270M, name="Llama with Gemma-3-270M's sizes", norms=2, qk_norm=False)


@dataclasses.dataclass(frozen=True)
class Case:
    shape: ModelShape
    checkpointing: bool
    batches: tuple[tuple[int, int], ...]  # (rows, tokens)
    rank: int = RANK


def tiny_shape() -> ModelShape:
    return ModelShape.from_config(models.load("tiny", where=torch.device("cpu"))[0].config, "the course's tiny model")


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


# Building, one layer at a time


def random_weights(shapes: dict[str, torch.Size], device: torch.device) -> Callable[[str], Tensor]:
    """A function from a parameter's name to new values in bf16, as a checkpoint's reader would give them one by one."""
    generator = torch.Generator(device).manual_seed(0)
    return lambda name: torch.empty(shapes[name], dtype=torch.bfloat16, device=device).normal_(std=0.02, generator=generator)


def skeleton(shape: ModelShape, device: torch.device) -> tuple[nn.Module, Callable[[str], Tensor]]:
    """The model without values, and what gives them."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = LlamaForCausalLM(config_of(shape))
    finally:
        torch.set_default_dtype(default)
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # computed, not stored
    weights = random_weights({name: p.shape for name, p in model.named_parameters()}, device)
    return model.requires_grad_(False), weights


def fill(model: nn.Module, weights: Callable[[str], Tensor]) -> None:
    """Values for every parameter that has none yet."""
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, nn.Parameter(weights(name), requires_grad=False))
    model.tie_weights()


def pack_with_bitsandbytes(model: nn.Module, weights: Callable[[str], Tensor], device: torch.device) -> None:
    import bitsandbytes as bnb

    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]:
        sizes = linear.in_features, linear.out_features
        packed = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
        packed.weight = bnb.nn.Params4bit(weights(f"{name}.weight"), requires_grad=False, quant_type="nf4", module=packed).to(device)
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, packed)
    model.is_loaded_in_4bit = True  # by this peft knows which of its layers to take


def build(how: str, case: Case, device: torch.device, extra: "Extra") -> nn.Module:
    """The adapted model, ready to train."""
    model, weights = skeleton(case.shape, device)
    weights = extra.watched(weights)
    if how == OURS:
        quantize_linears(model, device=device, weights=weights)
    elif how in (PEERS, PREPARED):
        pack_with_bitsandbytes(model, weights, device)
    fill(model, weights)
    extra.stop()
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    if how == PREPARED:
        import peft

        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=case.checkpointing, **options)
    elif case.checkpointing:
        model.gradient_checkpointing_enable(**options)
    if how in (OURS, DENSE):
        inject_lora(model, case.rank, ALPHA)
    else:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=case.rank, lora_alpha=ALPHA, target_modules="all-linear"))
    return model.train()


# Measuring


class Meter:
    """Bytes now and their peak: the allocator's on CUDA, storages that torch's operations hand out on a CPU."""

    def __init__(self, device: torch.device):
        self.cuda, self.live, self.base = device.type == "cuda", LiveBytes(), 0
        if self.cuda:
            held_by_libraries()  # from now on they are there

    def start(self) -> None:
        """Free what nobody uses; what is left is not counted."""
        gc.collect()
        if self.cuda:
            free()
        self.base = 0
        self.base = self.now
        self.reset()

    def reset(self) -> None:
        self.live.peak = self.live.bytes
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    @property
    def now(self) -> int:
        return (torch.cuda.memory_allocated() if self.cuda else self.live.bytes) - self.base

    @property
    def peak(self) -> int:
        return (torch.cuda.max_memory_allocated() if self.cuda else self.live.peak) - self.base

    def __enter__(self) -> "Meter":
        if not self.cuda:
            self.live.__enter__()
        return self

    def __exit__(self, *error) -> None:
        if not self.cuda:
            self.live.__exit__(*error)


class Extra:
    """The most bytes that were there while one weight was worked on, beyond what was there before it."""

    def __init__(self, meter: Meter):
        self.meter, self.bytes = meter, 0
        self.start()

    def start(self) -> None:
        self.meter.reset()
        self.before = self.meter.now

    def stop(self) -> None:
        self.bytes = max(self.bytes, self.meter.peak - self.before)

    def watched(self, weights: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
        def give(name: str) -> Tensor:
            self.stop()
            self.start()
            return weights(name)

        return give


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
    adam = optimizer(QLORA, [p for p in model.parameters() if p.requires_grad])  # AdamW as a GPU takes it by default
    rows = []
    for batch in case.batches:
        try:
            rows.append(row | {"batch": batch[0], "sequence": batch[1], **train(how, model, adam, batch, meter, device)})
        except Exception as error:
            rows.append(row | {"batch": batch[0], "sequence": batch[1], "error": f"{type(error).__name__}: {error}".splitlines()[0][:200]})
            adam.zero_grad(set_to_none=True)
    return rows


def train(how: str, model: nn.Module, adam: torch.optim.Optimizer, batch: tuple[int, int], meter: Meter, device: torch.device) -> dict:
    """Some steps; the peaks of the last one, in bytes."""
    ids = torch.randint(model.config.vocab_size, batch, device=device)
    autocast = torch.autocast(device.type, torch.bfloat16) if how == PREPARED else contextlib.nullcontext()
    losses, peaks = [], {}
    for _ in range(STEPS):
        meter.reset()
        began = time.perf_counter()
        with autocast:
            loss = model(input_ids=ids, labels=ids).loss
        peaks["forward"] = meter.peak
        meter.reset()
        loss.backward()
        losses.append(loss.item())
        del loss
        peaks["backward"] = meter.peak
        meter.reset()
        adam.step()
        peaks["step"] = meter.peak
        adam.zero_grad(set_to_none=True)
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
                rows.append({"shape": case.shape.name, "how": how, "error": f"{type(error).__name__}: {error}".splitlines()[0][:200]})
    return rows


def run_apart(how: str, smoke: bool, seconds: float) -> list[dict]:
    """The same in a process of its own; one that dies or takes too long is a row with an error."""
    command = [sys.executable, __file__, "--only", how, *(["--smoke"] if smoke else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return [{"shape": "all", "how": how, "error": f"took more than {seconds:.0f} s"}]
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return [{"shape": "all", "how": how, "error": f"exit code {done.returncode}: {last}"[:300]}]


def table(rows: list[dict]) -> str:
    form = "{:34}{:38}{:>10}{:>10}{:>10}{:>10}{:>10}"
    lines = [form.format("shape", "how", "tokens", "built", "extra", "peak", "predicted")]
    for row in sorted(rows, key=lambda row: (row["shape"], row.get("batch", 0) * row.get("sequence", 0), row.get("sequence", 0))):
        if "error" in row:
            lines.append(f"{row['shape']:34}{row['how']:38}  FAILED {row['error']}")
            continue
        tokens = f"{row['batch']}×{row['sequence']}"
        sizes = [show_bytes(row[key]) if key in row else "" for key in ("built", "building_extra", "peak", "predicted")]
        lines.append(form.format(row["shape"], row["how"], tokens, *sizes))
    return "\n".join(lines)


def compared(rows: list[dict]) -> dict[str, float]:
    """Our peak over that of peft + bitsandbytes, by case; at most 1.03 is the bar."""
    peaks = {(row["how"], row["shape"], row["batch"], row["sequence"]): row["peak"] for row in rows if "error" not in row}
    return {
        f"{shape} {batch}×{sequence}": peak / peaks[PEERS, shape, batch, sequence]
        for (how, shape, batch, sequence), peak in peaks.items()
        if how == OURS and (PEERS, shape, batch, sequence) in peaks
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/recorded; with --smoke a temporary one)")
    parser.add_argument("--smoke", action="store_true", help="small shapes on the CPU, in seconds")
    parser.add_argument("--only", choices=list(RECIPES), help="one way of building, in this process; prints its rows as JSON")
    parser.add_argument("--seconds", type=float, default=90, help="longest time for one way of building")
    arguments = parser.parse_args()
    if arguments.only:
        rows = run(arguments.only, arguments.smoke)
        print(json.dumps(rows))
        return
    if not (arguments.smoke or torch.cuda.is_available()):
        raise RuntimeError("memory is measured on a CUDA device, and this machine has none: try --smoke")
    out = arguments.out or (Path(tempfile.mkdtemp()) if arguments.smoke else recorded.FOLDER)
    rows, began = [], time.monotonic()
    for how in RECIPES:
        rows += run_apart(how, arguments.smoke, arguments.seconds)
        result = {"rank": RANK, "steps": STEPS, "rows": rows, "ours_over_peers": compared(rows)}
        path = recorded.save("qlora_memory", result, out, torch.device("cpu") if arguments.smoke else None)
        print(f"{how}: done after {time.monotonic() - began:.0f} s", flush=True)
    print(table(rows))
    print("ours over peft + bitsandbytes:", {case: round(ratio, 3) for case, ratio in compared(rows).items()})
    print(f"saved to {path.parent.name}/{path.name}" if out == recorded.FOLDER else f"saved to {path}")


if __name__ == "__main__":
    main()
