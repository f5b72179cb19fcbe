"""The product with a frozen NF4 weight, and the gradient that goes through it.

    y = x · Ŵᵀ + b        ∂L/∂x = ∂L/∂y · Ŵ        Ŵ = dequantize(packed weight): a copy for the moment of the product

The weight is frozen: there is no gradient for it, so the backward needs nothing of the forward but Ŵ, and that is dequantized a second
time instead of being kept. What the graph holds on to is the packed weight, which the layer holds anyway: no byte is added for the
backward, where a dense layer's graph refers to 2 bytes a weight and a graph over a dequantized copy would keep 2 *more*. Dettmers et al.
2023, "QLoRA", section 3.

On CUDA the work is done by :mod:`reference.kernels.nf4` where Triton is installed; ``use_kernels(False)`` goes back to plain torch.
"""

import importlib.util
import math
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.double_quant import QuantizedScales, dequantize_scales, quantize_scales
from reference.nf4 import NF4Tensor, dequantize_nf4, quantize_nf4

SCALES_BLOCK = 256  # scales that share a scale; the only number that bitsandbytes computes with
PIECE = 1 << 22  # values quantized or dequantized at a time by plain torch: a GPU needs about 20 bytes for each in between
_TRITON = importlib.util.find_spec("triton") is not None  # searched once: it is asked at every product
_kernels_wanted = True


def use_kernels(wanted: bool) -> None:
    """Whether CUDA tensors go through the Triton kernels; they do until told otherwise."""
    global _kernels_wanted
    _kernels_wanted = wanted


def kernels_for(tensor: Tensor) -> ModuleType | None:
    """The kernels, where they are wanted and can run."""
    if not (_kernels_wanted and _TRITON and tensor.is_cuda):
        return None
    from reference.kernels import nf4

    return nf4


@dataclass(frozen=True)
class Layout:
    """What is needed beside the tensors to read them: shape (out, in), values in a block, dtype of the weight before quantization."""

    shape: tuple[int, int]
    block_size: int
    dtype: torch.dtype

    @property
    def packed_shape(self) -> tuple[int, int]:
        return ((math.prod(self.shape) + 1) // 2, 1)

    @property
    def blocks(self) -> int:
        return -(math.prod(self.shape) // -self.block_size)


@dataclass(frozen=True, eq=False)
class Packed:
    """The tensors of a quantized weight.

    Attributes:
        weight: uint8, ``layout.packed_shape``: two codes a byte.
        absmax: a scale for each block: float32, or uint8 codes where the scales are quantized too.
        nested_absmax, offset: of quantized scales, float32: (blocks of scales,) and no axes; else None.
    """

    weight: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None = None
    offset: Tensor | None = None


@torch.no_grad()
def pack(weight: Tensor, block_size: int, double_quant: bool) -> Packed:
    """Quantize ``weight``; errors are those of :func:`reference.nf4.quantize_nf4`."""
    if kernels := kernels_for(weight):
        q = kernels.quantize_nf4(weight, block_size)
        packed, absmax = q.packed, q.absmax
    else:
        pieces = [quantize_nf4(piece, block_size) for piece in weight.detach().reshape(-1).split(max(PIECE, block_size))]
        packed, absmax = (torch.cat([getattr(piece, name) for piece in pieces]) for name in ("packed", "absmax"))
    if not double_quant:
        return Packed(packed, absmax)
    scales = quantize_scales(absmax, SCALES_BLOCK)
    return Packed(packed, scales.codes, scales.absmax, scales.offset)


def tensors(packed: Packed, layout: Layout) -> tuple[NF4Tensor, QuantizedScales | None]:
    """The weight as NF4 and, under double quantization, its scales, which are then what counts and not ``absmax``."""
    q = NF4Tensor(packed.weight, packed.absmax, torch.Size(layout.shape), layout.dtype, layout.block_size)
    nested = packed.nested_absmax is not None
    return q, QuantizedScales(packed.absmax, packed.nested_absmax, packed.offset, SCALES_BLOCK) if nested else None


@torch.no_grad()
def unpack(packed: Packed, layout: Layout, dtype: torch.dtype) -> Tensor:
    """The weight that ``packed`` stands for, (out, in)."""
    q, scales = tensors(packed, layout)
    if kernels := kernels_for(q.packed):
        return kernels.dequantize_nf4(q, dtype, scales)
    absmax, block = q.absmax if scales is None else dequantize_scales(scales), layout.block_size
    weight = torch.empty(layout.shape, dtype=dtype, device=absmax.device)
    start = 0
    for piece in weight.view(-1).split(max(PIECE, block)):  # pieces begin at a block, and at a byte
        stop = start + len(piece)
        part = NF4Tensor(q.packed[start // 2 : (stop + 1) // 2], absmax[start // block : -(stop // -block)], piece.shape, dtype, block)
        piece.copy_(dequantize_nf4(part))
        start = stop
    return weight


@torch.no_grad()
def product(x: Tensor, bias: Tensor | None, packed: Packed, layout: Layout) -> Tensor:
    """x · Ŵᵀ + b: (..., in) -> (..., out). For a few rows of x the kernels decode the weight on the way and never write it out."""
    if kernels := kernels_for(x):
        q, scales = tensors(packed, layout)
        return kernels.linear_nf4(x, q, bias, scales)
    return F.linear(x, unpack(packed, layout, x.dtype), bias)


class NF4Product(torch.autograd.Function):
    """x · Ŵᵀ + b. Arguments: x, b, the four tensors of ``Packed``, the layout."""

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, *rest) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # the layer has chosen its dtype
            return product(x, bias, Packed(*rest[:-1]), rest[-1])

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        _, _, *packed, ctx.layout = inputs
        ctx.save_for_backward(*packed)  # the layer's own tensors: no byte is copied

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_bias, *_ = ctx.needs_input_grad
        grad_x = grad_bias = None
        with torch.autocast(grad.device.type, enabled=False):
            if needs_x:
                grad_x = grad @ unpack(Packed(*ctx.saved_tensors), ctx.layout, grad.dtype)  # (..., in)
            if needs_bias:
                grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)  # (out,)
        return grad_x, grad_bias, None, None, None, None, None
