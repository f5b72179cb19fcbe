"""Checkpointing under LoRA: seconds beside torch.utils.checkpoint; and whether gradients are those without checkpointing, bit for bit.

    python -m benchmarks.checkpointing_lora               # a CUDA device, half a minute; saves the recorded result "checkpointing_lora"
    python -m benchmarks.checkpointing_lora --smoke       # small shapes on the CPU, in seconds; saves to a temporary folder

- "equal": four layers of benchmarks.checkpointing, 2 × 256 tokens, all weights trained ("full") or LoRA. Attention stores its scores here:
  the fused ones on a GPU add up their gradients in any order, so that even two runs without checkpointing differ.
- "time": 16 layers of Llama-2-7B in bf16, frozen, LoRA with r = 16 on all linears, forward and backward of 8 × 2,048 tokens: enough that
  the GPU does not wait for the launches. One layer per segment; variants take turns, medians by CUDA events after warm-up.
"""

import functools
import gc

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.checkpointing import (
    HOWS,
    SHAPE,
    SMOKE_BATCH,
    SMOKE_SHAPE,
    chain,
    inputs,
    one_by_one,
    table_of_times,
    take,
    times,
    with_gradients,
)
from benchmarks.cli import message, options, rounded
from benchmarks.meters import Meter
from course.lab import recorded
from course.lab.tables import wrapped
from reference.model_shapes import LLAMA_2_7B, ModelShape

DEPTH, BATCH = 16, (8, 2048)


def with_layers(shape: ModelShape, layers: int) -> ModelShape:
    return ModelShape(**{**vars(shape), "layers": layers})


def equal(recipe: str, shape: ModelShape, batch: tuple[int, int], device: torch.device) -> list[dict]:
    """Every gradient, of parameters and of x."""
    layers = chain(shape, batch[1], device, lora=recipe == "LoRA")
    x, direction = inputs(layers, shape, batch)
    trained, found = [x, *(p for p in layers.parameters() if p.requires_grad)], {}
    for how, each in HOWS.items():
        with_gradients(layers)
        x.grad = torch.zeros_like(x)
        with sdpa_kernel(SDPBackend.MATH):
            take(functools.partial(one_by_one, layers, each), x, direction)
        found[how] = [p.grad.clone() for p in trained]
    same = {how: all(map(torch.equal, grads, found["none"])) for how, grads in found.items()}
    return [{"work": "equal", "recipe": recipe, "how": how, "equal": each} for how, each in same.items()]


def lora_times(smoke: bool, device: torch.device) -> list[dict]:
    shape, batch = (SMOKE_SHAPE, SMOKE_BATCH) if smoke else (with_layers(LLAMA_2_7B, DEPTH), BATCH)
    with Meter(device) as meter:
        layers = chain(shape, batch[1], device, lora=True)
        x, direction = inputs(layers, shape, batch)
        with_gradients(layers)
        return times(layers, x, direction, meter, 1 if smoke else 3)


def table(result: dict) -> str:
    lines = []
    checked = [row for row in result["rows"] if row["work"] == "equal"]
    for recipe, equal in dict.fromkeys((row["recipe"], row["equal"]) for row in checked):
        names = ", ".join(row["how"].replace(",", "") for row in checked if (row["recipe"], row["equal"]) == (recipe, equal))
        lines.append(wrapped(f"{recipe}: gradients are {'' if equal else 'NOT '}those without checkpointing, bit for bit: {names}"))
    return "\n".join([*lines, table_of_times([row for row in result["rows"] if row["work"] == "time"]), *result["errors"]])


def main() -> None:
    given = options("checkpointing_lora", __doc__)
    result = {"shape": LLAMA_2_7B.name, "layers": DEPTH, "batch": list(BATCH), "rows": [], "errors": []}
    small = with_layers(SMOKE_SHAPE if given.smoke else SHAPE, 4)
    parts = {recipe: functools.partial(equal, recipe, small, (2, 16 if given.smoke else 256), given.device) for recipe in ("full", "LoRA")}
    for part, measure in (parts | {"times": functools.partial(lora_times, given.smoke, given.device)}).items():
        try:
            result["rows"] += rounded(measure())
        except Exception as error:
            result["errors"].append(f"{part}: {message(error)}")
        gc.collect()
        path = recorded.save("checkpointing_lora", result, given.out, given.device)  # a run that is cut short has what it found
    print(table(result))
    print("saved to", path)


if __name__ == "__main__":
    main()
