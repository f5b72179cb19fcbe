"""Exercise 4: a scale for each block."""

import math

import torch
from torch import Tensor

from course.checking import Check, Seen, but, unpacked
from course.checks.blockwise_quantization.shared import (
    TINY,
    as_if_even,
    largest_is,
    level_above,
    level_below,
    number,
    off_the_midpoints,
    transposed,
)  # fmt: skip
from reference.blockwise import dequantize_blockwise, fp4_codebook, int_codebook, midpoints, quantize_blockwise


def nearest(share: Tensor, codebook: Tensor) -> Tensor:
    return (share[:, None] - codebook).abs().argmin(1)


def quantize_blocks(
    x: Tensor,
    codebook: Tensor,
    block_size: int,
    *,
    wide=Tensor.float,
    cut=lambda x, size: x.flatten().split(size),
    largest=lambda block: block.abs().max(),
    dealt=lambda absmax: absmax,
    divisor=lambda top: torch.where(top == 0, 1, top),
    code=nearest,
    stored=lambda codes, x: codes.to(torch.uint8).view(x.shape),
    returned=lambda absmax: absmax,
) -> tuple[Tensor, Tensor]:
    """The worked answer: block by block the largest absolute value, and of each value's share of it the nearest level."""
    blocks = cut(wide(x), block_size)
    absmax = dealt(torch.stack([largest(block) for block in blocks]))
    codes = [code(block / divisor(top), codebook) for block, top in zip(blocks, absmax, strict=True)]
    return stored(torch.cat(codes), x), returned(absmax)


