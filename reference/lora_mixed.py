"""The float32 update of a half-precision layer, with half the memory and fewer passes over it.

A bfloat16 layer with float32 factors is the usual case of LoRA on a large model. Written plainly,

    y' = bfloat16( y + s · B·(A·float32(x)) ),

autograd keeps float32(x) for A's gradient: a copy, twice as large as x, for every adapted layer, even where several layers (query, key and
value) read the same x. This module computes the same numbers, but keeps x itself and widens it again in the backward; and the sum goes to
bfloat16 in one pass, without a float32 sum on the way.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def add_update(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """y + s·B·A·x in the dtype of ``y``, computed in the dtype of the factors.

    Args:
        y: output of the frozen layer, (..., out).
        x: its input, (..., in), of a dtype narrower than the factors'.
        lora_A, lora_B: (r, in) and (out, r).

    Differentiable once, in y, x and both factors.
    """
    if torch.is_grad_enabled():
        return _AddUpdate.apply(y, x, lora_A, lora_B, scaling)
    return _compute(y, x, lora_A, lora_B, scaling)[0]


def _compute(y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """The sum, and h = A·x with its share of the scale, which the gradient of B needs."""
    thin, wide = _split(s)
    h = F.linear(x.to(A.dtype), A)  # (..., r)
    h = h.mul_(thin) if thin != 1 else h
    update = F.linear(h, B)  # (..., out)
    update = update.mul_(wide) if wide != 1 else update
    return torch.add(y, update, out=torch.empty_like(y)), h  # rounded to y's dtype as it is stored


class _AddUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
        total, h = _compute(y, x, A, B, s)
        ctx.s = s
        ctx.save_for_backward(x, h, A, B)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, A, B = ctx.saved_tensors
        thin, wide = _split(ctx.s)
        g = grad.to(A.dtype)  # (..., out)
        g = g * wide if wide != 1 else g
        grad_h = g @ B  # (..., r)
        grad_h = grad_h.mul_(thin) if thin != 1 else grad_h
        _, needs_x, needs_A, needs_B, _ = ctx.needs_input_grad
        grad_x = (grad_h @ A).to(x.dtype) if needs_x else None  # (..., in)
        grad_A = _rows(grad_h).T @ _rows(x).to(A.dtype) if needs_A else None  # (r, in)
        grad_B = _rows(g).T @ _rows(h) if needs_B else None  # (out, r)
        return grad, grad_x, grad_A, grad_B, None


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _split(s: float) -> tuple[float, float]:
    """The factors for the thin (..., r) and the wide (..., out) tensor. A power of two rounds nothing, so it goes where it costs little."""
    return (s, 1) if math.frexp(s)[0] == 0.5 else (1, s)
