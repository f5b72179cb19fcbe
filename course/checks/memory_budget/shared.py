"""The sizes of a model that two exercises count with, and the linear layers they make."""

import random
from typing import NamedTuple


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


def draw_sizes(rng: random.Random, tied: bool) -> Sizes:
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


def linears(sizes: Sizes) -> dict[str, tuple[int, int]]:
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


def all_heads_have_keys(sizes: Sizes) -> dict[str, tuple[int, int]]:
    """``linears`` as of a model without grouped queries."""
    return linears(sizes._replace(kv_heads=sizes.heads))
