"""The checks of unit 00: bytes of a recipe, of an adapter, of a 4-bit base, of what an MLP keeps; which recipe, and how large a batch.

The worked answers are plain arithmetic, written apart from ``reference.memory``; the test of this file holds the two together.
"""

import math
import random
from collections.abc import Iterable
from typing import NamedTuple

from course.checking import Check


class Sizes(NamedTuple):
    """Sizes of a Llama-like decoder, as plain numbers."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    tied: bool


def _sizes(rng: random.Random, tied: bool) -> Sizes:
    """Random sizes in which heads·head_dim is not hidden, kv_heads not heads, and no two widths agree."""
    kv_heads, group = rng.choice([2, 4]), rng.choice([2, 4])
    return Sizes(
        hidden=128 * rng.choice([9, 11, 13]),
        layers=rng.randint(3, 9),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=128,
        mlp=128 * rng.choice([21, 23, 29]),
        vocab=128 * rng.randint(100, 400),
        tied=tied,
    )


# ------------------------------------------------------------------------------------------- bytes of full fine-tuning

FULL = {  # bytes of: weight, gradient, master weight, both moments, scales of the moments
    "fp32": (4, 4, 0, 8, 0),
    "mixed": (2, 2, 4, 8, 0),
    "bf16": (2, 2, 0, 4, 0),
    "8-bit Adam": (2, 2, 0, 2, 2 * 4 / 256),
}


def full_fine_tuning_gb(parameters: int, recipe: str) -> float:
    return parameters * sum(FULL[recipe]) / 1e9


def _full_fine_tuning_gb_again(parameters: int, recipe: str) -> float:
    moments = {"fp32": 2 * 32, "mixed": 2 * 32, "bf16": 2 * 16, "8-bit Adam": 2 * (8 + 32 / 256)}[recipe]
    rest = {"fp32": 32 + 32, "mixed": 16 + 16 + 32, "bf16": 16 + 16, "8-bit Adam": 16 + 16}[recipe]
    return (rest + moments) / 8 * (parameters / 10**9)


def _full_with(change):
    """The right answer with the five numbers of a recipe changed."""

    def answer(parameters: int, recipe: str) -> float:
        return parameters * sum(change(*FULL[recipe])) / 1e9

    return answer


def _observe_full(answer, seed: int) -> dict:
    rng = random.Random(seed)
    parameters = 256 * rng.randint(10**6, 10**8)  # whole blocks: who counts blocks and rounds up is right too
    return {f"{recipe}, {parameters:,} parameters": answer(parameters, recipe) for recipe in FULL}


full = Check(
    task="bytes of full fine-tuning, recipe by recipe",
    observe=_observe_full,
    reference=full_fine_tuning_gb,
    second=_full_fine_tuning_gb_again,
    misconceptions={
        "you divided by 2³⁰: that gives GiB; 1 GB is 10⁹ bytes, and the two differ by 7 %": lambda p, r: p * sum(FULL[r]) / 2**30,
        "the float32 master weights are missing: in mixed precision the optimizer updates them, and bf16 weights are copies": _full_with(
            lambda weight, gradient, master, moments, scales: (weight, gradient, moments, scales)
        ),
        "Adam keeps two moments for each parameter, the mean of the gradient and of its square; one of them is missing": _full_with(
            lambda weight, gradient, master, moments, scales: (weight, gradient, master, moments / 2, scales / 2)
        ),
        "the gradients are missing: after the backward pass there is one number for each trained weight": _full_with(
            lambda weight, gradient, master, moments, scales: (weight, master, moments, scales)
        ),
        "8-bit moments need their scales: one float32 for each block of 256, for both moments": _full_with(
            lambda weight, gradient, master, moments, scales: (weight, gradient, master, moments)
        ),
        "one of the two 8-bit moments has no scales in your sum: each moment has its own blocks of 256": _full_with(
            lambda weight, gradient, master, moments, scales: (weight, gradient, master, moments, scales / 2)
        ),
        "your gradients are float32 in every recipe: a gradient has the dtype of its weight, 2 bytes for a bf16 weight": _full_with(
            lambda weight, gradient, master, moments, scales: (weight, 4, master, moments, scales)
        ),
        "these are bits: divide by 8 to get bytes": _full_with(lambda *numbers: (8 * sum(numbers),)),
        "these are bytes: divide by 10⁹ to get GB": _full_with(lambda *numbers: (1e9 * sum(numbers),)),
    },
    rtol=1e-9,
)


# ------------------------------------------------------------------------------------------------------ bytes of LoRA


def _linears(sizes: Sizes) -> dict[str, tuple[int, int]]:
    """Name -> (out, in)."""
    q, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    return {
        "q_proj": (q, sizes.hidden),
        "k_proj": (kv, sizes.hidden),
        "v_proj": (kv, sizes.hidden),
        "o_proj": (sizes.hidden, q),
        "gate_proj": (sizes.mlp, sizes.hidden),
        "up_proj": (sizes.mlp, sizes.hidden),
        "down_proj": (sizes.hidden, sizes.mlp),
    }


def lora_budget(sizes: Sizes, rank: int, targets: Iterable[str]) -> dict[str, int]:
    trained = sizes.layers * sum(rank * sum(_linears(sizes)[name]) for name in targets)
    return {"trained": trained, "gradient bytes": 4 * trained, "optimizer bytes": 8 * trained}


def _lora_budget_again(sizes: Sizes, rank: int, targets: Iterable[str]) -> dict[str, int]:
    q, kv, h, m = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim, sizes.hidden, sizes.mlp
    width = {"q": h + q, "k": h + kv, "v": h + kv, "o": h + q, "gate": h + m, "up": h + m, "down": h + m}
    trained = 0
    for target in targets:
        trained += rank * width[target.removesuffix("_proj")]
    trained *= sizes.layers
    return {"trained": trained, "gradient bytes": trained * 4, "optimizer bytes": trained * 4 * 2}


def _lora_of(change):
    """The right answer on changed sizes."""
    return lambda sizes, rank, targets: lora_budget(change(sizes), rank, targets)


def _frozen(sizes: Sizes, targets: Iterable[str]) -> int:
    return sizes.layers * sum(math.prod(_linears(sizes)[name]) for name in targets)


def _lora_with(count=None, gradients=None, optimizer=None):
    """The right answer with one of its three numbers counted otherwise."""

    def answer(sizes: Sizes, rank: int, targets: Iterable[str]) -> dict[str, int]:
        trained = count(sizes, rank, targets) if count else lora_budget(sizes, rank, targets)["trained"]
        frozen = _frozen(sizes, targets)
        return {
            "trained": trained,
            "gradient bytes": gradients(trained, frozen) if gradients else 4 * trained,
            "optimizer bytes": optimizer(trained, frozen) if optimizer else 8 * trained,
        }

    return answer


def _observe_lora(answer, seed: int) -> dict:
    rng, seen = random.Random(seed), {}
    for others in (["k_proj", "down_proj"], ["v_proj"], ["k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]):
        sizes, rank = _sizes(rng, tied=False), rng.randint(2, 64)
        seen[f"rank {rank} on q_proj, {', '.join(others)}, {sizes}"] = answer(sizes, rank, ["q_proj", *others])
    return seen


lora = Check(
    task="trained parameters, gradients and optimizer of LoRA",
    observe=_observe_lora,
    reference=lora_budget,
    second=_lora_budget_again,
    misconceptions={
        "k_proj and v_proj are kv_heads·head_dim wide, not heads·head_dim: several query heads share one key and value head": _lora_of(
            lambda sizes: sizes._replace(kv_heads=sizes.heads)
        ),
        "q_proj is heads·head_dim wide, which need not be hidden (and o_proj reads that width)": _lora_with(
            count=lambda sizes, rank, targets: (
                sizes.layers
                * sum(rank * (2 * sizes.hidden if name in ("q_proj", "o_proj") else sum(_linears(sizes)[name])) for name in targets)
            )
        ),
        "you took head_dim as hidden / heads; it is a size of its own": _lora_of(
            lambda sizes: sizes._replace(head_dim=sizes.hidden // sizes.heads)
        ),
        "B is missing: an adapter is A, rank × in, and B, out × rank": _lora_with(
            count=lambda sizes, rank, targets: sizes.layers * sum(rank * _linears(sizes)[name][1] for name in targets)
        ),
        "B is counted with the width of the input: it is out × rank": _lora_with(
            count=lambda sizes, rank, targets: sizes.layers * sum(2 * rank * _linears(sizes)[name][1] for name in targets)
        ),
        "this is one layer: every decoder layer has its own adapters": _lora_of(lambda sizes: sizes._replace(layers=1)),
        "you counted gradients of the frozen weights too: no gradient is computed for a weight that does not require one": _lora_with(
            gradients=lambda trained, frozen: 4 * (trained + frozen)
        ),
        "you counted Adam's moments of the frozen weights too: the optimizer holds states for the parameters it was given": _lora_with(
            optimizer=lambda trained, frozen: 8 * (trained + frozen)
        ),
        "Adam keeps two float32 moments for each trained parameter, 8 bytes; you counted one": _lora_with(
            optimizer=lambda trained, frozen: 4 * trained
        ),
        "gradients and moments of these adapters are float32: 4 and 4 + 4 bytes; you counted 2 and 2 + 2": _lora_with(
            gradients=lambda trained, frozen: 2 * trained, optimizer=lambda trained, frozen: 4 * trained
        ),
    },
    rtol=1e-9,
)


# --------------------------------------------------------------------------------------------- bytes of a 4-bit base


def _linear_weights(sizes: Sizes) -> int:
    return sizes.layers * sum(out * into for out, into in _linears(sizes).values())


def _other_weights(sizes: Sizes) -> int:
    return sizes.vocab * sizes.hidden * (1 if sizes.tied else 2) + (2 * sizes.layers + 1) * sizes.hidden


def _scale_bits(double_quantization: bool) -> float:
    return 8 / 64 + 32 / (64 * 256) if double_quantization else 32 / 64


def qlora_base_bytes(sizes: Sizes, double_quantization: bool) -> float:
    return _linear_weights(sizes) * (4 + _scale_bits(double_quantization)) / 8 + 2 * _other_weights(sizes)


def _qlora_base_bytes_again(sizes: Sizes, double_quantization: bool) -> float:
    h, q, kv = sizes.hidden, sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    weights = sizes.layers * (2 * h * q + 2 * h * kv + 3 * h * sizes.mlp)
    blocks = weights / 64
    scales = blocks * 1 + blocks / 256 * 4 if double_quantization else blocks * 4
    rows = sizes.vocab + 2 * sizes.layers + 1 + (0 if sizes.tied else sizes.vocab)
    return weights / 2 + scales + 2 * h * rows


def _qlora_with(bits=lambda dq: 4 + _scale_bits(dq), linear=_linear_weights, other=lambda s: 2 * _other_weights(s)):
    """The right answer with one part counted otherwise: bits of a linear weight, how many there are, bytes of the rest."""
    return lambda sizes, double_quantization: linear(sizes) * bits(double_quantization) / 8 + other(sizes)


def _observe_qlora(answer, seed: int) -> dict:
    rng = random.Random(seed)
    return {
        f"{'tied' if tied else 'untied'} head, {'double' if double else 'simple'} quantization": answer(_sizes(rng, tied), double)
        for tied in (False, True)
        for double in (False, True)
    }


qlora = Check(
    task="bytes of a 4-bit base model",
    observe=_observe_qlora,
    reference=qlora_base_bytes,
    second=_qlora_base_bytes_again,
    misconceptions={
        "embedding and output head are counted in 4 bits: QLoRA quantizes the linear layers inside the decoder layers only": _qlora_with(
            linear=lambda s: _linear_weights(s) + s.vocab * s.hidden * (1 if s.tied else 2),
            other=lambda s: 2 * (2 * s.layers + 1) * s.hidden,
        ),
        "the output head is counted in 4 bits: like the embedding it stays in 16": _qlora_with(
            linear=lambda s: _linear_weights(s) + s.vocab * s.hidden * (not s.tied),
            other=lambda s: 2 * (s.vocab * s.hidden + (2 * s.layers + 1) * s.hidden),
        ),
        "everything is counted in 4 bits: embedding, output head and norms stay in 16": _qlora_with(
            linear=lambda s: _linear_weights(s) + _other_weights(s), other=lambda s: 0
        ),
        "the scales are missing: each block of 64 weights has one, in float32 or, with double quantization, in 8 bits": _qlora_with(
            bits=lambda dq: 4
        ),
        "double quantization does not remove the scales: 8 bits for each 64 weights stay, and a float32 for each 64·256": _qlora_with(
            bits=lambda dq: 4 if dq else 4.5
        ),
        "you ignored double_quantization: with it a scale takes 8 bits instead of 32": _qlora_with(bits=lambda dq: 4.5),
        "the scales of the scales are missing: with double quantization there is one float32 for each 256 scales": _qlora_with(
            bits=lambda dq: 4 + 8 / 64 if dq else 4.5
        ),
        "4 bits are half a byte; you counted 4 bytes a weight": _qlora_with(bits=lambda dq: 32 + _scale_bits(dq)),
        "a tied head is the embedding matrix itself: count it once": _qlora_with(
            other=lambda s: 2 * (2 * s.vocab * s.hidden + (2 * s.layers + 1) * s.hidden)
        ),
        "embedding and output head are missing: they stay in 16 bits": _qlora_with(other=lambda s: 2 * (2 * s.layers + 1) * s.hidden),
        "the norms are missing: two vectors of hidden numbers a layer and a last one, in 16 bits": _qlora_with(
            other=lambda s: 2 * (_other_weights(s) - (2 * s.layers + 1) * s.hidden)
        ),
        "the MLP is gated: it has three matrices, gate, up and down": _qlora_with(
            linear=lambda s: _linear_weights(s) - s.layers * s.hidden * s.mlp
        ),
        "k_proj and v_proj are kv_heads·head_dim wide, not heads·head_dim": _qlora_with(
            linear=lambda s: _linear_weights(s._replace(kv_heads=s.heads))
        ),
    },
    rtol=1e-9,
)


# ------------------------------------------------------------------------------------------- bytes that an MLP keeps


def mlp_kept_bytes(tokens: int, hidden: int, mlp: int, number_bytes: int, trained: bool, adapted: set[str]) -> int:
    return tokens * number_bytes * _mlp_kept(hidden, mlp, trained, adapted)


def _mlp_kept(hidden: int, mlp: int, trained: bool, adapted: set[str]) -> int:
    x = hidden * (trained or bool({"gate_proj", "up_proj"} & set(adapted)))
    product = mlp * (trained or "down_proj" in adapted)
    return x + 3 * mlp + product


def _mlp_kept_bytes_again(tokens: int, hidden: int, mlp: int, number_bytes: int, trained: bool, adapted: set[str]) -> int:
    kept = [mlp, mlp, mlp]  # gate for silu; silu(gate) and up, each for the other's gradient
    if trained or "gate_proj" in adapted or "up_proj" in adapted:
        kept.append(hidden)
    if trained or "down_proj" in adapted:
        kept.append(mlp)
    return sum(tokens * width * number_bytes for width in kept)


def _mlp_with(widths):
    """A wrong answer: other numbers kept for each token."""

    def answer(tokens: int, hidden: int, mlp: int, number_bytes: int, trained: bool, adapted: set[str]) -> int:
        return tokens * number_bytes * widths(hidden, mlp, trained, adapted)

    return answer


def _observe_mlp(answer, seed: int) -> dict:
    rng, seen = random.Random(seed), {}
    cases = {
        "trained in full": (True, set()),
        "frozen, no adapter in it": (False, set()),
        "frozen, LoRA on gate_proj": (False, {"gate_proj"}),
        "frozen, LoRA on up_proj": (False, {"up_proj"}),
        "frozen, LoRA on down_proj": (False, {"down_proj"}),
        "frozen, LoRA on gate_proj and up_proj": (False, {"gate_proj", "up_proj"}),
        "frozen, LoRA on gate_proj and down_proj": (False, {"gate_proj", "down_proj"}),
        "frozen, LoRA on up_proj and down_proj": (False, {"up_proj", "down_proj"}),
        "frozen, LoRA on all three": (False, {"gate_proj", "up_proj", "down_proj"}),
    }
    for i, (label, (trained, adapted)) in enumerate(cases.items()):
        tokens, hidden, mlp, number_bytes = rng.randint(5, 5000), rng.randint(50, 99), rng.randint(150, 400), (2, 4)[(seed + i) % 2]
        seen[label] = answer(tokens, hidden, mlp, number_bytes, trained, adapted)
    return seen


mlp = Check(
    task="bytes that a gated MLP keeps for the backward pass",
    observe=_observe_mlp,
    reference=mlp_kept_bytes,
    second=_mlp_kept_bytes_again,
    misconceptions={
        "a frozen linear layer keeps no input: its weight's gradient, which would need it, is not computed": _mlp_with(
            lambda h, m, trained, adapted: h + 4 * m
        ),
        "an adapter's A is trained, so it keeps the layer's input although the layer itself is frozen": _mlp_with(
            lambda h, m, trained, adapted: _mlp_kept(h, m, trained, set())
        ),
        "gate_proj is not the only one that reads x: an adapter on up_proj keeps it too": _mlp_with(
            lambda h, m, trained, adapted: _mlp_kept(h, m, trained, set(adapted) - {"up_proj"})
        ),
        "up_proj is not the only one that reads x: an adapter on gate_proj keeps it too": _mlp_with(
            lambda h, m, trained, adapted: _mlp_kept(h, m, trained, set(adapted) - {"gate_proj"})
        ),
        "gate_proj and up_proj each read x: an adapter on one of them is enough to keep it": _mlp_with(
            lambda h, m, trained, adapted: (
                _mlp_kept(h, m, trained, adapted) - h * (not trained and len({"gate_proj", "up_proj"} & set(adapted)) == 1)
            )
        ),
        "silu(gate) is missing: the product silu(gate)·up keeps both factors, and silu keeps its own input": _mlp_with(
            lambda h, m, trained, adapted: _mlp_kept(h, m, trained, adapted) - m
        ),
        "this MLP is gated: gate and silu(gate) are kept as well as up": _mlp_with(
            lambda h, m, trained, adapted: _mlp_kept(h, m, trained, adapted) - 2 * m
        ),
        "gate_proj and up_proj read the same tensor: it is kept once": _mlp_with(
            lambda h, m, trained, adapted: _mlp_kept(h, m, trained, adapted) + h * (trained or {"gate_proj", "up_proj"} <= set(adapted))
        ),
        "the output of down_proj is not kept: it is added to the residual stream, and a sum needs neither of its terms": _mlp_with(
            lambda h, m, trained, adapted: _mlp_kept(h, m, trained, adapted) + h
        ),
        "down_proj reads a tensor of width mlp, not hidden": _mlp_with(
            lambda h, m, trained, adapted: _mlp_kept(h, m, trained, adapted) - (m - h) * (trained or "down_proj" in adapted)
        ),
        "nothing is kept only where no gradient flows; through a frozen MLP it flows on to the layers before": _mlp_with(
            lambda h, m, trained, adapted: _mlp_kept(h, m, trained, adapted) if trained or adapted else 0
        ),
        "these are numbers, not bytes: multiply by number_bytes": lambda tokens, hidden, mlp, number_bytes, trained, adapted: (
            tokens * _mlp_kept(hidden, mlp, trained, adapted)
        ),
    },
    rtol=1e-9,
)


# ---------------------------------------------------------------------------------------------------- which recipe


def matching_recipes(parameters: int, gigabytes: float, recipes: dict[str, float], tolerance: float) -> list[str]:
    return [name for name, each in recipes.items() if abs(parameters * each / 1e9 - gigabytes) <= tolerance * gigabytes]


def _matching_recipes_again(parameters: int, gigabytes: float, recipes: dict[str, float], tolerance: float) -> list[str]:
    stated = gigabytes * 1e9 / parameters  # bytes a parameter
    found = []
    for name in recipes:
        if (1 - tolerance) * stated <= recipes[name] <= (1 + tolerance) * stated:
            found.append(name)
    return found


def _matching(test):
    """A wrong answer: ``test(bytes of the recipe, bytes stated, tolerance)`` decides."""

    def answer(parameters: int, gigabytes: float, recipes: dict[str, float], tolerance: float) -> list[str]:
        return [name for name, each in recipes.items() if test(parameters * each, gigabytes * 1e9, tolerance)]

    return answer


def _nearest(parameters: int, gigabytes: float, recipes: dict[str, float], tolerance: float) -> list[str]:
    return [min(recipes, key=lambda name: abs(parameters * recipes[name] / 1e9 - gigabytes))]


def _nearest_within(parameters: int, gigabytes: float, recipes: dict[str, float], tolerance: float) -> list[str]:
    fitting = set(matching_recipes(parameters, gigabytes, recipes, tolerance))
    return [name for name in _nearest(parameters, gigabytes, recipes, tolerance) if name in fitting]


def _isclose(parameters: int, gigabytes: float, recipes: dict[str, float], tolerance: float) -> list[str]:
    return [name for name, each in recipes.items() if math.isclose(parameters * each / 1e9, gigabytes, rel_tol=tolerance)]


FINE = {f"{total} GB": total / 1.3 for total in (4.66, 4.69, 5.25, 5.71, 5.73)}  # 4.68 to 5.72 GB are within a tenth


def _observe_matching(answer, seed: int) -> dict:
    """Figures with recipes just inside, just outside and at the edge on both sides, two recipes alike, and a figure that none gives."""
    rng = random.Random(seed)
    parameters, tolerance = rng.randint(10**9, 10**11), rng.choice([0.1, 0.15])
    each = rng.uniform(6, 9)
    recipes = {  # in an order that sorting would change
        "well below": each / 2.1,
        "nearest too": each * 1.01,
        "below by too much": each * (1 - 1.04 * tolerance),
        "nearest": each * 1.01,
        "within reach of a figure in GiB": each * (1 + 1.5 * tolerance),
        "a little below": each * (1 - 0.96 * tolerance),
        "above by too much": each * (1 + 1.04 * tolerance),
        "a little above": each * (1 + 0.96 * tolerance),
        "well above": each * 2.1,
    }
    stated = parameters * each / 1e9
    # powers of two, so that the edge is met exactly in whatever order and unit one calculates
    billions, edges = 2 ** rng.randint(0, 7), {"too low": 5.5, "lower edge": 6, "inside": 9, "upper edge": 10, "too high": 10.5}
    return {
        "recipes on both sides of the stated figure": answer(parameters, stated, dict(recipes), tolerance),
        "a figure that no recipe gives": answer(parameters, stated * 4, dict(recipes), tolerance),
        f"{billions}B parameters, {8 * billions} GB, recipes {edges}, tolerance 0.25": answer(
            billions * 10**9, 8.0 * billions, dict(edges), 0.25
        ),
        f"1.3B parameters, 5.2 GB, recipes {FINE}, tolerance 0.1": answer(13 * 10**8, 5.2, dict(FINE), 0.1),
    }


def _rounded(digits: int):
    return _matching(lambda total, stated, tolerance: abs(round(total / 1e9, digits) - stated / 1e9) <= tolerance * stated / 1e9)


matching = Check(
    task="which recipes give a stated figure",
    observe=_observe_matching,
    reference=matching_recipes,
    second=_matching_recipes_again,
    misconceptions={
        "you read the stated figure as GiB: it is in GB, 10⁹ bytes": lambda parameters, gigabytes, recipes, tolerance: matching_recipes(
            parameters, gigabytes * 2**30 / 1e9, recipes, tolerance
        ),
        "the total is rounded to whole GB before it is compared: compare it as it is": _rounded(0),
        "the total is rounded to tenths of a GB before it is compared: compare it as it is": _rounded(1),
        "the list is always empty: append each name that fits, and return the list at the end": lambda *arguments: [],
        "the parameters are cut to whole billions: divide by 10**9 with / and not with //": lambda parameters, *others: matching_recipes(
            parameters // 10**9 * 10**9, *others
        ),
        "you return the nearest recipe even where none is near: an empty list is an answer": _nearest,
        "several recipes can give the same figure: return all within the tolerance, not the nearest alone": _nearest_within,
        "a recipe may need less or more than the stated figure; yours must not exceed it": _matching(
            lambda total, stated, tolerance: (1 - tolerance) * stated <= total <= stated
        ),
        "every recipe that needs no more than the figure is in your list: it must come near the figure, not fit under it": _matching(
            lambda total, stated, tolerance: total <= (1 + tolerance) * stated
        ),
        "the tolerance is a share of the stated figure; you took it as so many GB": _matching(
            lambda total, stated, tolerance: abs(total - stated) <= tolerance * 1e9
        ),
        "the tolerance is a share of the stated figure; you took it of what the recipe gives": _matching(
            lambda total, stated, tolerance: abs(total - stated) <= tolerance * total
        ),
        "math.isclose takes rel_tol as a share of the larger of its two numbers: a recipe above the figure may then be too far from it; "
        "the tolerance is a share of the stated figure, |total − stated| ≤ tolerance · stated": _isclose,
        "a recipe exactly at the tolerance is within it: at most `tolerance` · stated (≤), not less": _matching(
            lambda total, stated, tolerance: abs(total - stated) < tolerance * stated
        ),
        "you sorted the names: keep the order of `recipes`": lambda *arguments: sorted(matching_recipes(*arguments)),
    },
)


# ---------------------------------------------------------------------------------------------------- how large a batch


def largest_batch(capacity: int, held: int, kept_per_token: int, sequence: int, vocab: int) -> int:
    return max(0, (capacity - held) // (sequence * (kept_per_token + 12 * vocab)))


def _largest_batch_again(capacity: int, held: int, kept_per_token: int, sequence: int, vocab: int) -> int:
    row = sequence * kept_per_token + 3 * 4 * sequence * vocab  # log-probabilities and two gradients, float32
    rows, left = 0, capacity - held
    if left > 0:
        rows, _ = divmod(left, row)
    return rows


def _batch_with(
    of_word: int = 12, round_down=math.floor, lowest: float = 0, held_counts: bool = True, of_sequence=lambda sequence: sequence
):
    """The right answer with one part replaced."""

    def answer(capacity: int, held: int, kept_per_token: int, sequence: int, vocab: int) -> int:
        room = capacity - held * held_counts
        return max(lowest, round_down(room / (of_sequence(sequence) * (kept_per_token + of_word * vocab))))

    return answer


def _loss_of_one_token(capacity: int, held: int, kept_per_token: int, sequence: int, vocab: int) -> int:
    return max(0, (capacity - held) // (sequence * kept_per_token + 12 * vocab))


def _observe_batch(answer, seed: int) -> dict:
    rng = random.Random(seed)
    kept, sequence, vocab = rng.randint(200_000, 600_000), rng.choice([256, 384, 512]), rng.choice([32_000, 49_152, 128_256])
    row, held = sequence * (kept + 12 * vocab), rng.randint(10**10, 3 * 10**10)
    rows = rng.randint(200, 300)
    tight = held - rng.randint(2, 5) * row
    return {
        "room for some rows and most of another": answer(held + rows * row + int(0.7 * row), held, kept, sequence, vocab),
        "room for some rows and a part of another": answer(held + rows * row + int(0.3 * row), held, kept, sequence, vocab),
        "room for a part of one row": answer(held + int(0.6 * row), held, kept, sequence, vocab),
        "room for rows without a remainder": answer(held + rows * row, held, kept, sequence, vocab),
        "what is held does not fit by itself": answer(max(tight, 1), held, kept, sequence, vocab),
    }


batch = Check(
    task="largest batch that fits",
    observe=_observe_batch,
    reference=largest_batch,
    second=_largest_batch_again,
    misconceptions={
        "the loss is missing: log-probabilities in float32 and two gradients of their size, 12 bytes for each token and word": _batch_with(
            0
        ),
        "only the log-probabilities are counted: their gradient and the gradient of the logits are there at the same time": _batch_with(4),
        "one of the loss's three float32 tensors is missing: log-probabilities, their gradient, the gradient of the logits": _batch_with(8),
        "the loss's tensors are float32, also in a bf16 model: 3 · 4 bytes a token and word, not 3 · 2": _batch_with(6),
        "the loss's tensors are counted in numbers and not in bytes: a float32 takes 4, so 3 · 4 bytes a token and word": _batch_with(3),
        "the loss is counted for one token of a row: each of its tokens needs 12 bytes for each word": _loss_of_one_token,
        "this is a number of tokens: divide by the sequence length to get rows": _batch_with(of_sequence=lambda sequence: 1),
        "you rounded up: a row that does not fit as a whole does not fit": _batch_with(round_down=math.ceil),
        "you rounded to the nearest number: a row that does not fit as a whole does not fit": _batch_with(round_down=round),
        "a batch is never negative: where nothing fits, the answer is 0": _batch_with(lowest=-math.inf),
        "what is held takes room too: subtract it first": _batch_with(held_counts=False),
        "a row that does not fit as a whole does not fit: where there is room for a part of one, the answer is 0": (
            lambda capacity, held, kept_per_token, sequence, vocab: (
                0 if capacity <= held else max(1, largest_batch(capacity, held, kept_per_token, sequence, vocab))
            )
        ),
        "a batch has at least one row only where one fits: else the answer is 0": _batch_with(lowest=1),
    },
    rtol=0,
    atol=0,
)
