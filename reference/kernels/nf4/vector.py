"""One row times an NF4 weight that is decoded on its way to the tensor cores.

See :mod:`reference.kernels.nf4`. One row leaves little time for decoding: a weight is used once,
and all that is done with it must fit into the time in which its half byte arrives. Four things make
it fit.

- Two codes are a byte, and a table of 256 *pairs of levels* needs one look-up for two weights
  (:mod:`reference.kernels.nf4.pairs`). Shared memory holds it 32 times, a copy in each of its
  banks, so that the lanes of a warp never wait for one another.
- The tensor cores multiply the levels unscaled. Eight columns are no more work for them than one,
  so each block of a step has a column of its own, with zeros for the others' features. The blocks'
  sums come out apart, and a scale is multiplied into each: one for 64 weights.
- Memory is read in whole cache lines (:mod:`reference.kernels.nf4.fetch`): eight lanes take 128
  bytes of a row. The tensor cores want four lanes for a row, so the two halves of a line go in as
  if they were two rows.
- What is needed next is on its way while a step is computed, and an 8-bit scale is looked up only
  when it is used: a code would have to arrive first, and everything behind it would wait.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from reference.kernels.launch import PTX, multiprocessors
from reference.kernels.nf4.fetch import decode_fetched, fetch_rows, fetch_x
from reference.kernels.nf4.pairs import look_up, pair_table, set_up
from reference.kernels.nf4.scales import nested, scale_tensors
from reference.nf4 import NF4Tensor

BLOCK_SIZES = 64, 128  # so that the blocks of a step fit into eight columns
ROWS, FEATURES = 16, 512  # of the weight, for a warp in a step
WARPS, PROGRAMS = 4, 4  # of a program, and of a multiprocessor: what was fastest on an H100
REGISTERS = 65536  # of a multiprocessor
OPTIONS = dict(num_warps=WARPS, num_stages=1, maxnreg=REGISTERS // (32 * WARPS * PROGRAMS))


@triton.jit
def arrange(x, W: tl.constexpr):
    """What ``fetch_x`` gives -> (W, 128, 8), features in the order of ``eight_rows``."""
    # (W, column, (word, pair, quarter, pair, level))
    x = x.reshape(4, W, 8, 4, 2, 2, 2).permute(1, 2, 0, 4, 3, 5, 6)
    return x.reshape(W, 8, 128).permute(0, 2, 1)


@triton.jit
def eight_rows(
    words, more_words, x, scales, pairs, levels_ptr, BLOCKS: tl.constexpr, PTX: tl.constexpr
):
    """(8 · W, 32) words twice, (W, 128, 8) of x, (16 · W, 8) scales -> (W, 8) sums of 512 products.

    The order in which products are added up is free. Here it is such that what a thread has loaded
    is what the tensor cores want from it, in the same registers.
    """
    W: tl.constexpr = x.shape[0]
    # (row of 4, W, row of 4 | half, quarter, word, pair, pair, level)
    # -> (W, (row, row, half), (word, pair, quarter, pair, level))
    first = look_up(words, pairs, levels_ptr, x.dtype, PTX).reshape(2, W, 4, 2, 4, 4, 2, 2, 2)
    first = first.permute(1, 0, 2, 3, 5, 6, 4, 7, 8)
    other = look_up(more_words, pairs, levels_ptr, x.dtype, PTX).reshape(2, W, 4, 2, 4, 4, 2, 2, 2)
    other = other.permute(1, 0, 2, 3, 5, 6, 4, 7, 8)
    part = tl.arange(0, 8)[None, :] // BLOCKS  # of four times 128 features, a column's own
    half = tl.arange(0, 16)[:, None] % 2  # of a line
    sums = tl.where((part == half)[None, :, :], tl.dot(first.reshape(W, 16, 128), x), 0.0)
    sums = tl.where((part == half + 2)[None, :, :], tl.dot(other.reshape(W, 16, 128), x), sums)
    scales = scales.reshape(2, W, 8, 8).permute(1, 0, 2, 3).reshape(W, 16, 8)
    return tl.sum((sums * scales).reshape(W, 8, 16), 2)


@triton.jit
def _vector_kernel(
    x_ptr, packed_ptr, absmax_ptr, nested_ptr, offset_ptr, dynamic_ptr, levels_ptr, pairs_ptr,
    bias_ptr, out_ptr, N, K_PAIRS, ODD: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr,
    DOUBLE: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, PTX: tl.constexpr,
    W: tl.constexpr,
):  # fmt: skip
    """One row of x against 16 rows of the weight at a time, 512 features for each of W warps.

    EVEN: all steps are full.
    """
    K_BLOCKS = (
        2 * K_PAIRS + ODD
    )  # so the compiler knows whether two scales can be read in one piece
    BLOCKS: tl.constexpr = 128 // BLOCK
    steps = tl.cdiv(K_BLOCKS, 4 * BLOCKS * W)
    tile = tl.program_id(0)
    visits = tl.cdiv(tl.cdiv(N, 16) - tile, tl.num_programs(0)) * steps
    offset = tl.load(offset_ptr) if DOUBLE else 0.0
    a0, a1, codes_a, outer_a = fetch_rows(
        tile * 16, 0, packed_ptr, absmax_ptr, nested_ptr, N, K_BLOCKS,
        BLOCK, NESTED, DOUBLE, EVEN, PTX, W,
    )  # fmt: skip
    b0, b1, codes_b, outer_b = fetch_rows(
        tile * 16 + 8, 0, packed_ptr, absmax_ptr, nested_ptr, N, K_BLOCKS,
        BLOCK, NESTED, DOUBLE, EVEN, PTX, W,
    )  # fmt: skip
    fetched = fetch_x(x_ptr, 0, K_BLOCKS, BLOCK, W)
    pairs, levels = set_up(pairs_ptr, dynamic_ptr, DOUBLE, PTX)

    total_a, total_b = tl.zeros((W, 8), tl.float32), tl.zeros((W, 8), tl.float32)
    step = 0
    for _ in range(visits):
        x = arrange(fetched, W)
        out = tile * 16 + tl.arange(0, 16)
        step += 1
        last = step == steps
        if last:
            step = 0
            tile += tl.num_programs(0)
        # What comes next is fetched as soon as its registers are free.
        scales = decode_fetched(codes_a, outer_a, offset, levels, dynamic_ptr, DOUBLE, PTX)
        total_a += eight_rows(a0, a1, x, scales, pairs, levels_ptr, BLOCKS, PTX)
        a0, a1, codes_a, outer_a = fetch_rows(
            tile * 16, step, packed_ptr, absmax_ptr, nested_ptr, N, K_BLOCKS,
            BLOCK, NESTED, DOUBLE, EVEN, PTX, W,
        )  # fmt: skip
        scales = decode_fetched(codes_b, outer_b, offset, levels, dynamic_ptr, DOUBLE, PTX)
        total_b += eight_rows(b0, b1, x, scales, pairs, levels_ptr, BLOCKS, PTX)
        b0, b1, codes_b, outer_b = fetch_rows(
            tile * 16 + 8, step, packed_ptr, absmax_ptr, nested_ptr, N, K_BLOCKS,
            BLOCK, NESTED, DOUBLE, EVEN, PTX, W,
        )  # fmt: skip
        fetched = fetch_x(x_ptr, step, K_BLOCKS, BLOCK, W)
        if last:
            y = tl.sum(tl.join(total_a, total_b).permute(0, 2, 1).reshape(W, 16), 0)
            if BIAS:
                y += tl.load(bias_ptr + out, out < N, other=0.0).to(tl.float32)
            tl.store(out_ptr + out, y.to(out_ptr.dtype.element_ty), out < N)
            total_a, total_b = tl.zeros((W, 8), tl.float32), tl.zeros((W, 8), tl.float32)


def takes(x: Tensor, q: NF4Tensor) -> bool:
    """Whether ``vector_product`` is for these.

    It reads 16 bytes at a time, and its tables leave no shared memory to do it otherwise.
    """
    aligned = x.data_ptr() % 16 == q.packed.data_ptr() % 16 == 0
    return len(x) == 1 and q.block_size in BLOCK_SIZES and aligned


def vector_product(x: Tensor, q: NF4Tensor, bias: Tensor | None) -> Tensor:
    """As ``rows_product``, for what it ``takes``."""
    (N, K), block = q.shape, q.block_size
    blocks, tiles = K // block, -(N // -ROWS)
    # Tiles of a program: the same for all but the last.
    each = -(tiles // -(PROGRAMS * multiprocessors(x.device)))
    out = torch.empty(1, N, dtype=x.dtype, device=x.device)
    _vector_kernel[(-(tiles // -each),)](
        x, q.packed.view(-1).view(torch.int32), *scale_tensors(q), pair_table(x.device, x.dtype),
        x if bias is None else bias, out, N, blocks // 2, blocks % 2, block, *nested(q),
        bias is not None, K % (WARPS * FEATURES) == 0, PTX, WARPS, **OPTIONS,
    )  # fmt: skip
    return out
