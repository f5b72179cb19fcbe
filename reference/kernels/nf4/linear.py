"""The product with an NF4 weight that is decoded on the way: see :mod:`reference.kernels.nf4`."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from reference.capability import has_bfloat16
from reference.kernels.launch import on
from reference.kernels.nf4.codes import dequantize_nf4
from reference.kernels.nf4.rows import BLOCK_SIZES, SIZES, rows_product
from reference.kernels.nf4.vector import takes, vector_product
from reference.nf4 import NF4Tensor

FUSED_ROWS = max(SIZES)  # rows of x


def linear_nf4(x: Tensor, q: NF4Tensor, bias: Tensor | None = None) -> Tensor:
    """x · Wᵀ + bias for a weight in NF4, without a gradient.

    Up to ``FUSED_ROWS`` rows of x in 16 bits, and where rows of the weight are whole blocks, the
    weight is decoded on the way; else, and on GPUs without bfloat16, whose tensor cores lack the
    instructions, it is written out in the dtype of x first. Sums are float32 in every case.

    Args:
        x: (..., in_features), float32, float16 or bfloat16.
        q: of shape (out_features, in_features).
        bias: (out_features,).

    Returns:
        (..., out_features) in the dtype of x.

    Raises:
        ValueError: x has another number of features.
    """
    N, K = q.shape
    if x.shape[-1:] != (K,):
        problem = f"x has shape {tuple(x.shape)}, but the weight takes {K} features"
        raise ValueError(f"{problem}: the last axis must be {K}")
    rows, block = x.numel() // K, q.block_size
    few = 0 < rows <= FUSED_ROWS and x.dtype != torch.float32
    if not (few and K % block == 0 and block in BLOCK_SIZES and has_bfloat16(x.device)):
        return linear(x, dequantize_nf4(q, x.dtype), bias)
    flat = x.reshape(rows, K).contiguous()
    with on(x):
        y = vector_product(flat, q, bias) if takes(flat, q) else rows_product(flat, q, bias)
    return y.view(*x.shape[:-1], N)
