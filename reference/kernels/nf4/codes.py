"""Quantize and dequantize NF4 in one kernel each: see :mod:`reference.kernels.nf4`."""

from contextlib import nullcontext
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from reference.blockwise import check_finite, check_tensor, midpoints
from reference.double_quant import QuantizedScales, dequantize_scales, dynamic_codebook
from reference.nf4 import NF4_CODEBOOK, NF4Tensor, check_packable
from reference.nf4 import dequantize_nf4 as dequantize_with_torch
from reference.nf4 import quantize_nf4 as quantize_with_torch

CELLS = 32
# Values in a tile and warps of a program: what was fastest on an H100
QUANTIZE = dict(tile=2048, num_warps=2)
DEQUANTIZE = dict(tile=4096, num_warps=2)


# ---- tables, one copy a device


def _cells() -> tuple[Tensor, Tensor]:
    """For each of 32 cells of [−1, 1]: the midpoint inside it (infinite without one) and how many midpoints lie below it."""
    between = midpoints(NF4_CODEBOOK)
    edges = (torch.arange(CELLS + 1) - 16.5) / 15  # cell c is where round(15·x) + 16 = c
    below = torch.searchsorted(between, edges)  # (33,)
    inside = torch.where(below[1:] > below[:-1], between[below[:-1].clamp(max=14)], torch.inf)
    return inside, below[:-1].to(torch.int32)


@lru_cache
def _tables(device: torch.device) -> dict[str, tuple[Tensor, ...]]:
    """What the kernels look up, once for each device."""
    return {"cells": tuple(t.to(device) for t in _cells()), "levels": (dynamic_codebook().to(device), NF4_CODEBOOK.to(device))}


# ---- pieces of kernels


