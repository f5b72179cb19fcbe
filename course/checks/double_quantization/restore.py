"""Exercise 4: read a weight back."""

from typing import NamedTuple

import torch
from torch import Tensor

from course.checking import Check, Seen, but
from course.checks.nf4 import AS_MASK, looked_up
from reference.double_quant import dynamic_codebook, quantize_scales
from reference.nf4 import NF4_CODEBOOK, quantize_nf4


class Stored(NamedTuple):
    """A doubly quantized weight, as plain tensors.

    Attributes:
        packed: uint8, ((n + 1) // 2,): two 4-bit codes a byte, the first in the high four bits.
        levels: float32, (16,): of the weight's codes; NF4's, or others.
        codes: uint8, (blocks,): of the scales.
        dynamic: float32, (256,): of the scales' codes; the dynamic map, or others.
        absmax: float32: the scales' scales.
        offset: float32, no axes.
        block_size: weights that share a scale; the last block may be short.
        second_block: scales that share a scale; the last block may be short.
        shape, dtype: of the weight; a tuple, for any number of axes; float32, float16 or bfloat16.
    """

    packed: Tensor
    levels: Tensor
    codes: Tensor
    dynamic: Tensor
    absmax: Tensor
    offset: Tensor
    block_size: int
    second_block: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def dequantize(
    q: Stored,
    *,
    dynamic=lambda q: q.dynamic[q.codes.int()],
    absmax=lambda q: q.absmax.repeat_interleave(q.second_block),
    scale=lambda level, absmax, q: level * absmax + q.offset,
    spread=lambda scales, q: scales.repeat_interleave(q.block_size),
    nibbles=lambda byte: (byte >> 4, byte & 15),
    levels=lambda q: q.levels,
    last=lambda weight, q: weight.to(q.dtype).view(q.shape),
) -> Tensor:
    """The worked answer: the scales first, then the levels of the weight's codes, then their products."""
    n = torch.Size(q.shape).numel()
    scales = scale(dynamic(q), absmax(q)[: len(q.codes)], q)  # (blocks,)
    codes = torch.stack(nibbles(q.packed), 1).view(-1)[:n]  # (n,)
    return last(levels(q)[codes.int()] * spread(scales, q)[:n], q)


