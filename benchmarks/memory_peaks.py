"""Peak memory of real training steps against ``reference.memory``'s prediction, configuration by configuration.

    python -m benchmarks.memory_peaks                   # all of them, on a CUDA device; saves the recorded result "memory_peaks"
    python -m benchmarks.memory_peaks --only lora 7b    # those whose name holds every word
    python -m benchmarks.memory_peaks --smoke           # a small shape on the CPU, in seconds, bytes of tensors counted

Models have the shape of Llama-3.2-1B and Llama-2-7B and random weights: memory does not depend on the values. Each configuration starts
from an emptied allocator and takes three steps; the last one counts (Adam's moments exist by then). "Measured" is the highest number of
bytes that the allocator had handed out (``torch.cuda.max_memory_allocated``), less the workspaces of the matrix library, which are
measured first: they belong to the process, not to the recipe.
"""

import time
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.cases import CHECKPOINTING, llama, pack_with_bitsandbytes
from benchmarks.cli import failed, message, options
from benchmarks.meters import Meter, take_step
from course.lab import recorded
from course.lab.meters import show_bytes
from course.lab.tables import columns
from reference.lora import inject_lora
from reference.memory import Breakdown, Recipe, training_memory
from reference.memory.recipes import ADAM_8BIT, FULL_BF16, FULL_FP32, FULL_MIXED, LORA, LORA_PEFT, QLORA
from reference.model_shapes import LLAMA_2_7B, LLAMA_3_2_1B, ModelShape

STEPS = 3


@dataclass(frozen=True)
class Configuration:
    shape: ModelShape
    recipe: Recipe
    batch: int
    sequence: int
    checkpointing: bool = False
    targets: str | tuple[str, ...] = "all-linear"
    rank: int = 16

    @property
    def name(self) -> str:
        targets = "" if self.recipe.trains_base else " all-linear" if self.targets == "all-linear" else " q,v"
        return f"{self.shape.name} {self.recipe.name}{targets} {self.batch}×{self.sequence}{' checkpointing' * self.checkpointing}"

    @property
    def attention(self) -> str:
        """torch has no fused kernel for grouped queries in float32: it falls back to the one that stores the scores."""
        return "math" if self.recipe.weight_bytes == 4 and self.shape.heads != self.shape.kv_heads else "fused"


QV = ("q_proj", "v_proj")
CONFIGURATIONS = [
    Configuration(LLAMA_3_2_1B, FULL_FP32, 1, 512),
    Configuration(LLAMA_3_2_1B, FULL_MIXED, 1, 512),
    Configuration(LLAMA_3_2_1B, FULL_MIXED, 4, 2048),
    Configuration(LLAMA_3_2_1B, FULL_MIXED, 4, 2048, checkpointing=True),
    Configuration(LLAMA_3_2_1B, FULL_BF16, 1, 512),
    Configuration(LLAMA_3_2_1B, ADAM_8BIT, 1, 512),
    Configuration(LLAMA_3_2_1B, ADAM_8BIT, 4, 2048),
    Configuration(LLAMA_3_2_1B, LORA, 1, 512, targets=QV),
    Configuration(LLAMA_3_2_1B, LORA, 1, 512),
    Configuration(LLAMA_3_2_1B, LORA, 4, 2048, targets=QV),
    Configuration(LLAMA_3_2_1B, LORA, 4, 2048),
    Configuration(LLAMA_3_2_1B, LORA_PEFT, 4, 2048),
    Configuration(LLAMA_3_2_1B, LORA, 4, 2048, checkpointing=True),
    Configuration(LLAMA_3_2_1B, QLORA, 1, 512),
    Configuration(LLAMA_3_2_1B, QLORA, 4, 2048),
    Configuration(LLAMA_3_2_1B, QLORA, 4, 2048, checkpointing=True),
    Configuration(LLAMA_2_7B, ADAM_8BIT, 1, 512, checkpointing=True),
    Configuration(LLAMA_2_7B, LORA, 1, 512, checkpointing=True),
    Configuration(LLAMA_2_7B, LORA, 1, 2048),
    Configuration(LLAMA_2_7B, LORA, 4, 2048, checkpointing=True),
    Configuration(LLAMA_2_7B, QLORA, 1, 512, checkpointing=True),
    Configuration(LLAMA_2_7B, QLORA, 1, 2048),
    Configuration(LLAMA_2_7B, QLORA, 4, 2048, checkpointing=True),
]
_SMALL = ModelShape("smoke", 128, 3, 4, 2, 32, 320, 300)
SMOKE = [Configuration(_SMALL, recipe, 2, 32, rank=4) for recipe in (FULL_FP32, FULL_MIXED, FULL_BF16, ADAM_8BIT, LORA, LORA_PEFT, QLORA)]
SMOKE += [Configuration(_SMALL, QLORA, 2, 32, checkpointing=True, rank=4)]


