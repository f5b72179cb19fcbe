"""How low is the rank of a fine-tuning? Spectra of weights and updates, what a truncated update still knows, and random subspaces.

Full fine-tuning of the tiny model on each downstream domain, three seeds (they decide the training text): spectra layer by layer, the loss
when every update is cut to rank r, the effective rank as training goes on under Adam and under SGD, and training in random subspaces of the
tiny model and of small networks for scikit-learn's digits.

    python -m benchmarks.update_rank            # minutes on two cores; saves the recorded result "update_rank"
    python -m benchmarks.update_rank --smoke    # a few steps of everything; saves to a temporary folder
"""

import copy
import dataclasses
import statistics
import time

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cases import pretrained
from benchmarks.cli import options, rounded
from course.lab import device, recorded, seed_everything
from course.lab.tables import columns
from course.lab.training import above_floor, train, warmup_cosine
from course.lab.world import World
from reference import lowrank
from reference.lowrank import RandomSubspace

ROWS, LENGTH, LR = 16, 32, 2e-3
RATES = (0.1, 0.3)
OPTIMIZERS = {
    "AdamW, lr 0.002": (torch.optim.AdamW, 2e-3),
    "AdamW, lr 0.0002": (torch.optim.AdamW, 2e-4),
    "SGD, lr 0.3": (torch.optim.SGD, 0.3),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is done; the defaults are the benchmark's, ``SMOKE`` is a dry run."""

    domains: tuple[str, ...] = ("clinic", "legal", "sql")
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 100
    ranks: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32, 64, 128)
    marks: tuple[int, ...] = (1, 3, 10, 30, 100)  # steps at which the update is looked at
    dimensions: tuple[int, ...] = (100, 300, 600, 1000, 1500, 3000, 10000)
    widths: tuple[int, ...] = (16, 64, 256)
    digit_dimensions: tuple[int, ...] = (20, 40, 80, 100, 120, 140, 160, 240, 480)
    digit_steps: int = 200


SMOKE = Settings(("clinic",), (0,), 2, (0, 8), (1, 2), (100,), (16,), (20,), 2)


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """Every weight with two axes: the linear layers, the embedding and the head. The rest are the gains of norms."""
    return {name: p.detach() for name, p in model.named_parameters() if p.ndim == 2}


def score(world: World, model: nn.Module, domain: str) -> float:
    return above_floor(model, world, domain, rows=64, length=LENGTH)


def batches(world: World, domain: str, seed: int):
    return lambda step: world.sample(domain, ROWS, LENGTH, seed=1000 * (seed + 1) + step)


def fine_tuned(world: World, domain: str, seed: int, steps: int) -> nn.Module:
    """The tiny model after full fine-tuning."""
    model = copy.deepcopy(pretrained())
    train(model, batches(world, domain, seed), steps, LR, schedule=warmup_cosine(), progress=False)
    return model


def spectrum(matrix: Tensor) -> dict:
    s = torch.linalg.svdvals(matrix)
    return {"effective_rank": lowrank.effective_rank(s), "rank_for_90_percent_energy": lowrank.rank_for_energy(s, 0.9)}


def mean_share(updates: dict[str, Tensor]) -> float:
    """Effective rank over the largest possible, averaged over the linear layers of the blocks."""
    return statistics.fmean(
        lowrank.effective_rank(torch.linalg.svdvals(u)) / min(u.shape) for name, u in updates.items() if ".layers." in name
    )


@torch.no_grad()
def with_rank(model: nn.Module, parts: dict[str, tuple], rank: int, start: dict[str, Tensor] | None = None) -> nn.Module:
    """``model`` with every matrix set to ``start`` (or zero) plus the first ``rank`` pieces of its decomposition in ``parts``."""
    for name, (u, s, vh) in parts.items():
        kept = (u[:, :rank] * s[:rank]) @ vh[:rank]
        model.get_parameter(name).copy_(kept if start is None else start[name] + kept)
    return model


def decomposed(weights: dict[str, Tensor]) -> dict[str, tuple]:
    return {name: torch.linalg.svd(weight, full_matrices=False) for name, weight in weights.items()}


def updates_and_truncation(world: World, s: Settings) -> dict:
    base = pretrained()
    before = matrices(base)
    result = {"updates": {}, "loss": {}, "retained": {}}
    for domain in s.domains:
        result["updates"][domain], result["loss"][domain], result["retained"][domain] = [], [], []
        for seed in s.seeds:
            model = fine_tuned(world, domain, seed, s.steps)
            change = {name: after - before[name] for name, after in matrices(model).items()}
            result["updates"][domain].append({name: spectrum(matrix) for name, matrix in change.items()})
            result["loss"][domain].append([score(world, base, domain), score(world, model, domain)])
            parts = decomposed(change)
            result["retained"][domain].append([score(world, with_rank(model, parts, rank, before), domain) for rank in s.ranks])
    parts = decomposed(before)
    truncated = [score(world, with_rank(copy.deepcopy(base), parts, rank), "general") for rank in s.ranks[1:]]
    generator = torch.Generator().manual_seed(0)
    noise = {name: spectrum(torch.randn(matrix.shape, generator=generator)) for name, matrix in before.items()}
    return result | {
        "shapes": {name: list(matrix.shape) for name, matrix in before.items()},
        "weights": {name: spectrum(matrix) for name, matrix in before.items()},
        "noise": noise,
        "ranks": s.ranks,
        "weights_truncated": {"ranks": s.ranks[1:], "loss_on_general": truncated},
    }