def block_by_block(q: Stored) -> Tensor:
    values = torch.empty(2 * len(q.packed))
    values[::2], values[1::2] = q.levels[q.packed.long() // 16], q.levels[q.packed.long() % 16]
    weight = values[: torch.Size(q.shape).numel()]
    for i, block in enumerate(weight.split(q.block_size)):
        block *= q.dynamic[int(q.codes[i])] * q.absmax[i // q.second_block] + q.offset
    return weight.reshape(q.shape).to(q.dtype)


def usual_map(q: Stored) -> Tensor:
    return dynamic_codebook()[q.codes.int()]


def scale_in_16_bits(level: Tensor, absmax: Tensor, q: Stored) -> Tensor:
    return (level * absmax + q.offset).to(q.dtype)


def but_for_ties(weight: object, right: Tensor) -> object:
    """``right`` where ``weight`` is it, but for a few places in which the last float32 digit decided how to round to 16 bits."""
    if not isinstance(weight, Tensor) or weight.shape != right.shape or weight.dtype != right.dtype:
        return weight
    near = torch.isclose(weight.float(), right.float(), rtol=2**-7, atol=0)
    return right if near.all() and (weight != right).float().mean() < 0.02 else weight


def observe(answer, seed: int) -> Seen:
    generator = torch.Generator().manual_seed(seed)
    usual, even = (NF4_CODEBOOK, dynamic_codebook()), (torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 256))
    for shape, dtype, block_size, second_block, (levels, dynamic) in (
        ((11, 37), torch.float32, 16, 8, usual),
        ((48, 64), torch.float32, 64, 16, usual),
        ((72, 128), torch.float32, 32, 16, usual),  # more than 256 blocks
        ((29, 5), torch.bfloat16, 16, 4, usual),
        ((331,), torch.float16, 32, 4, even),
    ):
        spread = 1 + torch.rand(shape, generator=generator).view(-1).cumsum(0).view(shape) / 50  # blocks of unlike size
        q = quantize_nf4((torch.randn(shape, generator=generator) * spread).to(dtype), block_size)
        s = quantize_scales(q.absmax, second_block)
        own = levels is not NF4_CODEBOOK
        offset = -s.offset if own else s.offset  # most scales are negative then: nothing but arithmetic is asked for
        tensors = q.packed.view(-1), levels.clone(), s.codes, dynamic, s.absmax, offset
        stored = Stored(*tensors, block_size, second_block, shape, dtype)
        weight = looked_up(answer, stored)
        size = " × ".join(map(str, shape)) if len(shape) > 1 else f"{shape[0]} weights on one axis"
        where = f"{size}, blocks of {block_size}, scales in blocks of {second_block}{', levels of its own and scales below zero' * own}"
        yield f"weight, {where}", weight if dtype == torch.float32 else but_for_ties(weight, dequantize(stored))
        if weight is AS_MASK:
            return


check = Check(
    task="a doubly quantized weight, read back",
    observe=observe,
    reference=dequantize,
    second=block_by_block,
    misconceptions={
        "a scale below zero is set to zero: a scale is dynamic[code]·absmax + offset, whatever comes out": but(
            scale=lambda level, absmax, q: (level * absmax + q.offset).clamp(min=0)
        ),
        "a scale below zero loses its sign: a scale is dynamic[code]·absmax + offset, whatever comes out": but(
            scale=lambda level, absmax, q: (level * absmax + q.offset).abs()
        ),
        "the offset is missing: a scale is dynamic[code]·absmax + offset": but(scale=lambda level, absmax, q: level * absmax),
        "the offset comes after the product: dynamic[code]·absmax + offset, not (dynamic[code] + offset)·absmax": but(
            scale=lambda level, absmax, q: (level + q.offset) * absmax
        ),
        "the offset is added, not taken off: taking it off was the first step of quantizing": but(
            scale=lambda level, absmax, q: level * absmax - q.offset
        ),
        "the nibbles are swapped: the first of two weights is in the high four bits": but(nibbles=lambda byte: (byte & 15, byte >> 4)),
        "a code is an index into the dynamic map, not a number to divide by 127": but(dynamic=lambda q: (q.codes.float() - 127) / 128),
        "scales of scales are dealt out in turn: each serves second_block neighbours, so repeat_interleave": but(
            absmax=lambda q: q.absmax.repeat(q.second_block)
        ),
        "256 is written in: second_block says how many scales share one, and it is not always 256": but(
            absmax=lambda q: q.absmax.repeat_interleave(256)
        ),
        "the first scale of scales is used for all: each second_block scales have their own": but(
            absmax=lambda q: q.absmax[:1].expand(len(q.codes))
        ),
        "scales are dealt out in turn: each serves block_size neighbouring weights, so repeat_interleave": but(
            spread=lambda scales, q: scales.repeat(q.block_size)
        ),
        "the products are in 16 bits: level · scale in float32, then one rounding": but(
            levels=lambda q: q.levels.to(q.dtype), scale=scale_in_16_bits
        ),
        "the scales were rounded to 16 bits before the product: keep them in float32, and round once, at the end": but(
            scale=lambda level, absmax, q: scale_in_16_bits(level, absmax, q).float()
        ),
        "every 16-bit weight comes out as bfloat16: there is float16 too, so take q.dtype": but(
            last=lambda weight, q: weight.to(torch.float32 if q.dtype == torch.float32 else torch.bfloat16).view(q.shape)
        ),
        "NF4's levels by heart: codes are indices into q.levels, whatever they are": but(levels=lambda q: NF4_CODEBOOK),
        "the dynamic map by heart: the scales' codes are indices into q.dynamic, whatever it is": but(dynamic=usual_map),
        "both code books by heart: use q.levels and q.dynamic, whatever they are": but(levels=lambda q: NF4_CODEBOOK, dynamic=usual_map),
        "torch takes an index of dtype uint8 for a mask, as it does one of bool: a mask selects entries, and has to be as long as what it "
        "selects from; codes are positions, so index with codes.int(), at both levels": but(dynamic=lambda q: q.dynamic[q.codes]),
        "the two block sizes are swapped, or one is used for both levels": but(absmax=lambda q: q.absmax.repeat_interleave(q.block_size)),
        "a level stands for a scale by itself here: multiply it by the scale of its block first, then add the offset": but(
            scale=lambda level, absmax, q: level + q.offset
        ),
        "the result stays float32: give it the weight's dtype, after the product": but(last=lambda weight, q: weight.view(q.shape)),
        "the result is flat: give it the weight's shape": but(last=lambda weight, q: weight.to(q.dtype)),
    },
    rtol=1e-5,
)