class MasterAdamW(torch.optim.Optimizer):
    """AdamW of a bf16 model with float32 master weights and moments: the 16 bytes a parameter of mixed precision, in plain sight.

    It walks over the tensors one by one, so that its own temporaries are two float32 copies of one tensor and not of the whole model.
    """

    def __init__(self, params, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                if not state:
                    state.update(step=0, master=parameter.float(), m=torch.zeros_like(parameter, dtype=torch.float32))
                    state["v"] = torch.zeros_like(state["m"])
                state["step"] += 1
                gradient = parameter.grad.float()
                state["m"].lerp_(gradient, 1 - beta1)
                state["v"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                denominator = (state["v"] / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
                state["master"].mul_(1 - lr * group["weight_decay"])
                state["master"].addcdiv_(state["m"], denominator, value=-lr / (1 - beta1 ** state["step"]))
                parameter.copy_(state["master"])
                del gradient, denominator  # before the next tensor's are made


def build(configuration: Configuration, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model with random weights, made on ``device``, and its optimizer."""
    shape, recipe = configuration.shape, configuration.recipe
    model = llama(shape, torch.float32 if recipe.weight_bytes == 4 else torch.bfloat16, device)
    if recipe.quantized:
        pack_with_bitsandbytes(model, lambda name: model.get_parameter(name).data, device)
    if recipe.input_copies:
        import peft

        targets = configuration.targets if configuration.targets == "all-linear" else list(configuration.targets)
        model = peft.get_peft_model(model, peft.LoraConfig(r=configuration.rank, lora_alpha=32, target_modules=targets))
    elif not recipe.trains_base:
        inject_lora(model, configuration.rank, 32, configuration.targets)
    if configuration.checkpointing:
        model.gradient_checkpointing_enable(**CHECKPOINTING)
    model.train()
    return model, optimizer(recipe, [p for p in model.parameters() if p.requires_grad])


def optimizer(recipe: Recipe, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The one that the recipe describes."""
    if recipe.master_bytes:
        return MasterAdamW(trained)
    if recipe.moment_bytes == 1:
        import bitsandbytes as bnb

        return bnb.optim.AdamW8bit(trained, lr=1e-4)
    return torch.optim.AdamW(trained, lr=1e-4, foreach=True)  # what a GPU takes by default


def steps(configuration: Configuration, device: torch.device, note=lambda moment: None, count: int = STEPS) -> None:
    """Build and train; ``note(moment)`` is called as each moment of each step ends."""
    model, adam = build(configuration, device)
    ids = torch.randint(configuration.shape.vocab, (configuration.batch, configuration.sequence), device=device)
    note("built")
    for _ in range(count):
        note("held")
        take_step(model, adam, ids, note)


def predict(configuration: Configuration) -> Breakdown:
    return training_memory(
        configuration.shape,
        configuration.recipe,
        configuration.batch,
        configuration.sequence,
        configuration.rank,
        configuration.targets,
        configuration.checkpointing,
        configuration.attention,
    )


def measure_one(configuration: Configuration, meter: Meter, device: torch.device) -> dict:
    """One row of the result, in bytes."""
    seen = {}

    def note(moment: str) -> None:
        seen[moment] = {"now": meter.now, "peak": meter.peak}
        meter.reset()

    meter.start()
    began = time.perf_counter()
    steps(configuration, device, note)
    expected = predict(configuration)
    measured = max(seen[moment]["peak"] for moment in ("forward", "backward", "step"))
    by_token = ("activations", "recomputed layer", "log-probabilities", "loss gradients", "temporaries")
    return {
        "name": configuration.name,
        "shape": configuration.shape.name,
        "recipe": configuration.recipe.name,
        "targets": None if configuration.recipe.trains_base else configuration.targets,
        "batch": configuration.batch,
        "sequence": configuration.sequence,
        "checkpointing": configuration.checkpointing,
        "predicted": expected.peak,
        "measured": measured,
        "ratio": expected.peak / measured,
        "activation_share": sum(expected.moments[expected.moment].get(kind, 0) for kind in by_token) / expected.peak,
        "predicted_moment": expected.moment,
        "predicted_moments": {moment: sum(there.values()) for moment, there in expected.moments.items()},
        "predicted_lines": {kind: line.bytes for kind, line in expected.lines.items()},
        "measured_held": seen["held"]["now"],
        "measured_after_forward": seen["forward"]["now"],
        "measured_peaks": {moment: seen[moment]["peak"] for moment in ("forward", "backward", "step")},
        "seconds": time.perf_counter() - began,
    }


def measure(configurations: list[Configuration] = CONFIGURATIONS, where: str = "cuda") -> dict:
    """A row for each; one that fails is reported and does not stop the others."""
    torch.manual_seed(0)
    meter, rows, missed = Meter(device := torch.device(where)), [], []
    print(
        f"{'configuration':58s} {'predicted':>10s} {'measured':>10s} {'ratio':>7s}   held, after forward, peak in forward, backward, step"
    )
    for configuration in configurations:
        try:
            with meter:
                row = measure_one(configuration, meter, device)
        except Exception as error:
            missed.append({"name": configuration.name, "error": message(error)})
            print(f"{configuration.name:58s} FAILED {message(error)}")
        else:
            rows.append(row)
            gigabytes = [row["measured_held"], row["measured_after_forward"], *row["measured_peaks"].values()]
            print(
                f"{row['name']:58s} {row['predicted'] / 1e9:10.3f} {row['measured'] / 1e9:10.3f} {row['ratio']:7.3f}   "
                + " ".join(f"{count / 1e9:.3f}" for count in gigabytes)
                + f"   {row['predicted_moment']}, {row['seconds']:.1f} s",
                flush=True,
            )
    return {"workspaces": meter.libraries, "rows": rows, "failed": missed}


def table(result: dict) -> str:
    rows = [(row["name"], show_bytes(row["measured"]), f"{row['ratio']:.4f}") for row in result["rows"]]
    ratios = [row["ratio"] for row in result["rows"]]
    quiet = [row["ratio"] for row in result["rows"] if row["activation_share"] < 0.5]
    lines = [columns(("", "peak", "ratio"), rows), *(failed(row["name"], row["error"]) for row in result["failed"])]
    if ratios:
        lines.append(f"ratio, predicted over peak: {min(ratios):.3f} to {max(ratios):.3f}")
    if quiet:
        lines.append(f"where activations are under half of it: {min(quiet):.3f} to {max(quiet):.3f}")
    return "\n".join(lines)


def main() -> None:
    only = {"nargs": "+", "metavar": "WORD", "help": "configurations whose names hold every word"}
    given = options("memory_peaks", __doc__, only=only)
    words = [word.lower() for word in given.only or ()]
    chosen = [each for each in (SMOKE if given.smoke else CONFIGURATIONS) if all(word in each.name.lower() for word in words)]
    result = measure(chosen, given.device.type)
    print(table(result))
    print("saved to", recorded.save("memory_peaks", result, given.out, given.device))


if __name__ == "__main__":
    main()
