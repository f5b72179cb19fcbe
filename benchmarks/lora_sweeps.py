"""What LoRA's knobs do: rank under three scales, rank and α against the learning rate, targets at equal parameters, a small set by heart.

Every run adapts the tiny model to text it has never seen and ends with nats per token above the floor, the loss that no model can beat.

    python -m benchmarks.lora_sweeps            # half an hour on one core; saves the recorded result "lora_sweeps"
    python -m benchmarks.lora_sweeps --smoke    # a few steps of everything; saves to a temporary folder
"""

import copy
import dataclasses
import functools
import math
import statistics

import torch
from torch import Tensor

from benchmarks.cases import pretrained
from benchmarks.cli import options
from course.lab import recorded, seed_everything
from course.lab.tables import columns
from course.lab.training import above_floor, cross_entropy, train
from course.lab.world import World
from reference.lora import inject_lora, trainable_parameters

DOMAIN, ROWS, LENGTH, RATE = "clinic", 8, 32, 3e-3
USUAL_RANK, SCALE = 8, 2.0  # the three rules agree here: r = 8, α = 16
RULES = {
    "α fixed, scale α/r": lambda r: SCALE * USUAL_RANK / r,
    "rsLoRA: α fixed, scale α/√r": lambda r: SCALE * math.sqrt(USUAL_RANK / r),
    "α = 2r, scale 2": lambda r: SCALE,
}
TARGETS = {
    "q, v": ("q_proj", "v_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "MLP": ("gate_proj", "up_proj", "down_proj"),
    "all linears": "all-linear",
}
BUDGETS, TARGET_RATES = (22_500, 90_000), (3e-3, 1e-2)  # trained parameters, as nearly as a whole rank allows; the better rate counts
SMALL_ROWS = 16


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is done; the defaults are the benchmark's, ``SMOKE`` is a dry run."""

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 100
    ranks: tuple[int, ...] = (1, 4, 8, 16, 64)
    scales: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
    tuned_ranks: tuple[int, ...] = (1, 4, 16, 64)
    tuned_rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
    grid_steps: int = 60
    small_steps: int = 150
    small_ranks: tuple[int, ...] = (1, 8, 64)


SMOKE = Settings((0,), 2, (8, 16), (1.0, 2.0), (1e-3, 4e-3), (8,), (1e-3, 4e-3), 2, 2, (8,))


@functools.cache
def batch(world: World, seed: int, step: int) -> Tensor:
    """Fresh text for every step; the same for all runs of a seed."""
    return world.sample(DOMAIN, ROWS, LENGTH, seed=1000 * (seed + 1) + step)


def adapted(world: World, seed: int, r: int, scale: float, steps: int, targets="all-linear", rate: float = RATE) -> float:
    """LoRA on new text; returns nats per token above the floor on fresh text, 9 where training broke down."""
    seed_everything(seed)
    model = copy.deepcopy(pretrained())
    inject_lora(model, r, scale * r, targets)
    try:
        train(model, lambda step: batch(world, seed, step), steps, rate, progress=False)
    except FloatingPointError:  # too large a step: that is a result too
        return 9.0
    return round(above_floor(model, world, DOMAIN, rows=64, length=LENGTH), 4)


def rank_sweep(world: World, s: Settings) -> dict:
    """rule -> rank -> a score for each seed."""
    run = functools.cache(lambda seed, r, scale: adapted(world, seed, r, scale, s.steps))  # the rules share a point
    return {rule: {str(r): [run(seed, r, scale(r)) for seed in s.seeds] for r in s.ranks} for rule, scale in RULES.items()}


def rank_and_rate(world: World, s: Settings) -> dict:
    """α fixed, scale α/r; rank -> for each rate a score for each seed."""

    def run(r: int, rate: float) -> list[float]:
        return [adapted(world, seed, r, SCALE * USUAL_RANK / r, s.steps, rate=rate) for seed in s.seeds]

    return {"rates": s.tuned_rates, "steps": s.steps, "scores": {str(r): [run(r, rate) for rate in s.tuned_rates] for r in s.tuned_ranks}}


def alpha_and_rate(world: World, s: Settings) -> dict:
    """r = 8; rows are scales (α/r), columns rates, and in each place a score for each seed."""

    def run(scale: float, rate: float) -> list[float]:
        return [adapted(world, seed, USUAL_RANK, scale, s.grid_steps, rate=rate) for seed in s.seeds]

    scores = [[run(scale, rate) for rate in s.rates] for scale in s.scales]
    return {"scales": s.scales, "rates": s.rates, "steps": s.grid_steps, "scores": scores}


def target_sweep(world: World, s: Settings) -> dict:
    """targets -> for each budget: r, parameters, the rate that did better, a score for each seed."""
    found = {}
    for name, targets in TARGETS.items():
        model = copy.deepcopy(pretrained())
        inject_lora(model, 1, 1, targets)
        per_rank, found[name] = trainable_parameters(model)[0], []
        for budget in BUDGETS:
            r = round(budget / per_rank)
            runs = {rate: [adapted(world, seed, r, SCALE, s.steps, targets, rate) for seed in s.seeds] for rate in TARGET_RATES}
            rate = min(runs, key=lambda rate, runs=runs: statistics.fmean(runs[rate]))
            found[name].append({"r": r, "parameters": r * per_rank, "rate": rate, "scores": runs[rate]})
    return found


def small_set(world: World, s: Settings) -> dict:
    """What trains -> steps, and nats above the floor on the 16 rows that are trained on and on fresh text, a curve for each seed."""
    found = {}
    for label, r in {**{f"LoRA, r = {r}": r for r in s.small_ranks}, "all weights": None}.items():
        curves = [_by_heart(world, seed, r, s.small_steps) for seed in s.seeds]
        found[label] = {"steps": [step for step, _ in curves[0]]} | {
            name: [[values[i] for _, values in curve] for curve in curves] for i, name in enumerate(("trained on", "fresh"))
        }
    return found


def _by_heart(world: World, seed: int, r: int | None, steps: int) -> list[tuple[int, tuple[float, float]]]:
    seed_everything(seed)
    model = copy.deepcopy(pretrained()).requires_grad_(True)
    if r:
        inject_lora(model, r, SCALE * r)
    rows = world.sample(DOMAIN, SMALL_ROWS, LENGTH, seed=50 + seed)
    floor = -world.log_probs(DOMAIN, rows).mean().item()

    def both() -> tuple[float, float]:
        return round(cross_entropy(model, rows) - floor, 4), round(above_floor(model, world, DOMAIN, rows=64, length=LENGTH), 4)

    return train(model, lambda step: rows, steps, RATE if r else RATE / 3, evaluate=both, every=15, progress=False).evaluations


def measure(s: Settings) -> dict:
    """All five sweeps."""
    world = World()
    settings = {"domain": DOMAIN, "rows": ROWS, "length": LENGTH, "steps": s.steps, "rate": RATE, "seeds": len(s.seeds)}
    result = {"settings": settings, "unit": "nats per token above the floor"}
    for sweep in (rank_sweep, rank_and_rate, alpha_and_rate, target_sweep, small_set):
        result[sweep.__name__] = sweep(world, s)
    return result | {"threads": torch.get_num_threads()}


def table(result: dict) -> str:
    def means(scores: list) -> list[float]:
        return [statistics.fmean(each) for each in scores]

    ranks = result["rank_sweep"]
    heads = [f"r = {r}" for r in next(iter(ranks.values()))]
    parts = [f"Means over seeds, in {result['unit']}."]
    parts.append(columns(("", *heads), [(rule, *means(by.values())) for rule, by in ranks.items()], ".3f"))
    tuned, alpha = result["rank_and_rate"], result["alpha_and_rate"]
    rows = [(f"r = {r}", *means(scores)) for r, scores in tuned["scores"].items()]
    parts.append(columns(("learning rate", *(f"{rate:g}" for rate in tuned["rates"])), rows, ".3f"))
    rows = [(f"α/r = {scale:g}", *means(scores)) for scale, scores in zip(alpha["scales"], alpha["scores"], strict=True)]
    parts.append(columns(("learning rate", *(f"{rate:g}" for rate in alpha["rates"])), rows, ".3f"))
    rows = [
        (f"{name}, r = {row['r']}", row["parameters"], statistics.fmean(row["scores"]))
        for name, sizes in result["target_sweep"].items()
        for row in sizes
    ]
    parts.append(columns(("", "parameters", "loss"), rows, ".3f"))
    ends = ("trained on", "fresh")
    small = [(name, *(statistics.fmean(each[-1] for each in curves[end]) for end in ends)) for name, curves in result["small_set"].items()]
    parts.append(columns(("a small set by heart", *ends), small, ".3f"))
    return "\n\n".join(parts)


def main() -> None:
    given = options("lora_sweeps", __doc__, gpu=False)
    result = measure(SMOKE if given.smoke else Settings())
    print(table(result))
    print("saved to", recorded.save("lora_sweeps", result, given.out))


if __name__ == "__main__":
    main()
