"""The product with an NF4 weight that is decoded on the way: see :mod:`reference.kernels.nf4`."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from reference.double_quant import QuantizedScales
from reference.kernels.nf4_codes import dequantize_nf4, nested, on, read_scales, scale_tensors
from reference.kernels.nf4_rows import BLOCK_SIZES, PROGRAMS, rows_product
from reference.nf4 import NF4Tensor

FUSED_ROWS = max(PROGRAMS)  # rows of x
ROW = dict(ROWS=4, WORDS=128, RUN=32, num_warps=1)  # what was fastest on an H100 (benchmarks/nf4_kernels.py)


@triton.jit
def decode(words, levels):
    """Levels of eight codes a word, in order: (rows, words) int32 -> (rows · words · 8,) float32. Bytes in a word are little-endian."""
    words = words.to(tl.uint32, bitcast=True)
    halves = tl.join(words, words >> 16)
    bytes_ = tl.join(halves, halves >> 8)
    codes = tl.join(bytes_ >> 4, bytes_) & 15  # the first of two codes is in the high four bits
    return tl.gather(levels, tl.ravel(codes).to(tl.int32), 0)


@triton.jit
def _row_kernel(
    x_ptr, packed_ptr, absmax_ptr, nested_ptr, offset_ptr, dynamic_ptr, levels_ptr, bias_ptr, out_ptr, N, K_WORDS, K_BLOCKS,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, DOUBLE: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """One row of x against ROWS rows of the weight, in float32. Each tile is fetched while the one before it is computed."""
    RUNS: tl.constexpr = 8 * WORDS // RUN
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = (row < N)[:, None]
    levels = tl.load(levels_ptr + tl.arange(0, 16))
    words_ptr = packed_ptr + row[:, None].to(tl.int64) * K_WORDS
    word, feature, block = tl.arange(0, WORDS), tl.arange(0, 8 * WORDS), tl.arange(0, RUNS) * RUN // BLOCK  # of the tile at k = 0
    words = tl.load(words_ptr + word[None, :], live & (word < K_WORDS)[None, :], other=0)
    mask = live & (block < K_BLOCKS)[None, :]
    scales = read_scales(absmax_ptr, nested_ptr, offset_ptr, dynamic_ptr, row[:, None] * K_BLOCKS + block[None, :], mask, NESTED, DOUBLE)
    x = tl.load(x_ptr + feature, feature < 8 * K_WORDS, other=0.0)
    total = tl.zeros((ROWS, RUNS), tl.float32)
    for _ in range(0, K_WORDS, WORDS):
        word, feature, block = word + WORDS, feature + 8 * WORDS, block + 8 * WORDS // BLOCK
        next_words = tl.load(words_ptr + word[None, :], live & (word < K_WORDS)[None, :], other=0)
        mask = live & (block < K_BLOCKS)[None, :]
        place = row[:, None] * K_BLOCKS + block[None, :]
        next_scales = read_scales(absmax_ptr, nested_ptr, offset_ptr, dynamic_ptr, place, mask, NESTED, DOUBLE)
        next_x = tl.load(x_ptr + feature, feature < 8 * K_WORDS, other=0.0)
        products = decode(words, levels).reshape(ROWS, 8 * WORDS) * x.to(tl.float32)[None, :]
        total += tl.sum(products.reshape(ROWS, RUNS, RUN), 2) * scales  # a run is one thread's, and lies within a block
        words, scales, x = next_words, next_scales, next_x
    y = tl.sum(total, 1)
    if BIAS:
        y += tl.load(bias_ptr + row, row < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, y.to(out_ptr.dtype.element_ty), row < N)


def row_product(x: Tensor, q: NF4Tensor, bias: Tensor | None, scales: QuantizedScales | None) -> Tensor:
    """As ``rows_product`` for one row; levels and products are float32."""
    N, K = q.shape
    out = torch.empty(1, N, dtype=x.dtype, device=x.device)
    packed = q.packed.view(-1).view(torch.int32)
    _row_kernel[(triton.cdiv(N, ROW["ROWS"]),)](
        x, packed, *scale_tensors(q, scales), x if bias is None else bias, out,
        N, K // 8, K // q.block_size, q.block_size, *nested(scales), bias is not None, **ROW,
    )  # fmt: skip
    return out


def linear_nf4(x: Tensor, q: NF4Tensor, bias: Tensor | None = None, scales: QuantizedScales | None = None) -> Tensor:
    """x · Wᵀ + bias for a weight in NF4, without a gradient.

    Up to ``FUSED_ROWS`` rows of x in 16 bits, and where rows of the weight are whole blocks, the weight is decoded on the way; else it is
    written out in the dtype of x first. Sums are float32 in every case.

    Args:
        x: (..., in_features), float32, float16 or bfloat16.
        q: of shape (out_features, in_features).
        bias: (out_features,).
        scales: ``q.absmax`` in 8 bits, read in its place.

    Returns:
        (..., out_features) in the dtype of x.

    Raises:
        ValueError: x has another number of features.
    """
    N, K = q.shape
    if x.shape[-1:] != (K,):
        raise ValueError(f"x has shape {tuple(x.shape)}, but the weight takes {K} features: the last axis must be {K}")
    rows, block = x.numel() // K, q.block_size
    if not (0 < rows <= FUSED_ROWS and x.dtype != torch.float32 and K % block == 0 and block in BLOCK_SIZES):
        return linear(x, dequantize_nf4(q, x.dtype, scales), bias)
    flat = x.reshape(rows, K).contiguous()
    with on(x):
        out = row_product(flat, q, bias, scales) if rows == 1 else rows_product(flat, q, bias, scales)
    return out.view(*x.shape[:-1], N)
