"""What unit 02 states: counts from the shapes of named models, identities checked on small tensors, and what the sweeps measured.

``model`` is a key of ``SHAPES`` and ``targets`` one of ``TARGETS``. The sweeps ran on a CPU; figures that a GPU measured take the
``device`` of the record, by default the one that the pages speak of.
"""

import copy
import math
import statistics
from collections import OrderedDict
from functools import cache

import peft
import torch
from torch import nn
from torch.nn import functional as F

from course.claims.memory_budget import TARGETS
from course.claims.shared import CPU, GPU, normal
from course.lab import recorded
from reference.lora import LoRAConv2d, LoRALinear
from reference.memory import SHAPES

# Counting


def _trained(model: str, r: int, targets: str) -> int:
    return SHAPES[model].adapter_parameters(r, TARGETS[targets])


def billions(model: str) -> float:
    """Of the model's parameters."""
    return SHAPES[model].parameters / 1e9


def adapter_millions(model: str, r: int, targets: str = "all-linear") -> float:
    """Of trained parameters."""
    return _trained(model, r, targets) / 1e6


def embedding_and_head_millions(model: str) -> float:
    """Of numbers in the token embedding and an output head of its own."""
    return 2 * SHAPES[model].embedding / 1e6


def embedding_over_adapter(model: str, r: int) -> float:
    """How many times what an adapter on all linear layers holds the embedding and the head hold."""
    return embedding_and_head_millions(model) / adapter_millions(model, r)


def adapter_percent(model: str, r: int, targets: str = "all-linear") -> float:
    """Trained parameters, of the model's."""
    return 100 * _trained(model, r, targets) / SHAPES[model].parameters


def times_fewer(model: str, r: int, targets: str = "all-linear") -> float:
    """How many times fewer parameters train."""
    return SHAPES[model].parameters / _trained(model, r, targets)


def adapter_mb(model: str, r: int, targets: str = "all-linear", bits: int = 16) -> float:
    """Of the adapter's file."""
    return bits / 8 * _trained(model, r, targets) / 1e6


# Identities


def _layer(n: int = 24, r: int = 3, alpha: float = 7.0) -> tuple[LoRALinear, torch.Tensor]:
    """A layer in float64, B zero, and 64 rows of input."""
    g = torch.Generator().manual_seed(0)
    base = nn.Linear(n, n).double()
    with torch.no_grad():
        for p in base.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / math.sqrt(n))
    layer = LoRALinear(base, r, alpha)
    with torch.no_grad():
        layer.lora_A.copy_(torch.randn(layer.lora_A.shape, generator=g) / math.sqrt(n))
    return layer, torch.randn(64, n, generator=g, dtype=torch.float64)


def zero_b_leaves_the_output() -> bool:
    """Bit for bit that of the base."""
    layer, x = _layer()
    return torch.equal(layer(x), layer.base(x))


def both_zero_has_no_gradient() -> bool:
    """A = B = 0: both gradients are exactly zero."""
    layer, x = _layer()
    nn.init.zeros_(layer.lora_A)
    gradients = torch.autograd.grad(layer(x).square().sum(), (layer.lora_A, layer.lora_B))
    return not any(gradient.any() for gradient in gradients)


def zero_b_gives_b_a_gradient() -> bool:
    """B = 0, A random: B has a gradient, A has none in the first step."""
    layer, x = _layer()
    to_a, to_b = torch.autograd.grad(layer(x).square().sum(), (layer.lora_A, layer.lora_B))
    return bool(to_b.any()) and not bool(to_a.any())


def letters_swapped_is_the_same() -> bool:
    """A (d × r) · B (r × d), as some texts write it for row vectors, is B·A transposed: the same layer."""
    layer, x = _layer()
    nn.init.normal_(layer.lora_B)
    a, b = layer.lora_A.T, layer.lora_B.T  # now A is (in, r), random; B is (r, out)
    return torch.allclose(layer(x), layer.base(x) + layer.scaling * (x @ a @ b))


def _train(
    scaling: float, kind: type[torch.optim.Optimizer], rate_a: float, rate_b: float, steps: int = 25, clip: float = math.inf, **options
) -> torch.Tensor:
    """The update s·B·A after some steps on a regression, A and B each with its own learning rate; ``clip``: of both gradients together."""
    layer, x = _layer()
    layer.scaling = scaling
    target = x @ normal(24, 24, seed=5, dtype=x.dtype) / 5
    optimizer = kind([{"params": [layer.lora_A], "lr": rate_a}, {"params": [layer.lora_B], "lr": rate_b}], **options)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(layer(x), target).backward()
        nn.utils.clip_grad_norm_((layer.lora_A, layer.lora_B), clip)
        optimizer.step()
    return layer.delta_weight().detach()


