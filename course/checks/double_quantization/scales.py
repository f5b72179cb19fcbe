"""Exercise 3: quantize the scales."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from course.checking import Check, Seen, but, unpacked
from course.checks.blockwise_quantization.shared import as_if_even, filled_up, level_above, level_below
from course.checks.double_quantization.dynamic import dynamic_map
from reference.blockwise import midpoints


def quantize_scales(
    absmax: Tensor,
    levels: Tensor,
    block_size: int,
    *,
    offset=lambda absmax, size: absmax.mean(),
    cut=lambda absmax, size: absmax.split(size),
    centred=lambda block, offset: block - offset,
    largest=lambda rest, raw: rest.abs().max(),
    divided=lambda centred, scale: centred / scale,
    code=lambda scaled, levels: torch.bucketize(scaled, midpoints(levels)),
    returned=lambda scales: scales,
) -> tuple[Tensor, Tensor, Tensor]:
    """The worked answer: the mean comes off, a block is divided by its largest absolute value, the nearest level has the code."""
    mean, codes, scales = offset(absmax, block_size), [], []
    for block in cut(absmax, block_size):
        rest = centred(block, mean)
        scales.append(largest(rest, block))
        codes.append(code(divided(rest, scales[-1]), levels))
    return torch.cat(codes)[: len(absmax)].to(torch.uint8), returned(torch.stack(scales)), mean


def in_one_piece(absmax: Tensor, levels: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    offset = absmax.sum() / absmax.numel()
    blocks = pad(absmax - offset, (0, -len(absmax) % block_size)).view(-1, block_size)
    largest = blocks.abs().amax(1)
    scaled = (blocks / largest[:, None]).flatten()[: len(absmax)]
    return (scaled[:, None] - levels).abs().argmin(1).to(torch.uint8), largest, offset


def mean_with_zeros(absmax: Tensor, block_size: int) -> Tensor:
    return torch.cat(filled_up(absmax, block_size)).mean()


def means(absmax: Tensor, block_size: int) -> Tensor:
    return torch.stack([block.mean() for block in absmax.split(block_size)])


def its_own_mean_off(block: Tensor, offset: Tensor) -> Tensor:
    return block - block.mean()


def drawn(generator: torch.Generator, count: int, block_size: int, levels: Tensor, margin: float) -> Tensor:
    """Positive scales, no code of which is decided by less than ``margin``; in some block the smallest is the farthest from the mean."""
    while True:
        absmax = torch.rand(count, generator=generator) * 0.3 + 0.7
        absmax[torch.rand(count, generator=generator) < 0.03] *= 0.1
        centred = (absmax.double() - absmax.double().mean()).split(block_size)
        scaled = torch.cat([block / block.abs().max() for block in centred])
        decided = ((scaled[:, None] - midpoints(levels).double()).abs() > margin).all()
        if decided and all((block > 0).any() for block in centred):  # a block's max() is then never below zero
            return absmax


def observe(answer, seed: int) -> Seen:
    generator = torch.Generator().manual_seed(seed)
    even = torch.linspace(-1, 1, 31)
    for levels, count, block_size, size, words, margin in (
        (dynamic_map(5), 150, 64, 1.0, "scales", 2e-5),
        (even, 83, 16, 1.0, "scales", 2e-5),
        (dynamic_map(7), 96, 32, 2.0**-20, "scales of about 1e-6", 2e-5),  # an epsilon of 1e-8 moves many codes, one of 1e-12 none
        (even, 40, 16, 2.0**-27, "scales of about 1e-8", 2e-3),  # and here a least value of 1e-8
    ):
        absmax = drawn(generator, count, block_size, levels, margin) * size  # a power of two: the scaled values stay what they are
        found = answer(absmax, levels, block_size)
        codes, largest, offset = unpacked(found, "three, the codes, the scales of the scales and the offset", object, object, object)
        where = f"{count} {words} in blocks of {block_size}, {len(levels)} levels"
        count_of_offsets = offset.numel() if isinstance(offset, Tensor) else len(offset) if isinstance(offset, (list, tuple)) else 1
        if count_of_offsets == -(-count // block_size):
            yield f"offset, {where}", "one for each block"  # of any shape, with whatever codes
            return
        yield f"offset, {where}", offset
        yield f"scales of scales, {where}", largest
        yield f"codes, {where}", codes
    absmax, levels = torch.full((20,), 0.75), dynamic_map(5)
    codes, largest, offset = unpacked(answer(absmax, levels, 8), "the same three", object, object, object)
    yield "offset, 20 scales that are all equal", offset
    yield "scales of scales, 20 scales that are all equal, so that 0 is left of each", largest
    if isinstance(codes, Tensor) and codes.dtype == torch.uint8 and codes.shape == absmax.shape:  # 0/0 may have any code that there is
        yield "20 scales that are all equal: each code is an index into levels", bool((codes < len(levels)).all())
    else:
        yield "codes, 20 scales that are all equal", codes


check = Check(
    task="scales in 8 bits around their mean",
    observe=observe,
    reference=quantize_scales,
    second=in_one_piece,
    misconceptions={
        "the mean is not taken off: scales are all positive, so half of the levels are never used": but(offset=lambda *_: torch.zeros(())),
        "you took each block's own mean: the offset is one number for the whole tensor": but(offset=means, centred=its_own_mean_off),
        "each block's own mean comes off, and the mean of all scales is returned: take off what you return, one number for the whole "
        "tensor": but(centred=its_own_mean_off),
        "each block's own mean comes off, and the mean of these means is returned: the offset is the mean of all scales, and it is what "
        "comes off": but(offset=lambda absmax, size: means(absmax, size).mean(), centred=its_own_mean_off),
        "each block's own mean comes off, and the last one is returned: the offset is one number, the mean of all scales": but(
            offset=lambda absmax, size: means(absmax, size)[-1], centred=its_own_mean_off
        ),
        "the offset is the mean of the blocks' means, in which a scale of a short last block counts for more: take the mean of all "
        "scales": but(offset=lambda absmax, size: means(absmax, size).mean()),
        "the offset is the mean; you took off the smallest scale, which leaves the negative levels unused": but(
            offset=lambda absmax, size: absmax.min()
        ),
        "the offset is the mean; you took the middle between the smallest and the largest": but(
            offset=lambda absmax, size: (absmax.min() + absmax.max()) / 2
        ),
        "the offset is the mean, not the median": but(offset=lambda absmax, size: absmax.median()),
        "a block's scale is its largest *absolute* value: a scale far below the mean counts too": but(largest=lambda rest, _: rest.max()),
        "a block's scale keeps the sign of the value that is farthest from zero: take its absolute value": but(
            largest=lambda rest, raw: rest[rest.abs().argmax()]
        ),
        "a block's scale is its largest absolute value, so that all of it fits between −1 and 1; you took the standard deviation": but(
            largest=lambda rest, raw: rest.std()
        ),
        "a block's scale is its largest absolute value; you took half the distance from the smallest to the largest": but(
            largest=lambda rest, raw: (rest.max() - rest.min()) / 2
        ),
        "a block's scale is what its values are divided by; you returned the inverse": but(returned=torch.reciprocal),
        "the code is the index of the nearest level, whatever the levels are; you rounded to evenly spaced ones": but(code=as_if_even),
        "the nearest level has the smallest *absolute* difference": but(code=lambda scaled, levels: (scaled[:, None] - levels).argmin(1)),
        "the mean comes off first: you took a block's scale from values that still have it": but(largest=lambda rest, raw: raw.abs().max()),
        "the zeros that fill the last block were counted in the mean: take it of the scales alone": but(offset=mean_with_zeros),
        "the last block was filled with zeros before the mean was taken and came off: they were counted in it, and became −mean; fill it "
        "up once the mean is off": but(offset=mean_with_zeros, cut=filled_up),
        "zeros were added before the mean came off: they became −mean and set the last block's scale": but(cut=filled_up),
        "one scale for all: each block of block_size scales has its own": but(cut=lambda absmax, size: [absmax]),
        "the code is that of the nearest level; you took the next level below": but(code=level_below),
        "the code is that of the nearest level; you took the next level above": but(code=level_above),
        "1e-8 is added to a block's scale: beside scales of 1e-6 that is no longer nothing, and it moves codes; add nothing": but(
            largest=lambda rest, raw: rest.abs().max() + 1e-8
        ),
        "1e-8 is added to what a block is divided by: beside scales of 1e-6 that is no longer nothing, and it moves codes; add "
        "nothing": but(divided=lambda centred, scale: centred / (scale + 1e-8)),
        "a block's scale has a least value of 1e-8: where scales are about 1e-8 that is no longer nothing, and it moves codes; take the "
        "largest value itself": but(largest=lambda rest, raw: rest.abs().max().clamp(min=1e-8)),
        "what a block is divided by has a least value of 1e-8: where scales are about 1e-8 that is no longer nothing, and it moves "
        "codes; divide by the largest value itself": but(divided=lambda centred, scale: centred / scale.clamp(min=1e-8)),
    },
    rtol=1e-5,
    atol=1e-12,
)
