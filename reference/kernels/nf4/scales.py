"""How the kernels read scales: float32, or 8-bit codes (:mod:`reference.double_quant`)."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from reference.double_quant import QuantizedScales, dynamic_codebook
from reference.nf4 import NF4_CODEBOOK, NF4Tensor


@lru_cache
def _levels(device: torch.device) -> tuple[Tensor, Tensor]:
    """Levels of the scales' codes, (256,), and of the weights', (16,)."""
    return dynamic_codebook().to(device), NF4_CODEBOOK.to(device)


def scale_tensors(q: NF4Tensor) -> tuple[Tensor, ...]:
    """What the kernels read of scales and levels.

    Of float32 scales there is one tensor; in the place of the others, which are then never touched,
    it is repeated.
    """
    s = q.scales
    own = (s.codes, s.absmax, s.offset) if isinstance(s, QuantizedScales) else (s, s, s)
    return *own, *_levels(q.packed.device)


def nested(q: NF4Tensor) -> tuple[int, bool]:
    """NESTED, how many scales share a scale, and DOUBLE, whether there is such a thing."""
    return (q.scales.block_size, True) if isinstance(q.scales, QuantizedScales) else (1, False)


@triton.jit
def fetch_scales(absmax_ptr, nested_ptr, block, mask, NESTED: tl.constexpr, DOUBLE: tl.constexpr):
    """absmax of the given blocks, twice; or its 8-bit codes, and their own scales."""
    codes = tl.load(absmax_ptr + block, mask, other=0)
    return codes, tl.load(nested_ptr + block // NESTED, mask, other=0.0) if DOUBLE else codes


@triton.jit
def decode_scales(codes, outer, offset_ptr, dynamic_ptr, DOUBLE: tl.constexpr):
    """absmax, from what ``fetch_scales`` gave: level · scale of the scales + their mean."""
    if DOUBLE:
        return tl.load(dynamic_ptr + codes.to(tl.int32)) * outer + tl.load(offset_ptr)
    else:
        return codes


@triton.jit
def read_scales(
    absmax_ptr, nested_ptr, offset_ptr, dynamic_ptr, block, mask,
    NESTED: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """Both at once.

    A code must have arrived before its level is looked up, and all that comes after waits as well.
    """
    codes, outer = fetch_scales(absmax_ptr, nested_ptr, block, mask, NESTED, DOUBLE)
    return decode_scales(codes, outer, offset_ptr, dynamic_ptr, DOUBLE)
