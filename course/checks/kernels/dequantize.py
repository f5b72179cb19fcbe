"""Exercise 13.1: NF4 back to weights, for every size."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from course.checking import Check, Seen, but
from course.checks.kernels.shared import amid, poisoned, seen, traced
from reference.nf4 import NF4_CODEBOOK


@triton.jit
def _kernel(
    packed_ptr, absmax_ptr, levels_ptr, out_ptr, n, limit,
    BLOCK: tl.constexpr, TILE: tl.constexpr, MASK: tl.constexpr, MASK_LOADS: tl.constexpr, HIGH_FIRST: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    everywhere = place >= 0
    mask = place < limit if MASK else everywhere
    read = mask if MASK_LOADS else everywhere
    byte = tl.load(packed_ptr + place // 2, read, other=0)
    code = tl.where(place % 2 == (0 if HIGH_FIRST else 1), byte >> 4, byte & 15)
    value = tl.load(levels_ptr + code.to(tl.int32))
    if SCALE == 1:
        value *= tl.load(absmax_ptr + place // BLOCK, read, other=0.0)
    elif SCALE == 4:
        value = value.to(out_ptr.dtype.element_ty)
        value *= tl.load(absmax_ptr + place // BLOCK, read, other=0.0).to(out_ptr.dtype.element_ty)
    elif SCALE == 3:
        value *= tl.load(absmax_ptr + place // 2 // BLOCK, read, other=0.0)
    elif SCALE == 2:
        value *= tl.load(absmax_ptr + tl.program_id(0))
    tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask)


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    levels: Tensor,
    out: Tensor,
    block_size: int,
    *,
    mask=True,
    mask_loads=True,
    block=lambda block_size: block_size,
    limit=lambda n: n,
    programs=lambda n: -(-n // 128),
    high_first=True,
    scale=1,
) -> None:
    """The worked answer: a program makes 128 values; each place finds its own half byte and its own scale."""
    n = out.numel()
    grid = (max(programs(n), 1),)
    _kernel[grid](packed, absmax, levels, out, n, limit(n), block(block_size), 128, mask, mask_loads, high_first, scale)


@triton.jit
def _by_bytes(packed_ptr, absmax_ptr, levels_ptr, out_ptr, n, BLOCK: tl.constexpr, TILE: tl.constexpr):
    start = tl.program_id(0) * TILE
    at = start + tl.arange(0, TILE)
    byte = tl.load(packed_ptr + at, 2 * at < n, other=0).to(tl.int32)
    for half in tl.static_range(2):
        place = 2 * at + half
        level = tl.load(levels_ptr + (byte >> (4 - 4 * half)) % 16)
        scale = tl.load(absmax_ptr + place // BLOCK, place < n, other=0.0)
        tl.store(out_ptr + place, (level * scale).to(out_ptr.dtype.element_ty), place < n)


def by_bytes(packed: Tensor, absmax: Tensor, levels: Tensor, out: Tensor, block_size: int) -> None:
    _by_bytes[(triton.cdiv(len(packed), 32),)](packed, absmax, levels, out, out.numel(), block_size, 32)


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)
    odd = 2 * int(torch.randint(1050, 1300, (1,), generator=g)) + 1  # more than a program can be expected to make
    for n, block_size, dtype in ((1024, 32, torch.float32), (odd, 64, torch.float32), (1, 64, torch.float32), (333, 32, torch.float16)):
        packed = amid(torch.randint(256, ((n + 1) // 2,), generator=g, dtype=torch.uint8))
        absmax = amid(0.5 + torch.rand(-(-n // block_size), generator=g))
        levels = amid(torch.randn(16, generator=g).sort().values)  # any: an answer that has NF4's in it ignores them
        out = poisoned(n, dtype=dtype)
        label = f"{n} {str(dtype).removeprefix('torch.')} weights in blocks of {block_size}"
        yield from seen(traced(answer, packed, absmax, levels, out, block_size), label, out, packed)


check = Check(
    task="dequantize in a kernel: every size, nothing touched outside",
    observe=observe,
    reference=dequantize,
    second=by_bytes,
    rtol=0.0,  # a product and a rounding
    atol=0.0,
    misconceptions={
        "there is no mask: the last program reads and writes behind the tensors; pass `place < n` to load and store": but(mask=False),
        "the loads have no mask: what does not exist is read as well; a load needs the mask as much as the store": but(mask_loads=False),
        "the mask lets one place too many through: places go from 0 to n − 1": but(limit=lambda n: n + 1),
        "the last places stay unwritten: there are too few programs; n / tile, rounded up, is triton.cdiv(n, tile)": but(
            programs=lambda n: n // 128
        ),
        "the last place stays unwritten: the mask ends one too early": but(limit=lambda n: n - 1),
        "the half bytes are read in the wrong order: the first of two values is in the high four bits": but(high_first=False),
        "the levels are not scaled: multiply each by the absmax of its block": but(scale=0),
        "blocks are taken to hold 64 values: pass block_size to the kernel": but(block=lambda block_size: 64),
        "blocks are counted in bytes, so each scale serves two: a block holds block_size values, absmax[place // block_size]": but(scale=3),
        "level and scale are rounded before the product: multiply in float32, and round once, at the end": but(scale=4),
        "the levels are those of NF4, whatever is given: load them from `levels`": (
            lambda packed, absmax, levels, out, block_size: dequantize(packed, absmax, NF4_CODEBOOK.clone(), out, block_size)
        ),
        "a program uses one scale for all of its values: the scale belongs to a block, absmax[place // block_size]": but(scale=2),
    },
)
