"""Exercise 2: trained parameters, gradients and optimizer of LoRA."""

import math
import random
from collections.abc import Iterable

from course.checking import Check, Seen, but
from course.checks.memory_budget.shared import Sizes, all_heads_have_keys, draw_sizes, linears


def lora_budget(
    sizes: Sizes,
    rank: int,
    targets: Iterable[str],
    *,
    shapes=linears,
    adapter=lambda rank, out, into: rank * (into + out),
    layers=lambda sizes: sizes.layers,
    with_gradient=lambda trained, *model: trained,
    with_moments=lambda trained, *model: trained,
    moments: int = 2,
    number_bytes: int = 4,
) -> dict[str, int]:
    """The worked answer: A and B of each target in each layer; only they have gradients and moments, in float32."""
    trained = layers(sizes) * sum(adapter(rank, *shapes(sizes)[name]) for name in targets)
    return {
        "trained": trained,
        "gradient bytes": number_bytes * with_gradient(trained, sizes, targets),
        "optimizer bytes": moments * number_bytes * with_moments(trained, sizes, targets),
    }


def by_width(sizes: Sizes, rank: int, targets: Iterable[str]) -> dict[str, int]:
    q, kv, h, m = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim, sizes.hidden, sizes.mlp
    width = {"q": h + q, "k": h + kv, "v": h + kv, "o": h + q, "gate": h + m, "up": h + m, "down": h + m}
    trained = rank * sizes.layers * sum(width[target.removesuffix("_proj")] for target in targets)
    return {"trained": trained, "gradient bytes": trained * 4, "optimizer bytes": trained * 4 * 2}


def with_frozen(trained: int, sizes: Sizes, targets: Iterable[str]) -> int:
    return trained + sizes.layers * sum(math.prod(linears(sizes)[name]) for name in targets)


def observe(answer, seed: int) -> Seen:
    rng = random.Random(seed)
    for others in (["k_proj", "down_proj"], ["v_proj"], ["k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]):
        sizes, rank = draw_sizes(rng, tied=False), rng.randint(2, 64)
        yield f"rank {rank} on q_proj, {', '.join(others)}, {sizes}", answer(sizes, rank, ["q_proj", *others])


check = Check(
    task="trained parameters, gradients and optimizer of LoRA",
    observe=observe,
    reference=lora_budget,
    second=by_width,
    misconceptions={
        "k_proj and v_proj are kv_heads·head_dim wide, not heads·head_dim: several query heads share one key and value head": but(
            shapes=all_heads_have_keys
        ),
        "q_proj is heads·head_dim wide, which need not be hidden (and o_proj reads that width)": but(
            shapes=lambda sizes: linears(sizes) | dict.fromkeys(("q_proj", "o_proj"), (sizes.hidden, sizes.hidden))
        ),
        "the attention layers are counted as hidden × hidden: q_proj has heads·head_dim outputs, k_proj and v_proj have kv_heads·head_dim, "
        "and o_proj reads heads·head_dim": but(
            shapes=lambda sizes: linears(sizes) | dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (sizes.hidden, sizes.hidden))
        ),
        "you took head_dim as hidden / heads; it is a size of its own": but(
            shapes=lambda sizes: linears(sizes._replace(head_dim=sizes.hidden // sizes.heads))
        ),
        "B is missing: an adapter is A, rank × in, and B, out × rank": but(adapter=lambda rank, out, into: rank * into),
        "B is counted with the width of the input: it is out × rank": but(adapter=lambda rank, out, into: rank * (into + into)),
        "this is one layer: every decoder layer has its own adapters": but(layers=lambda sizes: 1),
        "you counted gradients of the frozen weights too: no gradient is computed for a weight that does not require one": but(
            with_gradient=with_frozen
        ),
        "you counted Adam's moments of the frozen weights too: the optimizer holds states for the parameters it was given": but(
            with_moments=with_frozen
        ),
        "Adam keeps two float32 moments for each trained parameter, 8 bytes; you counted one": but(moments=1),
        "gradients and moments of these adapters are float32: 4 and 4 + 4 bytes; you counted 2 and 2 + 2": but(number_bytes=2),
    },
    rtol=1e-9,
)
