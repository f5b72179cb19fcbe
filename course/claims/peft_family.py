"""What unit 10 states: counts from the shapes of named models, identities on small tensors and the tiny model, and what was measured.

``method`` is a key of ``course.lab.family.METHODS`` where the tiny model's table is asked, of the record where Gemma's is.
"""

import copy
import math
import statistics
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from course.claims.memory_budget import TARGETS
from course.claims.shared import normal
from course.lab import models, recorded
from course.lab.family import FULL, METHODS, prefix_of_text
from course.lab.world import World
from reference.bottleneck import HOULSBY, Bottleneck, inject_bottleneck
from reference.fusion import Fusion
from reference.ia3 import IA3Layer
from reference.lora.dora import DoRALinear
from reference.memory import SHAPES
from reference.model_shapes import ModelShape
from reference.nf4 import dequantize_nf4, quantize_nf4
from reference.relatives import loftq
from reference.soft_prompts import PrefixTuning, Prompt, PromptEncoder, PromptTuning, text_start
from reference.t_few import choice_losses

OVER_SEEDS = {"mean": statistics.fmean, "least": min, "most": max, "spread": lambda found: max(found) - min(found)}

# Counting


def _numbers(shape: ModelShape, method: str, size: int) -> int:
    """Trained by the method in a model; ``size`` is its rank, its tokens, or the factor of its bottleneck."""
    d, kv = shape.hidden, shape.kv_heads * shape.head_dim
    bottleneck = 2 * d * max(1, d // size) + d + max(1, d // size) if method in ("Houlsby", "Pfeiffer") else 0
    q = shape.heads * shape.head_dim
    outputs = q + 2 * kv + d + 2 * shape.mlp + d  # of all linear layers of a block
    return {
        "LoRA": lambda: shape.adapter_parameters(size, TARGETS["all-linear"]),
        "LoRA on q, v": lambda: shape.adapter_parameters(size, TARGETS["q, v"]),
        "DoRA": lambda: shape.adapter_parameters(size, TARGETS["all-linear"]) + shape.layers * outputs,
        "VeRA": lambda: shape.layers * (7 * size + outputs),
        "IA³": lambda: shape.layers * (2 * kv + shape.mlp),
        "Houlsby": lambda: shape.layers * 2 * bottleneck,
        "Pfeiffer": lambda: shape.layers * bottleneck,
        "prompt": lambda: size * d,
        "prefix": lambda: size * 2 * shape.layers * kv,
        "LN tuning": lambda: (shape.norms * shape.layers + 1) * d,
    }[method]()


def trained(model: str, method: str, size: int = 8) -> int:
    """Numbers that a method trains in a named model."""
    return _numbers(SHAPES[model], method, size)


def percent(model: str, method: str, size: int = 8) -> float:
    """The same, of the model's parameters."""
    return 100 * trained(model, method, size) / SHAPES[model].parameters


def p_tuning_millions(network: str, width: int = 4096, tokens: int = 20) -> float:
    """Trained with an encoder as wide as the model."""
    with torch.device("meta"):
        return sum(p.numel() for p in PromptEncoder(tokens, width, network=network).parameters()) / 1e6


def fusion_times_adapters(d: int = 4096, m: int = 256) -> float:
    """Numbers of one place's Q, K and V over those of one bottleneck."""
    return (3 * d * d + 2 * d) / (2 * d * m + d + m)


# Identities, on small tensors and the tiny model


def dora_detach_percent() -> float:
    """How far A's gradient is off if the norm is not a constant."""
    torch.manual_seed(0)
    layer = DoRALinear(nn.Linear(64, 48, bias=False), 8, 16)
    with torch.no_grad():
        layer.lora_B.normal_(std=0.1)
    x, direction = normal(32, 64), normal(32, 48, seed=1)
    layer(x).backward(direction)
    V = layer.base.weight.detach() + layer.scaling * layer.lora_B @ layer.lora_A
    y = F.linear(x, layer.lora_magnitude_vector[:, None] * V / V.norm(dim=1, keepdim=True))
    (through,) = torch.autograd.grad(y, layer.lora_A, direction)
    return 100 * ((through - layer.lora_A.grad).norm() / layer.lora_A.grad.norm()).item()


def dora_rows_have_their_magnitudes() -> bool:
    layer = DoRALinear(nn.Linear(20, 12), 3, 6)
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.lora_magnitude_vector.uniform_(0.5, 2)
    layer.merge()
    return torch.allclose(layer.base.weight.norm(dim=1), layer.lora_magnitude_vector, rtol=1e-4)


def ia3_merges_with_its_bias() -> bool:
    """And without scaling the bias it would not be the same layer."""
    layer, x = IA3Layer(nn.Linear(16, 8)), normal(5, 16)
    layer.ia3_l.data.uniform_(0.5, 2)
    W, b = layer.merged_weight()
    right, forgotten = F.linear(x, W, b), F.linear(x, W, layer.base.bias)
    return torch.allclose(layer(x), right, atol=1e-5) and not torch.allclose(layer(x), forgotten, atol=1e-2)


@cache
def _tiny() -> tuple[nn.Module, Tensor, Tensor]:
    """The tiny model, eight rows of clinic text, and a text of 16 tokens."""
    world = World()
    return models.load("tiny", where=torch.device("cpu"))[0], world.sample("clinic", 8, 24, 3), world.sample("clinic", 1, 17, 4)[0, 1:]


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits[:, -ids.shape[1] :]


def random_prompt_times() -> float:
    """Standard deviation of N(0, 1) over that of Gemma 3 270M's embedding, as it is looked up: Gemma scales it up."""
    return 1 / recorded.load("gemma_few_shot")["result"]["embedding_std"]


def random_prompt_times_tiny() -> float:
    return 1 / _tiny()[0].get_input_embeddings().weight.std().item()


def a_prompt_and_a_prefix_hold_any_text() -> bool:
    """A prompt of the text's embeddings, and a prefix of its cache, give what the text in front gives."""
    model, ids, text = _tiny()
    full = _logits(model, torch.cat([text.expand(len(ids), -1), ids], 1))[:, len(text) :]
    prompt = PromptTuning(copy.deepcopy(model), Prompt(text_start(model.get_input_embeddings(), text.tolist(), len(text))))
    prefix = PrefixTuning(copy.deepcopy(model), prefix_of_text(model, text), DynamicCache)
    return all(torch.allclose(_logits(tuned, ids), full, atol=1e-3) for tuned in (prompt, prefix))


@cache
def adapter_start_moves(start: str) -> float:
    """What fresh Houlsby adapters do to the tiny model's logits, over their own standard deviation, in percent."""
    model, ids, _ = _tiny()
    torch.manual_seed(0)
    changed = copy.deepcopy(model)
    inject_bottleneck(changed, ["self_attn", "mlp"], **HOULSBY | {"start": start})
    before = _logits(model, ids)
    return 100 * ((_logits(changed, ids) - before).std() / before.std()).item()


def fresh_fusion_is_a_mean() -> bool:
    """With V at the identity and small Q, K; within a few percent."""
    torch.manual_seed(0)
    several = [Bottleneck(32, 8) for _ in range(3)]
    for adapter in several:
        nn.init.normal_(adapter.up.weight, std=0.3)
    h = normal(64, 32)
    with torch.no_grad():
        mean = torch.stack([adapter(h) for adapter in several]).mean(0)
        return bool((Fusion(several)(h) - mean).norm() < 0.1 * mean.norm())


def unlikelihood_at(p: float) -> float:
    """T-Few's UL of a wrong token with probability p."""
    logits = torch.tensor([[p, 1 - p]]).log().expand(1, 2, 1, 2)
    labels = torch.tensor([[[1], [0]]])
    return choice_losses(logits, labels, torch.tensor([0]))["ul"].item()


def loftq_keeps_percent(r: int, rounds: int = 5) -> float:
    """Of NF4's error in a normal weight, what LoftQ's start leaves."""
    W = normal(256, 256)
    R, A, B = loftq(W, r, rounds)
    plain = (W - dequantize_nf4(quantize_nf4(W))).norm()
    return 100 * ((W - dequantize_nf4(quantize_nf4(R)) - B @ A).norm() / plain).item()


# The table: the tiny model


@cache
def _row(method: str) -> dict:
    assert method in METHODS
    return recorded.row("peft_family", method=method)


@cache
def _cost(method: str) -> dict:
    return recorded.row("peft_costs", method=method)


def score(method: str, task: str) -> float:
    """ "clinic", "sql" or "forgotten": nats per token above the floor, mean of three seeds."""
    return statistics.fmean(_row(method)[task])


def untouched(task: str) -> float:
    """The pre-trained model's own distance to the floor on "clinic", "sql" or "general"."""
    return recorded.load("peft_family")["result"]["base"][task]


def untouched_accuracy() -> float:
    """Of the pre-trained model, percent of the notes."""
    return 100 * recorded.load("peft_family")["result"]["base"]["few"]


def few(method: str, size: int, losses: str = "lm", end: str = "mean") -> float:
    """Accuracy after so many notes, percent, over seeds the "mean", "least" or "most"; losses "lm" or "t-few"."""
    return 100 * OVER_SEEDS[end](_row(method)["few"][losses][str(size)])


def few_seeds(method: str, losses: str = "lm") -> int:
    """How many seeds the record holds of it at every size."""
    return min(len(found) for found in _row(method)["few"][losses].values())


def numbers(method: str) -> int:
    """Trained in the tiny model."""
    return _cost(method)["parameters"]


def file_kb(method: str) -> float:
    return _cost(method)["file_bytes"] / 1e3


def latency_percent(method: str) -> float:
    """Of one row's forward, unmerged, over the plain model's: what it adds."""
    return 100 * (_cost(method)["latency_ms"] / recorded.load("peft_costs")["result"]["latency_ms"] - 1)


def step_times_lora(method: str) -> float:
    """Time of a training step over LoRA's."""
    return _cost(method)["step_ms"] / _cost("LoRA")["step_ms"]


def share_percent(method: str) -> float:
    """Trained numbers, of the tiny model's."""
    return 100 * numbers(method) / numbers(FULL)


def best_rate(method: str, task: str = "clinic") -> float:
    return _row(method)["rates"][task]


def rates_span(task: str = "clinic") -> float:
    """The highest over the lowest best rate of all methods."""
    rates = [row["rates"][task] for row in recorded.load("peft_family")["result"]["methods"]]
    return max(rates) / min(rates)


def in_every_seed(better: str, worse: str, task: str = "clinic") -> bool:
    """The worst seed of one method is better than the best seed of the other."""
    return max(_row(better)[task]) < min(_row(worse)[task])


def spread(method: str, task: str = "clinic") -> float:
    """Between the best and the worst seed, nats per token."""
    return max(_row(method)[task]) - min(_row(method)[task])


def lora_beats_every_prompt() -> bool:
    """On both texts, in every seed: soft prompts and prefixes, each at its own rate."""
    prompts = [name for name, method in METHODS.items() if method.kind == "prompt"]
    return all(in_every_seed("LoRA", name, task) for name in prompts for task in ("clinic", "sql"))


def prefix_beats_prompt() -> bool:
    """The better start of each, on both texts, in every seed."""
    kinds = {kind: [name for name in METHODS if name.startswith(kind)] for kind in ("prefix", "prompt")}
    return all(
        in_every_seed(*(min(kinds[kind], key=lambda name: score(name, task)) for kind in ("prefix", "prompt")), task)
        for task in ("clinic", "sql")
    )


# Gemma 3 270M, few-shot

INSIDE = ("LoRA", "DoRA", "IA³", "adapter, Houlsby")
OUTSIDE = ("prompt, text", "prompt, random", "prefix, text", "prefix, random")


@cache
def _accuracies(method: str, size: int, losses: str = "t-few") -> tuple[float, ...]:
    """Percent of the test lines, of each seed in its order; every planned seed must be there."""
    result = recorded.load("gemma_few_shot")["result"]
    rows = [recorded.row("gemma_few_shot", method=method, size=size, losses=losses, seed=seed) for seed in result["settings"]["seeds"]]
    return tuple(100 * row["accuracy"] for row in rows)


def accuracy(method: str, size: int, over: str = "mean", losses: str = "t-few") -> float:
    """Percent of the test lines after ``size`` lines: over seeds the "mean", "least" or "most", or their "spread" in points."""
    return OVER_SEEDS[over](_accuracies(method, size, losses))


def test_lines() -> int:
    result = recorded.load("gemma_few_shot")["result"]
    return result["settings"]["test"] * len(result["packages"])


def accuracy_margin(method: str, size: int) -> float:
    """Half the width of one accuracy's 95 % interval, in points, at the seeds' mean: from the number of test lines, not from seeds."""
    right = accuracy(method, size) / 100
    return 100 * 1.96 * math.sqrt(right * (1 - right) / test_lines())


def above_in_every_seed(better: str, worse: str, size: int, losses: str = "t-few", others: str = "t-few") -> bool:
    """The least of one's seeds lies above the most of the other's."""
    return accuracy(better, size, "least", losses) > accuracy(worse, size, "most", others)


def inside_above_prompts(size: int) -> bool:
    """Every run of LoRA, DoRA, IA³ and adapters is above every run of prompts and prefixes."""
    return all(above_in_every_seed(better, worse, size) for better in INSIDE for worse in OUTSIDE)


def lines_between(size: int) -> int:
    """How many test lines the worst run of what sits inside got right beyond the best run of prompts and prefixes."""
    worst, best = (end(accuracy(m, size, over) for m in kind) for end, over, kind in ((min, "least", INSIDE), (max, "most", OUTSIDE)))
    return round((worst - best) / 100 * test_lines())


def few_shot_leader(method: str, size: int) -> bool:
    """Has the highest mean of all methods."""
    return all(accuracy(method, size) >= accuracy(other, size) for other in INSIDE + OUTSIDE)


def widest_spread(method: str, size: int) -> bool:
    """Has the largest spread of all methods."""
    return all(accuracy(method, size, "spread") >= accuracy(other, size, "spread") for other in INSIDE + OUTSIDE)


def t_few_changes(method: str) -> float:
    """Points by which T-Few's other two losses change the mean, up or down: the most over sizes."""
    sizes = recorded.load("gemma_few_shot")["result"]["settings"]["sizes"]
    return max(abs(accuracy(method, size) - accuracy(method, size, losses="lm")) for size in sizes)


def few_shot_numbers(method: str) -> int:
    """Trained in Gemma 3 270M."""
    return recorded.load("gemma_few_shot")["result"]["costs"][method]["parameters"]


def lora_times_ia3() -> float:
    """LoRA's trained numbers over IA³'s."""
    return few_shot_numbers("LoRA") / few_shot_numbers("IA³")


def nats_tried(method: str, which: str = "best") -> float:
    """Of the right answer after 64 lines, on validation lines, at the "best" or the "worst" of three rates; one seed."""
    return {"best": min, "worst": max}[which](recorded.load("gemma_few_shot")["result"]["tried"][method].values())


def best_rate_is_the_highest_tried(method: str) -> bool:
    """Then a higher one might be better still."""
    tried = recorded.load("gemma_few_shot")["result"]["tried"][method]
    return min(tried, key=tried.get) == max(tried, key=float)


def zero_shot(what: str = "accuracy") -> float:
    """Without training: "accuracy" in percent, or "nats"."""
    found = recorded.load("gemma_few_shot")["result"]["zero_shot"][what]
    return 100 * found if what == "accuracy" else found


# Speed of layers


def layer(method: str, what: str, who: str = "ours") -> float:
    """Of ``family_layers``: "milliseconds", "error" or "peak_bytes" of "ours", "peft" or "frozen layer"; or "times_as_fast"."""
    row = recorded.row("family_layers", method=method)
    return row[what] if what == "times_as_fast" else row[what][who]


def layer_mb(method: str, who: str = "ours") -> float:
    """The most that a step of the layer holds beyond what was there before it."""
    return layer(method, "peak_bytes", who) / 1e6