def _sgd_at_two_scales(clip: float = math.inf) -> tuple[torch.Tensor, torch.Tensor]:
    """The update at scale 4, and at scale 1 with B's learning rate times 4²."""
    return _train(4.0, torch.optim.SGD, 0.5, 0.5, clip=clip), _train(1.0, torch.optim.SGD, 0.5, 16 * 0.5, clip=clip)


def sgd_scale_is_a_rate_squared() -> bool:
    """SGD: scale s is scale 1 with B's learning rate times s², exactly."""
    with_scale, with_rate = _sgd_at_two_scales()
    return bool(with_rate.norm() > 0.1) and torch.allclose(with_scale, with_rate, rtol=1e-9, atol=1e-12)


def adam_scale_is_a_rate() -> bool:
    """Adam: scale s is scale 1 with B's learning rate times s; exact but for Adam's epsilon."""
    with_scale = _train(4.0, torch.optim.Adam, 0.01, 0.01, eps=1e-14)
    with_rate = _train(1.0, torch.optim.Adam, 0.01, 4 * 0.01, eps=1e-14)
    return bool(with_rate.norm() > 0.1) and torch.allclose(with_scale, with_rate, rtol=1e-6, atol=1e-9)


def clipping_breaks_the_identity() -> bool:
    """With both gradients clipped by their common norm the same two runs end more than 10 % apart."""
    with_scale, with_rate = _sgd_at_two_scales(clip=0.1)
    return bool((with_scale - with_rate).norm() > 0.1 * with_rate.norm())


RULES = {"α/r": lambda r: 16 / r, "α/√r": lambda r: 16 / math.sqrt(r), "fixed": lambda r: 2.0}
OPTIMIZERS = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}


@cache
def first_step_grows(optimizer: str, rule: str, r: int) -> float:
    """By which factor rank r takes a longer first step down the gradient than rank 1, its scale by ``rule``; mean over 32 draws of A.

    The step is −⟨ΔW, G⟩, with G the gradient of the loss in ΔW: what the loss falls by, to first order.
    """

    def step(r: int, seed: int, n: int = 128) -> float:
        scale, G = RULES[rule](r), normal(n, n, seed=100)
        A = normal(r, n, seed=seed) / math.sqrt(n)
        B = torch.zeros(n, r, requires_grad=True)
        optimizer_of_b = OPTIMIZERS[optimizer]([B], lr=1e-3)
        (scale * (B @ A) * G).sum().backward()
        optimizer_of_b.step()
        return -(scale * (B @ A) * G).sum().item()

    return statistics.fmean(step(r, seed) for seed in range(32)) / statistics.fmean(step(1, seed) for seed in range(32))


def terms_are_coherent() -> bool:
    """Down the gradient the first step grows like s²·r under gradient descent and like s·r under Adam, to 10 %."""
    right = {
        (name, rule): 16 * (scale(16) / scale(1)) ** power for name, power in (("SGD", 2), ("Adam", 1)) for rule, scale in RULES.items()
    }
    return all(math.isclose(first_step_grows(*case, 16), expected, rel_tol=0.1) for case, expected in right.items())


def merging_twice_is_one_update_off() -> bool:
    """The output of a layer that was merged twice is off by the update's own size."""
    layer, x = _layer()
    nn.init.normal_(layer.lora_B)
    right, base = layer(x), layer.base(x)
    layer.merge()
    layer.merged = False  # the guard circumvented
    layer.merge()
    return math.isclose((layer(x) - right).norm().item(), (right - base).norm().item(), rel_tol=1e-9)


def bf16_unmerge_restores_percent() -> float:
    """Of weights, those that come back exactly when a bfloat16 merge is undone by subtracting."""
    layer, _ = _layer(n=256, r=8, alpha=16)
    layer.base.to(torch.bfloat16)
    layer.lora_B.data.copy_(normal(256, 8, seed=1) / 50)
    before = layer.base.weight.clone()
    layer.merge()
    after = (layer.base.weight - layer.delta_weight()).to(torch.bfloat16)
    return 100 * (after == before).double().mean().item()


def peft_ignores_an_unknown_name() -> bool:
    """A target that names nothing is an error in PEFT only if no other one names something."""
    model, refused = nn.Sequential(OrderedDict(q_proj=nn.Linear(4, 4), o_proj=nn.Linear(4, 4))), False
    try:
        peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=["no_such_name"]))
    except ValueError:
        refused = True
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "no_such_name"]))
    return refused and adapted.get_nb_trainable_parameters()[0] == 2 * (4 + 4)


