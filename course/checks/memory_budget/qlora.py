"""Exercise 3: bytes of a 4-bit base model."""

import random

from course.checking import Check, but
from course.checks.memory_budget.shared import Sizes, all_heads_have_keys, draw_sizes, linears


def qlora_base_bytes(
    sizes: Sizes,
    double_quantization: bool,
    *,
    shapes=linears,
    head=lambda sizes: 0 if sizes.tied else sizes.vocab * sizes.hidden,
    in_4_bits: tuple[str, ...] = ("linears",),
    missing: tuple[str, ...] = (),
    weight_bits: int = 4,
    scale_bits=lambda double: 8 / 64 + 32 / (64 * 256) if double else 32 / 64,
) -> float:
    """The worked answer: 4 bits and a share of a scale for each weight of a linear layer, 16 bits for all others."""
    numbers = {
        "linears": sizes.layers * sum(out * into for out, into in shapes(sizes).values()),
        "embedding": sizes.vocab * sizes.hidden,
        "head": head(sizes),
        "norms": (2 * sizes.layers + 1) * sizes.hidden,
    }
    quantized = (weight_bits + scale_bits(double_quantization)) / 8
    each = dict.fromkeys(numbers, 2) | dict.fromkeys(in_4_bits, quantized) | dict.fromkeys(missing, 0)
    return sum(count * each[name] for name, count in numbers.items())


def by_blocks(sizes: Sizes, double_quantization: bool) -> float:
    h, q, kv = sizes.hidden, sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    weights = sizes.layers * (2 * h * q + 2 * h * kv + 3 * h * sizes.mlp)
    blocks = weights / 64
    scales = blocks * 1 + blocks / 256 * 4 if double_quantization else blocks * 4
    rows = sizes.vocab + 2 * sizes.layers + 1 + (0 if sizes.tied else sizes.vocab)
    return weights / 2 + scales + 2 * h * rows


def observe(answer, seed: int) -> dict:
    rng = random.Random(seed)
    return {
        f"{'tied' if tied else 'untied'} head, {'double' if double else 'simple'} quantization": answer(draw_sizes(rng, tied), double)
        for tied in (False, True)
        for double in (False, True)
    }


check = Check(
    task="bytes of a 4-bit base model",
    observe=observe,
    reference=qlora_base_bytes,
    second=by_blocks,
    misconceptions={
        "embedding and output head are counted in 4 bits: QLoRA quantizes the linear layers inside the decoder layers only": but(
            in_4_bits=("linears", "embedding", "head")
        ),
        "the output head is counted in 4 bits: like the embedding it stays in 16": but(in_4_bits=("linears", "head")),
        "everything is counted in 4 bits: embedding, output head and norms stay in 16": but(
            in_4_bits=("linears", "embedding", "head", "norms")
        ),
        "the scales are missing: each block of 64 weights has one, in float32 or, with double quantization, in 8 bits": but(
            scale_bits=lambda double: 0
        ),
        "double quantization does not remove the scales: 8 bits for each 64 weights stay, and a float32 for each 64·256": but(
            scale_bits=lambda double: 0 if double else 32 / 64
        ),
        "you ignored double_quantization: with it a scale takes 8 bits instead of 32": but(scale_bits=lambda double: 32 / 64),
        "the scales of the scales are missing: with double quantization there is one float32 for each 256 scales": but(
            scale_bits=lambda double: 8 / 64 if double else 32 / 64
        ),
        "4 bits are half a byte; you counted 4 bytes per weight": but(weight_bits=32),
        "a tied head is the embedding matrix itself: count it once": but(head=lambda sizes: sizes.vocab * sizes.hidden),
        "embedding and output head are missing: they stay in 16 bits": but(missing=("embedding", "head")),
        "the norms are missing: two vectors of hidden numbers per layer and a last one, in 16 bits": but(missing=("norms",)),
        "the MLP is gated: it has three matrices, gate, up and down": but(shapes=lambda sizes: linears(sizes) | {"gate_proj": (0, 0)}),
        "k_proj and v_proj are kv_heads·head_dim wide, not heads·head_dim": but(shapes=all_heads_have_keys),
    },
    rtol=1e-9,
)
