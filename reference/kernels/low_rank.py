"""The float32 update of a bfloat16 layer on the tensor cores, in float32's precision.

    y' = bfloat16( y + s · h·Bᵀ )        h = x·Aᵀ        x, y: bfloat16        A, B, h: float32

Written plainly, x is widened to float32 in memory, multiplied far from the tensor cores, and the
sum takes a wide copy of y. Two facts save all that. A float32 number has 24 digits and a bfloat16
8, so three bfloat16 hold it whole:

    t = t₀ + t₁ + t₂      t₀ = bfloat16(t)    t₁ = bfloat16(t − t₀)    t₂ = bfloat16(t − t₀ − t₁)

and a product of a bfloat16 x with A is three products of bfloat16 with float32 sums, which the
tensor cores do in one, with the pieces side by side: 3r columns cost no more than r, since reading
x is what takes the time. And the second product is so thin that one kernel makes it while it reads
y and writes y'. No wide copy of x or y exists anywhere. The backward is four products of the same
two kinds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from reference.kernels.launch import on

PIECES = 1024  # numbers a program
ADD = dict(ROWS=64, COLUMNS=128, num_warps=4)


@triton.jit
def _pieces_kernel(t_ptr, out_ptr, count, width, scale, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < count
    rest = tl.load(t_ptr + i, live, other=0.0) * scale
    place = out_ptr + i // width * (3 * width) + i % width
    for piece in tl.static_range(3):
        part = rest.to(tl.bfloat16)
        tl.store(place + piece * width, part, live)
        rest -= part.to(tl.float32)


def pieces(t: Tensor, scale: float = 1) -> Tensor:
    """scale · t as a sum of three: (n, width) float32 -> (n, 3·width) bfloat16, pieces in a row."""
    (n, width), count = t.shape, t.numel()
    out = torch.empty(n, 3 * width, dtype=torch.bfloat16, device=t.device)
    with on(t):
        grid = (-(count // -PIECES),)
        _pieces_kernel[grid](t.contiguous(), out, count, width, float(scale), PIECES)
    return out


@triton.jit
def _add_kernel(
    y_ptr, h_ptr, b_ptr, out_ptr, M, N, R, stride_n, stride_r, scale,
    ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column, k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, RANK)
    h = tl.load(
        h_ptr + row[:, None] * R + k[None, :], (row < M)[:, None] & (k < R)[None, :], other=0.0
    )  # (ROWS, RANK)
    b = tl.load(
        b_ptr + column[None, :] * stride_n + k[:, None] * stride_r,
        (column < N)[None, :] & (k < R)[:, None],
        other=0.0,
    )  # (RANK, COLUMNS)
    # Three products on the tensor cores for one of float32.
    total = tl.dot(h, b, input_precision="tf32x3") * scale  # (ROWS, COLUMNS)
    place, live = row[:, None] * N + column[None, :], (row < M)[:, None] & (column < N)[None, :]
    if ADD:
        total += tl.load(y_ptr + place, live, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), live)


def add_product(y: Tensor | None, h: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """y + scale · h·bᵀ, or without y the product alone, rounded once to ``dtype``.

    Args:
        y: (n, columns).
        h, b: (n, r) and (columns, r), float32.
    """
    (M, R), N = h.shape, len(b)
    out = torch.empty(M, N, dtype=dtype, device=h.device)
    grid = -(N // -ADD["COLUMNS"]), -(M // -ADD["ROWS"])
    rank = max(16, triton.next_power_of_2(R))
    with on(h):
        _add_kernel[grid](
            out if y is None else y, h, b, out, M, N, R, *b.stride(), float(scale), y is not None,
            RANK=rank, **ADD,
        )  # fmt: skip
    return out


def wide(a: Tensor, b: Tensor) -> Tensor:
    """a · b of bfloat16 with a float32 result."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def forward(y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """y + s·B·A·x, and h = A·x: y (n, out), x (n, in), A (r, in), B (out, r)."""
    r = len(A)
    h = wide(x, pieces(A.reshape(1, -1)).view(3 * r, -1).T).view(-1, 3, r).sum(1)  # (n, r)
    return add_product(y.contiguous(), h, B, s, y.dtype), h


def backward(
    grad: Tensor, x: Tensor, h: Tensor, A: Tensor, B: Tensor, s: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, A and B for the gradient (n, out) of the sum; ``h`` is the forward's."""
    r = len(A)
    grad_h = wide(grad, pieces(B)).view(-1, 3, r).sum(1)  # (n, r), without s
    grad_x = add_product(None, grad_h, A.T, s, x.dtype)  # (n, in)
    grad_A = wide(pieces(grad_h, s).T, x).view(3, r, -1).sum(0)  # (r, in)
    grad_B = wide(grad.T, pieces(h, s)).view(-1, 3, r).sum(1)  # (out, r)
    return grad_x, grad_A, grad_B
