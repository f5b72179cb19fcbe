"""A few rows times an NF4 weight that is decoded on its way to the tensor cores.

See :mod:`reference.kernels.nf4`. Three things make it fast. Levels come out of registers, by
instructions that permute bytes (:mod:`reference.kernels.nf4.permute`). They meet the tensor cores
unscaled and in the very registers where those want them; a block's scale is multiplied in
afterwards, into its product. And programs that share a row of the weight, each with a part of the
features, need no second launch to add their parts up: the last one to arrive does.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from reference.kernels.launch import PTX, counters, multiprocessors
from reference.kernels.nf4.permute import byte_table, look_up, own
from reference.kernels.nf4.scales import decode_scales, fetch_scales, nested, scale_tensors
from reference.nf4 import NF4Tensor

BLOCK_SIZES = 32, 64, 128
# Rows of x -> rows of the weight for a program, its warps, and programs for each multiprocessor:
# what was fastest on an H200
SIZES = {16: (64, 4, 6), 32: (64, 4, 4), 64: (128, 8, 2), 128: (64, 4, 2)}


@triton.jit
def product(level, x, W: tl.constexpr):
    """(rows, words, 8) levels · (rows_x, 8 · words)ᵀ -> (rows, rows_x) float32.

    Rows are as ``row_order`` puts them. The order in which products are added up is free, and so is
    that of the rows. Here both are such that what a thread has loaded, two words of one row in
    four, is what the tensor cores want from it: without it every level would go through shared
    memory once more.
    """
    ROWS: tl.constexpr = level.shape[0]
    ROWS_X: tl.constexpr = x.shape[0]
    BLOCK: tl.constexpr = x.shape[1]
    level = level.reshape(ROWS // (16 * W), 2, W, 8, 4, BLOCK // 32, 4, 2)
    level = level.permute(0, 2, 1, 3, 5, 6, 4, 7)
    x = x.reshape(ROWS_X, 4, BLOCK // 32, 4, 2).permute(0, 2, 3, 1, 4)
    return tl.dot(level.reshape(ROWS, BLOCK), tl.trans(x.reshape(ROWS_X, BLOCK)))


@triton.jit
def row_order(place, W: tl.constexpr):
    """The row of a tile that ``product`` puts at ``place``.

    W warps load eight rows each in turn, and multiply sixteen.
    """
    warp = place // (16 * W) * (16 * W)
    return warp + place // 8 % 2 * (8 * W) + place // 16 % W * 8 + place % 8


@triton.jit
def _rows_kernel(
    x_ptr, packed_ptr, absmax_ptr, nested_ptr, offset_ptr, dynamic_ptr, levels_ptr, table_ptr,
    bias_ptr, parts_ptr, arrived_ptr, out_ptr, M, N, K_BLOCKS, BLOCK: tl.constexpr,
    NESTED: tl.constexpr, DOUBLE: tl.constexpr, BIAS: tl.constexpr, PTX: tl.constexpr,
    ROWS_X: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Up to ROWS_X rows of x against ROWS rows of the weight, over one part of the features."""
    WORDS: tl.constexpr = BLOCK // 8
    table = (
        own(table_ptr, 0, PTX), own(table_ptr, 1, PTX), own(table_ptr, 2, PTX),
        own(table_ptr, 3, PTX), own(table_ptr, 4, PTX), own(table_ptr, 5, PTX),
        own(table_ptr, 6, PTX), own(table_ptr, 7, PTX),
    )  # fmt: skip
    begin, parts = tl.program_id(0) * ROWS, tl.num_programs(1)
    share = tl.cdiv(K_BLOCKS, parts)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, K_BLOCKS)
    # Rows that do not exist are read as the last one, and not written.
    row, row_x = begin + row_order(tl.arange(0, ROWS), W), tl.arange(0, ROWS_X)
    live, live_x = row < N, row_x < M
    # A thread loads a quarter of a row's block.
    word = tl.multiple_of(tl.arange(0, WORDS)[None, :], (1, BLOCK // 32))
    read = tl.minimum(begin + tl.arange(0, ROWS), N - 1)[:, None]
    words_ptr = packed_ptr + read.to(tl.int64) * (K_BLOCKS * WORDS) + word
    x_ptr += tl.minimum(row_x, M - 1)[:, None] * (K_BLOCKS * BLOCK) + tl.arange(0, BLOCK)[None, :]
    scale = tl.minimum(row, N - 1) * K_BLOCKS

    block = tl.minimum(first, K_BLOCKS - 1)
    words, x = tl.load(words_ptr + block * WORDS), tl.load(x_ptr + block * BLOCK)
    codes, outer = fetch_scales(absmax_ptr, nested_ptr, scale + block, live, NESTED, DOUBLE)
    total = tl.zeros((ROWS, ROWS_X), tl.float32)
    for block in range(first, last):
        block = tl.minimum(block + 1, last - 1)  # the next is fetched while this one is computed
        next_words, next_x = tl.load(words_ptr + block * WORDS), tl.load(x_ptr + block * BLOCK)
        next_codes, next_outer = fetch_scales(
            absmax_ptr, nested_ptr, scale + block, live, NESTED, DOUBLE
        )
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
            there = parts_ptr + part * M * N + place
            total += tl.load(there, mask, other=0.0, cache_modifier=".cg")
    if BIAS:
        total += tl.load(bias_ptr + row, live, other=0.0).to(tl.float32)[:, None]
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask)


def rows_product(x: Tensor, q: NF4Tensor, bias: Tensor | None) -> Tensor:
    """x · Wᵀ + bias, 1 to 128 rows; a row of the weight is a number of whole blocks.

    Args:
        x: (rows, in_features), contiguous, 16 bits.

    Returns:
        (rows, out_features) in the dtype of x. Levels are rounded to it, sums are float32.
    """
    (M, K), (N, _), block = x.shape, q.shape, q.block_size
    rows_x = max(16, triton.next_power_of_2(M))
    rows, warps, programs = SIZES[rows_x]
    tiles = -(N // -rows)
    parts = max(1, min(programs * multiprocessors(x.device) // tiles, K // block))
    # Without parts their sums are not touched.
    shares = torch.empty(parts, M, N, device=x.device) if parts > 1 else x
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    _rows_kernel[(tiles, parts)](
        x, q.packed.view(-1).view(torch.int32), *scale_tensors(q), byte_table(x.device, x.dtype),
        x if bias is None else bias, shares, counters(tiles, x.device), out, M, N, K // block,
        block, *nested(q), bias is not None, PTX, rows_x, rows, warps,
        num_warps=warps, num_stages=1,
    )  # fmt: skip
    return out
