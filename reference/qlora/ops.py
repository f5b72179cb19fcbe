"""The NF4 product as an operation of torch, so that torch.compile sees one node with a shape.

A compiler reads Python until it knows every operation; launches of hand-written kernels, and loops
over pieces, are nothing it could improve. ``torch.library`` gives them a name, a schema, a
gradient, and a "fake": a function from the shapes of the arguments to the shape of the result. The
numbers are those of :class:`reference.qlora.product.NF4Product`, which costs less of the CPU's time
where nothing is compiled.
"""

import torch
from torch import Tensor

from reference.nf4 import NF4Tensor
from reference.qlora.product import NF4Product, gradients, join, parts, product, unpack

PARTS = "Tensor weight, Tensor absmax, Tensor? nested_absmax, Tensor? offset"
PACKED = f"{PARTS}, int out_features, int in_features, int block_size"


def _joined(*packed, dtype: torch.dtype) -> NF4Tensor:
    *tensors, out_features, in_features, block_size = packed
    return join(*tensors, torch.Size((out_features, in_features)), dtype, block_size)


@torch.library.custom_op(
    "nf4::dequantize", mutates_args=(), schema=f"({PACKED}, ScalarType dtype) -> Tensor"
)
def dequantize(*arguments):
    """Ŵ, (out_features, in_features), in ``dtype``."""
    *packed, dtype = arguments
    return unpack(_joined(*packed, dtype=dtype), dtype)


@dequantize.register_fake
def _(weight, absmax, nested_absmax, offset, out_features, in_features, block_size, dtype):
    return torch.empty(out_features, in_features, dtype=dtype, device=weight.device)


@torch.library.custom_op(
    "nf4::linear", mutates_args=(), schema=f"(Tensor x, Tensor? bias, {PACKED}) -> Tensor"
)
def linear(x, bias, *packed):
    """x · Ŵᵀ + b: (..., in_features) -> (..., out_features)."""
    return product(x, bias, _joined(*packed, dtype=x.dtype))


@linear.register_fake
def _(x, bias, weight, absmax, nested_absmax, offset, out_features, in_features, block_size):
    return x.new_empty(*x.shape[:-1], out_features)


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    _, _, *tensors, out_features, in_features, block_size = inputs
    ctx.sizes = out_features, in_features, block_size
    ctx.save_for_backward(*tensors)  # the layer's own tensors: no byte is copied


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs_x, needs_bias, *_ = ctx.needs_input_grad
    packed = *ctx.saved_tensors, *ctx.sizes
    found = gradients(grad, lambda: dequantize(*packed, grad.dtype), needs_x, needs_bias)
    return *found, *[None] * 7


linear.register_autograd(_backward, setup_context=_keep)


def nf4_product(x: Tensor, bias: Tensor | None, q: NF4Tensor) -> Tensor:
    """x · Ŵᵀ + b for x and b of one floating dtype, differentiable in both."""
    if torch.compiler.is_compiling():
        return linear(x, bias, *parts(q), *q.shape, q.block_size)
    return NF4Product.apply(x, bias, q)
