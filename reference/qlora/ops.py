"""The NF4 product as an operation of torch, so that torch.compile sees one node with a shape where there are kernels or loops.

A compiler reads Python until it knows every operation; launches of hand-written kernels, and loops over pieces, are nothing it could
improve. ``torch.library`` gives them a name, a schema, a gradient, and a "fake": a function from the shapes of the arguments to the shape
of the result. The numbers are those of :class:`reference.qlora.product.NF4Product`, which costs less of the CPU's time where nothing is
compiled.
"""

import torch
from torch import Tensor

from reference.qlora.product import Layout, NF4Product, Packed, product, unpack

PACKED = "Tensor weight, Tensor absmax, Tensor? nested_absmax, Tensor? offset, int out_features, int in_features, int block_size"


@torch.library.custom_op("nf4::dequantize", mutates_args=(), schema=f"({PACKED}, ScalarType dtype) -> Tensor")
def dequantize(weight, absmax, nested_absmax, offset, out_features, in_features, block_size, dtype):
    """Ŵ, (out_features, in_features), in ``dtype``."""
    return unpack(Packed(weight, absmax, nested_absmax, offset), Layout((out_features, in_features), block_size, dtype), dtype)


@dequantize.register_fake
def _(weight, absmax, nested_absmax, offset, out_features, in_features, block_size, dtype):
    return torch.empty(out_features, in_features, dtype=dtype, device=weight.device)


@torch.library.custom_op("nf4::linear", mutates_args=(), schema=f"(Tensor x, Tensor? bias, {PACKED}) -> Tensor")
def linear(x, bias, weight, absmax, nested_absmax, offset, out_features, in_features, block_size):
    """x · Ŵᵀ + b: (..., in_features) -> (..., out_features)."""
    with torch.autocast(x.device.type, enabled=False):  # the layer has chosen its dtype
        return product(x, bias, Packed(weight, absmax, nested_absmax, offset), Layout((out_features, in_features), block_size, x.dtype))


@linear.register_fake
def _(x, bias, weight, absmax, nested_absmax, offset, out_features, in_features, block_size):
    return x.new_empty(*x.shape[:-1], out_features)


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    _, _, *packed, out_features, in_features, block_size = inputs
    ctx.sizes = out_features, in_features, block_size
    ctx.save_for_backward(*packed)  # the layer's own tensors: no byte is copied


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs_x, needs_bias, *_ = ctx.needs_input_grad
    with torch.autocast(grad.device.type, enabled=False):
        grad_x = grad @ dequantize(*ctx.saved_tensors, *ctx.sizes, grad.dtype) if needs_x else None  # (..., in)
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if needs_bias else None  # (out,)
    return grad_x, grad_bias, *[None] * 7


linear.register_autograd(_backward, setup_context=_keep)


def nf4_product(x: Tensor, bias: Tensor | None, packed: Packed, layout: Layout) -> Tensor:
    """x · Ŵᵀ + b for x and b of one floating dtype, differentiable in both."""
    tensors = packed.weight, packed.absmax, packed.nested_absmax, packed.offset
    if torch.compiler.is_compiling():
        return linear(x, bias, *tensors, *layout.shape, layout.block_size)
    return NF4Product.apply(x, bias, *tensors, layout)
