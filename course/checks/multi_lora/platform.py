"""Exercise 5, a design: what a platform of many tenants needs. The judge counts as reference.model_shapes and a roofline do."""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real

from course.checking import Check, NotYet, Seen, but
from reference.memory.recipes import QLORA, weights
from reference.model_shapes import LLAMA_2_13B, LLAMA_3_8B, LLAMA_3_70B, ModelShape

PARTS = ("adapter_bytes", "kv_bytes", "adapters_on_card", "step_seconds", "swap_seconds", "cards")


@dataclass(frozen=True)
class Platform:
    """What a customer tells you.

    Attributes:
        shape: of the base model: ``shape.linears`` is name -> (out, in), ``layers``, ``heads``, ``kv_heads``, ``head_dim``.
        base_bytes: of the base on a card.
        r: rank of every adapter, on all of ``shape.linears``.
        tenants: how many adapters there are.
        rows: requests in a batch.
        context: tokens of each, at most.
        distinct: adapters among the rows of a batch.
        card_bytes: of a card.
        bandwidth: bytes per second that a card reads from its memory.
        bus: bytes per second from RAM to a card.
        tokens_per_second: that all tenants together ask for.
    """

    shape: ModelShape
    base_bytes: int
    r: int
    tenants: int
    rows: int
    context: int
    distinct: int
    card_bytes: int
    bandwidth: float
    bus: float
    tokens_per_second: float


def nf4_bytes(shape: ModelShape) -> int:
    return weights(shape, QLORA).bytes


EXAMPLE = Platform(
    LLAMA_3_70B, nf4_bytes(LLAMA_3_70B), r=16, tenants=100, rows=32, context=2048, distinct=20, card_bytes=80 * 10**9,
    bandwidth=3.0e12, bus=50e9, tokens_per_second=4000.0,
)  # fmt: skip


def adapter_of(p: Platform, each: int = 2) -> int:
    return each * p.shape.layers * sum(p.r * (out + into) for out, into in p.shape.linears.values())


def kv_of(p: Platform, heads: int | None = None, both: int = 2) -> int:
    """Keys and values in 16 bits, in all layers, of all rows."""
    heads = p.shape.kv_heads if heads is None else heads
    return 2 * both * p.shape.layers * heads * p.shape.head_dim * p.rows * p.context


def design(
    p: Platform,
    *,
    adapter=adapter_of,
    kv=kv_of,
    room=lambda p, kv: p.card_bytes - p.base_bytes - kv,
    read=lambda p, adapter, kv: p.base_bytes + p.distinct * adapter + kv,
    over=lambda p: p.bus,
    tokens=lambda p, step: p.rows / step,
    whole=math.ceil,
    slot=lambda p, adapter: adapter,
) -> dict[str, float]:
    """The worked answer."""
    size, cache = adapter(p), kv(p)
    step = read(p, size, cache) / p.bandwidth
    return {
        "adapter_bytes": size,
        "kv_bytes": cache,
        "adapters_on_card": max(0, room(p, cache) // slot(p, size)),
        "step_seconds": step,
        "swap_seconds": size / over(p),
        "cards": whole(p.tokens_per_second / tokens(p, step)),
    }


def by_the_reference(p: Platform) -> dict[str, float]:
    import torch

    from reference.multi_lora.serving import token_bytes

    size = 2 * p.shape.adapter_parameters(p.r)
    cache = token_bytes(p.shape, torch.bfloat16) * p.rows * p.context
    seconds = p.base_bytes / p.bandwidth + p.distinct * size / p.bandwidth + cache / p.bandwidth
    return {
        "adapter_bytes": size,
        "kv_bytes": cache,
        "adapters_on_card": int((p.card_bytes - p.base_bytes - cache) / size),
        "step_seconds": seconds,
        "swap_seconds": size / p.bus,
        "cards": -int(-p.tokens_per_second * seconds // p.rows),
    }


def drawn(seed: int) -> list[Platform]:
    """Three customers; there is room for the cache and for more than one adapter."""
    rng, found = random.Random(seed), []
    for shape in (LLAMA_3_70B, LLAMA_3_8B, replace(LLAMA_2_13B, name="with groups of five heads", kv_heads=8)):
        p = Platform(
            shape, nf4_bytes(shape), r=rng.choice((4, 8, 12, 16)), tenants=rng.randint(60, 900), rows=rng.randint(17, 40),
            context=rng.choice((512, 1024, 1536)), distinct=rng.randint(5, 16), card_bytes=rng.choice((80, 96, 141)) * 10**9,
            bandwidth=rng.uniform(2e12, 4.5e12), bus=rng.uniform(2e10, 6e10), tokens_per_second=rng.uniform(3e4, 9e4),
        )  # fmt: skip
        found.append(p)
    return found


def observe(answer, seed: int) -> Seen:
    for p in drawn(seed):
        result = answer(p)
        if not isinstance(result, Mapping):
            raise NotYet(f"your function returned {type(result).__name__}: return a dictionary with the keys {', '.join(PARTS)}")
        yield f"the numbers for {p.shape.name}", {part: "there" for part in result}
        for part in PARTS:
            value = result.get(part)
            if part == "adapters_on_card" and isinstance(value, Real) and value < 0:
                value = 0  # a mistake in the cache can leave no room; some then write 0, some go below
            yield f"{part} for {p.shape.name}", value


check = Check(
    task="a platform of many tenants: memory, time of a step, a swap, and cards",
    observe=observe,
    reference=design,
    second=by_the_reference,
    rtol=1e-6,
    atol=0,
    misconceptions={
        "keys and values were counted for all query heads: with grouped queries only kv_heads of them are cached": but(
            kv=lambda p: kv_of(p, p.shape.heads)
        ),
        "the cache holds keys only: values take as much again": but(kv=lambda p: kv_of(p, both=1)),
        "the cache is that of one request: every row of the batch has its own": but(kv=lambda p: kv_of(p) // p.rows),
        "the adapter has one factor: A has r·in numbers, and B r·out more": but(
            adapter=lambda p: 2 * p.shape.layers * sum(p.r * into for _, into in p.shape.linears.values())
        ),
        "the adapter is that of one layer of the model: every layer has its own factors": but(
            adapter=lambda p: adapter_of(p) // p.shape.layers
        ),
        "the adapter was counted in float32: served in 16 bits a number takes 2 bytes": but(adapter=lambda p: adapter_of(p, 4)),
        "the cache has no room: take it off the card before you count adapters": but(room=lambda p, kv: p.card_bytes - p.base_bytes),
        "a step reads an adapter for every row: rows of one tenant share it, so count distinct ones": but(
            read=lambda p, adapter, kv: p.base_bytes + p.rows * adapter + kv
        ),
        "a step reads all tenants' adapters: only those in the batch are read": but(
            read=lambda p, adapter, kv: p.base_bytes + p.tenants * adapter + kv
        ),
        "a step reads the base once for every row: that one reading serves all rows is the point of a batch": but(
            read=lambda p, adapter, kv: p.rows * p.base_bytes + p.distinct * adapter + kv
        ),
        "a step does not read the cache: each new token attends to all of its request": but(
            read=lambda p, adapter, kv: p.base_bytes + p.distinct * adapter
        ),
        "the swap was timed at the card's own bandwidth: the adapter comes from RAM, over the bus": but(over=lambda p: p.bandwidth),
        "a card gives one token per step: it gives one for every row": but(tokens=lambda p, step: 1 / step),
        "the cards were rounded down: with a part of a card missing the queue grows without end": but(whole=math.floor),
    },
)
