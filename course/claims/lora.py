"""What unit 02 states: counts from the shapes of named models, identities checked on small tensors, and what the sweeps measured."""

import functools
import math
import statistics

import torch
from torch import nn
from torch.nn import functional as F

from course.lab import recorded
from reference.lora import LoRAConv2d, LoRALinear
from reference.model_shapes import GEMMA_3_270M, GPT_3, LLAMA_2_7B, LLAMA_3_8B, LLAMA_3_70B, ModelShape

QV = ("q_proj", "v_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

# Counting


def _share(shape: ModelShape, r: int, targets="all-linear") -> float:
    """Trained parameters in percent of the model's."""
    return 100 * shape.adapter_parameters(r, targets) / shape.parameters


def square_layer_parameters() -> int:
    """r = 16 on a 4096 × 4096 layer."""
    return 16 * (4096 + 4096)


def square_layer_share() -> float:
    """The same in percent of the layer's weight."""
    return 100 * square_layer_parameters() / 4096**2


def gpt3_billions() -> float:
    return GPT_3.parameters / 1e9


def gpt3_r4_qv_millions() -> float:
    return GPT_3.adapter_parameters(4, QV) / 1e6


def gpt3_r4_qv_megabytes() -> float:
    """In 16 bits, 1 MB = 1e6 bytes."""
    return 2 * GPT_3.adapter_parameters(4, QV) / 1e6


def gpt3_r4_qv_fewer() -> float:
    """How many times fewer parameters train."""
    return GPT_3.parameters / GPT_3.adapter_parameters(4, QV)


def gpt3_r2_qv_millions() -> float:
    """The "10 M of 175 B" that is often quoted."""
    return GPT_3.adapter_parameters(2, QV) / 1e6


def gpt3_r16_all_linear_millions() -> float:
    return GPT_3.adapter_parameters(16) / 1e6


def gpt3_r16_all_linear_fewer() -> float:
    return GPT_3.parameters / GPT_3.adapter_parameters(16)


def llama7b_r8_qv_millions() -> float:
    return LLAMA_2_7B.adapter_parameters(8, QV) / 1e6


def llama7b_r8_qv_share() -> float:
    return _share(LLAMA_2_7B, 8, QV)


def llama7b_r16_qv_millions() -> float:
    return LLAMA_2_7B.adapter_parameters(16, QV) / 1e6


def llama7b_r16_qv_share() -> float:
    return _share(LLAMA_2_7B, 16, QV)


def llama7b_r16_qv_fewer() -> float:
    return LLAMA_2_7B.parameters / LLAMA_2_7B.adapter_parameters(16, QV)


def llama7b_r16_all_millions() -> float:
    return LLAMA_2_7B.adapter_parameters(16) / 1e6


def llama7b_r16_all_share() -> float:
    return _share(LLAMA_2_7B, 16)


def llama7b_r16_all_fewer() -> float:
    return LLAMA_2_7B.parameters / LLAMA_2_7B.adapter_parameters(16)


def llama7b_r64_all_share() -> float:
    return _share(LLAMA_2_7B, 64)


def llama8b_r16_all_megabytes() -> float:
    """In 16 bits."""
    return 2 * LLAMA_3_8B.adapter_parameters(16) / 1e6


def llama70b_r16_all_megabytes() -> float:
    return 2 * LLAMA_3_70B.adapter_parameters(16) / 1e6


def gemma_r16_qv_share() -> float:
    return _share(GEMMA_3_270M, 16, QV)


def gemma_r16_all_share() -> float:
    return _share(GEMMA_3_270M, 16)


def llama7b_full_state_gigabytes() -> float:
    """Gradients, float32 master weights and Adam's two moments of full fine-tuning: 14 bytes a parameter."""
    return 14 * LLAMA_2_7B.parameters / 1e9


def llama7b_lora_state_gigabytes() -> float:
    """Of LoRA, r = 16 on all linears: float32 factors, gradients and moments, 16 bytes a trained parameter."""
    return 16 * LLAMA_2_7B.adapter_parameters(16) / 1e9


def llama7b_weights_gigabytes() -> float:
    return 2 * LLAMA_2_7B.parameters / 1e9


def llama7b_total_ratio() -> float:
    """Full over LoRA, everything but activations: weights, gradients, states."""
    full = llama7b_weights_gigabytes() + llama7b_full_state_gigabytes()
    return full / (llama7b_weights_gigabytes() + llama7b_lora_state_gigabytes())


def flops_share_r16_4096() -> float:
    """Extra multiplications of an unmerged adapter, r = 16 on 4096 × 4096, in percent of the layer's."""
    return 100 * 16 * (4096 + 4096) / 4096**2


# Identities


def _layer(
    seed: int = 0, n: int = 24, r: int = 3, alpha: float = 7.0, dtype: torch.dtype = torch.float64
) -> tuple[LoRALinear, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    base = nn.Linear(n, n).to(dtype)
    with torch.no_grad():
        for p in base.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / math.sqrt(n))
    layer = LoRALinear(base, r, alpha)
    with torch.no_grad():
        layer.lora_A.copy_(torch.randn(layer.lora_A.shape, generator=g) / math.sqrt(n))
    return layer, torch.randn(64, n, generator=g, dtype=torch.float64).to(dtype)


def zero_b_leaves_the_output() -> bool:
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
    target = x @ torch.randn(24, 24, generator=torch.Generator().manual_seed(5), dtype=x.dtype) / 5
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


def merged_twice_error() -> float:
    """Relative error of the output of a layer that was merged twice, in multiples of the update's own size."""
    layer, x = _layer()
    nn.init.normal_(layer.lora_B)
    right, base = layer(x), layer.base(x)
    layer.merge()
    layer.merged = False  # the guard circumvented
    layer.merge()
    return ((layer(x) - right).norm() / (right - base).norm()).item()


def bf16_unmerge_restores() -> float:
    """Share of weights, in percent, that come back exactly when a bfloat16 merge is undone by subtracting."""
    layer, _ = _layer(n=256, r=8, alpha=16)
    layer.base.to(torch.bfloat16)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=g) / 50)
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