def conv_is_one_convolution() -> bool:
    """A k×k convolution to r channels and a 1×1 one after it are one convolution with the weight that ``delta_weight`` gives."""
    torch.manual_seed(0)
    layer = LoRAConv2d(nn.Conv2d(4, 6, 3, padding=1).double(), 2, 7)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    merged = F.conv2d(x, layer.base.weight + layer.delta_weight(), layer.base.bias, padding=1)
    return torch.allclose(layer(x), merged)


# Measured on the tiny model: nats a token above the floor, means over three seeds


@cache
def _sweeps() -> dict:
    return recorded.load("lora_sweeps", CPU)["result"]


def _ranks(rule: str) -> dict[str, list[float]]:
    """Rank -> the seeds' scores; ``rule`` is how its name in the record begins."""
    (scores,) = (scores for name, scores in _sweeps()["rank_sweep"].items() if name.startswith(rule))
    return scores


def rank_nats(rule: str, r: int) -> float:
    """Where the scale is "α fixed" / r, "rsLoRA", or "α = 2r" / r."""
    return statistics.fmean(_ranks(rule)[str(r)])


def rules_agree_at_rank_8() -> bool:
    """There the three scales are 2, in every seed."""
    return _ranks("α fixed")["8"] == _ranks("rsLoRA")["8"] == _ranks("α = 2r")["8"]


def fixed_alpha_hides_the_rank() -> bool:
    """At fixed α the means of r = 8 and r = 64 differ by less than the seeds at r = 8 do."""
    seeds = _ranks("α fixed")["8"]
    return abs(rank_nats("α fixed", 64) - rank_nats("α fixed", 8)) < max(seeds) - min(seeds)


def best_rate(scale: float) -> float:
    """Of the grid, at this scale α/r and r = 8."""
    grid = _sweeps()["alpha_and_rate"]
    return _best(grid["rates"], grid["scores"][grid["scales"].index(scale)])


def _best(rates: list[float], scores: list[list[float]]) -> float:
    """The rate with the lowest mean over seeds.

    Raises:
        ValueError: it is the first or the last one: the true best may lie beyond.
    """
    means = [statistics.fmean(each) for each in scores]
    best = means.index(min(means))
    if best in (0, len(rates) - 1):
        raise ValueError(f"the best rate, {rates[best]}, is at the edge of the grid: extend it")
    return rates[best]


def tuned_rate(r: int) -> float:
    """Best learning rate of rank r at α = 16, scale α/r."""
    sweep = _sweeps()["rank_and_rate"]
    return _best(sweep["rates"], sweep["scores"][str(r)])


def tuned_nats(r: int) -> float:
    """At that rate."""
    sweep = _sweeps()["rank_and_rate"]
    return statistics.fmean(sweep["scores"][str(r)][sweep["rates"].index(tuned_rate(r))])


def higher_rank_helps_at_its_best_rate() -> bool:
    """r = 64 below r = 4 in every seed, each at its best rate."""
    sweep = _sweeps()["rank_and_rate"]
    low, high = (sweep["scores"][str(r)][sweep["rates"].index(tuned_rate(r))] for r in (4, 64))
    return max(high) < min(low)


def ranks_part_near_the_best_rate(rate: float = 0.002) -> bool:
    """At a low rate r = 4, 16 and 64 end within 0.05 nats; at the best rates r = 4 is farther than that from r = 64."""
    sweep = _sweeps()["rank_and_rate"]
    slow = [statistics.fmean(sweep["scores"][str(r)][sweep["rates"].index(rate)]) for r in (4, 16, 64)]
    return max(slow) - min(slow) < 0.05 < tuned_nats(4) - tuned_nats(64)


def targets_nats(targets: str) -> float:
    """At the larger budget; ``targets`` is written as in the record."""
    return statistics.fmean(_sweeps()["target_sweep"][targets][-1]["scores"])


def all_linears_beat_qv_at_equal_parameters() -> bool:
    """At both budgets, equal to 4 %, in every seed."""
    sweep = _sweeps()["target_sweep"]
    pairs = list(zip(sweep["all linears"], sweep["q, v"], strict=True))
    equal = all(math.isclose(spread["parameters"], narrow["parameters"], rel_tol=0.04) for spread, narrow in pairs)
    return equal and all(max(spread["scores"]) < min(narrow["scores"]) for spread, narrow in pairs)


def _small_set(r: int, text: str) -> list[float]:
    """Mean curve over the seeds."""
    return [statistics.fmean(values) for values in zip(*_sweeps()["small_set"][f"LoRA, r = {r}"][text], strict=True)]


