"""A few rows times an NF4 weight that is decoded on its way to the tensor cores: see :mod:`reference.kernels.nf4`.

Three things make it fast. Levels come out of registers, by instructions that permute bytes. They meet the tensor cores unscaled and in
the very registers where those want them; a block's scale is multiplied in afterwards, into its product. And programs that share a row of
the weight, each with a part of the features, need no second launch to add their parts up: the last one to arrive does.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from reference.double_quant import QuantizedScales
from reference.kernels.nf4.codes import decode_scales, fetch_scales, nested, scale_tensors
from reference.nf4 import NF4_CODEBOOK, NF4Tensor

ROWS, WARPS = 64, 4  # of a program: rows of the weight, and warps
BLOCK_SIZES = 32, 64, 128
PROGRAMS = {16: 6, 32: 4, 64: 6}  # rows of x -> programs for each multiprocessor: what was fastest on an H100
PTX = torch.version.cuda is not None and not triton.knobs.runtime.interpret

# prmt takes four of eight bytes; four bits say which: three are a number, the fourth asks for the byte's sign in its place. A code has four
# bits, too, so a word of eight codes is a list of places in a table. The table is cut in two: bit 3 of a code says in which half to look.
LOOK_UP = tl.constexpr("""{
    .reg .b32 places, up, first, second, upper, low, high;
    and.b32 places, $4, 0x77777777;
    shl.b32 up, $4, 4;
    prmt.b32 first, $4, up, 0x9d8c;                 // bit 3 of codes 1 0 3 2, each spread over a byte
    prmt.b32 second, $4, up, 0xbfae;                // of codes 5 4 7 6
    prmt.b32 low, $6, $8, places;                   // low bytes of their levels, if below 8
    prmt.b32 upper, $10, $12, places;               // and if not
    lop3.b32 low, low, upper, first, 0xd8;          // first ? upper : low
    prmt.b32 high, $14, $16, places;                // high bytes
    prmt.b32 upper, $18, $20, places;
    lop3.b32 high, high, upper, first, 0xd8;
    prmt.b32 $0, low, high, 0x4051;                 // levels of codes 0 and 1
    prmt.b32 $1, low, high, 0x6273;                 // of codes 2 and 3
    shr.u32 places, places, 16;
    prmt.b32 low, $6, $8, places;
    prmt.b32 upper, $10, $12, places;
    lop3.b32 low, low, upper, second, 0xd8;
    prmt.b32 high, $14, $16, places;
    prmt.b32 upper, $18, $20, places;
    lop3.b32 high, high, upper, second, 0xd8;
    prmt.b32 $2, low, high, 0x4051;
    prmt.b32 $3, low, high, 0x6273;
}""")
# The table is the same for all lanes. Loaded as such it would lie in registers that all share, from where every prmt has it copied first.
OWN = tl.constexpr("""{
    .reg .u32 lane;
    .reg .u64 place;
    mov.u32 lane, %laneid;
    mad.wide.u32 place, lane, 4, $1;
    ld.global.nc.b32 $0, [place];
}""")


@lru_cache
def byte_table(device: torch.device, dtype: torch.dtype) -> Tensor:
    """(8, 32) int32: low bytes of levels 0–7 and 8–15 in ``dtype``, then their high bytes, four to a word; a copy for each lane."""
    low_high = NF4_CODEBOOK.to(dtype).view(torch.uint8).view(16, 2).T.contiguous()
    return low_high.view(torch.int32).view(8, 1).repeat(1, 32).to(device)


@triton.jit
def own(table_ptr, i: tl.constexpr, PTX: tl.constexpr):
    """Word i of the table, in a register of each lane."""
    if PTX:
        return tl.inline_asm_elementwise(OWN, "=r,l", [(table_ptr + 32 * i).to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return 0


@triton.jit
def plain_levels(words, levels_ptr, dtype: tl.constexpr):
    """What ``look_up`` gives, in Triton alone: bytes in a word are little-endian, the first of two codes is in the high four bits."""
    words = words.to(tl.uint32, bitcast=True)
    halves = tl.join(words, words >> 16)
    bytes_ = tl.join(halves, halves >> 8)
    level = tl.load(levels_ptr + (tl.join(bytes_ >> 4, bytes_) & 15).to(tl.int32)).to(dtype)
    return level.reshape(words.shape[0], words.shape[1], 8)


@triton.jit
def four_words(first, second, third, fourth, dtype: tl.constexpr):
    """What a look-up left in four registers, two levels each: four times (rows, words, 2) int16 -> (rows, words, 8) of ``dtype``."""
    level = tl.join(tl.join(first, third), tl.join(second, fourth)).permute(0, 1, 3, 4, 2).to(dtype, bitcast=True)
    return level.reshape(first.shape[0], first.shape[1], 8)


@triton.jit
def look_up(words, table, levels_ptr, dtype: tl.constexpr, PTX: tl.constexpr):
    """Levels of eight codes a word, in order: (rows, words) int32 -> (rows, words, 8)."""
    if PTX:
        names: tl.constexpr = "=r,=r,=r,=r," + "r," * 17 + "r"
        twice = tl.join(words, words)  # as many elements as come out: two in each register
        given = [twice, table[0], table[1], table[2], table[3], table[4], table[5], table[6], table[7]]
        a, b, c, d = tl.inline_asm_elementwise(LOOK_UP, names, given, (tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=2)
        return four_words(a, b, c, d, dtype)
    else:
        return plain_levels(words, levels_ptr, dtype)


@triton.jit
def product(level, x, W: tl.constexpr):
    """(rows, words, 8) levels · (rows_x, 8 · words)ᵀ -> (rows, rows_x) float32, rows as ``row_order`` puts them.

    The order in which products are added up is free, and so is that of the rows. Here both are such that what a thread has loaded, two
    words of one row in four, is what the tensor cores want from it: without it every level would go through shared memory once more.
    """
    ROWS: tl.constexpr = level.shape[0]
    ROWS_X: tl.constexpr = x.shape[0]
    BLOCK: tl.constexpr = x.shape[1]
    level = level.reshape(ROWS // (16 * W), 2, W, 8, 4, BLOCK // 32, 4, 2).permute(0, 2, 1, 3, 5, 6, 4, 7)
    x = x.reshape(ROWS_X, 4, BLOCK // 32, 4, 2).permute(0, 2, 3, 1, 4)
    return tl.dot(level.reshape(ROWS, BLOCK), tl.trans(x.reshape(ROWS_X, BLOCK)))


@triton.jit
def row_order(place, W: tl.constexpr):
    """The row of a tile that ``product`` puts at ``place``: W warps load eight rows each in turn, and multiply sixteen."""
    return place // (16 * W) * (16 * W) + place // 8 % 2 * (8 * W) + place // 16 % W * 8 + place % 8


@triton.jit
def _rows_kernel(
    x_ptr, packed_ptr, absmax_ptr, nested_ptr, offset_ptr, dynamic_ptr, levels_ptr, table_ptr, bias_ptr, parts_ptr, arrived_ptr, out_ptr,
    M, N, K_BLOCKS, BLOCK: tl.constexpr, NESTED: tl.constexpr, DOUBLE: tl.constexpr, BIAS: tl.constexpr, PTX: tl.constexpr,
    ROWS_X: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Up to ROWS_X rows of x against ROWS rows of the weight, over one part of the features, block by block."""
    WORDS: tl.constexpr = BLOCK // 8
    table = (
        own(table_ptr, 0, PTX), own(table_ptr, 1, PTX), own(table_ptr, 2, PTX), own(table_ptr, 3, PTX),
        own(table_ptr, 4, PTX), own(table_ptr, 5, PTX), own(table_ptr, 6, PTX), own(table_ptr, 7, PTX),
    )  # fmt: skip
    begin, parts = tl.program_id(0) * ROWS, tl.num_programs(1)
    share = tl.cdiv(K_BLOCKS, parts)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, K_BLOCKS)
    # Rows that do not exist are read as the last one, and not written.
    row, row_x = begin + row_order(tl.arange(0, ROWS), W), tl.arange(0, ROWS_X)
    live, live_x = row < N, row_x < M
    word = tl.multiple_of(tl.arange(0, WORDS)[None, :], (1, BLOCK // 32))  # a thread loads a quarter of a row's block
    words_ptr = packed_ptr + tl.minimum(begin + tl.arange(0, ROWS), N - 1)[:, None].to(tl.int64) * (K_BLOCKS * WORDS) + word
    x_ptr += tl.minimum(row_x, M - 1)[:, None] * (K_BLOCKS * BLOCK) + tl.arange(0, BLOCK)[None, :]
    scale = tl.minimum(row, N - 1) * K_BLOCKS

    block = tl.minimum(first, K_BLOCKS - 1)
    words, x = tl.load(words_ptr + block * WORDS), tl.load(x_ptr + block * BLOCK)
    codes, outer = fetch_scales(absmax_ptr, nested_ptr, scale + block, live, NESTED, DOUBLE)
    total = tl.zeros((ROWS, ROWS_X), tl.float32)
    for block in range(first, last):
        block = tl.minimum(block + 1, last - 1)  # the next is fetched while this one is computed
        next_words, next_x = tl.load(words_ptr + block * WORDS), tl.load(x_ptr + block * BLOCK)
        next_codes, next_outer = fetch_scales(absmax_ptr, nested_ptr, scale + block, live, NESTED, DOUBLE)
        scales = decode_scales(codes, outer, offset_ptr, dynamic_ptr, DOUBLE)
        total += product(look_up(words, table, levels_ptr, x.dtype, PTX), x, W) * scales[:, None]
        words, x, codes, outer = next_words, next_x, next_codes, next_outer

    place, mask = row_x[None, :] * N + row[:, None], live[:, None] & live_x[None, :]
    if parts > 1:
        tl.store(parts_ptr + tl.program_id(1) * M * N + place, total, mask)
        tl.debug_barrier()  # all threads have stored before one of them says so
        if tl.atomic_add(arrived_ptr + tl.program_id(0), 1) != parts - 1:
            return
        tl.store(arrived_ptr + tl.program_id(0), 0)  # for the next launch
        total = tl.zeros((ROWS, ROWS_X), tl.float32)
        for part in range(parts):  # always in this order: the same bits whoever comes last
            total += tl.load(parts_ptr + part * M * N + place, mask, other=0.0, cache_modifier=".cg")
    if BIAS:
        total += tl.load(bias_ptr + row, live, other=0.0).to(tl.float32)[:, None]
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask)


@lru_cache
def _counters(tiles: int, device: torch.device, stream: int) -> Tensor:
    """(tiles,) zeros, and zeros again after each launch. One set for a stream: launches in two of them may run at the same time."""
    return torch.zeros(tiles, dtype=torch.int32, device=device)


def counters(tiles: int, device: torch.device) -> Tensor:
    """As ``_counters``; while a CUDA graph is recorded new ones, since nothing is cleared then, only when the graph runs."""
    if device.type != "cuda":
        return _counters(tiles, device, 0)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(tiles, dtype=torch.int32, device=device)
    return _counters(tiles, device, torch.cuda.current_stream(device).cuda_stream)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """1 without a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@lru_cache
def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has tensor cores with the instructions that fused products are laid out for: since compute capability 8.0."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def rows_product(x: Tensor, q: NF4Tensor, bias: Tensor | None, scales: QuantizedScales | None) -> Tensor:
    """x · Wᵀ + bias, 1 to 64 rows. x: (rows, in_features), contiguous, 16 bits; a row of the weight is a number of whole blocks.

    Returns:
        (rows, out_features) in the dtype of x. Levels are rounded to it, sums are float32.
    """
    (M, K), (N, _), block = x.shape, q.shape, q.block_size
    rows_x, tiles = max(16, triton.next_power_of_2(M)), triton.cdiv(N, ROWS)
    parts = max(1, min(PROGRAMS[rows_x] * multiprocessors(x.device) // tiles, K // block))
    shares = torch.empty(parts, M, N, device=x.device) if parts > 1 else x  # without parts it is not touched
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    _rows_kernel[(tiles, parts)](
        x, q.packed.view(-1).view(torch.int32), *scale_tensors(q, scales), byte_table(x.device, x.dtype),
        x if bias is None else bias, shares, counters(tiles, x.device), out, M, N, K // block, block, *nested(scales),
        bias is not None, PTX, rows_x, ROWS, WARPS, num_warps=WARPS, num_stages=1,
    )  # fmt: skip
    return out
