"""Exercise 5: bits to spend."""

import math
import random
from operator import floordiv, truediv

from course.checking import Check, Seen, but


def smallest_block(
    n: int,
    code_bits: int,
    scale_bits: int,
    budget: float,
    *,
    first=1,
    blocks=lambda n, block: math.ceil(n / block),
    bits=lambda code_bits, scale_bits: (code_bits, scale_bits),
    fits=lambda used, allowed: used <= allowed,
    last=lambda block, n: block >= n,
    found=lambda block: block,
    nothing=lambda block: None,
) -> int | None:
    """The worked answer: the first power of two whose codes and scales fit; none is tried after the one that holds everything."""
    code_bits, scale_bits = bits(code_bits, scale_bits)
    block = first
    while not fits(n * code_bits + blocks(n, block) * scale_bits, budget * n):
        if last(block, n):
            return nothing(block)
        block *= 2
    return found(block)


def from_the_scales_that_can_be_paid(n: int, code_bits: int, scale_bits: int, budget: float) -> int | None:
    scales = math.floor((budget - code_bits) * n / scale_bits)
    fitting = [2**power for power in range(n.bit_length() + 1) if -(-n // 2**power) <= scales]
    return fitting[0] if fitting else None


def largest_block(n: int, code_bits: int, scale_bits: int, budget: float) -> int | None:
    return 2 ** max(0, n - 1).bit_length() if n * code_bits + scale_bits <= budget * n else None


def any_block(n: int, code_bits: int, scale_bits: int, budget: float) -> int | None:
    scales = math.floor((budget - code_bits) * n / scale_bits)
    return math.ceil(n / min(scales, n)) if scales > 0 else None


def observe(answer, seed: int) -> Seen:
    rng = random.Random(seed)
    wide = rng.choice([512, 1024, 4096]) * rng.choice([3, 5, 11])
    bits, power = rng.choice([3, 4, 5]), rng.randint(4, 7)
    odd = 2**power + rng.randint(1, 3)
    cases = {
        "scales that use the budget up exactly": (wide, bits, 32, bits + 32 / 2**power),
        "half a scale more than that": (wide, bits, 32, bits + 32 / 2**power + 16 / wide),
        "a little less than the scales need": (wide, bits, 32, bits + 31 / 2**power),
        "scales of 16 bits": (wide, bits, 16, bits + 17 / 2**power),
        "scales of 8 bits, no power of two in the middle": (wide, 8, 8, 8 + 3 / 2 ** (power + 1)),
        "a last block of one to three values": (odd, bits, 32, bits + (32 + 8) / odd),
        "so many bits that every value can have a scale": (wide, bits, 8, bits + 9),
        "no room for a single scale": (wide, bits, 32, float(bits)),
        "fewer bits than the codes take": (wide, bits, 32, bits - 0.5),
        "a scale for a million values": (3 * 2**20, bits, 32, bits + 32 / 2**20),
    }
    for label, case in cases.items():
        yield f"{label}: n = {case[0]}, codes of {case[1]} bits, scales of {case[2]}, budget {case[3]:.9g}", answer(*case)


check = Check(
    task="the smallest block that a bit budget allows",
    observe=observe,
    reference=smallest_block,
    second=from_the_scales_that_can_be_paid,
    misconceptions={
        "the scales are missing from your sum: each block adds scale_bits": but(blocks=lambda n, block: 0),
        "the scale of the short last block is missing: the number of blocks is n / block_size rounded *up*": but(blocks=floordiv),
        "n // block_size + 1 counts a block too many where block_size divides n: round n / block_size up, with math.ceil": but(
            blocks=lambda n, block: n // block + 1
        ),
        "you counted a fraction of a scale: a short last block has a whole one, so round n / block_size up": but(blocks=truediv),
        "a budget that is used up exactly is kept: compare with ≤": but(fits=lambda used, allowed: used < allowed),
        "that is the largest block, with the fewest scales: the smallest one that fits gives the least error": largest_block,
        "this block is one halving too small: its scales no longer fit into the budget": but(found=lambda block: max(1, block // 2)),
        "that is not a power of two: try 1, 2, 4, 8, …": any_block,
        "you read scale_bits as bytes: it is in bits, as the budget is": but(bits=lambda codes, scales: (codes, 8 * scales)),
        "you divided scale_bits by 8: everything here is in bits": but(bits=lambda codes, scales: (codes, scales / 8)),
        "you assumed float32 scales: use scale_bits": but(bits=lambda codes, scales: (codes, 32)),
        "blocks can be as small as one value: start at 1": but(first=2),
        "a block may be longer than n: one block then holds everything, with one scale; don't stop before that": but(
            last=lambda block, n: 2 * block > n
        ),
        "your search ended too early: no block is too long, up to the one that holds everything; go on until block ≥ n": but(
            last=lambda block, n: block >= min(n, 4096)
        ),
        "the codes take code_bits each, not 4": but(bits=lambda codes, scales: (4, scales)),
        "where nothing fits, return None: not even one scale for all values can be paid": but(nothing=lambda block: block),
    },
    rtol=0,
    atol=0,
)
