"""The float32 update of a half-precision layer, with half the memory and fewer passes over it.

A bfloat16 layer with float32 factors is the usual case of LoRA on a large model. Written plainly,

    y' = bfloat16( y + s · B·(A·float32(x)) ),

autograd keeps float32(x) for A's gradient: a copy, twice as large as x, for every adapted layer,
even where several layers (query, key and value) read the same x. This module computes the same
numbers, but keeps x itself and widens it again in the backward; and the sum goes to bfloat16 in one
pass, without a float32 sum on the way.

On a GPU with bfloat16, where Triton is installed, :mod:`reference.kernels.low_rank` computes the
same on the tensor cores and widens nothing; ``use_tensor_cores(False)`` goes back to plain torch.
"""

import importlib.util
import math
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from reference.capability import has_bfloat16

MAX_RANK = 64  # whose factors' tiles fit every GPU's shared memory
_TRITON = importlib.util.find_spec("triton") is not None
_tensor_cores_wanted = True
FEW_ROWS = 2048


def use_tensor_cores(wanted: bool) -> None:
    """Whether bfloat16 layers on CUDA go through the kernels; they do until told otherwise."""
    global _tensor_cores_wanted
    _tensor_cores_wanted = wanted


@cache
def _low_rank() -> ModuleType:
    from reference.kernels import low_rank

    return low_rank


def takes_kernels(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether :mod:`reference.kernels.low_rank` computes this update.

    Below ``FEW_ROWS`` rows launching its kernels takes longer than they save, except where nobody
    waits for launches: in a compiled layer and in a CUDA graph.
    """
    if not (_tensor_cores_wanted and _TRITON and x.is_cuda):
        return False
    kinds = y.dtype == x.dtype == torch.bfloat16 and A.dtype == B.dtype == torch.float32
    if not (kinds and x.numel() > 0 and len(A) <= MAX_RANK):
        return False
    if torch.compiler.is_compiling():
        return True
    if x.numel() // x.shape[-1] < FEW_ROWS and not torch.cuda.is_current_stream_capturing():
        return False
    return has_bfloat16(x.device)


def add_update(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """y + s·B·A·x in the dtype of ``y``, computed in the dtype of the factors.

    Args:
        y: output of the frozen layer, (..., out).
        x: its input, (..., in), of a dtype narrower than the factors'.
        lora_A, lora_B: (r, in) and (out, r).

    Differentiable once, in y, x and both factors.
    """
    by_kernels = takes_kernels(y, x, lora_A, lora_B)
    if torch.is_grad_enabled():
        return _AddUpdate.apply(y, x, lora_A, lora_B, scaling, by_kernels)
    return (_with_kernels if by_kernels else _with_torch)(y, x, lora_A, lora_B, scaling)[0]


class _AddUpdate(torch.autograd.Function):
    """The sum. Between forward and backward it keeps x, and h = A·x for the gradient of B."""

    @staticmethod
    def forward(
        ctx, y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float, by_kernels: bool
    ) -> Tensor:
        total, h = (_with_kernels if by_kernels else _with_torch)(y, x, A, B, s)
        ctx.s, ctx.by_kernels = s, by_kernels
        ctx.save_for_backward(x, h, A, B)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        back = _back_with_kernels if ctx.by_kernels else _back_with_torch
        return grad, *back(grad, *ctx.saved_tensors, ctx.s, ctx.needs_input_grad[1:4]), None, None


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


# ---- by torch


def _split(s: float) -> tuple[float, float]:
    """The scale as the factor of a product, and as one that is multiplied in for itself.

    A power of two rounds nothing, wherever it multiplies, so the product may take it along. The
    other is 1, and costs nothing.
    """
    return (s, 1) if math.frexp(s)[0] == 0.5 else (1, s)


def _with_torch(y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float) -> tuple[Tensor, Tensor]:
    along, apart = _split(s)
    h = F.linear(_rows(x).to(A.dtype), A)  # (n, r)
    update = F.linear(h, B)  # (n, out)
    update = update.mul_(apart) if apart != 1 else update
    # Rounded to y's dtype as it is stored.
    return torch.add(y, update.view(y.shape), alpha=along, out=torch.empty_like(y)), h


def _back_with_torch(
    grad: Tensor, x: Tensor, h: Tensor, A: Tensor, B: Tensor, s: float, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    along, apart = _split(s)
    needs_x, needs_A, needs_B = needs
    g = _rows(grad).to(A.dtype)  # (n, out)
    g = g * apart if apart != 1 else g
    # With beta = 0 addmm's first argument gives nothing but a shape.
    grad_h = torch.addmm(h, g, B, beta=0, alpha=along)  # (n, r)
    grad_x = (grad_h @ A).to(x.dtype).view(x.shape) if needs_x else None  # (..., in)
    grad_A = grad_h.T @ _rows(x).to(A.dtype) if needs_A else None  # (r, in)
    grad_B = torch.addmm(B, g.T, h, beta=0, alpha=along) if needs_B else None  # (out, r)
    return grad_x, grad_A, grad_B


# ---- by the kernels


def _kernels_forward(y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float) -> tuple[Tensor, Tensor]:
    if not has_bfloat16(y.device):  # while compiling nobody asks before
        return _with_torch(y, x, A, B, s)
    return _low_rank().forward(y, x, A, B, s)


def _kernels_backward(
    grad: Tensor, x: Tensor, h: Tensor, A: Tensor, B: Tensor, s: float
) -> tuple[Tensor, Tensor, Tensor]:
    if not has_bfloat16(grad.device):
        return _back_with_torch(grad, x, h, A, B, s, (True, True, True))
    return _low_rank().backward(grad, x, h, A, B, s)


# To torch.compile each is one operation, of which it knows the shapes; called directly, they cost
# less time of the CPU.
kernels_forward = torch.library.custom_op(
    "lora::forward",
    _kernels_forward,
    mutates_args=(),
    schema="(Tensor y, Tensor x, Tensor A, Tensor B, float s) -> (Tensor, Tensor)",
)
kernels_backward = torch.library.custom_op(
    "lora::backward",
    _kernels_backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor h, Tensor A, Tensor B, float s)"
    " -> (Tensor, Tensor, Tensor)",
)


@kernels_forward.register_fake
def _(y, x, A, B, s):
    return y.new_empty(y.shape), x.new_empty(len(x), len(A), dtype=A.dtype)


@kernels_backward.register_fake
def _(grad, x, h, A, B, s):
    return x.new_empty(x.shape), A.new_empty(A.shape), B.new_empty(B.shape)


def _with_kernels(y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float) -> tuple[Tensor, Tensor]:
    run = kernels_forward if torch.compiler.is_compiling() else _kernels_forward
    total, h = run(_rows(y), _rows(x), A, B, float(s))
    return total.view(y.shape), h


def _back_with_kernels(
    grad: Tensor, x: Tensor, h: Tensor, A: Tensor, B: Tensor, s: float, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    run = kernels_backward if torch.compiler.is_compiling() else _kernels_backward
    grad_x, grad_A, grad_B = run(_rows(grad), _rows(x), h, A, B, float(s))
    return grad_x.view(x.shape), grad_A, grad_B
