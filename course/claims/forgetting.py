"""What unit 09 states: the study on the tiny model, five tasks of digits, and identities checked on small models.

``method`` is a name of the study's; ``level`` what is left to learn about clinic notes, in nats per token above the floor.
"""

import itertools
import math
import statistics
from functools import cache

import torch
from torch import nn

from course.figures.forgetting import CARD, batch_shares, foreign_data, levels, odd_or_even
from course.lab import recorded
from course.lab.forgetting import Mean, at_equal_learning, mean_of
from reference.ewc import EWC, LoRAEWC, fisher_diagonal
from reference.lora import inject_lora, lora_layers, merge_lora
from reference.progressive import ProgressiveNetwork

# The study: clinic notes on the tiny model


@cache
def _study() -> dict:
    return recorded.load("forgetting", CARD)["result"]


def seeds() -> int:
    """That are reported."""
    return _study()["reported_seeds"]


def _at(method: str, level: float) -> dict:
    return next(row for row in levels(method) if row["level"] == level)


def _forgotten(method: str, level: float) -> Mean:
    return mean_of(_at(method, level)["forgotten"])


def forgotten(method: str, level: float = 0.5, end: str = "mean") -> float:
    """Nats per token of general text; ``end`` is mean, low or high."""
    return getattr(_forgotten(method, level), end)


def facts_percent(method: str, level: float = 0.5) -> float:
    """Of facts that are still answered."""
    return 100 * statistics.fmean(_at(method, level)["facts"])


def times_forgotten(method: str, over: str, level: float = 0.5) -> float:
    """As much as ``over`` forgets."""
    return _forgotten(method, level).mean / _forgotten(over, level).mean


def forgets_less(*methods: str, level: float = 0.5) -> bool:
    """Each forgets less than the next, and the intervals do not touch."""
    found = [_forgotten(method, level) for method in methods]
    return all(one.high < other.low for one, other in itertools.pairwise(found))


def larger_lambdas_do_not_help() -> bool:
    """EWC with λ = 10,000 and 100,000 at one rate (recorded on a CPU, three seeds) forgets more than L2 at a quarter of a nat."""
    rows = recorded.load("forgetting", "cpu")["result"]["frontier"]["levels"]
    row = next(row for row in rows if row["level"] == 0.25)
    return mean_of(row["forgotten"]).low > _forgotten("L2 to the start", 0.25).high


def _settings(method: str) -> dict[float, dict]:
    rows = _study()["frontier"]["settings"]
    return {row["value"]: row for row in rows if row["method"] == method}


def of_setting(method: str, value: float, level: float = 0.5) -> float:
    """Nats per token that one setting forgot at a level, at the rate that learned most."""
    return statistics.fmean(_settings(method)[value]["forgotten"][str(level)])


def rate_matters() -> float:
    """Times as much that full fine-tuning forgets at the rate that learns most as at the one that forgets least."""
    return of_setting("full fine-tuning", 0.0) / forgotten("full fine-tuning")


def at_the_end(method: str, value: float, key: str) -> float:
    """Of a setting at the rate that learned most: "new" or "old" in nats above the floor, "facts" in percent."""
    return statistics.fmean(_settings(method)[value][key]) * (100 if key == "facts" else 1)


# Far from pre-training, and tasks in a row


def foreign_left(method: str) -> float:
    """Nats per token left to learn of the foreign language at the end."""
    return foreign_data()[method]["left"][-1][0]


def _sequence(method: str) -> dict:
    return next(row for row in _study()["sequence"] if row["method"] == method)


def after_three(method: str, domain: str) -> float:
    """Nats per token above the floor after clinic, legal and SQL."""
    return statistics.fmean(_sequence(method)[domain])


# A real model: Gemma 3 270M on clinic notes


@cache
def _gemma() -> dict:
    return recorded.load("gemma_forgetting", CARD)["result"]


