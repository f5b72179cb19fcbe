"""Exercise 5: what the saving can buy."""

import random

from course.checking import Check, Seen, but

BLOCKS = tuple(2**i for i in range(3, 13))  # 8 … 4096


def smallest_block(
    budget: float,
    second_block: int | None,
    *,
    blocks=BLOCKS,
    plain=lambda block: 32 / block,
    double=lambda block, second: 8 / block + 32 / (block * second),
    fits=lambda constants, budget: 4 + constants <= budget,
    choose=min,
    without=None,
) -> int | None:
    """The worked answer: the smallest of the blocks whose codes and scales take no more than the budget."""
    bits = {block: plain(block) if second_block is None else double(block, second_block) for block in blocks}
    return choose([block for block in blocks if fits(bits[block], budget)], default=without)


def first_that_fits(budget: float, second_block: int | None) -> int | None:
    scale = 32 if second_block is None else 8 + 32 / second_block  # bits
    for block in BLOCKS:
        if scale <= (budget - 4) * block:
            return block
    return None


def observe(answer, seed: int) -> Seen:
    rng = random.Random(seed)
    for bits in (4.0, 3.5):  # the codes alone take all of it, or more
        for words, second in (("in float32", None), ("in 8 bits", 256)):
            yield f"a budget of {bits:g} bits, scales {words}", answer(bits, second)
    for second in (None, 64, rng.choice([32, 128, 256, 512])):
        words = "in float32" if second is None else f"in 8 bits, in blocks of {second}"
        asked: dict[str, float] = {}  # two blocks may have a budget in common
        for block in (*rng.sample(BLOCKS[1:-1], 4), 8, 4096):  # the ends too: above the first and below the last there is nothing
            exact = 4 + (32 / block if second is None else 8 / block + 32 / (block * second))
            for budget in (exact, exact * (1 - 1e-6), 4 + 8 / block, 4 + 32 / block + rng.random() / 100, 8 + 32 / block):
                asked.setdefault(f"{budget:.6f}", budget)
        for bits, budget in asked.items():
            yield f"a budget of {bits} bits, scales {words}", answer(budget, second)


check = Check(
    task="the smallest block that a budget of bits allows",
    observe=observe,
    reference=smallest_block,
    second=first_that_fits,
    misconceptions={
        "that is the largest block that fits: the smallest has the least error": but(choose=max),
        "blocks of 8 weights are the smallest asked for: a large budget allows no smaller ones": but(blocks=(4, *BLOCKS)),
        "the largest blocks are of 4096 weights: where they don't fit, the answer is None": but(blocks=(*BLOCKS, 8192)),
        "4096 is one of the sizes: range(3, 13) ends at 12": but(blocks=BLOCKS[:-1]),
        "8 is one of the sizes: the powers of two begin at 2**3": but(blocks=BLOCKS[1:]),
        "None where no size fits, not the largest one": but(without=4096),
        "None where no size fits, not 0": but(without=0),
        "the codes themselves are missing: four bits per weight before any scale": but(fits=lambda constants, budget: constants <= budget),
        "exactly the budget is within the budget": but(fits=lambda constants, budget: 4 + constants < budget),
        "you ignored second_block: with it a scale takes 8 bits, and a float32 for each second_block scales": but(
            double=lambda block, second: 32 / block
        ),
        "the scales of the scales are missing: 32/(block·second_block) bits": but(double=lambda block, second: 8 / block),
        "double quantization does not make scales free: 8 bits each, and their own scales": but(double=lambda block, second: 0),
        "a second-level scale serves second_block scales, which are block·second_block weights": but(
            double=lambda block, second: 8 / block + 32 / second
        ),
        "an unquantized scale has 32 bits; you counted 16": but(plain=lambda block: 16 / block),
        "scales are counted in bytes: 32 bits each, or 8": but(
            plain=lambda block: 4 / block, double=lambda block, second: 1 / block + 4 / (block * second)
        ),
    },
)
