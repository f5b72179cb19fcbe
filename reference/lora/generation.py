"""An unmerged layer at generation, where a token costs launches and hardly any arithmetic.

With one or a few rows the update is over sooner than its launches have begun. So where a GPU is,
:mod:`reference.kernels.multi_lora` adds it in two of them. Rows beyond ``FEW``, training, and what
no kernel takes go their usual way (:mod:`reference.lora.layer`, :mod:`reference.lora.mixed`).
"""

import importlib.util

import torch
from torch import Tensor

FEW = 16  # rows: one tile of the kernels
HALF = (torch.float16, torch.bfloat16)
_TRITON = importlib.util.find_spec("triton") is not None


def takes_kernels(x: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether the kernels compute the update of this input."""
    if torch.is_grad_enabled() or not (_TRITON and x.is_cuda) or torch.compiler.is_compiling():
        return False
    rows = x.numel() // x.shape[-1]
    kinds = x.dtype in HALF and A.dtype == B.dtype and A.dtype in (x.dtype, torch.float32)
    return kinds and 0 < rows <= FEW and A.is_contiguous() and B.is_contiguous()


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
