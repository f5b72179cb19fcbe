"""What unit 15 states, and the questions that were added to other units for interviews: whiteboard sums and identities on small tensors.

Bandwidths, rates and counts that a sum assumes are arguments, so that the text that states the result states them too. GB are 1e9 bytes.
"""

import copy
import math
import warnings
from functools import cache

import peft
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from course import interview
from course.claims.lora import adapter_mb
from course.claims.memory_budget import weights_gb
from course.claims.shared import UNITS, normal
from reference.lora import LoRALinear, inject_lora
from reference.memory import SHAPES

# LoRA's algebra


def _factors(r: int = 3, n: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """A (r, n), B (n, r) and a gradient G of the update, in float64."""
    return normal(r, n, dtype=torch.float64), normal(n, r, seed=1, dtype=torch.float64), normal(n, n, seed=2, dtype=torch.float64)


def gradients_are_products() -> bool:
    """∂L/∂A = s·Bᵀ·G and ∂L/∂B = s·G·Aᵀ, where G = ∂L/∂ΔW is the sum over rows of g·xᵀ."""
    A, B, _ = _factors()
    x, y, s = normal(20, 12, seed=3, dtype=torch.float64), normal(20, 12, seed=4, dtype=torch.float64), 1.7
    A.requires_grad_(), B.requires_grad_()
    out = s * x @ A.T @ B.T
    loss = (out - y).square().sum()
    to_a, to_b, to_out = torch.autograd.grad(loss, (A, B, out))
    G = to_out.T @ x
    return torch.allclose(to_a, s * B.T @ G) and torch.allclose(to_b, s * G @ A.T)


def first_update_is_projected() -> bool:
    """From B = 0 one step of gradient descent makes ΔW = −η·s²·G·AᵀA: the gradient, seen through the r directions of A."""
    A, _, G = _factors()
    s, rate = 2.0, 0.1
    B = -rate * s * G @ A.T
    return torch.allclose(s * B @ A, -rate * s**2 * G @ A.T @ A) and bool(torch.linalg.matrix_rank(A.T @ A) == len(A))


def _step_of(A: Tensor, B: Tensor, G: Tensor, rate: float = 0.01) -> Tensor:
    """By how much B·A changes in one step of gradient descent on both."""
    return (B - rate * G @ A.T) @ (A - rate * B.T @ G) - B @ A


@cache
def regauged_step_times(stretch: float) -> float:
    """How many times longer a step of gradient descent moves B·A after B was multiplied by ``stretch`` and A divided by it."""
    A, B, G = _factors()
    return (_step_of(A / stretch, stretch * B, G).norm() / _step_of(A, B, G).norm()).item()


def rotation_keeps_the_step() -> bool:
    """With R orthogonal the step of B·A is the same; with R a stretch it is not."""
    A, B, G = _factors()
    R = torch.linalg.qr(normal(3, 3, seed=5, dtype=torch.float64)).Q
    return torch.allclose(_step_of(R.T @ A, B @ R, G), _step_of(A, B, G)) and regauged_step_times(3.0) > 2


def decay_is_the_nuclear_norm() -> bool:
    """½(‖A‖² + ‖B‖²) is at least the sum of the singular values of B·A, and equals it for factors that share each one evenly."""
    A, B, _ = _factors()
    U, sigma, V = torch.linalg.svd(B @ A)
    even = sigma[:3].sqrt()
    shared = (U[:, :3] * even).square().sum() + (even[:, None] * V[:3]).square().sum()
    stretched = [((B * t).square().sum() + (A / t).square().sum()) / 2 for t in (0.3, 1.0, 2.0)]
    return math.isclose(shared / 2, sigma[:3].sum(), rel_tol=1e-9) and bool(min(stretched) > sigma[:3].sum())


def summed_factors_have_cross_terms() -> bool:
    """(B₁ + B₂)(A₁ + A₂) is not B₁A₁ + B₂A₂; factors set side by side, with rank r₁ + r₂, are."""
    (A, B, _), (C, D) = _factors(), (normal(3, 12, seed=7, dtype=torch.float64), normal(12, 3, seed=8, dtype=torch.float64))
    wanted = B @ A + D @ C
    return not torch.allclose((B + D) @ (A + C), wanted) and torch.allclose(torch.cat([B, D], 1) @ torch.cat([A, C]), wanted)


def restarted_rank(r: int, restarts: int) -> int:
    """The rank of the sum of that many products of rank r, as ReLoRA merges them; 64 × 64."""
    return int(torch.linalg.matrix_rank(sum(normal(64, r, seed=i) @ normal(r, 64, seed=100 + i) for i in range(restarts))))


@cache
def intruders(size: float, r: int = 4, among: int = 10) -> int:
    """Of the first singular vectors of W + ΔW, those with a cosine below 0.6 to every one of W's; 128 × 128, W with a falling spectrum.

    ``size`` is that of ΔW's singular values over the largest of W's.
    """
    U, V = (torch.linalg.qr(normal(128, 128, seed=i)).Q for i in (0, 1))
    W = U @ torch.diag(1 / torch.arange(1, 129) ** 0.5) @ V.T
    update = size * torch.linalg.qr(normal(128, r, seed=2)).Q @ torch.linalg.qr(normal(128, r, seed=3)).Q.T
    new = torch.linalg.svd(W + update).U[:, :among]
    return int(((U.T @ new).abs().amax(0) < 0.6).sum())


# Operations


@cache
def operations_per_weight(trains: str, checkpointed: bool = False) -> float:
    """Of a step, for a token and a weight of a linear layer in the middle of a network; ``trains``: "all" or "LoRA", with r = 1."""
    n, tokens = 256, 8
    layers = nn.Sequential(*(nn.Linear(n, n, bias=False) for _ in range(4)))
    if trains == "LoRA":
        inject_lora(layers, r=1, lora_alpha=1)
    x = torch.randn(tokens, n, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        for layer in layers:
            x = checkpoint(layer, x, use_reentrant=False, early_stop=False) if checkpointed else layer(x)
        x.sum().backward()
    return counter.get_total_flops() / (tokens * 4 * n * n)


def training_hours(model: str, operations: float, million_tokens: float, tflops: float) -> float:
    """For so many operations a token and weight, at a rate that is reached."""
    return operations * SHAPES[model].parameters * million_tokens * 1e6 / (tflops * 1e12) / 3600


# Serving


def adapters_gb(model: str, r: int, count: int, targets: str = "all-linear") -> float:
    """Of so many adapters in 16 bits."""
    return count * adapter_mb(model, r, targets) / 1e3


def adapter_rank(model: str, megabytes: float, targets: str = "all-linear") -> int:
    """The largest rank whose adapter takes no more in 16 bits."""
    return int(megabytes // adapter_mb(model, 1, targets))


def swap_ms(model: str, r: int, gb_per_s: float) -> float:
    """To copy one adapter on all linears, 16 bits, over a bus."""
    return adapter_mb(model, r) / gb_per_s


def read_weights_ms(model: str, recipe: str, gb_per_s: float) -> float:
    """To read all weights once, which generating a token for a batch has to: "LoRA" in 16 bits, "QLoRA" in NF4."""
    return 1e3 * weights_gb(model, recipe) / gb_per_s


def tokens_per_second_are(count: int, model: str, recipe: str, gb_per_s: float) -> bool:
    """Reading all weights once for each token allows so many, rounded."""
    return round(1e3 / read_weights_ms(model, recipe, gb_per_s)) == count


def cache_kb(model: str) -> float:
    """Keys and values of a token in all layers, 16 bits."""
    shape = SHAPES[model]
    return 2 * 2 * shape.layers * shape.kv_heads * shape.head_dim / 1e3


def cache_gb(model: str, requests: int, tokens: int) -> float:
    """The same for so many requests of that many tokens."""
    return cache_kb(model) * requests * tokens / 1e6


def copies_gb(model: str, count: int) -> float:
    """Of so many whole models in 16 bits."""
    return count * weights_gb(model, "LoRA")


def requests_beside(gigabytes: float, model: str, recipe: str, tokens: int, spare: float, adapters: int = 0, r: int = 16) -> int:
    """How many requests of so many tokens fit on a card beside base and adapters, ``spare`` GB left for everything else."""
    return int((gigabytes - spare - weights_gb(model, recipe) - adapters_gb(model, r, adapters)) // cache_gb(model, 1, tokens))


# Training on several cards, and beside other things


def shard_gb(model: str, recipe: str, cards: int) -> float:
    """Of the base's weights, on each card."""
    return weights_gb(model, recipe) / cards


def gather_seconds(model: str, recipe: str, cards: int, gb_per_s: float, times: int = 3) -> float:
    """What each card receives in a step over its link: the others' shards, once for each pass that reads the weights."""
    return times * weights_gb(model, recipe) * (cards - 1) / cards / gb_per_s


def boundary_mb(model: str, tokens: int) -> float:
    """Activations that pass from one stage of a pipeline to the next, 16 bits."""
    return 2 * SHAPES[model].hidden * tokens / 1e6


def bubble_percent(stages: int, micro_batches: int) -> float:
    """Of a pipeline's time, what each stage waits."""
    return 100 * (stages - 1) / (micro_batches + stages - 1)


def new_rows_millions(model: str, tokens: int) -> float:
    """Numbers in the rows of so many new tokens, embedding and head counted apart where they are."""
    return tokens * SHAPES[model].hidden * (1 if SHAPES[model].tied else 2) / 1e6


def whole_tables_gb(model: str) -> float:
    """Embedding and head trained as a whole in mixed precision: 16 bytes a number."""
    return 16 * SHAPES[model].embedding * (1 if SHAPES[model].tied else 2) / 1e9


def dpo_starts_at() -> float:
    """DPO's loss where policy and reference are the same: −log σ(0)."""
    return -F.logsigmoid(torch.zeros(())).item()


def galore_states(model: str, r: int, unit: str = "GB") -> float:
    """Float32 moments of gradients projected to rank r, and the projections, over all linears."""
    shape = SHAPES[model]
    return 4 * shape.layers * sum(2 * r * max(size) + r * min(size) for size in shape.linears.values()) / UNITS[unit]


def adam_states_gb(model: str) -> float:
    """Two float32 moments for every weight of the linears."""
    return 8 * SHAPES[model].linear_parameters / 1e9


def lora_states_gb(model: str, r: int) -> float:
    """Gradients, masters and moments of an adapter on all linears: 16 bytes a number."""
    return 16 * SHAPES[model].adapter_parameters(r) / 1e9


MIXTURE = {"hidden": 4096, "mlp": 14336, "layers": 32, "kv": 1024, "experts": 8, "vocab": 32000}  # Mixtral 8x7B


def mixture(what: str, r: int = 16) -> float:
    """ "billions" of parameters; "experts", their share in percent; trained millions with r on the "attention" or on "all" linears."""
    m = MIXTURE
    expert, attention = 3 * m["hidden"] * m["mlp"], 2 * m["hidden"] * (m["hidden"] + m["kv"])
    total = m["layers"] * (m["experts"] * expert + attention + m["experts"] * m["hidden"]) + 2 * m["vocab"] * m["hidden"]
    on_attention = m["layers"] * r * (2 * 2 * m["hidden"] + 2 * (m["hidden"] + m["kv"]))
    on_experts = m["layers"] * m["experts"] * r * 3 * (m["hidden"] + m["mlp"])
    found = {"billions": total / 1e9, "experts": 100 * m["layers"] * m["experts"] * expert / total, "attention": on_attention / 1e6}
    return (found | {"all": (on_attention + on_experts) / 1e6})[what]


def wrapped_by_peft(model: nn.Module, **targets) -> set[str]:
    """Ends of names, behind the block's number, of what peft gives factors to; "all-linear" if nothing else is said."""
    with warnings.catch_warnings(action="ignore"):  # what it says of names that it changes itself
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, **({"target_modules": "all-linear"} | targets)))
    names = (name.partition(".lora_A")[0] for name, _ in adapted.named_parameters() if ".lora_A" in name)
    return {name.partition(".layers.")[2].partition(".")[2] for name in names}


def peft_takes_some_experts_and_leaves_others() -> bool:
    """Its "all-linear" adapts Mixtral's experts and router, and no stacked expert of gpt-oss or Llama 4; `target_parameters` does."""
    size = dict(vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    more = dict(num_local_experts=4, head_dim=8)
    mixtral = hf.MixtralForCausalLM(hf.MixtralConfig(**size, num_local_experts=4))
    others = {
        "mlp": hf.GptOssForCausalLM(hf.GptOssConfig(**size, **more, layer_types=["full_attention"])),
        "feed_forward": hf.Llama4ForCausalLM(hf.Llama4TextConfig(**size, **more, intermediate_size_mlp=32, interleave_moe_layer_step=1)),
    }
    taken = wrapped_by_peft(mixtral) >= {"mlp.gate", "mlp.experts", "mlp.experts.base_layer"}
    for place, model in others.items():
        names = wrapped_by_peft(copy.deepcopy(model))
        taken &= "self_attn.q_proj" in names and not any(name.startswith(f"{place}.experts") for name in names)
        named = wrapped_by_peft(model, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
        taken &= named == {f"{place}.experts", f"{place}.experts.base_layer"}
    return taken


def everything_frozen_does_not_require_grad() -> bool:
    """Behind a frozen embedding, with no other part trained, re-entrant checkpointing raises; an input with a gradient mends it."""
    block, x = LoRALinear(nn.Linear(4, 4), 2, 4), torch.randn(3, 4)
    try:
        checkpoint(block, x, use_reentrant=True).sum().backward()
    except RuntimeError as error:
        refused = "does not require grad" in str(error)
    checkpoint(block, x.requires_grad_(), use_reentrant=True).sum().backward()
    return refused and block.lora_B.grad is not None


# The bank itself


@cache
def _bank() -> list[dict]:
    return interview.entries()


def questions(**of: str) -> int:
    """In the bank, or those of a ``kind``, a ``frequency``, a ``role``."""
    found = _bank()
    return sum(all(value in (entry[field] if field == "role" else [entry[field]]) for field, value in of.items()) for entry in found)


def statements(*holds: str) -> int:
    """That are checked, or those of them with this verdict: "yes", "partly", "no"."""
    found = [statement for entry in _bank() for statement in entry.get("statements", [])]
    return sum(not holds or statement["holds"] in holds for statement in found)


def evidence() -> int:
    """Different claims behind the answers."""
    return len({claim for entry in _bank() for claim in entry["claims"].values()})


def debugging_cases() -> int:
    """Scripts with a bug."""
    from course.casebook import cases

    return len(cases())
