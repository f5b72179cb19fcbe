"""Fine-tuning with bfloat16 weights: rounded to nearest, at random, with Kahan's sum, with float32 masters; and float32 weights.

    python -m benchmarks.bf16_training               # the CPU, about ten minutes; saves the recorded result "bf16_training"
    python -m benchmarks.bf16_training --smoke       # few steps; saves to a temporary folder

The tiny model of the course, all of it, on clinic notes of the small world: 80 steps of AdamW on 8 × 48 tokens, three seeds, three rates.
Adam's moments are float32 everywhere: the ways differ in how the update is added to the weight. A row has the loss at the end, in nats
per token above the floor, and the share of weights that the last step of the first seed left as they were.
"""

import copy
import functools

import torch
from torch import Tensor, nn

from benchmarks.cli import record, rounded
from course.lab import models, seed_everything, training
from course.lab.tables import columns, wrapped
from course.lab.world import World
from reference.precision import add_kahan_, add_stochastic_

SEEDS, RATES, STEPS, BATCH = (0, 1, 2), (1e-3, 1e-4, 1e-5), 80, (8, 48)
WAYS = ("float32", "masters", "nearest", "stochastic", "Kahan")


class InBFloat16(torch.optim.AdamW):
    """AdamW whose update is computed in float32 and added to bfloat16 parameters, in one of four ways."""

    def __init__(self, params, lr: float, way: str, seed: int):
        self.half, self.way = list(params), way
        self.generator = torch.Generator().manual_seed(seed)
        self.lost = [torch.zeros_like(p) for p in self.half]
        self.unmoved = 0.0  # share of the weights, in the last step
        super().__init__([p.detach().float().requires_grad_() for p in self.half], lr=lr, weight_decay=0.0)

    @property
    def full(self) -> list[Tensor]:
        return self.param_groups[0]["params"]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.half:
            p.grad = None

    @torch.no_grad()
    def step(self, closure=None) -> None:
        before = [p.clone() for p in self.half]
        for p, full in zip(self.half, self.full, strict=True):
            full.grad = p.grad.float()
            if self.way != "masters":
                full.copy_(p)
        old = [full.clone() for full in self.full]
        super().step()
        for p, full, was, lost in zip(self.half, self.full, old, self.lost, strict=True):
            if self.way == "stochastic":
                add_stochastic_(p, full - was, self.generator)
            elif self.way == "Kahan":
                add_kahan_(p, lost, full - was)
            else:
                p.copy_(full)
        same = sum(int((p == was).sum()) for p, was in zip(self.half, before, strict=True))
        self.unmoved = same / sum(p.numel() for p in self.half)


def batch_of(world: World, seed: int, step: int) -> Tensor:
    return world.sample("clinic", *BATCH, seed=1000 * seed + step)


def run(tiny: nn.Module, world: World, way: str, rate: float, seed: int, steps: int) -> tuple[float, float]:
    seed_everything(seed)
    model = copy.deepcopy(tiny)
    optimizer = None
    if way != "float32":
        model = model.bfloat16()
        optimizer = InBFloat16(model.parameters(), rate, way, seed)
    batch = functools.partial(batch_of, world, seed)
    training.train(model, batch, steps, rate, optimizer=optimizer, progress=False)
    left = training.above_floor(model.float(), world, "clinic", rows=64)
    return left, optimizer.unmoved if optimizer else 0.0


def measure(steps: int = STEPS, seeds: tuple[int, ...] = SEEDS) -> dict:
    world, (tiny, _) = World(), models.load("tiny", where=torch.device("cpu"))
    rows = []
    for rate in RATES:
        for way in WAYS:
            found = [run(tiny, world, way, rate, seed, steps) for seed in seeds]
            rows.append({"rate": rate, "way": way, "losses": [left for left, _ in found], "unmoved_percent": 100 * found[0][1]})
            print(f"{rate:g} {way:12} " + " ".join(f"{left:.4f}" for left, _ in found), flush=True)
    before = training.above_floor(tiny, world, "clinic", rows=64)
    return rounded({"steps": steps, "batch": list(BATCH), "before": before, "rows": rows})


def table(result: dict) -> str:
    about = f"nats per token above the floor, by seed ({result['before']:.3f} before); weights that the last step left unmoved"
    seeds = [f"seed {i}" for i in range(len(result["rows"][0]["losses"]))]
    rows = [[f"{row['rate']:<8g}{row['way']}", *row["losses"], f"{row['unmoved_percent']:.1f} %"] for row in result["rows"]]
    return "\n".join([wrapped(about), columns(("rate    way", *seeds, "unmoved"), rows, ".4f")])


def main() -> None:
    record("bf16_training", __doc__, measure, table, small={"steps": 2, "seeds": (0,)}, where="cpu")


if __name__ == "__main__":
    main()
