"""The float32 update of a half-precision layer, with half the memory and fewer passes over it.

A bfloat16 layer with float32 factors is the usual case of LoRA on a large model. Written plainly,

    y' = bfloat16( y + s · B·(A·float32(x)) ),

autograd keeps float32(x) for A's gradient: a copy, twice as large as x, for every adapted layer,
even where several layers (query, key and value) read the same x. This module computes the same
numbers, but keeps x itself and widens it again in the backward; and the sum goes to bfloat16 in one
pass, without a float32 sum on the way.

On CUDA, where Triton is installed, :mod:`reference.kernels.low_rank` computes the same on the
tensor cores and widens nothing; ``use_tensor_cores(False)`` goes back to plain torch.
"""

import importlib.util
import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_RANK = 64  # whose factors' tiles fit every GPU's shared memory
_TRITON = importlib.util.find_spec("triton") is not None
_tensor_cores_wanted = True
FEW_ROWS = 2048


def use_tensor_cores(wanted: bool) -> None:
    """Whether bfloat16 layers with float32 factors on CUDA go through the kernels.

    They do until told otherwise.
    """
    global _tensor_cores_wanted
    _tensor_cores_wanted = wanted


@lru_cache
def _multiplies_bfloat16(device: torch.device) -> bool:
    return torch.cuda.get_device_properties(device).major >= 8  # since Ampere


def takes_kernels(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether :mod:`reference.kernels.low_rank` computes this update.

    Below ``FEW_ROWS`` rows launching its kernels takes longer than they save, except where nobody
    waits for launches: in a compiled layer and in a CUDA graph.
    """
    kinds = y.dtype == x.dtype == torch.bfloat16 and A.dtype == B.dtype == torch.float32
    sizes = x.numel() > 0 and len(A) <= MAX_RANK
    if not (_tensor_cores_wanted and _TRITON and kinds and x.is_cuda and sizes):
        return False
    if torch.compiler.is_compiling():
        return True
    enough = x.numel() // x.shape[-1] >= FEW_ROWS or torch.cuda.is_current_stream_capturing()
    return enough and _multiplies_bfloat16(x.device)


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
    """The sum, and h = A·x, which the gradient of B needs.

    From torch h comes with its share of the scale, from the kernels without.
    """
    if takes_kernels(y, x, A, B):
        run = kernels_forward if torch.compiler.is_compiling() else _kernels_forward
        total, h = run(_rows(y), _rows(x), A, B, float(s))
        return total.view(y.shape), h
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
        ctx.s, ctx.by_kernels = s, takes_kernels(y, x, A, B)
        ctx.save_for_backward(x, h, A, B)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, A, B = ctx.saved_tensors
        if ctx.by_kernels:
            run = kernels_backward if torch.compiler.is_compiling() else _kernels_backward
            grad_x, grad_A, grad_B = run(_rows(grad), _rows(x), h, A, B, float(ctx.s))
            return grad, grad_x.view(x.shape), grad_A, grad_B, None
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
    """The scale's share for the thin (..., r) and for the wide (..., out) tensor.

    A power of two rounds nothing, so it goes where it costs little.
    """
    return (s, 1) if math.frexp(s)[0] == 0.5 else (1, s)


def _kernels_forward(y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float) -> tuple[Tensor, Tensor]:
    from reference.kernels import low_rank

    return low_rank.forward(y, x, A, B, s)


def _kernels_backward(
    grad: Tensor, x: Tensor, h: Tensor, A: Tensor, B: Tensor, s: float
) -> tuple[Tensor, Tensor, Tensor]:
    from reference.kernels import low_rank

    return low_rank.backward(grad, x, h, A, B, s)


# To torch.compile each is one operation, of which it knows the shapes. Called directly, they cost
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
kernels_forward.register_fake(
    lambda y, x, A, B, s: (y.new_empty(y.shape), x.new_empty(len(x), len(A), dtype=A.dtype))
)
kernels_backward.register_fake(
    lambda grad, x, h, A, B, s: (x.new_empty(x.shape), A.new_empty(A.shape), B.new_empty(B.shape))
)