# Measured


@functools.cache
def _sweeps() -> dict:
    return recorded.load("lora_sweeps", device="cpu")["result"]


def _rank(rule: str, r: int) -> float:
    """Mean over seeds, nats above the floor."""
    (scores,) = [scores for name, scores in _sweeps()["rank_sweep"].items() if name.startswith(rule)]
    return statistics.fmean(scores[str(r)])


def fixed_alpha_r1() -> float:
    return _rank("α fixed", 1)


def fixed_alpha_r64() -> float:
    return _rank("α fixed", 64)


def rslora_r1() -> float:
    return _rank("rsLoRA", 1)


def rslora_r64() -> float:
    return _rank("rsLoRA", 64)


def fixed_scale_r1() -> float:
    return _rank("α = 2r", 1)


def fixed_scale_r64() -> float:
    return _rank("α = 2r", 64)


def all_rules_r8() -> float:
    """Where the three rules agree."""
    return _rank("α fixed", 8)


def _best_rate(scale: float) -> float:
    grid = _sweeps()["alpha_and_rate"]
    scores = grid["scores"][grid["scales"].index(scale)]
    return grid["rates"][scores.index(min(scores))]


def best_rate_at_scale_half() -> float:
    return _best_rate(0.5)


def best_rate_at_scale_eight() -> float:
    return _best_rate(8.0)


def _targets(name: str) -> float:
    """Mean over seeds at the larger budget."""
    return statistics.fmean(_sweeps()["target_sweep"][name][-1]["scores"])


def targets_qv_large() -> float:
    return _targets("q, v")


def targets_all_large() -> float:
    return _targets("all linears")


def all_linears_beat_qv_at_equal_parameters() -> bool:
    """At both budgets, in every seed."""
    sweep = _sweeps()["target_sweep"]
    return all(max(spread["scores"]) < min(narrow["scores"]) for spread, narrow in zip(sweep["all linears"], sweep["q, v"], strict=True))


