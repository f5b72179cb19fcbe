"""A first kernel: eight-bit codes back to weights, in one pass over memory.

A weight is its code times the step of its block. Plain torch does that with four operators, each of
which reads its arguments from memory and writes its result there. Here what lies between stays in
registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from reference.kernels.launch import on

TILE = 1024  # values that a program makes


@triton.jit
def _dequantize_kernel(
    codes_ptr,
    steps_ptr,
    out_ptr,
    n,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)  # my places
    mask = place < n  # the last program has fewer
    code = tl.load(codes_ptr + place, mask, other=0)  # (TILE,), int8
    step = tl.load(steps_ptr + place // BLOCK, mask, other=0.0)  # (TILE,), float32
    value = code.to(tl.float32) * step
    tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask)


def dequantize(codes: Tensor, steps: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """codes · the step of their block.

    Args:
        codes: int8, any shape; contiguous.
        steps: (blocks,), float32; the last block may be short.
        dtype: of the result; the product is float32 and rounded once.

    Returns:
        The weights, in the shape of ``codes``.

    Raises:
        ValueError: codes are not contiguous, or steps are not one per block.
    """
    n, blocks = codes.numel(), -(-codes.numel() // block_size)
    if not codes.is_contiguous():
        raise ValueError("codes are not contiguous: pass codes.contiguous()")
    if steps.shape != (blocks,):
        problem = f"steps has shape {tuple(steps.shape)}, but {n} codes are {blocks} blocks"
        raise ValueError(f"{problem} of {block_size}: give one step per block")
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if n:
        with on(out):
            _dequantize_kernel[(triton.cdiv(n, TILE),)](codes, steps, out, n, block_size, TILE)
    return out


def dequantize_with_torch(
    codes: Tensor, steps: Tensor, block_size: int, dtype: torch.dtype
) -> Tensor:
    """The same in plain torch, an operator a line."""
    values = codes.flatten().to(torch.float32)
    spread = steps.repeat_interleave(block_size)[: codes.numel()]
    product = values * spread
    return product.to(dtype).view(codes.shape)
