"""Exercise 4: restoring what was packed."""

import torch
from torch import Tensor

from course.checking import Check, Seen, but
from course.checks.blockwise_quantization import TINY
from reference.nf4 import NF4_CODEBOOK, quantize_nf4


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    shape: tuple,
    block_size: int,
    dtype: torch.dtype,
    *,
    unpack=lambda packed: torch.stack([packed >> 4, packed & 15], 1).flatten(),
    look_up=lambda codes: NF4_CODEBOOK[codes.int()],
    spread=lambda absmax, n, size: absmax.repeat_interleave(size)[:n],
    values=lambda levels, scales, dtype: (levels * scales).to(dtype),
    arrange=torch.reshape,
) -> Tensor:
    """The worked answer: each code's level times the scale of its block."""
    n = torch.Size(shape).numel()
    levels = look_up(unpack(packed)[:n])  # (n,): without the spare half
    scales = spread(absmax, n, block_size)  # (n,): the last block may be short
    return arrange(values(levels, scales, dtype), shape)


def by_pairs(packed: Tensor, absmax: Tensor, shape: tuple, block_size: int, dtype: torch.dtype) -> Tensor:
    pairs = torch.cartesian_prod(NF4_CODEBOOK, NF4_CODEBOOK)  # (256, 2): row b holds both levels of byte b
    flat = pairs[packed.long()].flatten()[: torch.Size(shape).numel()]
    return torch.cat([piece * scale for piece, scale in zip(flat.split(block_size), absmax, strict=True)]).to(dtype).reshape(shape)


AS_MASK = "an IndexError: the index was taken for a mask"


def looked_up(answer, *arguments) -> object:
    """What the answer gives; ``AS_MASK`` where torch took an index, uint8 or bool, for a mask and found it of another length."""
    try:
        return answer(*arguments)
    except IndexError as error:
        if "The shape of the mask" not in str(error):
            raise
        return AS_MASK


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)
    for shape, block_size, dtype, size in (
        ((4, 32), 64, torch.float32, 1.0),
        ((7, 15), 32, torch.float32, 1.0),
        ((333,), 64, torch.bfloat16, 1.0),
        ((3, 50, 5), 128, torch.float16, 1.0),
        ((2, 96), 64, torch.float32, TINY),
    ):
        x = size * torch.randn(shape, generator=g) * (0.5 + torch.rand(1, generator=g))
        q = quantize_nf4(x, block_size)
        label = f"a {str(dtype).removeprefix('torch.')} tensor of shape {tuple(shape)} in blocks of {block_size}"
        label += f", values of about {TINY:.0e}" * (size == TINY)
        found = looked_up(answer, q.packed.view(-1).clone(), q.absmax.clone(), tuple(shape), block_size, dtype)
        yield label, found
        if found is AS_MASK:
            return


check = Check(
    task="restoring packed NF4: the high nibble first, each block its scale, one rounding, any shape and length",
    observe=observe,
    reference=dequantize,
    second=by_pairs,
    rtol=0.0,  # a table lookup, one float32 product and one rounding: nothing is left to differ
    atol=0.0,
    misconceptions={
        "the nibbles are read in the wrong order: every weight sits where its neighbour belongs; the first is in the high bits": but(
            unpack=lambda packed: torch.stack([packed & 15, packed >> 4], 1).flatten()
        ),
        "the levels are not scaled: multiply each by the absmax of its block": but(values=lambda levels, scales, dtype: levels.to(dtype)),
        "the levels are divided by absmax: it was divided by when quantizing; multiply": but(
            values=lambda levels, scales, dtype: (levels / scales).to(dtype)
        ),
        "the scales are spread as if all blocks were equally long: the last block may be short, the others hold block_size values": but(
            spread=lambda absmax, n, size: absmax[torch.arange(n) * len(absmax) // n]
        ),
        "the scales go round and round, one value each: absmax[b] belongs to block_size neighbours (repeat_interleave)": but(
            spread=lambda absmax, n, size: absmax.repeat(size)[:n]
        ),
        "every block has the first one's scale: absmax[b] belongs to block b": but(spread=lambda absmax, n, size: absmax[:1].expand(n)),
        "the values are right but float32: round to the dtype that is asked for": but(values=lambda levels, scales, dtype: levels * scales),
        "levels and scales are rounded to the dtype before they are multiplied: multiply in float32, then round once": but(
            values=lambda levels, scales, dtype: levels.to(dtype) * scales.to(dtype)
        ),
        "the levels are rounded to the dtype before they are multiplied: multiply in float32, then round once": but(
            values=lambda levels, scales, dtype: (levels.to(dtype) * scales).to(dtype)
        ),
        "all high halves come first, then all low ones: the two halves of a byte are neighbours (stack and flatten, not cat)": but(
            unpack=lambda packed: torch.cat([packed >> 4, packed & 15])
        ),
        "the values are right but flat: give them the tensor's shape": but(arrange=lambda values, shape: values),
        "torch takes an index of dtype uint8 for a mask, as it does one of bool: a mask selects entries, and has to be as long as what it "
        "selects from; codes are positions, so index with NF4_CODEBOOK[codes.int()]": but(look_up=lambda codes: NF4_CODEBOOK[codes]),
        "codes are looked up in evenly spaced levels: use NF4_CODEBOOK": but(look_up=lambda codes: torch.linspace(-1, 1, 16)[codes.int()]),
    },
)
