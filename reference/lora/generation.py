"""An unmerged layer at generation, where a token costs launches and hardly any arithmetic.

With one or a few rows the update is over sooner than its launches have begun. So where a GPU is,
:mod:`reference.kernels.multi_lora` adds it in two of them. One row through a plain layer of 16 bits
takes two in all: the base's product is in the first. Rows beyond ``FEW``, training, and what
no kernel takes go their usual way (:mod:`reference.lora.layer`, :mod:`reference.lora.mixed`).
"""

import importlib.util

import torch
from torch import Tensor, nn

FEW = 16  # rows: one tile of the kernels
HALF = (torch.float16, torch.bfloat16)
RANK = 256  # at one row: a program of expand holds this many columns of B
_TRITON = importlib.util.find_spec("triton") is not None


def takes_kernels(x: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether the kernels compute the update of this input."""
    if torch.is_grad_enabled() or not (_TRITON and x.is_cuda) or torch.compiler.is_compiling():
        return False
    rows = x.numel() // x.shape[-1]
    kinds = x.dtype in HALF and A.dtype == B.dtype and A.dtype in (x.dtype, torch.float32)
    return kinds and 0 < rows <= FEW and A.is_contiguous() and B.is_contiguous()


def plain(base: nn.Module, x: Tensor) -> bool:
    """Whether x is one row and the base a plain ``nn.Linear`` of its dtype: nothing packed, and
    nobody who waits for the base's own forward."""
    if type(base) is not nn.Linear or x.numel() != base.in_features:
        return False
    watched = base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base)
    weight, bias = base.weight, base.bias
    alike = weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype)
    return alike and not watched and weight.is_contiguous() and weight.device == x.device


def forward(base: nn.Module, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """base(x) + s·B·(A·x), for what ``takes_kernels``."""
    if len(A) <= RANK and plain(base, x):
        return adapted_row(base, x, A, B, scaling)
    return add_update(base(x), x, A, B, scaling)


def adapted_row(base: nn.Linear, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """The same in two launches, for one row through a :func:`plain` layer."""
    from reference.kernels.multi_lora import single

    flat = x.reshape(1, -1).contiguous()  # (1, in)
    y = single.adapted_row(flat, base.weight, base.bias, A, B, scaling)
    return y.view(*x.shape[:-1], -1)


def add_update(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """y + s·B·(A·x), rounded once.

    Args:
        y: output of the frozen layer, (..., out), which may be written to.
        x: its input, (..., in), of its dtype.
        A, B: (r, in) and (out, r).
    """
    from reference.kernels.multi_lora import single

    y = y.contiguous()
    flat = x.reshape(-1, x.shape[-1]).contiguous()  # (rows, in)
    single.add_update(y.view(-1, y.shape[-1]), flat, A, B, scaling)
    return y
