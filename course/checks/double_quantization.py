"""The checks of unit 05: bits counted to the byte, the dynamic map, quantized scales, a weight read back, what the saving buys."""

import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from course.checking import Check, NotYet
from course.checks.nf4 import AS_MASK, looked_up
from reference.double_quant import dynamic_codebook, quantize_scales
from reference.nf4 import NF4_CODEBOOK, quantize_nf4

# --------------------------------------------------------------------------------------------------- bits, to the byte


def _up(count: int, size: int) -> int:
    return -(-count // size)


def _one_more(count: int, size: int) -> int:
    return count // size + 1


def bits_per_weight(elements: int, block_size: int, second_block: int | None) -> float:
    blocks = _up(elements, block_size)
    constants = 4 * blocks if second_block is None else blocks + 4 * _up(blocks, second_block) + 4
    return 8 * (_up(elements, 2) + constants) / elements


def _bits_per_weight_again(elements: int, block_size: int, second_block: int | None) -> float:
    packed = (elements + 1) // 2 * 8
    blocks = len(range(0, elements, block_size))
    if second_block is None:
        return (packed + 32 * blocks) / elements
    groups = len(range(0, blocks, second_block))
    return (packed + 8 * blocks + 32 * groups + 32) / elements


def _bits_with(
    packed: Callable = lambda n: _up(n, 2),
    plain: Callable = lambda n, b: 4 * _up(n, b),
    double: Callable = lambda n, b, s: _up(n, b) + 4 * _up(_up(n, b), s) + 4,
    each: Callable = lambda total, n: 8 * total / n,
):
    """The right answer with one part of the bytes counted otherwise."""

    def answer(elements: int, block_size: int, second_block: int | None) -> float:
        constants = plain(elements, block_size) if second_block is None else double(elements, block_size, second_block)
        return each(packed(elements) + constants, elements)

    return answer


def _observe_bits(answer, seed: int) -> dict:
    rng, seen = random.Random(seed), {}

    def see(elements: int, block: int, second: int | None) -> None:
        label = f"{elements:,} weights in blocks of {block}, " + (f"scales in blocks of {second}" if second else "scales not quantized")
        seen[label] = answer(elements, block, second)

    for second in (None, 64, 256):
        for block in (32, 64):
            see(block * rng.randint(300, 900) + 2 * rng.randint(1, 15) + 1, block, second)  # odd, with a short last block
    for second in (None, rng.choice([32, 128, 512])):
        block = rng.choice([16, 128, 256])
        see(block * (second or 1) * rng.randint(2, 9), block, second)  # all blocks of both levels are full
        see(rng.randrange(3, block, 2), block, second)  # less than one block
    return seen


bits = Check(
    task="bits a weight, counted to the byte",
    observe=_observe_bits,
    reference=bits_per_weight,
    second=_bits_per_weight_again,
    misconceptions={
        "with double quantization you count no scales at all, a saving of 0.5 bits: 8 bits for each scale stay": _bits_with(
            double=lambda n, b, s: 0
        ),
        "the scales of the scales are missing: a float32 for each second_block of them": _bits_with(double=lambda n, b, s: _up(n, b) + 4),
        "the offset is missing: one float32 for the whole tensor": _bits_with(double=lambda n, b, s: _up(n, b) + 4 * _up(_up(n, b), s)),
        "scales of scales and offset are missing: a float32 for each second_block scales, and one for the tensor": _bits_with(
            double=lambda n, b, s: _up(n, b)
        ),
        "second_block counts scales: a second-level scale serves second_block scales, not second_block weights": _bits_with(
            double=lambda n, b, s: _up(n, b) + 4 * _up(n, s) + 4
        ),
        "you ignored second_block: with it a scale takes one byte instead of four": _bits_with(double=lambda n, b, s: 4 * _up(n, b)),
        "the float32 scales are replaced by their codes; you counted both": _bits_with(
            double=lambda n, b, s: 5 * _up(n, b) + 4 * _up(_up(n, b), s) + 4
        ),
        "the last block may be short, and has a scale too: round the number of blocks up": _bits_with(
            plain=lambda n, b: 4 * (n // b), double=lambda n, b, s: n // b + 4 * (n // b // s) + 4
        ),
        "n // block + 1 is one block too many where the last block is full; rounded up, a/b is -(-a // b)": _bits_with(
            plain=lambda n, b: 4 * _one_more(n, b), double=lambda n, b, s: _one_more(n, b) + 4 * _one_more(_one_more(n, b), s) + 4
        ),
        "blocks // second_block + 1 is one too many where the last block of scales is full; rounded up, a/b is -(-a // b)": _bits_with(
            double=lambda n, b, s: _up(n, b) + 4 * _one_more(_up(n, b), s) + 4
        ),
        "a // b + 1 is one too many where a is a multiple of b, bytes and blocks alike; rounded up, a/b is -(-a // b)": _bits_with(
            packed=lambda n: n // 2 + 1,
            plain=lambda n, b: 4 * _one_more(n, b),
            double=lambda n, b, s: _one_more(n, b) + 4 * _one_more(_one_more(n, b), s) + 4,
        ),
        "an even number of weights fills its last byte: (n + 1) // 2 bytes, not n // 2 + 1": _bits_with(packed=lambda n: n // 2 + 1),
        "the last block of scales may be short, and has its own scale: round up there too": _bits_with(
            double=lambda n, b, s: _up(n, b) + 4 * (_up(n, b) // s) + 4
        ),
        "the scales of the scales are float32, 4 bytes each; you counted 2": _bits_with(
            double=lambda n, b, s: _up(n, b) + 2 * _up(_up(n, b), s) + 4
        ),
        "the offset is one for the whole tensor, not one for each block of scales": _bits_with(
            double=lambda n, b, s: _up(n, b) + 8 * _up(_up(n, b), s)
        ),
        "blocks can't be fractions: a short last block has a whole scale, so round up": _bits_with(
            plain=lambda n, b: 4 * n / b, double=lambda n, b, s: n / b + 4 * n / b / s + 4
        ),
        "an odd number of weights leaves half a byte unused, and it is stored: round the bytes up": _bits_with(packed=lambda n: n / 2),
        "an unquantized scale is a float32, 4 bytes whatever the dtype of the weight; you counted 2": _bits_with(
            plain=lambda n, b: 2 * _up(n, b)
        ),
        "these are bytes a weight: multiply by 8": _bits_with(each=lambda total, n: total / n),
        "these are all bits of the tensor: divide by the number of weights": _bits_with(each=lambda total, n: 8 * total),
    },
    rtol=1e-9,
)

# --------------------------------------------------------------------------------------------------- the dynamic map


def dynamic_map(decades: int) -> Tensor:
    levels = [torch.tensor([0.0, 1.0])]
    for i in range(decades):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        centres = 10.0 ** (i - decades + 1) * (edges[:-1] + edges[1:]) / 2
        levels += [centres, -centres]
    return torch.cat(levels).sort().values


def _dynamic_map_again(decades: int) -> Tensor:
    levels = {0.0, 1.0}
    for decade in range(decades):
        parts, largest = 2**decade, 10 ** (decade + 1 - decades)
        for k in range(parts):
            centre = largest * (0.1 + 0.9 * (k + 0.5) / parts)
            levels |= {centre, -centre}
    return torch.tensor(sorted(levels))


def _map_with(
    inner: Callable = lambda edges: (edges[:-1] + edges[1:]) / 2,
    parts: Callable = lambda i, d: 2**i,
    top: Callable = lambda i, d: 10.0 ** (i - d + 1),
    extra: tuple[float, ...] = (0.0, 1.0),
    signs: tuple[int, ...] = (1, -1),
    order: Callable = lambda levels: levels.sort().values,
):
    """The right answer with one ingredient changed."""

    def answer(decades: int) -> Tensor:
        levels = [torch.tensor(extra)]
        for i in range(decades):
            inside = top(i, decades) * inner(torch.linspace(0.1, 1, parts(i, decades) + 1))
            levels += [sign * inside for sign in signs]
        return order(torch.cat(levels))

    return answer


dynamic = Check(
    task="the dynamic map, from its definition",
    observe=lambda answer, seed: {f"{decades} decades": answer(decades) for decades in (3, 7, random.Random(seed).choice([2, 4, 5, 6]))},
    reference=dynamic_map,
    second=_dynamic_map_again,
    misconceptions={
        "these are the lower edges of the parts: the levels are their centres": _map_with(inner=lambda edges: edges[:-1]),
        "these are the upper edges of the parts: the levels are their centres": _map_with(inner=lambda edges: edges[1:]),
        "these are the edges of the parts, or points between them at even distances: the levels are the parts' centres": _map_with(
            inner=lambda edges: torch.linspace(0.1, 1, len(edges) - 1)
        ),
        "the parts of a decade begin at zero: the decade from 0.1 to 1 begins at 0.1": _map_with(
            inner=lambda edges: (torch.arange(len(edges) - 1) + 0.5) / (len(edges) - 1)
        ),
        "the parts of a decade are equal in ratio: cut it into parts of equal length": _map_with(
            inner=lambda edges: 10 ** ((torch.arange(len(edges) - 1) + 0.5) / (len(edges) - 1) - 1)
        ),
        "−1 is a level and 1 is not: it is the other way round": _map_with(extra=(0.0, -1.0)),
        "the levels fall: sort them from the smallest to the largest": lambda d: dynamic_map(d).flip(0),
        "the levels are sorted by size without their signs: sort them from the most negative to 1": lambda d: dynamic_map(d)[
            dynamic_map(d).abs().argsort(stable=True)
        ],
        "the digits are the wrong way round: the decade of the largest numbers is cut into the most parts": _map_with(
            parts=lambda i, d: 2 ** (d - 1 - i)
        ),
        "these levels are evenly spaced, as in INT8: every decade has its own spacing": lambda d: torch.linspace(-1, 1, 2 ** (d + 1)),
        "the negative levels are missing: centred scales have both signs": _map_with(signs=(1,)),
        "1 is missing: the largest value of a block is scaled to exactly 1": _map_with(extra=(0.0,)),
        "zero is missing: without it a scale that equals the mean is moved": _map_with(extra=(1.0,)),
        "one level too many: 0 and 1 complete the map to a power of two; there is no −1": _map_with(extra=(0.0, 1.0, -1.0)),
        "the levels are not sorted: whoever searches for the nearest needs them in order": _map_with(order=lambda levels: levels),
        "the largest decade ends at 0.1: it should be the one from 0.1 to 1": _map_with(top=lambda i, d: 10.0 ** (i - d)),
        "every decade has the same number of parts: it is 1, 2, 4 …, twice as many for each larger decade": _map_with(
            parts=lambda i, d: 2 ** (d - 1)
        ),
    },
    rtol=1e-5,
    atol=1e-12,
)

# ------------------------------------------------------------------------------------------------- quantize the scales


def quantize(absmax: Tensor, levels: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    offset = absmax.mean()
    padded = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % block_size)).view(-1, block_size)
    largest = padded.abs().amax(1)
    scaled = (padded / largest[:, None]).view(-1)[: len(absmax)]
    codes = torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2)
    return codes.to(torch.uint8), largest, offset


def _quantize_again(absmax: Tensor, levels: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    offset = absmax.sum() / absmax.numel()
    codes, largest = [], []
    for block in (absmax - offset).split(block_size):
        largest.append(block.abs().max())
        codes.append((block[:, None] / largest[-1] - levels).abs().argmin(1))
    return torch.cat(codes).to(torch.uint8), torch.stack(largest), offset


def _nearest(scaled: Tensor, levels: Tensor) -> Tensor:
    return torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2)


def _quantize_with(
    offset_of: Callable = lambda a, b: a.mean(),
    largest_of: Callable = lambda block, raw: block.abs().max(),
    code_of: Callable = _nearest,
    padding: Callable = lambda a, b: a,
):
    """The right answer with another mean, another scale for a block, other codes, or values added at the end."""

    def answer(absmax: Tensor, levels: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
        offset = offset_of(absmax, block_size)
        raw = padding(absmax, block_size).split(block_size)
        largest = [largest_of(block - offset, block) for block in raw]
        codes = [code_of((block - offset) / scale, levels) for block, scale in zip(raw, largest, strict=True)]
        return torch.cat(codes)[: len(absmax)].to(torch.uint8), torch.stack(largest), torch.as_tensor(offset)

    return answer


def _with_zeros(absmax: Tensor, block_size: int) -> Tensor:
    return torch.nn.functional.pad(absmax, (0, -len(absmax) % block_size))


def _mean_of_each_block(returned: Callable = lambda absmax, means: means):
    """Each block's own mean comes off; what is returned as the offset can be replaced."""

    def answer(absmax: Tensor, levels: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
        means = torch.stack([block.mean() for block in absmax.split(block_size)])
        centred = [block - mean for block, mean in zip(absmax.split(block_size), means, strict=True)]
        largest = torch.stack([block.abs().max() for block in centred])
        codes = [_nearest(block / scale, levels) for block, scale in zip(centred, largest, strict=True)]
        return torch.cat(codes).to(torch.uint8), largest, returned(absmax, means)

    return answer


def _one_scale(absmax: Tensor, levels: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    codes, largest, offset = quantize(absmax, levels, len(absmax))
    return codes, largest, offset


def _with_epsilon(absmax: Tensor, levels: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    return _quantize_with(largest_of=lambda block, raw: block.abs().max() + 1e-8)(absmax, levels, block_size)


def _decided(absmax: Tensor, levels: Tensor, block_size: int) -> bool:
    """No scaled value is so close to a midpoint that the last digits decide its code."""
    middle = (levels[:-1] + levels[1:]).double() / 2
    offset = absmax.double().mean()
    scaled = torch.cat([block / block.abs().max() for block in (absmax.double() - offset).split(block_size)])
    return bool(((scaled[:, None] - middle).abs() > 2e-5).all())


def _scales(generator: torch.Generator, count: int, block_size: int, levels: Tensor) -> Tensor:
    """Positive scales in which, in some block, the smallest is the farthest from the mean."""
    while True:
        absmax = torch.rand(count, generator=generator) * 0.3 + 0.7
        absmax[torch.rand(count, generator=generator) < 0.03] *= 0.1
        above = [bool((block > absmax.mean()).any()) for block in absmax.split(block_size)]  # a block's max() is then never below zero
        if all(above) and _decided(absmax, levels, block_size):
            return absmax


def _observe_quantize(answer, seed: int) -> dict:
    generator, seen = torch.Generator().manual_seed(seed), {}
    small = 2.0**-20  # about 1e-6: an epsilon of 1e-8 moves many codes, one of 1e-12 none
    cases = ((dynamic_map(5), 150, 64, 1.0), (torch.linspace(-1, 1, 31), 83, 16, 1.0), (dynamic_map(7), 96, 32, small))
    for levels, count, block_size, size in cases:
        absmax = _scales(generator, count, block_size, levels) * size  # a power of two: the scaled values stay what they are
        found = answer(absmax.clone(), levels.clone(), block_size)
        if not isinstance(found, (tuple, list)) or len(found) != 3:
            what = f"{len(found)} values" if isinstance(found, (tuple, list)) else type(found).__name__
            raise NotYet(f"your function returned {what}: return three, the codes, the scales of the scales and the offset")
        codes, largest, offset = found
        where = f"{count} {'scales' if size == 1 else 'scales of about 1e-6'} in blocks of {block_size}, {len(levels)} levels"
        means = offset.numel() if isinstance(offset, Tensor) else len(offset) if isinstance(offset, (list, tuple)) else 1
        if means == -(-count // block_size):
            return seen | {f"offset, {where}": "one for each block"}  # of any shape, with whatever codes
        seen |= {f"offset, {where}": offset, f"scales of scales, {where}": largest, f"codes, {where}": codes}
    return seen


scales = Check(
    task="scales in 8 bits around their mean",
    observe=_observe_quantize,
    reference=quantize,
    second=_quantize_again,
    misconceptions={
        "the mean is not taken off: scales are all positive, so half of the levels are never used": _quantize_with(
            offset_of=lambda a, b: a.new_zeros(())
        ),
        "you took each block's own mean: the offset is one number for the whole tensor": _mean_of_each_block(),
        "each block's own mean comes off, and the mean of all scales is returned: take off what you return, one number for the whole "
        "tensor": _mean_of_each_block(lambda absmax, means: absmax.mean()),
        "each block's own mean comes off, and the mean of these means is returned: the offset is the mean of all scales, and it is what "
        "comes off": _mean_of_each_block(lambda absmax, means: means.mean()),
        "each block's own mean comes off, and the last one is returned: the offset is one number, the mean of all scales": (
            _mean_of_each_block(lambda absmax, means: means[-1])
        ),
        "the offset is the mean of the blocks' means, in which a scale of a short last block counts for more: take the mean of all "
        "scales": _quantize_with(offset_of=lambda a, b: torch.stack([block.mean() for block in a.split(b)]).mean()),
        "the offset is the mean; you took off the smallest scale, which leaves the negative levels unused": _quantize_with(
            offset_of=lambda a, b: a.min()
        ),
        "the offset is the mean; you took the middle between the smallest and the largest": _quantize_with(
            offset_of=lambda a, b: (a.min() + a.max()) / 2
        ),
        "the offset is the mean, not the median": _quantize_with(offset_of=lambda a, b: a.median()),
        "a block's scale is its largest *absolute* value: a scale far below the mean counts too": _quantize_with(
            largest_of=lambda block, raw: block.max()
        ),
        "a block's scale keeps the sign of the value that is farthest from zero: take its absolute value": _quantize_with(
            largest_of=lambda block, raw: block[block.abs().argmax()]
        ),
        "a block's scale is its largest absolute value, so that all of it fits between −1 and 1; you took the standard "
        "deviation": _quantize_with(largest_of=lambda block, raw: block.std()),
        "a block's scale is its largest absolute value; you took half the distance from the smallest to the largest": _quantize_with(
            largest_of=lambda block, raw: (block.max() - block.min()) / 2
        ),
        "a block's scale is what its values are divided by; you returned the inverse": lambda absmax, levels, block_size: (
            (found := quantize(absmax, levels, block_size))[0],
            found[1].reciprocal(),
            found[2],
        ),
        "the code is the index of the nearest level, whatever the levels are; you rounded to evenly spaced ones": _quantize_with(
            code_of=lambda scaled, levels: ((scaled + 1) / 2 * (len(levels) - 1)).round()
        ),
        "the nearest level has the smallest *absolute* difference": _quantize_with(
            code_of=lambda scaled, levels: (scaled[:, None] - levels).argmin(1)
        ),
        "the mean comes off first: you took a block's scale from values that still have it": _quantize_with(
            largest_of=lambda block, raw: raw.abs().max()
        ),
        "the zeros that fill the last block were counted in the mean: take it of the scales alone": _quantize_with(
            offset_of=lambda a, b: _with_zeros(a, b).mean()
        ),
        "the last block was filled with zeros before the mean was taken and came off: they were counted in it, and became −mean; fill it "
        "up once the mean is off": _quantize_with(offset_of=lambda a, b: _with_zeros(a, b).mean(), padding=_with_zeros),
        "zeros were added before the mean came off: they became −mean and set the last block's scale": _quantize_with(padding=_with_zeros),
        "one scale for all: each block of block_size scales has its own": _one_scale,
        "the code is that of the nearest level; you took the next level below": _quantize_with(
            code_of=lambda scaled, levels: (torch.searchsorted(levels, scaled, right=True) - 1).clamp(min=0)
        ),
        "the code is that of the nearest level; you took the next level above": _quantize_with(
            code_of=lambda scaled, levels: torch.searchsorted(levels, scaled).clamp(max=len(levels) - 1)
        ),
        "1e-8 is added to a block's scale: beside scales of 1e-6 that is no longer nothing, and it moves codes; add nothing": _with_epsilon,
        "1e-8 is added to what a block is divided by: beside scales of 1e-6 that is no longer nothing, and it moves codes; add "
        "nothing": lambda absmax, levels, block_size: (
            _with_epsilon(absmax, levels, block_size)[0],
            *quantize(absmax, levels, block_size)[1:],
        ),
    },
    rtol=1e-5,
    atol=1e-12,
)

# -------------------------------------------------------------------------------------------------- a weight read back


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


def dequantize(q: Stored) -> Tensor:
    n = torch.Size(q.shape).numel()
    scales = q.dynamic[q.codes.int()] * q.absmax.repeat_interleave(q.second_block)[: len(q.codes)] + q.offset
    codes = torch.stack([q.packed >> 4, q.packed & 15], 1).view(-1)[:n]
    return (q.levels[codes.int()] * scales.repeat_interleave(q.block_size)[:n]).to(q.dtype).view(q.shape)


def _dequantize_again(q: Stored) -> Tensor:
    values = torch.empty(2 * len(q.packed))
    values[::2], values[1::2] = q.levels[q.packed.long() // 16], q.levels[q.packed.long() % 16]
    weight = values[: torch.Size(q.shape).numel()]
    for i, block in enumerate(weight.split(q.block_size)):
        block *= q.dynamic[int(q.codes[i])] * q.absmax[i // q.second_block] + q.offset
    return weight.reshape(q.shape).to(q.dtype)


def _dequantize_with(
    scale: Callable = lambda level, absmax, offset: level * absmax + offset,
    level: Callable = lambda q: q.dynamic[q.codes.int()],
    second: Callable = lambda q: q.absmax.repeat_interleave(q.second_block)[: len(q.codes)],
    spread: Callable = lambda scales, q, n: scales.repeat_interleave(q.block_size)[:n],
    nibbles: Callable = lambda packed: (packed >> 4, packed & 15),
    last: Callable = lambda weight, q: weight.to(q.dtype).view(q.shape),
):
    """The right answer with one step changed."""

    def answer(q: Stored) -> Tensor:
        n = torch.Size(q.shape).numel()
        codes = torch.stack(nibbles(q.packed), 1).view(-1)[:n]
        return last(q.levels[codes.int()] * spread(scale(level(q), second(q), q.offset), q, n), q)

    return answer


def _in_16_bits(q: Stored) -> Tensor:
    n = torch.Size(q.shape).numel()
    scales = q.dynamic[q.codes.int()] * q.absmax.repeat_interleave(q.second_block)[: len(q.codes)] + q.offset
    codes = torch.stack([q.packed >> 4, q.packed & 15], 1).view(-1)[:n]
    return (q.levels.to(q.dtype)[codes.int()] * scales.to(q.dtype).repeat_interleave(q.block_size)[:n]).view(q.shape)


def _but_for_ties(weight: object, right: Tensor) -> object:
    """``right`` where ``weight`` is it, but for a few places in which the last float32 digit decided how to round to 16 bits."""
    if not isinstance(weight, Tensor) or weight.shape != right.shape or weight.dtype != right.dtype:
        return weight
    near = torch.isclose(weight.float(), right.float(), rtol=2**-7, atol=0)
    return right if near.all() and (weight != right).float().mean() < 0.02 else weight


def _observe_dequantize(answer, seed: int) -> dict:
    generator, seen = torch.Generator().manual_seed(seed), {}
    usual, even = (NF4_CODEBOOK, dynamic_codebook()), (torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 256))
    cases = [
        ((11, 37), torch.float32, 16, 8, usual),
        ((48, 64), torch.float32, 64, 16, usual),
        ((29, 5), torch.bfloat16, 16, 4, usual),
        ((331,), torch.float16, 32, 4, even),
    ]
    for shape, dtype, block_size, second_block, (levels, dynamic) in cases:
        spread = 1 + torch.rand(shape, generator=generator).view(-1).cumsum(0).view(shape) / 50  # blocks of unlike size
        q = quantize_nf4((torch.randn(shape, generator=generator) * spread).to(dtype), block_size)
        s = quantize_scales(q.absmax, second_block)
        own = levels is not NF4_CODEBOOK
        offset = -s.offset if own else s.offset  # most scales are negative then: nothing but arithmetic is asked for
        stored = Stored(
            *(q.packed.view(-1), levels.clone(), s.codes, dynamic.clone()),
            *(s.absmax, offset, block_size, second_block, shape, dtype),
        )
        weight = looked_up(answer, stored)
        size = " × ".join(map(str, shape)) if len(shape) > 1 else f"{shape[0]} weights on one axis"
        where = f"{size}, blocks of {block_size}, scales in blocks of {second_block}{', levels of its own and scales below zero' * own}"
        seen[f"weight, {where}"] = weight if dtype == torch.float32 else _but_for_ties(weight, dequantize(stored))
        if weight is AS_MASK:
            return seen
    return seen


restore = Check(
    task="a doubly quantized weight, read back",
    observe=_observe_dequantize,
    reference=dequantize,
    second=_dequantize_again,
    misconceptions={
        "a scale below zero is set to zero: a scale is dynamic[code]·absmax + offset, whatever comes out": _dequantize_with(
            scale=lambda level, absmax, offset: (level * absmax + offset).clamp(min=0)
        ),
        "a scale below zero loses its sign: a scale is dynamic[code]·absmax + offset, whatever comes out": _dequantize_with(
            scale=lambda level, absmax, offset: (level * absmax + offset).abs()
        ),
        "the offset is missing: a scale is dynamic[code]·absmax + offset": _dequantize_with(
            scale=lambda level, absmax, offset: level * absmax
        ),
        "the offset comes after the product: dynamic[code]·absmax + offset, not (dynamic[code] + offset)·absmax": _dequantize_with(
            scale=lambda level, absmax, offset: (level + offset) * absmax
        ),
        "the offset is added, not taken off: taking it off was the first step of quantizing": _dequantize_with(
            scale=lambda level, absmax, offset: level * absmax - offset
        ),
        "the nibbles are swapped: the first of two weights is in the high four bits": _dequantize_with(
            nibbles=lambda packed: (packed & 15, packed >> 4)
        ),
        "a code is an index into the dynamic map, not a number to divide by 127": _dequantize_with(
            level=lambda q: (q.codes.float() - 127) / 128
        ),
        "scales of scales are dealt out in turn: each serves second_block neighbours, so repeat_interleave": _dequantize_with(
            second=lambda q: q.absmax.repeat(q.second_block)[: len(q.codes)]
        ),
        "the first scale of scales is used for all: each second_block scales have their own": _dequantize_with(
            second=lambda q: q.absmax[:1].expand(len(q.codes))
        ),
        "scales are dealt out in turn: each serves block_size neighbouring weights, so repeat_interleave": _dequantize_with(
            spread=lambda scales, q, n: scales.repeat(q.block_size)[:n]
        ),
        "the products are in 16 bits: level · scale in float32, then one rounding": _in_16_bits,
        "the scales were rounded to 16 bits before the product: keep them in float32, and round once, at the end": lambda q: (
            _dequantize_with(spread=lambda scales, q, n: scales.to(q.dtype).float().repeat_interleave(q.block_size)[:n])(q)
        ),
        "every 16-bit weight comes out as bfloat16: there is float16 too, so take q.dtype": _dequantize_with(
            last=lambda weight, q: weight.to(torch.float32 if q.dtype == torch.float32 else torch.bfloat16).view(q.shape)
        ),
        "NF4's levels by heart: codes are indices into q.levels, whatever they are": lambda q: dequantize(q._replace(levels=NF4_CODEBOOK)),
        "the dynamic map by heart: the scales' codes are indices into q.dynamic, whatever it is": lambda q: dequantize(
            q._replace(dynamic=dynamic_codebook())
        ),
        "both code books by heart: use q.levels and q.dynamic, whatever they are": lambda q: dequantize(
            q._replace(levels=NF4_CODEBOOK, dynamic=dynamic_codebook())
        ),
        "torch takes an index of dtype uint8 for a mask, as it does one of bool: a mask selects entries, and has to be as long as what it "
        "selects from; codes are positions, so index with codes.int(), at both levels": lambda q: q.dynamic[q.codes] * q.absmax[0],
        "the two block sizes are swapped, or one is used for both levels": _dequantize_with(
            second=lambda q: q.absmax.repeat_interleave(q.block_size)[: len(q.codes)]
        ),
        "a level stands for a scale by itself here: multiply it by the scale of its block first, then add the offset": _dequantize_with(
            scale=lambda level, absmax, offset: level + offset
        ),
        "the result stays float32: give it the weight's dtype, after the product": _dequantize_with(
            last=lambda weight, q: weight.view(q.shape)
        ),
        "the result is flat: give it the weight's shape": _dequantize_with(last=lambda weight, q: weight.to(q.dtype)),
    },
    rtol=1e-5,
)

# -------------------------------------------------------------------------------------------- what the saving can buy

BLOCKS = tuple(2**i for i in range(3, 13))  # 8 … 4096


def smallest_block(budget: float, second_block: int | None) -> int | None:
    for block in BLOCKS:
        constants = 32 / block if second_block is None else 8 / block + 32 / (block * second_block)
        if 4 + constants <= budget:
            return block
    return None


def _smallest_block_again(budget: float, second_block: int | None) -> int | None:
    each = 32 if second_block is None else 8 + 32 / second_block  # bits of a scale
    fitting = [block for block in BLOCKS if each <= (budget - 4) * block]
    return min(fitting, default=None)


def _smallest_with(
    plain: Callable = lambda b: 32 / b,
    double: Callable = lambda b, s: 8 / b + 32 / (b * s),
    fits: Callable = lambda bits, budget: 4 + bits <= budget,
    choose: Callable = min,
    smallest: int = 3,
    largest: int = 13,
    without: int | None = None,
):
    """The right answer with one part changed."""

    def answer(budget: float, second_block: int | None) -> int | None:
        blocks = [2**i for i in range(smallest, largest)]
        bits = {block: plain(block) if second_block is None else double(block, second_block) for block in blocks}
        return choose([block for block in blocks if fits(bits[block], budget)], default=without)

    return answer


def _observe_smallest(answer, seed: int) -> dict:
    rng, seen = random.Random(seed), {}
    for bits in (4.0, 3.5):  # the codes alone take all of it, or more
        for words, second in (("in float32", None), ("in 8 bits", 256)):
            seen[f"a budget of {bits:g} bits, scales {words}"] = answer(bits, second)
    for second in (None, 64, rng.choice([32, 128, 256, 512])):
        words = "in float32" if second is None else f"in 8 bits, in blocks of {second}"
        for block in (*rng.sample(BLOCKS[1:-1], 4), 8, 4096):  # the ends too: above the first and below the last there is nothing
            exact = 4 + (32 / block if second is None else 8 / block + 32 / (block * second))
            for budget in (exact, exact * (1 - 1e-6), 4 + 8 / block, 4 + 32 / block + rng.random() / 100, 8 + 32 / block):
                seen[f"a budget of {budget:.6f} bits, scales {words}"] = answer(budget, second)
    return seen


budget = Check(
    task="the smallest block that a budget of bits allows",
    observe=_observe_smallest,
    reference=smallest_block,
    second=_smallest_block_again,
    misconceptions={
        "that is the largest block that fits: the smallest has the least error": _smallest_with(choose=max),
        "blocks of 8 weights are the smallest asked for: a large budget allows no smaller ones": _smallest_with(smallest=2),
        "the largest blocks are of 4096 weights: where they don't fit, the answer is None": _smallest_with(largest=14),
        "4096 is one of the sizes: range(3, 13) ends at 12": _smallest_with(largest=12),
        "8 is one of the sizes: the powers of two begin at 2**3": _smallest_with(smallest=4),
        "None where no size fits, not the largest one": _smallest_with(without=4096),
        "None where no size fits, not 0": _smallest_with(without=0),
        "the codes themselves are missing: four bits a weight before any scale": _smallest_with(fits=lambda bits, budget: bits <= budget),
        "exactly the budget is within the budget": _smallest_with(fits=lambda bits, budget: 4 + bits < budget),
        "you ignored second_block: with it a scale takes 8 bits, and a float32 for each second_block scales": _smallest_with(
            double=lambda b, s: 32 / b
        ),
        "the scales of the scales are missing: 32/(block·second_block) bits": _smallest_with(double=lambda b, s: 8 / b),
        "double quantization does not make scales free: 8 bits each, and their own scales": _smallest_with(double=lambda b, s: 0),
        "a second-level scale serves second_block scales, which are block·second_block weights": _smallest_with(
            double=lambda b, s: 8 / b + 32 / s
        ),
        "an unquantized scale has 32 bits; you counted 16": _smallest_with(plain=lambda b: 16 / b),
        "scales are counted in bytes: 32 bits each, or 8": _smallest_with(plain=lambda b: 4 / b, double=lambda b, s: 1 / b + 4 / (b * s)),
    },
)
