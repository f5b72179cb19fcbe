"""Quantize and dequantize NF4 in one kernel each: see :mod:`reference.kernels.nf4`."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from reference.blockwise import check_finite, check_tensor, midpoints
from reference.kernels.launch import on
from reference.kernels.nf4 import bfloat16
from reference.kernels.nf4.scales import nested, read_scales, scale_tensors
from reference.nf4 import NF4_CODEBOOK, NF4Tensor, check_packable
from reference.nf4 import dequantize_nf4 as dequantize_with_torch
from reference.nf4 import quantize_nf4 as quantize_with_torch

CELLS = 32
# Values in a tile and warps of a program: what was fastest on an H200
QUANTIZE = dict(tile=1024, num_warps=1)
DEQUANTIZE = dict(tile=2048, num_warps=2)


@lru_cache
def _cells(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each of 32 cells of [−1, 1]: its midpoint, and how many midpoints lie below it.

    A cell that holds no midpoint has an infinite one.
    """
    between = midpoints(NF4_CODEBOOK)
    edges = (torch.arange(CELLS + 1) - 16.5) / 15  # cell c is where round(15·x) + 16 = c
    below = torch.searchsorted(between, edges)  # (33,)
    inside = torch.where(below[1:] > below[:-1], between[below[:-1].clamp(max=14)], torch.inf)
    return inside.to(device), below[:-1].to(device, torch.int32)


# ---- quantize


@triton.jit
def _quantize_kernel(
    x_ptr, packed_ptr, absmax_ptr, bad_ptr, inside_ptr, below_ptr, blocks,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    mask = (block < blocks)[:, None]
    x = tl.load(x_ptr + block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], mask, other=0.0)
    x = x.to(tl.float32)  # (ROWS, BLOCK)
    # Without its sign bit a float sorts like an integer, and NaN above infinity: no NaN gets lost
    # in the maximum.
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)  # (ROWS,)
    tl.store(bad_ptr, 1, mask=tl.max(largest, 0) >= 0x7F800000)
    absmax = largest.to(tl.float32, bitcast=True)
    tl.store(absmax_ptr + block, absmax, block < blocks)
    divisor = tl.maximum(absmax, tl.full((ROWS,), 1e-38, tl.float32))
    inverse = tl.math.div_rn(tl.full((ROWS,), 1, tl.float32), divisor)  # (ROWS,)
    scaled = x * inverse[:, None]  # (ROWS, BLOCK)

    cell = tl.ravel((scaled * 15 + 16.5).to(tl.int32) & (CELLS - 1))
    inside = tl.gather(tl.load(inside_ptr + tl.arange(0, CELLS)), cell, 0).reshape(scaled.shape)
    below = tl.gather(tl.load(below_ptr + tl.arange(0, CELLS)), cell, 0).reshape(scaled.shape)
    codes = below + (scaled > inside).to(tl.int32)
    high, low = tl.split(codes.reshape(ROWS, BLOCK // 2, 2))  # (ROWS, BLOCK/2)
    byte = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    tl.store(packed_ptr + byte, (high << 4 | low).to(tl.uint8), mask)


def _quantize_any(
    flat: Tensor, packed: Tensor, absmax: Tensor, bad: Tensor, blocks: int, block_size: int
) -> None:
    rows = max(1, QUANTIZE["tile"] // block_size)
    _quantize_kernel[(-(blocks // -rows),)](
        flat, packed, absmax, bad, *_cells(flat.device), blocks, block_size, rows, CELLS,
        num_warps=QUANTIZE["num_warps"],
    )  # fmt: skip


def quantize_nf4(weight: Tensor, block_size: int = 64, check: bool = True) -> NF4Tensor:
    """As :func:`reference.nf4.quantize_nf4`, for CUDA.

    Args:
        check: refuse NaN and infinity. The kernel notices them by itself, but only when it is done:
            the CPU has to wait for it. Without the check a broken block has an absmax of NaN or
            infinity.
    """
    check_tensor(weight, "weight")
    check_packable(block_size)
    flat = weight.detach().reshape(-1)
    n, blocks = len(flat), len(flat) // block_size
    packed = torch.empty((n + 1) // 2, 1, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(n // -block_size), device=flat.device)
    # Zero takes a launch, so only for somebody who looks.
    bad = (torch.zeros if check else torch.empty)((), dtype=torch.int32, device=flat.device)
    if blocks:
        write = bfloat16.quantize_pairs if bfloat16.takes(flat) else _quantize_any
        with on(flat):
            write(flat, packed, absmax, bad, blocks, block_size)
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
    packed = tl.load(packed_ptr + byte, live[:, None], other=0, eviction_policy="evict_first")
    packed = packed.to(tl.int32)  # (ROWS, HALF)
    # The first of two values is in the high four bits.
    codes = tl.join(packed >> 4, packed & 15)  # (ROWS, HALF, 2)
    level = tl.gather(tl.load(levels_ptr + tl.arange(0, 16)), tl.ravel(codes), 0)
    level = level.reshape(ROWS, 2 * HALF)
    absmax = read_scales(
        absmax_ptr, nested_ptr, offset_ptr, dynamic_ptr, block, live, NESTED, DOUBLE
    )
    place = block[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(out_ptr + place, (level * absmax[:, None]).to(out_ptr.dtype.element_ty), live[:, None])


def dequantize_nf4(q: NF4Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """As :func:`reference.nf4.dequantize_nf4`, for CUDA.

    8-bit scales are decoded in the same pass.
    """
    out = torch.empty(q.shape, dtype=dtype or q.dtype, device=q.packed.device)
    n, block_size = out.numel(), q.block_size
    blocks, rows = n // block_size, max(1, DEQUANTIZE["tile"] // block_size)
    if blocks:
        with on(out):
            _dequantize_kernel[(-(blocks // -rows),)](
                q.packed, *scale_tensors(q), out, blocks, block_size // 2, rows, *nested(q),
                num_warps=DEQUANTIZE["num_warps"],
                enable_fp_fusion=False,  # product and sum of a scale are rounded one by one
            )  # fmt: skip
    done = blocks * block_size
    if done < n:
        packed, absmax = q.packed[done // 2 :], q.absmax[blocks:]
        rest = NF4Tensor(packed, absmax, torch.Size([n - done]), out.dtype, block_size)
        out.view(-1)[done:] = dequantize_with_torch(rest)
    return out