def gemma_runs(method: str, lr: float) -> list[dict]:
    """The recorded runs of a plan, one for each seed."""
    found = [run for run in _gemma()["runs"] if (run["method"], run["lr"]) == (method, lr)]
    assert found, f"no runs of {method!r} at {lr}"
    return found


def gemma_level() -> float:
    """Nats per word left to learn that every run comes down to."""
    return _gemma()["level"]


def gemma_lost(method: str, lr: float, moment: int | None = None) -> list[float]:
    """Nats per token of English passages, each seed's: where the run first reaches the level, or at a moment (-1: the end)."""
    runs, before = gemma_runs(method, lr), _gemma()["base"]["old"]
    if moment is None:
        return [at_equal_learning(run["new"], run["old"], gemma_level()) - before for run in runs]
    return [run["old"][moment] - before for run in runs]


def gemma_forgotten(method: str, lr: float, moment: int | None = None, end: str = "mean") -> float:
    """Of ``gemma_lost`` over seeds the "mean", "least" or "most"."""
    return {"mean": statistics.fmean, "least": min, "most": max}[end](gemma_lost(method, lr, moment))


def gemma_lost_first(method: str, lr: float) -> float:
    """The same where the first seed's run reaches the level."""
    return gemma_lost(method, lr)[0]


def gemma_left(method: str, lr: float, moment: int = -1) -> float:
    """Nats per word above the floor of clinic notes at a moment, mean of seeds."""
    return statistics.fmean(run["new"][moment] for run in gemma_runs(method, lr))


def gemma_apart(plan: tuple[str, float], other: tuple[str, float], moment: int | None = None) -> bool:
    """In every seed the first forgets less than the other in any."""
    return max(gemma_lost(*plan, moment)) < min(gemma_lost(*other, moment))


def gemma_facts(method: str = "", lr: float = 0.0) -> float:
    """Percent of English facts completed rightly at the end of the runs; without a method: before."""
    return 100 * (statistics.fmean(run["facts"] for run in gemma_runs(method, lr)) if method else _gemma()["base"]["facts"])


def gemma_scaled(lr: float, share: float, what: str = "old") -> float:
    """One seed's LoRA with a share of its update: "old", forgotten in nats per token; "new", left to learn in nats per word."""
    (scaled,) = (run["scaled"] for run in gemma_runs("LoRA r=16", lr) if "scaled" in run)
    value = scaled[what][scaled["share"].index(share)]
    return value - _gemma()["base"]["old"] if what == "old" else value


def gemma_base_is_back() -> bool:
    """With the adapter's scale at zero, Gemma's logits are the base's, bit for bit."""
    found = [run["scaled"]["base_is_back"] for run in _gemma()["runs"] if "scaled" in run]
    return bool(found) and all(found)


# Digits


def _digits(method: str, value: float | None = None) -> list:
    rows = recorded.load("permuted_digits", "cpu")["result"]["runs"]
    return next(row["tables"] for row in rows if row["method"] == method and (row["chosen"] if value is None else row["value"] == value))


def digits_percent(method: str, task: int | None = None, value: float | None = None) -> float:
    """Right after all five tasks: of one of them, or in their mean."""
    ends = [table[-1] for table in _digits(method, value)]
    return 100 * statistics.fmean(statistics.fmean(end) if task is None else end[task - 1] for end in ends)


def digits_learned_percent(method: str) -> float:
    """Of the first task, right when it was learned."""
    return 100 * statistics.fmean(table[0][0] for table in _digits(method))


# The Fisher


def batch_share(rows: int) -> float:
    """The squared gradient of batches of so many rows, over the exact Fisher, in sum."""
    data = batch_shares()
    return data["labels of the data"][data["sizes"].index(rows)]


def times_too_small(rows: int) -> float:
    """The exact Fisher over the squared gradient of batches."""
    return 1 / batch_share(rows)