def by_the_reference(x: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    q = quantize_blockwise(x, codebook, block_size)
    return q.codes, q.absmax


def last_block_borrows(x: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    flat = x.float().flatten()
    whole = flat[: len(flat) // block_size * block_size].view(-1, block_size).abs().amax(1)
    scales = whole.repeat_interleave(block_size)
    scales = torch.cat([scales, scales[-1:].expand(len(flat) - len(scales))])
    return nearest(flat / scales, codebook).to(torch.uint8).view(x.shape), whole


def in_no_order(count: int, g: torch.Generator) -> Tensor:
    """A codebook. Zero is neither its first level nor that in the middle, and no two levels are equal: either code would be right."""
    inner = torch.randperm(9999, generator=g) - 4999
    levels = torch.cat([torch.tensor([-1.0, 1.0]), inner[inner != 0][: count - 3] / 5000])
    levels = levels[torch.randperm(count - 1, generator=g)]
    at = int(torch.randint(1, count // 4, (1,), generator=g))
    return torch.cat([levels[:at], torch.zeros(1), levels[at:]])


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)
    uneven, many = in_no_order(12, g), in_no_order(256, g)
    for name, shape, block_size, codebook, dtype in (
        ("4-bit integers", (6, 32), 16, int_codebook(4), torch.float32),
        ("4-bit integers, rows that end inside a block", (5, 24), 16, int_codebook(4), torch.float32),
        ("a short last block", (7, 11), 32, int_codebook(5), torch.float32),
        ("a codebook in no order", (6, 10), 8, uneven, torch.float32),
        ("FP4 levels, a bfloat16 tensor", (3, 37), 16, fp4_codebook(), torch.bfloat16),
        ("256 levels, a transposed bfloat16 tensor of three dimensions", (6, 5, 23), 32, many, torch.bfloat16),
    ):
        x = torch.randn(shape, generator=g)
        x = torch.cat([largest_is((-1) ** i, block) for i, block in enumerate(x.flatten().split(block_size), 1)]).view(shape)
        x[-1, -1] *= 3  # the last block has a scale of its own
        x = off_the_midpoints(x.to(dtype), codebook, block_size)
        if "transposed" in name:
            x = transposed(x)
        result = answer(x.clone(), codebook.clone(), block_size)
        codes, absmax = unpacked(result, "a pair of tensors, (codes, absmax)", Tensor, Tensor)
        yield f"absmax, {name}", absmax
        yield f"dtype of the codes, {name}", str(codes.dtype)
        yield f"shape of the codes, {name}", str(tuple(codes.shape))
        if codes.is_floating_point() or codes.numel() != x.numel() or len(absmax) != math.ceil(x.numel() / block_size):
            return
        levels = codebook[codes.long().clamp(0, len(codebook) - 1).flatten()]
        yield f"the levels that the codes stand for, {name}", levels
        right = dequantize_blockwise(quantize_blockwise(x.float(), codebook, block_size)).flatten()
        if not torch.allclose(levels * absmax.float().repeat_interleave(block_size)[: len(levels)], right, rtol=1e-4):
            return
    x = torch.randn(4, 16, generator=g)
    x[1] *= TINY
    x[2] = 0
    codes, absmax = answer(off_the_midpoints(x, uneven, 16), uneven, 16)
    yield f"absmax of a block of values of about {TINY:.0e}", number(absmax[1])
    yield f"codes of a block of values of about {TINY:.0e}", codes[1]
    levels = uneven[codes[2].long().clamp(0, len(uneven) - 1)]
    yield "the codes of a block of zeros stand for 0", not levels.any()  # whatever they are instead, one message fits
    yield "absmax of a block of zeros", number(absmax[2])


check = Check(
    task="one scale for each block, any codebook",
    observe=observe,
    reference=quantize_blocks,
    second=by_the_reference,
    misconceptions={
        "your blocks start anew in every row: they run over the flattened tensor, also past the end of a row": but(
            cut=lambda x, size: [block for row in x for block in row.split(size)]
        ),
        "the values after the last whole block are missing: the last block is as short as it comes out, with a scale of its own": but(
            cut=lambda x, size: x.flatten()[: x.numel() // size * size].split(size), stored=lambda codes, x: codes.to(torch.uint8)
        ),
        "the short last block uses the scale of the block before it: it needs one of its own": last_block_borrows,
        "every block has the scale of the whole tensor: take the maximum inside each block": but(dealt=lambda t: t.max().expand_as(t)),
        "you cut the tensor into block_size blocks: block_size is how many values a block holds (split, not chunk)": but(
            cut=lambda x, size: x.flatten().chunk(size)
        ),
        "the scales come from the largest signed value of a block: take the absolute value first": but(largest=torch.max),
        "you took the level below each value: the nearest one changes at the midpoint between two levels": but(code=level_below),
        "you took the level above each value: bucketize on the levels does that; the nearest one changes at the midpoint of two": but(
            code=level_above
        ),
        "your codes count in the sorted codebook: a code is an index into the codebook as it was given": but(
            code=lambda share, codebook: torch.bucketize(share, midpoints(codebook.sort().values))
        ),
        "you took midpoints between neighbours of the codebook as given, but it may be in any order: sort it first, then translate "
        "back": but(code=lambda share, codebook: torch.bucketize(share, midpoints(codebook))),
        "the codes are those of evenly spaced levels: look for the nearest level of the codebook": but(code=as_if_even),
        "the values were not divided by the absmax of their block before the nearest level was looked up": but(divisor=torch.ones_like),
        "you kept the sign of a block's largest value: absmax is its absolute value, and is never negative": but(
            largest=lambda block: block[block.abs().argmax()]
        ),
        "absmax was taken, and the division done, in 16 bits: convert x to float32 first": but(
            wide=lambda x: x, code=lambda share, codebook: nearest(share, codebook.to(share.dtype))
        ),
        "the codes are int64, eight bytes for each: convert them to torch.uint8": but(stored=lambda codes, x: codes.view(x.shape)),
        "the codes are flat: give them the shape of x": but(stored=lambda codes, x: codes.to(torch.uint8)),
        "you returned steps (absmax over the number of levels): with a codebook from −1 to 1 the scale is absmax itself": but(
            returned=lambda absmax: absmax / 7
        ),
        "the codes of a block of zeros do not stand for 0: either it was divided by its absmax, and 0 / 0 is NaN, which has no nearest "
        "level, or you gave it a fixed code, and which code is that of zero depends on the codebook": but(divisor=lambda top: top),
        "absmax is right, but x / absmax was computed in the tensor's own 16-bit dtype: divide x.float()": but(
            wide=lambda x: x, largest=lambda block: block.float().abs().max()
        ),
        "absmax is never below some number, or has one added, when you divide by it: beside it a block of tiny values is lost; "
        "guard against 0 alone": but(divisor=lambda top: top + 1e-8),
        "the absmax of a block of zeros is 0: replace it where you divide, not in what you return": but(
            returned=lambda absmax: torch.where(absmax == 0, 1, absmax)
        ),
    },
    atol=1e-30,  # an absmax may be tiny; what keeps a divisor from being zero, 1e-38, may stay in it
)
