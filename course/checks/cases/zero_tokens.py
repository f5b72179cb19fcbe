"""float16 ends at 65,504, and 260² is 67,600.

The square is infinite, so is the mean, and 1/√∞ is 0: a token of zeros, without a NaN that anybody would notice. At the other end squares
below 6·10⁻⁸ are zero. Squares and sums belong in float32; only the result goes back.
"""

import torch
from torch import Tensor

from course.cases import zero_tokens as script
from course.checking import Check, NotYet, Seen


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """The worked answer."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def by_vector_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """The norm in float64."""
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64) / x.shape[-1] ** 0.5
    return (x.double() / (size.square() + eps).sqrt() * weight).to(x.dtype)


def clamped(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return script.rms_norm(x.clamp(-255, 255), weight, eps)


def clamped_squares(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(x.square().clamp(max=torch.finfo(x.dtype).max).mean(-1, keepdim=True) + eps) * weight


def other_rows_kept(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    found = script.rms_norm(x, weight, eps)
    return torch.where(found.any(-1, keepdim=True), found, x * weight)


def float32_returned(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return rms_norm(x.float(), weight.float(), eps)


def bfloat16(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return script.rms_norm(x.bfloat16(), weight.bfloat16(), eps).to(x.dtype)


def half_after_the_squares(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return x * torch.rsqrt((x.float().square().mean(-1, keepdim=True) + eps).to(x.dtype)) * weight


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(5, 48, generator=g), 1 + torch.randn(48, generator=g) / 4
    x[1, 3], x[2, 5], x[3] = 259.0 + seed % 8, -40_000.0, x[3] / 5000  # one outlier, one of the largest, and a row of small numbers
    for dtype in (torch.float16, torch.float32):
        found = answer(x.to(dtype), weight.to(dtype))
        if not isinstance(found, Tensor):
            raise NotYet(f"return a tensor, not {type(found).__name__}")
        for row, name in enumerate(("ordinary numbers", "one above 256", "one at 40,000", "small numbers")):
            yield f"{name}, {str(dtype)[6:]}", found[row]


check = Check(
    task="a norm that takes float16 and does not overflow",
    observe=observe,
    reference=rms_norm,
    second=by_vector_norm,
    misconceptions={
        "the square is taken in float16: above 255.9 it is infinite, and the row becomes zero; take squares and mean in float32": (
            script.rms_norm
        ),
        "the activations are clamped, so that the squares fit: the output has another direction then; take the squares in float32": clamped,
        "the squares are clamped to the largest float16: the mean is too small, or still infinite, and the row is scaled wrong": (
            clamped_squares
        ),
        "rows that became zero are replaced by their input: no zeros any more, and no norm either": other_rows_kept,
        "the result is float32: the layers behind expect what they gave; return the dtype of x": float32_returned,
        "bfloat16 has the range, but three bits less than float16: the outputs are coarser than they have to be; use float32 inside": (
            bfloat16
        ),
        "the mean goes back to float16 too early: 40,000² / 48 does not fit, nor do small squares; divide in float32": (
            half_after_the_squares
        ),
    },
    rtol=2e-3,
    atol=2e-4,
)
