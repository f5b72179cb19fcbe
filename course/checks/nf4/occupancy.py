"""Exercise 5: the share of the values that each level gets."""

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from course.checking import Check, Seen, but
from course.checks.blockwise_quantization.shared import TINY, filled_up, off_the_midpoints, transposed
from reference.blockwise import int_codebook, midpoints
from reference.nf4 import NF4_CODEBOOK, normal_float_codebook


def absmax(block: Tensor) -> Tensor:
    return block.abs().max()


def count(scaled: Tensor, edges: Tensor) -> Tensor:
    return torch.bincount(torch.bucketize(scaled.to(edges), edges), minlength=len(edges) + 1)


def occupancy(
    x: Tensor,
    levels: Tensor,
    block_size: int,
    *,
    widen=Tensor.float,
    cut=torch.split,
    largest=absmax,
    guard=lambda largest: largest.clamp(min=1e-38),
    edges=midpoints,
    bins=count,
    share=lambda counts, scaled, x: counts / len(scaled),
) -> Tensor:
    """The worked answer: each block divided by its own largest absolute value, then the values between neighbouring midpoints counted."""
    blocks = cut(widen(x).flatten(), block_size)  # the last one as short as it comes out
    scaled = torch.cat([block / guard(largest(block)) for block in blocks])  # (n,)
    return share(bins(scaled, edges(levels)), scaled, x)  # (levels,)


def by_comparing(x: Tensor, levels: Tensor, block_size: int) -> Tensor:
    n = x.numel()
    padded = F.pad(x.reshape(-1).float(), (0, -n % block_size)).view(-1, block_size)
    scale = padded.abs().amax(1, keepdim=True)
    scaled = (padded / torch.where(scale == 0, 1.0, scale)).view(-1)[:n]
    codes = (scaled[:, None] - levels).abs().argmin(1)
    return (codes[:, None] == torch.arange(len(levels))).float().mean(0)


def last_divided_by_the_one_before(x: Tensor, levels: Tensor, block_size: int) -> Tensor:
    blocks = x.float().flatten().split(block_size)
    pairs = pairwise((blocks[0], *blocks))
    scaled = [block / absmax(before if len(block) < block_size else block).clamp(min=1e-38) for before, block in pairs]
    return count(torch.cat(scaled), midpoints(levels)) / x.numel()


