"""In float16 some tokens come out of the norm as zeros. There is no NaN, no infinity and no error.

In float32 the same weights work. The tokens concerned have one large activation, as the first
tokens of a text often have. Mend `rms_norm`; it has to take and give float16.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Each row of ``x`` over its root mean square, times ``weight``; in the dtype of ``x``."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def main(rms_norm=rms_norm) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(4, 64), torch.ones(64)
    x[0, 7], x[2, 7] = 250.0, 260.0
    exact, half = rms_norm(x, weight), rms_norm(x.half(), weight.half())
    for row, largest in enumerate(x.abs().amax(1)):
        norms = f"{exact[row].norm():.3f} in float32, {half[row].float().norm():.3f} in float16"
        print(f"token {row}: largest activation {largest:6.1f}, norm of the output {norms}")