def along_training(world: World, s: Settings) -> dict:
    """optimizer -> for each seed, the mean share of the largest effective rank and the loss, at MARKS."""
    before, found = matrices(pretrained()), {}
    for label, (kind, lr) in OPTIMIZERS.items():
        found[label] = {"share": [], "loss": []}
        for seed in s.seeds:
            model, draw, done, shares, losses = copy.deepcopy(pretrained()), batches(world, "clinic", seed), 0, [], []
            settings = {"weight_decay": 0.0} if kind is torch.optim.AdamW else {"momentum": 0.9}
            optimizer = kind(model.parameters(), lr=lr, **settings)
            for mark in s.marks:
                train(model, lambda step, draw=draw, done=done: draw(done + step), mark - done, lr, optimizer=optimizer, progress=False)
                done = mark
                shares.append(mean_share({name: after - before[name] for name, after in matrices(model).items()}))
                losses.append(score(world, model, "clinic"))
            found[label]["share"].append(shares)
            found[label]["loss"].append(losses)
    return {"steps": s.marks, "runs": found}


def tiny_subspaces(world: World, s: Settings) -> dict:
    """Share of the full fine-tuning's gain that d trained numbers reach, d -> one value a seed; the rate is chosen on seed 0."""
    base = pretrained()
    before, total = score(world, base, "clinic"), sum(p.numel() for p in base.parameters())
    full = [score(world, fine_tuned(world, "clinic", seed, s.steps), "clinic") for seed in s.seeds]

    def run(d: int, seed: int, lr: float) -> float:
        model = RandomSubspace(copy.deepcopy(base).requires_grad_(True), d, seed=seed)
        train(model, batches(world, "clinic", seed), s.steps, lr, schedule=warmup_cosine(), clip=0, progress=False)
        return (before - score(world, model, "clinic")) / (before - full[seed])

    shares = {}
    for d in s.dimensions:
        first = {lr: run(d, 0, lr) for lr in RATES}
        best = max(first, key=first.get)
        shares[str(d)] = [first[best], *(run(d, seed, best) for seed in s.seeds[1:])]
    return {"parameters": total, "share_of_gain": shares, "loss_before": before, "loss_after_full": full}


def digits_accuracy(width: int, seed: int, dimension: int | None, steps: int) -> float:
    """Test accuracy of a network 64 → width → 10, all of it trained, or inside a random subspace."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(pixels, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    seed_everything(seed)
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
    if dimension:
        model = RandomSubspace(model, dimension, seed=seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05 if dimension else 0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x[:1297]), y[:1297]).backward()
        optimizer.step()
    with torch.no_grad():
        return (model(x[1297:]).argmax(1) == y[1297:]).double().mean().item()


def digits(s: Settings) -> dict:
    """width -> parameters, accuracy of full training and inside subspaces, one value a seed."""
    return {
        str(width): {
            "parameters": 64 * width + width + 10 * width + 10,
            "full": [digits_accuracy(width, seed, None, s.digit_steps) for seed in s.seeds],
            "subspace": {str(d): [digits_accuracy(width, seed, d, s.digit_steps) for seed in s.seeds] for d in s.digit_dimensions},
        }
        for width in s.widths
    }


def measure(s: Settings) -> dict:
    """Everything, as JSON holds it."""
    world, started = World(), time.perf_counter()
    result = updates_and_truncation(world, s)
    result |= {"along_training": along_training(world, s), "tiny": tiny_subspaces(world, s), "digits": digits(s)}
    result["settings"] = {"rows": ROWS, "length": LENGTH, "steps": s.steps, "lr": LR, "seeds": len(s.seeds)}
    return rounded(result) | {"seconds": round(time.perf_counter() - started)}


def table(result: dict) -> str:
    def means(runs: list[list[float]]) -> list[float]:
        return [statistics.fmean(values) for values in zip(*runs, strict=True)]

    truncated = [(domain, *means(runs)) for domain, runs in result["retained"].items()]
    along = [(name, *means(runs["share"])) for name, runs in result["along_training"]["runs"].items()]
    tiny = result["tiny"]["share_of_gain"]
    digits = []
    for width, found in result["digits"].items():
        full = statistics.fmean(found["full"])
        digits.append((f"width {width}", *(statistics.fmean(right) / full for right in found["subspace"].values())))
    parts = [
        ("nats above the floor, update of rank", result["ranks"], truncated),
        ("effective rank of the update over the largest possible, after step", result["along_training"]["steps"], along),
        ("the tiny model: share of the gain, d", tiny, [("", *map(statistics.fmean, tiny.values()))]),
        ("digits: share of the accuracy, d", next(iter(result["digits"].values()))["subspace"], digits),
    ]
    return "\n\n".join(f"{about}\n{columns(('', *map(str, heads)), rows)}" for about, heads, rows in parts)


def main() -> None:
    given = options("update_rank", __doc__, gpu=False)
    s = SMOKE if given.smoke else Settings()
    if device().type == "cuda":
        print("the tiny model is slower on a GPU's launches than on a CPU; the recorded result is a CPU's")
    result = measure(s)
    print(table(result))
    print("saved to", recorded.save("update_rank", result, given.out), f"{result['seconds']} s on {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