@triton.jit
def fetch_scales(absmax_ptr, nested_ptr, block, mask, NESTED: tl.constexpr, DOUBLE: tl.constexpr):
    """absmax of the given blocks, twice; or its 8-bit codes, and their own scales."""
    codes = tl.load(absmax_ptr + block, mask, other=0)
    return codes, tl.load(nested_ptr + block // NESTED, mask, other=0.0) if DOUBLE else codes


@triton.jit
def decode_scales(codes, outer, offset_ptr, dynamic_ptr, DOUBLE: tl.constexpr):
    """absmax, from what ``fetch_scales`` gave: with double quantization level · scale of the scales + their mean."""
    if DOUBLE:
        return tl.load(dynamic_ptr + codes.to(tl.int32)) * outer + tl.load(offset_ptr)
    else:
        return codes


@triton.jit
def read_scales(absmax_ptr, nested_ptr, offset_ptr, dynamic_ptr, block, mask, NESTED: tl.constexpr, DOUBLE: tl.constexpr):
    """Both at once: a code must have arrived before its level is looked up, and all that comes after waits as well."""
    codes, outer = fetch_scales(absmax_ptr, nested_ptr, block, mask, NESTED, DOUBLE)
    return decode_scales(codes, outer, offset_ptr, dynamic_ptr, DOUBLE)


def scale_tensors(q: NF4Tensor, scales: QuantizedScales | None) -> tuple[Tensor, ...]:
    """What the kernels read of scales and levels. Without double quantization two of them are never touched, and repeat the first."""
    first = (q.absmax,) * 3 if scales is None else (scales.codes, scales.absmax, scales.offset)
    return *first, *_tables(q.packed.device)["levels"]


def nested(scales: QuantizedScales | None) -> tuple[int, bool]:
    """NESTED and DOUBLE."""
    return (1, False) if scales is None else (scales.block_size, True)


def on(tensor: Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


# ---- quantize


@triton.jit
def _quantize_kernel(
    x_ptr, packed_ptr, absmax_ptr, bad_ptr, inside_ptr, below_ptr, blocks, BLOCK: tl.constexpr, ROWS: tl.constexpr, CELLS: tl.constexpr
):
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    mask = (block < blocks)[:, None]
    x = tl.load(x_ptr + block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], mask, other=0.0).to(tl.float32)  # (ROWS, BLOCK)
    # Without its sign bit a float sorts like an integer, and NaN above infinity: no NaN gets lost in the maximum.
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)  # (ROWS,)
    tl.store(bad_ptr, 1, mask=tl.max(largest, 0) >= 0x7F800000)
    absmax = largest.to(tl.float32, bitcast=True)
    tl.store(absmax_ptr + block, absmax, block < blocks)
    divisor = tl.maximum(absmax, tl.full((ROWS,), 1e-38, tl.float32))
    scaled = x * tl.math.div_rn(tl.full((ROWS,), 1, tl.float32), divisor)[:, None]  # (ROWS, BLOCK)

    cell = tl.ravel((scaled * 15 + 16.5).to(tl.int32) & (CELLS - 1))
    inside = tl.gather(tl.load(inside_ptr + tl.arange(0, CELLS)), cell, 0).reshape(scaled.shape)
    below = tl.gather(tl.load(below_ptr + tl.arange(0, CELLS)), cell, 0).reshape(scaled.shape)
    codes = below + (scaled > inside).to(tl.int32)
    high, low = tl.split(codes.reshape(ROWS, BLOCK // 2, 2))  # (ROWS, BLOCK/2)
    byte = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    tl.store(packed_ptr + byte, (high << 4 | low).to(tl.uint8), mask)


@torch.no_grad()
def quantize_nf4(weight: Tensor, block_size: int = 64, check: bool = True) -> NF4Tensor:
    """As :func:`reference.nf4.quantize_nf4`, for CUDA.

    Args:
        check: refuse NaN and infinity. The kernel notices them by itself, but only when it is done: the CPU has to wait for it. Without the
            check a broken block has an absmax of NaN or infinity.
    """
    check_tensor(weight, "weight")
    check_packable(block_size)
    flat = weight.detach().reshape(-1)
    n, blocks = len(flat), len(flat) // block_size
    packed = torch.empty((n + 1) // 2, 1, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(n // -block_size), device=flat.device)
    bad = torch.zeros((), dtype=torch.int32, device=flat.device)
    if blocks:
        rows = max(1, QUANTIZE["tile"] // block_size)
        tables = _tables(flat.device)["cells"]
        with on(flat):
            _quantize_kernel[(triton.cdiv(blocks, rows),)](
                flat, packed, absmax, bad, *tables, blocks, block_size, rows, CELLS, num_warps=QUANTIZE["num_warps"]
            )
    if blocks * block_size < n:  # a short last block, with a rounding of its own
        try:
            rest = quantize_with_torch(flat[blocks * block_size :], block_size)
            packed[blocks * block_size // 2 :], absmax[blocks:] = rest.packed, rest.absmax
        except ValueError:  # NaN or infinity in it
            absmax[blocks:] = torch.nan
            bad.fill_(1)
    if check and bad.item():
        check_finite(absmax, "weight", block_size)
    return NF4Tensor(packed, absmax, weight.shape, weight.dtype, block_size)


# ---- dequantize


@triton.jit
def _dequantize_kernel(
    packed_ptr, absmax_ptr, nested_ptr, offset_ptr, dynamic_ptr, levels_ptr, out_ptr, blocks,
    HALF: tl.constexpr, ROWS: tl.constexpr, NESTED: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    live = block < blocks
    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    packed = tl.load(packed_ptr + byte, live[:, None], other=0, eviction_policy="evict_first").to(tl.int32)  # (ROWS, HALF)
    codes = tl.join(packed >> 4, packed & 15)  # (ROWS, HALF, 2): the first of two values is in the high four bits
    level = tl.gather(tl.load(levels_ptr + tl.arange(0, 16)), tl.ravel(codes), 0).reshape(ROWS, 2 * HALF)
    absmax = read_scales(absmax_ptr, nested_ptr, offset_ptr, dynamic_ptr, block, live, NESTED, DOUBLE)
    place = block[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(out_ptr + place, (level * absmax[:, None]).to(out_ptr.dtype.element_ty), live[:, None])


@torch.no_grad()
def dequantize_nf4(q: NF4Tensor, dtype: torch.dtype | None = None, scales: QuantizedScales | None = None) -> Tensor:
    """As :func:`reference.nf4.dequantize_nf4`, for CUDA.

    Args:
        scales: ``q.absmax`` in 8 bits; given, it is decoded in the same pass and ``q.absmax`` is not read.
    """
    out = torch.empty(q.shape, dtype=dtype or q.dtype, device=q.packed.device)
    n, block_size = out.numel(), q.block_size
    blocks, rows = n // block_size, max(1, DEQUANTIZE["tile"] // block_size)
    if blocks:
        with on(out):
            _dequantize_kernel[(triton.cdiv(blocks, rows),)](
                q.packed, *scale_tensors(q, scales), out, blocks, block_size // 2, rows, *nested(scales),
                num_warps=DEQUANTIZE["num_warps"], enable_fp_fusion=False,  # product and sum of a scale are rounded one by one
            )  # fmt: skip
    if blocks * block_size < n:
        absmax = q.absmax if scales is None else dequantize_scales(scales)
        rest = NF4Tensor(q.packed[blocks * block_size // 2 :], absmax[blocks:], torch.Size([n % block_size]), out.dtype, block_size)
        out.view(-1)[blocks * block_size :] = dequantize_with_torch(rest)
    return out
