"""What a step of :mod:`reference.kernels.nf4.vector` reads: codes and scales of 8 rows, and x."""

import triton
import triton.language as tl

from reference.kernels.nf4.pairs import look_up_scales

# Unlike tl.load, which chooses who loads what: here each thread loads what it will use.
LOAD_HERE = tl.constexpr("ld.global.nc.f32 $0, [$1];")


@triton.jit
def fetch_rows(
    begin, step, packed_ptr, absmax_ptr, nested_ptr, N, K_BLOCKS,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, DOUBLE: tl.constexpr, EVEN: tl.constexpr,
    PTX: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Of eight rows of the weight: words twice, (8 · W, 32), and scales twice, (16 · W, 8).

    Words are of the two halves of a line. Scales are there for each half; or, under double
    quantization, their codes and their own scales. What a row does not have is 0. In place of rows
    that do not exist the last one is read, or no word if none of the eight exists.
    """
    BLOCKS: tl.constexpr = 128 // BLOCK
    K_WORDS = K_BLOCKS * (BLOCK // 8)
    place = tl.arange(0, 8 * W)  # (row of 4, W, row of 4)
    row = tl.minimum(begin + place // (4 * W) * 4 + place % 4, N - 1)[:, None]
    word = ((step * W + place // 4 % W) * 64)[:, None] + tl.arange(0, 32)[None, :]
    words_ptr = packed_ptr + row.to(tl.int64) * K_WORDS + word
    some = begin < N
    words = tl.load(words_ptr, some if EVEN else some & (word < K_WORDS), other=0)
    more_words = tl.load(words_ptr + 32, some if EVEN else some & (word + 32 < K_WORDS), other=0)
    place = tl.arange(0, 16 * W)  # (row of 4, W, row of 4, half)
    row = tl.minimum(begin + place // (8 * W) * 4 + place % 8 // 2, N - 1)[:, None]
    # What a thread of the tensor cores holds: two columns.
    column = tl.multiple_of(tl.arange(0, 8), 2)[None, :]
    block = ((step * W + place // 8 % W) * (4 * BLOCKS))[:, None] + column
    mask = column < 4 * BLOCKS if EVEN else (column < 4 * BLOCKS) & (block < K_BLOCKS)
    block = row * K_BLOCKS + block
    scales = tl.load(absmax_ptr + block, mask, other=0)
    outer = scales
    if DOUBLE:
        outer_ptr = nested_ptr + tl.where(mask, block // NESTED, 0)
        if PTX:
            outer = tl.inline_asm_elementwise(
                LOAD_HERE, "=f,l", [outer_ptr.to(tl.int64)], dtype=tl.float32, is_pure=True, pack=1
            )
        else:
            outer = tl.load(outer_ptr)
    return words, more_words, scales, outer


@triton.jit
def decode_fetched(
    scales, outer, offset, levels, dynamic_ptr, DOUBLE: tl.constexpr, PTX: tl.constexpr
):
    """The scales themselves, from what ``fetch_rows`` gave."""
    if DOUBLE:
        return look_up_scales(scales.to(tl.int32), levels, dynamic_ptr, PTX) * outer + offset
    else:
        return scales


@triton.jit
def fetch_x(x_ptr, step, K_BLOCKS, BLOCK: tl.constexpr, W: tl.constexpr):
    """(32 · W, 32): eight features of each quarter of 128, for each column; four times, for all 32.

    0 if their block has another column.
    """
    BLOCKS: tl.constexpr = 128 // BLOCK
    place = tl.arange(0, 32 * W)[:, None]  # (eight, W, column)
    column = place % 8
    feature = tl.arange(0, 32)[None, :]
    block = (step * W + place // 8 % W) * (4 * BLOCKS) + column
    own = (feature // (BLOCK // 4) == column % BLOCKS) & (column < 4 * BLOCKS) & (block < K_BLOCKS)
    part = block // BLOCKS * 128 + place // (8 * W) * 8
    return tl.load(x_ptr + part + (feature // 8 * 32 + feature % 8), own, other=0.0)
