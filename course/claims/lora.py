"""What unit 02 states: counts from the shapes of named models, identities checked on small tensors, and what the sweeps measured.

``model`` is a key of ``SHAPES`` and ``targets`` one of ``TARGETS``. The sweeps ran on a CPU; figures that a GPU measured take the
``device`` of the record, by default the one that the pages speak of.
"""

import math
import statistics
from functools import cache

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


def _train(scaling: float, kind: type[torch.optim.Optimizer], rate_a: float, rate_b: float, steps: int = 25, **options) -> torch.Tensor:
    """The update s·B·A after some steps on a regression, A and B each with its own learning rate."""
    layer, x = _layer()
    layer.scaling = scaling
    target = x @ normal(24, 24, seed=5, dtype=x.dtype) / 5
    optimizer = kind([{"params": [layer.lora_A], "lr": rate_a}, {"params": [layer.lora_B], "lr": rate_b}], **options)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(layer(x), target).backward()
        optimizer.step()
    return layer.delta_weight().detach()


def sgd_scale_is_a_rate_squared() -> bool:
    """SGD: scale s is scale 1 with B's learning rate times s², exactly."""
    with_scale, with_rate = _train(4.0, torch.optim.SGD, 0.5, 0.5), _train(1.0, torch.optim.SGD, 0.5, 16 * 0.5)
    return bool(with_rate.norm() > 0.1) and torch.allclose(with_scale, with_rate, rtol=1e-9, atol=1e-12)


def adam_scale_is_a_rate() -> bool:
    """Adam: scale s is scale 1 with B's learning rate times s; exact but for Adam's epsilon."""
    with_scale = _train(4.0, torch.optim.Adam, 0.01, 0.01, eps=1e-14)
    with_rate = _train(1.0, torch.optim.Adam, 0.01, 4 * 0.01, eps=1e-14)
    return bool(with_rate.norm() > 0.1) and torch.allclose(with_scale, with_rate, rtol=1e-6, atol=1e-9)


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


def higher_rank_helps_where_the_scale_holds() -> bool:
    """rsLoRA and α = 2r: r = 64 below r = 8 in every seed."""
    return all(max(scores["64"]) < min(scores["8"]) for scores in map(_ranks, ("rsLoRA", "α = 2r")))


def fixed_alpha_hides_the_rank() -> bool:
    """At fixed α the means of r = 8 and r = 64 differ by less than the seeds at r = 8 do."""
    seeds = _ranks("α fixed")["8"]
    return abs(rank_nats("α fixed", 64) - rank_nats("α fixed", 8)) < max(seeds) - min(seeds)


def best_rate(scale: float) -> float:
    """Of the grid, at this scale α/r."""
    grid = _sweeps()["alpha_and_rate"]
    scores = grid["scores"][grid["scales"].index(scale)]
    return grid["rates"][scores.index(min(scores))]


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


def unmerged_longer_percent(rows: str, device: str = GPU) -> float:
    """Than the base an unmerged layer takes for "1 row" or "64 rows"; float32 factors."""
    times = recorded.load("lora_layer", device)["result"]["generation"]["float32 factors, α/r = 2"][rows]
    return 100 * (times["ours"] / times["base"] - 1)


@cache
def _gemma(config: str, device: str = GPU) -> dict:
    """At the learning rate that was chosen for it."""
    (row,) = (row for row in recorded.load("gemma_lora", device)["result"]["summary"] if row["config"] == config and row["chosen"])
    return row


def gemma_nats(config: str, what: str, device: str = GPU) -> float:
    """A token "learned" about code, or "forgotten" about prose; mean over the seeds there are."""
    return _gemma(config, device)[what][0]


def gemma_rate_times(config: str, device: str = GPU) -> float:
    """Best learning rate of LoRA (α/r = 2) over that of full fine-tuning."""
    return _gemma(config, device)["lr"] / _gemma("full fine-tuning", device)["lr"]


def gemma_lora_forgot_more() -> bool:
    """r = 64 learned as much as full fine-tuning, to 2 %, and forgot more in every seed."""
    adapted, full = _gemma("all-linear r=64"), _gemma("full fine-tuning")
    as_much = math.isclose(adapted["learned"][0], full["learned"][0], rel_tol=0.02)
    return min(adapted["seeds"], full["seeds"]) >= 3 and as_much and adapted["forgotten"][1] > full["forgotten"][2]
