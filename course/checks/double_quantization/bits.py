"""Exercise 1: bits a weight, to the byte."""

import random
from operator import floordiv, truediv

from course.checking import Check, Seen, but


def up(count: int, size: int) -> int:
    return -(-count // size)


def one_more(count: int, size: int) -> int:
    return count // size + 1


def bits_per_weight(
    elements: int,
    block_size: int,
    second_block: int | None,
    *,
    packed=up,
    blocks=up,
    groups=up,
    served=lambda elements, blocks: blocks,
    plain=lambda blocks: 4 * blocks,
    double=lambda blocks, groups: blocks + 4 * groups + 4,
    share=lambda total, elements: 8 * total / elements,
) -> float:
    """The worked answer: bytes of packed codes and of scales; quantized, of their codes, of a scale for each group, and the offset."""
    scales = blocks(elements, block_size)
    constants = plain(scales) if second_block is None else double(scales, groups(served(elements, scales), second_block))
    return share(packed(elements, 2) + constants, elements)


def from_ranges(elements: int, block_size: int, second_block: int | None) -> float:
    packed = (elements + 1) // 2 * 8
    blocks = len(range(0, elements, block_size))
    if second_block is None:
        return (packed + 32 * blocks) / elements
    groups = len(range(0, blocks, second_block))
    return (packed + 8 * blocks + 32 * groups + 32) / elements


def observe(answer, seed: int) -> Seen:
    rng = random.Random(seed)
    cases = [
        (block * rng.randint(300, 900) + 2 * rng.randint(1, 15) + 1, block, second)  # odd, with a short last block
        for second in (None, 64, 256)
        for block in (32, 64)
    ]
    for second in (None, rng.choice([32, 128, 512])):
        block = rng.choice([16, 128, 256])
        cases.append((block * (second or 1) * rng.randint(2, 9), block, second))  # all blocks of both levels are full
        cases.append((rng.randrange(3, block, 2), block, second))  # less than one block
    for elements, block, second in cases:
        scales = f"in blocks of {second}" if second else "not quantized"
        yield f"{elements:,} weights in blocks of {block}, scales {scales}", answer(elements, block, second)


check = Check(
    task="bits per weight, counted to the byte",
    observe=observe,
    reference=bits_per_weight,
    second=from_ranges,
    misconceptions={
        "with double quantization you count no scales at all, a saving of 0.5 bits: 8 bits for each scale stay": but(double=lambda *_: 0),
        "the scales of the scales are missing: a float32 for each second_block of them": but(double=lambda blocks, groups: blocks + 4),
        "the offset is missing: one float32 for the whole tensor": but(double=lambda blocks, groups: blocks + 4 * groups),
        "scales of scales and offset are missing: a float32 for each second_block scales, and one for the tensor": but(
            double=lambda blocks, groups: blocks
        ),
        "second_block counts scales: a second-level scale serves second_block scales, not second_block weights": but(
            served=lambda elements, blocks: elements
        ),
        "you ignored second_block: with it a scale takes one byte instead of four": but(double=lambda blocks, groups: 4 * blocks),
        "the float32 scales are replaced by their codes; you counted both": but(double=lambda blocks, groups: 5 * blocks + 4 * groups + 4),
        "the last block may be short, and has a scale too: round the number of blocks up": but(blocks=floordiv, groups=floordiv),
        "n // block + 1 is one block too many where the last block is full; rounded up, a/b is -(-a // b)": but(
            blocks=one_more, groups=one_more
        ),
        "blocks // second_block + 1 is one too many where the last block of scales is full; rounded up, a/b is -(-a // b)": but(
            groups=one_more
        ),
        "a // b + 1 is one too many where a is a multiple of b, bytes and blocks alike; rounded up, a/b is -(-a // b)": but(
            packed=one_more, blocks=one_more, groups=one_more
        ),
        "an even number of weights fills its last byte: (n + 1) // 2 bytes, not n // 2 + 1": but(packed=one_more),
        "the last block of scales may be short, and has its own scale: round up there too": but(groups=floordiv),
        "the scales of the scales are float32, 4 bytes each; you counted 2": but(double=lambda blocks, groups: blocks + 2 * groups + 4),
        "the offset is one for the whole tensor, not one for each block of scales": but(double=lambda blocks, groups: blocks + 8 * groups),
        "blocks can't be fractions: a short last block has a whole scale, so round up": but(blocks=truediv, groups=truediv),
        "the last block of scales can't be a fraction: it has a whole float32, so round up there too": but(groups=truediv),
        "an odd number of weights leaves half a byte unused, and it is stored: round the bytes up": but(packed=truediv),
        "an unquantized scale is a float32, 4 bytes whatever the dtype of the weight; you counted 2": but(plain=lambda blocks: 2 * blocks),
        "these are bytes per weight: multiply by 8": but(share=lambda total, elements: total / elements),
        "these are all bits of the tensor: divide by the number of weights": but(share=lambda total, elements: 8 * total),
    },
    rtol=1e-9,
)