def _small(label: str, text: str) -> list[float]:
    """Mean curve over seeds."""
    return [statistics.fmean(values) for values in zip(*_sweeps()["small_set"][label][text], strict=True)]


def small_r64_trained() -> float:
    """How far below the floor."""
    return -_small("LoRA, r = 64", "trained on")[-1]


def small_r64_fresh_best() -> float:
    return min(_small("LoRA, r = 64", "fresh"))


def small_r64_fresh_last() -> float:
    return _small("LoRA, r = 64", "fresh")[-1]


def small_r1_fresh_best() -> float:
    return min(_small("LoRA, r = 1", "fresh"))


def small_r1_fresh_last() -> float:
    return _small("LoRA, r = 1", "fresh")[-1]


def targets_mlp_large() -> float:
    return _targets("MLP")


def higher_rank_helps_where_the_scale_holds() -> bool:
    """rsLoRA and α = 2r: r = 64 below r = 8 in every seed."""
    rules = [scores for name, scores in _sweeps()["rank_sweep"].items() if not name.startswith("α fixed")]
    return all(max(scores["64"]) < min(scores["8"]) for scores in rules)


def fixed_alpha_hides_the_rank() -> bool:
    """At fixed α the means of r = 8 and r = 64 differ by less than the seeds at r = 8 do."""
    (scores,) = [scores for name, scores in _sweeps()["rank_sweep"].items() if name.startswith("α fixed")]
    return abs(fixed_alpha_r64() - all_rules_r8()) < max(scores["8"]) - min(scores["8"])


def _generation(rows: str) -> float:
    """How much longer than the base an unmerged layer takes on the recorded GPU, in per cent; float32 factors."""
    times = recorded.load("lora_layer", device="h100")["result"]["generation"]["float32 factors, α/r = 2"][rows]
    return 100 * (times["ours"] / times["base"] - 1)


def unmerged_gpu_one_row() -> float:
    return _generation("1 row")


def unmerged_gpu_64_rows() -> float:
    return _generation("64 rows")


def _gemma(config: str, measure: str) -> float:
    """At the chosen learning rate, mean over the seeds there are."""
    rows = recorded.load("gemma_lora", device="h100")["result"]["summary"]
    (row,) = [row for row in rows if row["config"] == config and row["chosen"]]
    return row[measure][0] if isinstance(row[measure], list) else row[measure]


def gemma_rate_ratio_r1() -> float:
    """Best learning rate of LoRA (all linears, α/r = 2) over that of full fine-tuning."""
    return _gemma("all-linear r=1", "lr") / _gemma("full fine-tuning", "lr")


def gemma_rate_ratio_r64() -> float:
    return _gemma("all-linear r=64", "lr") / _gemma("full fine-tuning", "lr")


def gemma_learned_r1() -> float:
    return _gemma("all-linear r=1", "learned")


def gemma_learned_r64() -> float:
    return _gemma("all-linear r=64", "learned")


def gemma_learned_full() -> float:
    return _gemma("full fine-tuning", "learned")


def gemma_forgotten_r64() -> float:
    """On prose that it was not trained on."""
    return _gemma("all-linear r=64", "forgotten")


def gemma_forgotten_full() -> float:
    return _gemma("full fine-tuning", "forgotten")


def gemma_lora_forgot_more() -> bool:
    """r = 64 learned as much as full fine-tuning, to 2 %, and forgot more in every seed."""
    rows = {row["config"]: row for row in recorded.load("gemma_lora", device="h100")["result"]["summary"] if row["chosen"]}
    adapted, full = rows["all-linear r=64"], rows["full fine-tuning"]
    as_much = math.isclose(adapted["learned"][0], full["learned"][0], rel_tol=0.02)
    return min(adapted["seeds"], full["seeds"]) >= 3 and as_much and adapted["forgotten"][1] > full["forgotten"][2]


def merging_twice_is_one_update_off() -> bool:
    return math.isclose(merged_twice_error(), 1.0, rel_tol=1e-9)