def small_set_nats(r: int, when: str) -> float:
    """On fresh text, at its "best" or at the "end" of training on few rows."""
    return {"best": min, "end": lambda curve: curve[-1]}[when](_small_set(r, "fresh"))


def recited_nats(r: int) -> float:
    """How far *below* the floor the loss on these few rows ends."""
    return -_small_set(r, "trained on")[-1]


# Measured on a GPU


def _layer_ms(rows: str, who: str, device: str) -> float:
    """One 4096 × 4096 layer in a chain, without gradients; float32 factors. ``rows``: "1 row" or "64 rows"; ``who``: base, ours, peft."""
    return recorded.load("lora_layer", device)["result"]["generation"]["float32 factors, α/r = 2"][rows][who]


def unmerged_times(rows: str, device: str = GPU, who: str = "ours") -> float:
    """How many times as long as the base an unmerged layer takes for "1 row" or "64 rows"."""
    return _layer_ms(rows, who, device) / _layer_ms(rows, "base", device)


def launches_percent(rows: str = "1 row", device: str = "h200") -> float:
    """Of the extra time of PEFT's unmerged layer, what one launch in place of many saves."""
    extra, replayed = (_layer_ms(label, "peft", device) - _layer_ms(label, "base", device) for label in (rows, f"{rows}, one launch"))
    return 100 * (1 - replayed / extra)


def rows_cost_nothing() -> bool:
    """On both cards the base takes less time for 64 rows than for one, and an unmerged layer at most a tenth more: launches decide."""
    cards = [
        {who: _layer_ms("64 rows", who, card) / _layer_ms("1 row", who, card) for who in ("base", "ours")} for card in ("h100", "h200")
    ]
    return all(card["base"] < 1 and card["ours"] < 1.1 for card in cards)


@cache
def _gemma_runs(config: str, lr: float | None) -> list[dict]:
    """Of every seed; at the learning rate that was chosen for it unless ``lr`` names another."""
    result = recorded.load("gemma_lora", GPU)["result"]
    lr = lr or result["chosen_lr"][config]
    return [run for run in result["runs"] if (run["config"], run["lr"]) == (config, lr)]


def gemma_nats(config: str, what: str, lr: float | None = None) -> float:
    """Per token "learned" about code or "forgotten" about prose, the mean over the seeds; or the first seed's "validation" loss."""
    base, runs = recorded.load("gemma_lora", GPU)["result"]["base"], _gemma_runs(config, lr)
    if what == "validation":
        return runs[0]["validation"][-1][1]
    sign, measure = {"learned": (-1, "code"), "forgotten": (1, "passages")}[what]
    return statistics.fmean(sign * (run["measures"][measure] - base[measure]) for run in runs)


def gemma_learned_percent(config: str) -> float:
    """Of what full fine-tuning learned about code, each at its best rate."""
    return 100 * gemma_nats(config, "learned") / gemma_nats("full fine-tuning", "learned")


def gemma_rate_times(config: str) -> float:
    """Best learning rate of LoRA (α/r = 2) over that of full fine-tuning."""
    chosen = recorded.load("gemma_lora", GPU)["result"]["chosen_lr"]
    return chosen[config] / chosen["full fine-tuning"]


def gemma_rates_nearly_tie() -> bool:
    """For r = 1, 16 and 64 the rate half a decade lower has a validation loss within 0.01 nats, and forgets less than half as much."""
    for r, lower in ((1, 1e-3), (16, 3e-4), (64, 1e-4)):
        config = f"all-linear r={r}"
        tie = gemma_nats(config, "validation", lower) - gemma_nats(config, "validation") < 0.01
        if not (tie and gemma_nats(config, "forgotten", lower) < gemma_nats(config, "forgotten") / 2):
            return False
    return True


def gemma_forgetting_follows_the_rate() -> bool:
    """For full fine-tuning and every rank on all linears: the higher of two rates always forgot more."""
    for config in ("full fine-tuning", *(f"all-linear r={r}" for r in (1, 4, 16, 64))):
        rates = sorted({run["lr"] for run in recorded.load("gemma_lora", GPU)["result"]["runs"] if run["config"] == config})
        forgotten = [gemma_nats(config, "forgotten", lr) for lr in rates]
        if forgotten != sorted(forgotten):
            return False
    return True


def gemma_lora_forgot_more() -> bool:
    """r = 64 learned as much as full fine-tuning, to 2 %, and at both of its two best rates forgot more."""
    full = gemma_nats("full fine-tuning", "forgotten")
    as_much = abs(gemma_learned_percent("all-linear r=64") - 100) < 2
    return as_much and all(gemma_nats("all-linear r=64", "forgotten", lr) > full for lr in (3e-4, 1e-4))
