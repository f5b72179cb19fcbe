"""The product with a frozen NF4 weight, and the gradient that goes through it.

    y = x · Ŵᵀ + b        ∂L/∂x = ∂L/∂y · Ŵ        Ŵ = dequantize(q): a copy for the moment

The weight is frozen: there is no gradient for it, so the backward needs nothing of the forward but
Ŵ, and that is dequantized a second time instead of being kept. What the graph holds on to is the
packed weight, which the layer holds anyway: no byte is added for the backward, where a dense
layer's graph refers to 2 bytes a weight and a graph over a dequantized copy would keep 2 *more*.
Dettmers et al. 2023, "QLoRA", section 3.

On CUDA the work is done by :mod:`reference.kernels.nf4` where Triton is installed and the GPU has
bfloat16; ``use_kernels(False)`` goes back to plain torch.
"""

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.capability import has_bfloat16
from reference.double_quant import QuantizedScales, double_quantize
from reference.nf4 import NF4Tensor, dequantize_nf4, quantize_nf4

SCALES_BLOCK = 256  # scales that share a scale; the only number that bitsandbytes computes with
# Values that plain torch works on at a time: a GPU needs about 20 bytes for each in between.
PIECE = 1 << 22
PARTS = "weight", "absmax", "nested_absmax", "offset"  # what a layer calls the parts of its weight
_TRITON = importlib.util.find_spec("triton") is not None
_NOTHING = nullcontext()
_kernels_wanted = True


def use_kernels(wanted: bool) -> None:
    """Whether CUDA tensors go through the Triton kernels; they do until told otherwise."""
    global _kernels_wanted
    _kernels_wanted = wanted


@cache
def _kernels() -> ModuleType:
    from reference.kernels import nf4

    return nf4


def kernels_for(tensor: Tensor) -> ModuleType | None:
    """The kernels, where they are wanted and can run."""
    if not (_kernels_wanted and _TRITON and tensor.is_cuda and has_bfloat16(tensor.device)):
        return None
    return _kernels()


# ---- the weight


def pack(weight: Tensor, block_size: int, double_quant: bool) -> NF4Tensor:
    """Quantize ``weight``; errors are those of :func:`reference.nf4.quantize_nf4`."""
    if kernels := kernels_for(weight):
        q = kernels.quantize_nf4(weight, block_size)
    else:
        flat = weight.detach().reshape(-1)
        pieces = [quantize_nf4(part, block_size) for part in flat.split(max(PIECE, block_size))]
        packed = torch.cat([piece.packed for piece in pieces])  # ((n + 1) // 2, 1)
        absmax = torch.cat([piece.absmax for piece in pieces])  # (blocks,)
        q = NF4Tensor(packed, absmax, weight.shape, weight.dtype, block_size)
    return double_quantize(q, SCALES_BLOCK) if double_quant else q


def unpack(q: NF4Tensor, dtype: torch.dtype) -> Tensor:
    """Ŵ in ``dtype``, (out, in)."""
    if kernels := kernels_for(q.packed):
        return kernels.dequantize_nf4(q, dtype)
    absmax, block = q.absmax, q.block_size
    weight = torch.empty(q.shape, dtype=dtype, device=absmax.device)
    start = 0
    for piece in weight.view(-1).split(max(PIECE, block)):  # they begin at a block, and at a byte
        stop = start + len(piece)
        packed = q.packed[start // 2 : (stop + 1) // 2]
        scales = absmax[start // block : -(stop // -block)]
        piece.copy_(dequantize_nf4(NF4Tensor(packed, scales, piece.shape, dtype, block)))
        start = stop
    return weight


def zeros(
    shape: torch.Size, dtype: torch.dtype, block_size: int, double_quant: bool,
    device: torch.device | str | None,
) -> NF4Tensor:  # fmt: skip
    """A weight of zeros."""
    n = shape.numel()
    codes = torch.full(((n + 1) // 2, 1), 0x77, dtype=torch.uint8, device=device)
    absmax = torch.zeros(-(n // -block_size), device=device)  # (blocks,)
    nested = offset = None
    if double_quant:
        absmax = absmax.to(torch.uint8)
        nested = torch.zeros(-(len(absmax) // -SCALES_BLOCK), device=device)  # (blocks of scales,)
        offset = torch.zeros((), device=device)
    return join(codes, absmax, nested, offset, shape, dtype, block_size)


def parts(q: NF4Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The tensors of a weight, in the order of ``PARTS``; nested ones only of quantized scales."""
    scales = q.scales
    if isinstance(scales, QuantizedScales):
        return q.packed, scales.codes, scales.absmax, scales.offset
    return q.packed, scales, None, None


def join(
    weight: Tensor, absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None,
    shape: torch.Size, dtype: torch.dtype, block_size: int,
) -> NF4Tensor:  # fmt: skip
    """The weight of which these are the ``parts``."""
    scales = absmax
    if nested_absmax is not None:
        scales = QuantizedScales(absmax, nested_absmax, offset, SCALES_BLOCK)
    return NF4Tensor(weight, scales, shape, dtype, block_size)


# ---- the product


def product(x: Tensor, bias: Tensor | None, q: NF4Tensor) -> Tensor:
    """x · Ŵᵀ + b, without a gradient: (..., in) -> (..., out).

    For a few rows of x the kernels decode the weight on the way and never write it out.
    """
    with no_autocast(x):
        if kernels := kernels_for(x):
            return kernels.linear_nf4(x, q, bias)
        return F.linear(x, unpack(q, x.dtype), bias)


def gradients(
    grad: Tensor, weight: Callable[[], Tensor], needs_x: bool, needs_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """∂L/∂x and ∂L/∂b, for ∂L/∂y and a function that gives Ŵ in its dtype."""
    grad_x = grad_bias = None
    if needs_x:
        with no_autocast(grad):
            grad_x = grad @ weight()  # (..., in)
    if needs_bias:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)  # (out,)
    return grad_x, grad_bias


class NF4Product(torch.autograd.Function):
    """x · Ŵᵀ + b. Arguments: x, b, the weight as an ``NF4Tensor``."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, q: NF4Tensor) -> Tensor:
        ctx.save_for_backward(*parts(q))  # the layer's own tensors: no byte is copied
        ctx.rest = q.shape, q.dtype, q.block_size
        return product(x, bias, q)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_bias, _ = ctx.needs_input_grad
        q = join(*ctx.saved_tensors, *ctx.rest)
        return *gradients(grad, lambda: unpack(q, grad.dtype), needs_x, needs_bias), None


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Inside, autocast is off: the layer has chosen its dtype."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _NOTHING
