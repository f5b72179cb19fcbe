"""Other ways to write the NF4 kernels, to be measured beside those of the course (:mod:`benchmarks.kernel_limits`).

Each gives what the course's kernel gives. One that a measurement finds faster goes into ``reference/kernels/nf4``; the others go.

- quantize, pairs: for bfloat16, read two at a time in 32 bits, so that nothing has to be taken apart and put together again. A
  bfloat16 over a bfloat16 takes few values, with gaps around each midpoint. So a midpoint may be moved within its gap, until its last
  four bits are the number of midpoints below: one table and one barrier instead of two of each. The cell comes out of a sum with
  1.5 · 2²³, whose last bits are the rounded number, in place of a conversion, which starts at a quarter of the rate of others. The
  comparison is the sign of a difference: no predicate, no choice. For an H100 the compiler makes 14 instructions per weight of it, and
  23 of the course's.
- dequantize, loop: a program goes on from tile to tile, and the next tile's codes and scales are on their way while it decodes this
  one. Under double quantization the level of a scale has to wait for its code; here it waits behind the work on another tile.
- few rows: more rows of the weight for a program. Each program reads all of x, so x crosses the second cache less often.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from reference.blockwise import midpoints
from reference.kernels.launch import PTX, counters, multiprocessors
from reference.kernels.nf4 import codes as nf4_codes
from reference.kernels.nf4 import rows as nf4_rows
from reference.kernels.nf4 import vector as nf4_vector
from reference.kernels.nf4.pairs import pair_table
from reference.kernels.nf4.permute import byte_table
from reference.kernels.nf4.scales import decode_scales, fetch_scales, nested, scale_tensors
from reference.nf4 import NF4_CODEBOOK, NF4Tensor

CELLS = 32
ROUND = tl.constexpr(12582912.0)  # 1.5 · 2²³: added to a small number it leaves the rounded one in the last bits
NEVER = 1.5  # no scaled weight is above it


# ---- quantize


def scaled_bfloat16() -> Tensor:
    """All values from 1/64 to 1, sorted, that a positive bfloat16 can have when it is scaled by the absmax of its block."""
    digits = torch.arange(128, 256, dtype=torch.float64) / 128
    found = []
    for exponent in (0, 126, 127):  # where the inverse has all its digits, and where it is subnormal
        absmax = (digits * 2.0**exponent).float()
        inverse = torch.ones(()) / absmax
        for less in range(8):
            found.append((digits * 2.0 ** (exponent - less)).float()[:, None] * inverse)
    tiny = torch.arange(1, 128, dtype=torch.float64) * 2.0**-133  # below 1e-38, by which the kernels then divide
    found.append(tiny.float() * (torch.ones(()) / torch.tensor(1e-38)))
    values = torch.cat([each.flatten() for each in found]).unique()
    return values[(values >= 1 / 64) & (values <= 1.25)]


@lru_cache
def cell_table(device: torch.device) -> Tensor:
    """(32,) int32, of cell n mod 32, n = round(15 · scaled): its midpoint, moved within its gap, and in the last four bits the code below.

    Raises:
        ArithmeticError: a gap is too narrow.
    """
    between, values, entries = midpoints(NF4_CODEBOOK), scaled_bfloat16(), []
    for place in range(CELLS):
        n = (place + 16) % CELLS - 16
        below, above = torch.searchsorted(between, (torch.tensor([-0.5, 0.5]) + n) / 15).tolist()
        if below == above:
            entries.append((torch.tensor(NEVER).view(torch.int32) | below).item())
            continue
        size = between[below].abs()
        # Above a midpoint means greater: one that is a value itself belongs to the side towards −∞.
        i = torch.searchsorted(values, size, right=bool(between[below] > 0)).item()
        low, high = values[i - 1 : i + 1].view(torch.int32).tolist()
        moved = (low + 16) & -16 | below
        if not low < moved < high:
            raise ArithmeticError(f"between {values[i - 1]} and {values[i]} there is no float that ends in {below:04b}")
        entries.append(moved - (1 << 31) if between[below] < 0 else moved)
    return torch.tensor(entries, dtype=torch.int64).int().to(device)


@triton.jit
def _codes(scaled, table):
    """The codes of weights over their absmax."""
    cell = (scaled * 15 + ROUND).to(tl.int32, bitcast=True) & 31
    entry = tl.gather(table, tl.ravel(cell), 0).reshape(scaled.shape)
    short = entry.to(tl.float32, bitcast=True) - scaled  # negative above the midpoint
    return (entry & 15) + (short.to(tl.uint32, bitcast=True) >> 31).to(tl.int32)


@triton.jit
def _quantize_kernel(
    pairs_ptr, packed_ptr, absmax_ptr, bad_ptr, table_ptr, blocks, BLOCK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    mask = (block < blocks)[:, None]
    byte = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    pair = tl.load(pairs_ptr + byte, mask, other=0)  # (ROWS, BLOCK/2), the first of two in the low half
    table = tl.load(table_ptr + tl.arange(0, 32))
    # Without its sign bit a float sorts like an integer; what the low half holds does not change the order of the high halves.
    second = tl.max(pair & 0x7FFF7FFF, 1) & 0x7FFF0000
    largest = tl.maximum(second, tl.max((pair & 0x7FFF) << 16, 1))  # (ROWS,)
    tl.store(bad_ptr, 1, mask=tl.max(largest, 0) >= 0x7F800000)
    absmax = largest.to(tl.float32, bitcast=True)
    tl.store(absmax_ptr + block, absmax, block < blocks)
    divisor = tl.maximum(absmax, tl.full((ROWS,), 1e-38, tl.float32))
    inverse = tl.math.div_rn(tl.full((ROWS,), 1, tl.float32), divisor)[:, None]
    high = _codes((pair << 16).to(tl.float32, bitcast=True) * inverse, table)
    low = _codes((pair & -65536).to(tl.float32, bitcast=True) * inverse, table)
    tl.store(packed_ptr + byte, (high * 16 + low).to(tl.uint8), mask)


def quantize(weight: Tensor, block_size: int = 64, tile: int = 2048, warps: int = 2) -> NF4Tensor:
    """As the course's, for bfloat16 in whole blocks and without its check."""
    flat = weight.detach().reshape(-1)
    n, blocks, rows = len(flat), len(flat) // block_size, max(1, tile // block_size)
    packed = torch.empty(n // 2, 1, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(blocks, device=flat.device)
    bad = torch.zeros((), dtype=torch.int32, device=flat.device)
    _quantize_kernel[(-(blocks // -rows),)](
        flat.view(torch.int32), packed, absmax, bad, cell_table(flat.device), blocks, block_size, rows, num_warps=warps
    )
    return NF4Tensor(packed, absmax, weight.shape, weight.dtype, block_size)


# ---- dequantize


@triton.jit
def _dequantize_kernel(
    packed_ptr, absmax_ptr, nested_ptr, offset_ptr, dynamic_ptr, levels_ptr, out_ptr, blocks, tiles,
    HALF: tl.constexpr, ROWS: tl.constexpr, NESTED: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    row, tile = tl.arange(0, ROWS), tl.program_id(0)
    levels = tl.load(levels_ptr + tl.arange(0, 16))
    block = tile.to(tl.int64) * ROWS + row
    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    packed = tl.load(packed_ptr + byte, (block < blocks)[:, None], other=0, eviction_policy="evict_first")
    codes, outer = fetch_scales(absmax_ptr, nested_ptr, block, block < blocks, NESTED, DOUBLE)
    for _ in range(tile, tiles, tl.num_programs(0)):
        ahead = block + tl.num_programs(0) * ROWS  # after the last tile: all masked
        there = ahead < blocks
        byte = ahead[:, None] * HALF + tl.arange(0, HALF)[None, :]
        next_packed = tl.load(packed_ptr + byte, there[:, None], other=0, eviction_policy="evict_first")
        next_codes, next_outer = fetch_scales(absmax_ptr, nested_ptr, ahead, there, NESTED, DOUBLE)
        word = packed.to(tl.int32)
        level = tl.gather(levels, tl.ravel(tl.join(word >> 4, word & 15)), 0).reshape(ROWS, 2 * HALF)
        absmax = decode_scales(codes, outer, offset_ptr, dynamic_ptr, DOUBLE)
        place = block[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
        tl.store(out_ptr + place, (level * absmax[:, None]).to(out_ptr.dtype.element_ty), (block < blocks)[:, None])
        block, packed, codes, outer = ahead, next_packed, next_codes, next_outer


def dequantize(q: NF4Tensor, tile: int = 4096, warps: int = 4, programs: int = 8) -> Tensor:
    """As the course's, for whole blocks; ``programs`` for each multiprocessor."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.packed.device)
    blocks, rows = out.numel() // q.block_size, max(1, tile // q.block_size)
    tiles = -(blocks // -rows)
    _dequantize_kernel[(min(tiles, programs * multiprocessors(out.device)),)](
        q.packed, *scale_tensors(q), out, blocks, tiles, q.block_size // 2, rows, *nested(q), num_warps=warps, enable_fp_fusion=False
    )
    return out


# ---- the course's own kernels in other sizes


def quantize_in(weight: Tensor, block_size: int = 64, tile: int = 2048, warps: int = 2) -> NF4Tensor:
    with sizes(nf4_codes.QUANTIZE, tile=tile, num_warps=warps):
        return nf4_codes.quantize_nf4(weight, block_size, check=False)


def dequantize_in(q: NF4Tensor, tile: int = 4096, warps: int = 2) -> Tensor:
    with sizes(nf4_codes.DEQUANTIZE, tile=tile, num_warps=warps):
        return nf4_codes.dequantize_nf4(q)


@contextmanager
def sizes(settings: dict, **others) -> Iterator[None]:
    """Inside, a kernel is launched with other sizes."""
    before = dict(settings)
    settings.update(others)
    try:
        yield
    finally:
        settings.update(before)


def one_row(x: Tensor, q: NF4Tensor, warps: int = 4, programs: int = 4) -> Tensor:
    """The kernel for one row; ``programs`` for each multiprocessor."""
    (N, K), block, tiles = q.shape, q.block_size, -(q.shape[0] // -nf4_vector.ROWS)
    each = -(tiles // -(programs * multiprocessors(x.device)))
    out = torch.empty(1, N, dtype=x.dtype, device=x.device)
    blocks = K // block
    nf4_vector._vector_kernel[(-(tiles // -each),)](
        x, q.packed.view(-1).view(torch.int32), *scale_tensors(q), pair_table(x.device, x.dtype), x, out, N, blocks // 2, blocks % 2,
        block, *nested(q), False, K % (warps * nf4_vector.FEATURES) == 0, PTX, warps,
        num_warps=warps, num_stages=1, maxnreg=nf4_vector.REGISTERS // (32 * warps * programs),
    )  # fmt: skip
    return out


def few_rows(x: Tensor, q: NF4Tensor, rows: int = 64, warps: int = 4, programs: int = 4) -> Tensor:
    """The kernel for a few rows, and for as many as 128: ``rows`` of the weight for a program, a multiple of 16 for each warp."""
    (M, K), (N, _), block = x.shape, q.shape, q.block_size
    rows_x, tiles = max(16, triton.next_power_of_2(M)), -(N // -rows)
    parts = max(1, min(programs * multiprocessors(x.device) // tiles, K // block))
    shares = torch.empty(parts, M, N, device=x.device) if parts > 1 else x
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    nf4_rows._rows_kernel[(tiles, parts)](
        x, q.packed.view(-1).view(torch.int32), *scale_tensors(q), byte_table(x.device, x.dtype), x, shares, counters(tiles, x.device),
        out, M, N, K // block, block, *nested(q), False, PTX, rows_x, rows, warps, num_warps=warps, num_stages=1,
    )  # fmt: skip
    return out


# ---- what is measured


def named(way: Callable, name: str, *sizes: tuple) -> dict[str, Callable]:
    """Name with its sizes -> the way in these sizes."""
    return {f"{name} {' × '.join(map(str, each))}": partial(way, **dict(zip(SIZES[way], each, strict=True))) for each in sizes}


SIZES = {
    quantize: ("tile", "warps"),
    quantize_in: ("tile", "warps"),
    dequantize: ("tile", "warps", "programs"),
    dequantize_in: ("tile", "warps"),
    one_row: ("warps", "programs"),
    few_rows: ("rows", "warps", "programs"),
}
QUANTIZE = named(quantize, "pairs", (1024, 1), (2048, 1), (2048, 2), (4096, 2), (4096, 4), (8192, 4))
QUANTIZE |= named(quantize_in, "ours", (1024, 1), (4096, 2), (4096, 4))
DEQUANTIZE = named(dequantize, "loop", (2048, 2, 16), (4096, 2, 8), (4096, 4, 8), (4096, 4, 4), (8192, 4, 4), (8192, 8, 2))
DEQUANTIZE |= named(dequantize_in, "ours", (2048, 1), (2048, 2), (4096, 4), (8192, 4))
ONE_ROW = named(one_row, "ours", (4, 2), (4, 3), (2, 6), (8, 2), (8, 1), (16, 1))
FEW_ROWS = named(few_rows, "ours", (64, 4, 3), (64, 4, 8), (128, 4, 2), (128, 4, 4), (128, 8, 2), (128, 8, 3), (256, 8, 1))
MORE_ROWS = named(few_rows, "ours", (64, 4, 2), (64, 4, 4), (128, 8, 1), (128, 8, 2))  # 65 to 128: others have too few registers