def ellipse_is_right_on_the_axes() -> bool:
    """One weight alone, moved a little from the optimum: the loss rises by ½ F δ², to 5 %."""
    model, x, y = odd_or_even()
    F = fisher_diagonal(model, [(x, None)])["weight"]

    def loss() -> float:
        return torch.nn.functional.cross_entropy(model(x), y).item()

    before, ratios = loss(), []
    for i in (1, 5, 9):
        with torch.no_grad():
            model.weight[1, i] += 0.3
            ratios.append((loss() - before) / (0.5 * F[1, i].item() * 0.3**2))
            model.weight[1, i] -= 0.3
    return all(math.isclose(ratio, 1, rel_tol=0.05) for ratio in ratios)


def half_is_a_factor_of_two() -> bool:
    """λ Σ F δ² is the paper's penalty at twice the λ."""
    model, x, _ = odd_or_even()
    fisher = fisher_diagonal(model, [(x, None)])
    ewc = EWC(model, fisher, 2 * 0.7)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    without = 0.7 * sum((fisher[name] * (p - start[name]) ** 2).sum().item() for name, p in model.named_parameters())
    found = ewc.penalty().item()
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(0.1)
    return math.isclose(found, without, rel_tol=1e-6)


def _adapted() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    return model, torch.randn(40, 6, dtype=torch.float64)


def fisher_of_a_is_zero() -> bool:
    """Before training B = 0, so A has no gradient and no Fisher; B has both."""
    model, x = _adapted()
    inject_lora(model, 2, 4, ["0", "2"])
    fisher = fisher_diagonal(model, [(x, None)])
    return all(bool(F.any()) == name.endswith("lora_B") for name, F in fisher.items())


def on_the_update_is_on_the_weights() -> bool:
    """EWC on ΔW is full fine-tuning's EWC at the merged weights."""
    model, x = _adapted()
    fisher = fisher_diagonal(model, [(x, None)])
    full = EWC(model, fisher, 3.0)
    inject_lora(model, 2, 4, ["0", "2"])
    ewc = LoRAEWC(model, fisher, 3.0)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B)
    found, merged = ewc.penalty().item(), dict(merge_lora(model).named_parameters())
    wanted = 1.5 * sum((full.fisher[n] * (merged[n] - full.start[n]) ** 2).sum().item() for n in full.start if n.endswith("weight"))
    return math.isclose(found, wanted, rel_tol=1e-9)


def adapter_off_is_the_base() -> bool:
    """With the scale at zero the outputs are the base's, bit for bit."""
    model, x = _adapted()
    before = model(x)
    inject_lora(model, 2, 4, ["0", "2"])
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B)
        layer.scaling = 0.0
    return torch.equal(model(x), before)


def old_columns_stay() -> bool:
    """Training a new progressive column changes no bit of the old one's outputs."""
    torch.manual_seed(0)
    net, x = ProgressiveNetwork([nn.Linear(5, 6), nn.Linear(6, 4)]), torch.randn(8, 5)
    net.add_column([nn.Linear(5, 6), nn.Linear(6, 4)], lambda i: nn.Linear(6, 4, bias=False))
    before, new = net(x, 0), net(x)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.1)
    net(x).square().sum().backward()
    optimizer.step()
    return torch.equal(net(x, 0), before) and not torch.equal(net(x), new)


def faster_than(who: str, model: str, estimator: str = "exact", rows: int = 1, device: str = "cpu") -> float:
    """Times that our Fisher takes less than ``who``'s."""
    times = recorded.row("fisher", device, model=model, estimator=estimator, rows=rows)["milliseconds"]
    return times[who] / times["ours"]


def fisher_ms(who: str, model: str, rows: int = 1, device: str = CARD) -> float:
    """Milliseconds of an exact Fisher of "ours", "ours, checked", "BackPACK", "torch.func" or the "loop"."""
    return recorded.row("fisher", device, model=model, estimator="exact", rows=rows)["milliseconds"][who]


def batch_rows() -> int:
    """That the texts speak of."""
    return 32
