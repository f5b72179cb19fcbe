"""Exercise 3: attention with a prefix of trained keys and values."""

import math

import torch
from torch import Tensor

from course.checking import Check, Seen, but


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding of one head: x (length, width), positions (length,). The exercise gives this function."""
    half = x.shape[-1] // 2
    angles = positions[:, None] / 100 ** (torch.arange(half) / half)  # (length, width / 2)
    one, two = x[:, :half], x[:, half:]
    return torch.cat([one * angles.cos() - two * angles.sin(), two * angles.cos() + one * angles.sin()], 1)


def after_prefix(length: int, prefix: int) -> Tensor:
    """Which keys a query sees, (length, prefix + length): all of the prefix, and the text up to itself."""
    return torch.ones(length, prefix + length, dtype=torch.bool).tril(prefix)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    first=len,
    place_prefix=lambda prefix_k: prefix_k,
    place_query=rotate,
    sees=after_prefix,
    scale=lambda width: 1 / math.sqrt(width),
    soft=lambda scores: scores.softmax(-1),
    hide=lambda scores, sees: scores.masked_fill(~sees, -math.inf),
    values=lambda prefix_v, v: torch.cat([prefix_v, v]),
) -> Tensor:
    """The worked answer: the text's positions begin at P; the prefix's keys are taken as they are."""
    length, prefix = len(q), len(prefix_k)
    positions = torch.arange(length) + first(prefix_k)
    q, k = place_query(q, positions), rotate(k, positions)
    scores = q @ torch.cat([place_prefix(prefix_k), k]).T * scale(q.shape[1])  # (length, P + length)
    return soft(hide(scores, sees(length, prefix))) @ values(prefix_v, v)


def token_by_token(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    """As generation does it: a cache that grows."""
    out = []
    for i in range(len(q)):
        at = torch.tensor([len(prefix_k)])
        prefix_k = torch.cat([prefix_k, rotate(k[i : i + 1], at)])
        prefix_v = torch.cat([prefix_v, v[i : i + 1]])
        weights = torch.softmax(rotate(q[i : i + 1], at) @ prefix_k.T / math.sqrt(q.shape[1]), -1)
        out.append(weights @ prefix_v)
    return torch.cat(out)


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)
    for length, prefix, width in ((5, 3, 6), (4, 1, 8), (1, 4, 2)):
        q, k, v = (torch.randn(length, width, generator=g) for _ in range(3))
        prefix_k, prefix_v = (torch.randn(prefix, width, generator=g) for _ in range(2))
        yield f"the output for {length} tokens after a prefix of {prefix}", answer(q, k, v, prefix_k, prefix_v)
    zeros = torch.zeros(2, 2)
    yield "the output after two keys and values of zeros", answer(q, k, v, zeros, zeros)


check = Check(
    task="attention to a prefix: its keys as they are, the text placed after it",
    observe=observe,
    reference=attend,
    second=token_by_token,
    misconceptions={
        "the prefix's keys were rotated: they are trained as the cache holds them, after the rotary embedding": but(
            place_prefix=lambda prefix_k: rotate(prefix_k, torch.arange(len(prefix_k)))
        ),
        "the text's positions begin at 0: the prefix takes the first ones, so they begin behind it": but(first=lambda prefix_k: 0),
        "the text's positions begin one too late: the prefix takes 0 to T − 1, so they begin at T": but(
            first=lambda prefix_k: len(prefix_k) + 1
        ),
        "the mask is shifted: the first token sees only the first of all keys; every token sees the whole prefix": but(
            sees=lambda length, prefix: torch.ones(length, prefix + length, dtype=torch.bool).tril()
        ),
        "tokens see what comes after them: the mask must hide later tokens of the text": but(
            sees=lambda length, prefix: torch.ones(length, prefix + length, dtype=torch.bool)
        ),
        "hidden scores became 0, and exp(0) is 1: set them to −∞ before the softmax": but(hide=lambda scores, sees: scores * sees),
        "the queries are not rotated: they need the positions as the text's keys do": but(place_query=lambda q, positions: q),
        "the scores are not divided by √width": but(scale=lambda width: 1.0),
        "the softmax runs over the queries: each token's weights over the keys must add up to one, dim=-1": but(
            soft=lambda scores: scores.softmax(0).nan_to_num()
        ),
        "the values stand in another order than the keys: both begin with the prefix": but(
            values=lambda prefix_v, v: torch.cat([v, prefix_v])
        ),
        "the prefix is not seen at all": but(
            sees=lambda length, prefix: after_prefix(length, prefix) & (torch.arange(prefix + length) >= prefix)
        ),
    },
)