def mean_of_blocks(x: Tensor, levels: Tensor, block_size: int) -> Tensor:
    return torch.stack([occupancy(block, levels, block_size) for block in x.flatten().split(block_size)]).mean(0)


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([0.2, 3.0, 1.0])  # blocks of different scale, so that one scale for all shows
    for label, levels, shape, block_size, dtype in (
        ("NF4's bins, blocks of 64, a short last block", NF4_CODEBOOK, (64 * 60 + 37,), 64, torch.float32),
        ("a bfloat16 tensor, blocks of 256", NF4_CODEBOOK, (256 * 18 + 101,), 256, torch.bfloat16),
        ("five bits, a transposed float16 tensor of three dimensions", normal_float_codebook(5), (12, 16, 20), 32, torch.float16),
    ):
        n = math.prod(shape)
        x = torch.randn(n, generator=g)
        x *= sizes[torch.arange(n) // block_size % 3]
        x[-(n % block_size or block_size) :] += 1.5  # the last block is not like the others
        x = off_the_midpoints(x.to(dtype), levels, block_size).view(shape)
        yield label, answer(transposed(x) if len(shape) > 1 else x, levels.clone(), block_size)

    def shares(x: Tensor, levels: Tensor, block_size: int = 64) -> object:
        return answer(off_the_midpoints(x, levels, block_size), levels.clone(), block_size)

    x = torch.randn(64, 40, generator=g)  # rows end inside of a block
    x.view(-1)[7 * 64 : 8 * 64] = 0
    yield "a matrix with a block of zeros", shares(x, NF4_CODEBOOK)
    few, many = 0.2 + 0.7 * torch.rand(2, generator=g), 0.2 + 0.7 * torch.rand(7, generator=g)
    levels = torch.cat([torch.tensor([-1.0, 0.07, 1.0]), -few, many]).sort().values  # none is 0, and code 3 is the nearest to it
    yield "a block of zeros, levels without a zero", shares(off_the_midpoints(x, NF4_CODEBOOK, 64), levels)
    yield f"values of about {TINY:.0e}", shares(TINY * torch.randn(20 * 64, generator=g), NF4_CODEBOOK)
    yield "values that leave the upper bins empty", shares(-1 - torch.rand(300, generator=g), int_codebook(4), 32)


check = Check(
    task="what the bins hold: each block scaled by its own largest absolute value, the last one too",
    observe=observe,
    reference=occupancy,
    second=by_comparing,
    rtol=0.0,
    atol=1e-4,  # one value in four thousand would be 2.5e-4
    misconceptions={
        "every bin has the same share: that is what one reads; scale the blocks, find the codes, and count": but(
            share=lambda counts, scaled, x: torch.full((len(counts),), 1 / len(counts))
        ),
        "the whole tensor was divided by one number: each block has its own largest value": but(cut=lambda flat, block_size: [flat]),
        "blocks were divided by their largest value, without abs(): values below −max then lie outside": but(largest=torch.max),
        "blocks were divided by their standard deviation: absmax scaling divides by the largest absolute value": but(largest=torch.std),
        "the short last block was left out: it counts like the others, with its own scale": but(
            cut=lambda flat, block_size: [block for block in flat.split(block_size) if len(block) == block_size]
        ),
        "the zeros that fill up the last block were counted: only the tensor's own values count": but(cut=filled_up),
        "the zeros that fill up the last block were counted in zero's bin: cut them off again before you count": but(
            cut=filled_up, share=lambda counts, scaled, x: counts / x.numel()
        ),
        "these are counts: divide by the number of values": but(share=lambda counts, scaled, x: counts.float()),
        "these are percentages: return shares that sum to 1": but(share=lambda counts, scaled, x: 100 * counts / len(scaled)),
        "a bin without values has no entry: return one share for every level (minlength)": but(
            bins=lambda scaled, edges: torch.bucketize(scaled, edges).bincount()
        ),
        "blocks were divided in the tensor's own 16-bit dtype: convert x to float32 first": but(widen=lambda x: x),
        "blocks were divided in the tensor's own 16-bit dtype, and by no less than a least value: convert x to float32 first, and guard "
        "against 0 alone": but(widen=lambda x: x, guard=lambda largest: largest.clamp(min=1e-7)),
        "blocks were divided in the tensor's own 16-bit dtype, and a block of zeros by zero: convert x to float32 first; zeros belong to "
        "the code of zero": but(widen=lambda x: x, guard=lambda largest: largest),
        "the short last block was divided by the largest value of the block before it: it has its own": last_divided_by_the_one_before,
        "these are the blocks' shares averaged: a short last block then counts as much as a whole one; count values": mean_of_blocks,
        "blocks of zeros were left out: their values are zero, and they count": but(
            cut=lambda flat, block_size: [block for block in flat.split(block_size) if block.any()]
        ),
        "bins were cut at even steps from −1 to 1: cut at the midpoints between `levels`": but(
            bins=lambda scaled, edges: torch.histc(scaled, len(edges) + 1, -1, 1)
        ),
        "bins were cut at the levels: they are cut at the midpoints between levels": but(edges=lambda levels: levels[1:]),
        "a block of zeros was divided by zero: its values are zero, and belong to the code of zero": but(guard=lambda largest: largest),
        "a block of zeros was divided by zero, and argmin of NaN is 0, the lowest code: zeros belong to the code of zero": but(
            guard=lambda largest: largest, bins=lambda scaled, edges: count(scaled.nan_to_num(-1), edges)
        ),
        "a number was added to the divisor, or it has a least value: beside it a block of tiny values is lost; guard against 0 alone": but(
            guard=lambda largest: largest + 1e-8
        ),
    },
)
