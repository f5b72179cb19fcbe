"""DoRA's two passes on CUDA: row norms from one reading of W, and the gain with its gradient.

    products    ‖w‖² and β·(A·w) for each row w of W (bfloat16) and β of B: W is read once
    gain        y = g ⊙ u + offset: u is read once, y written once
    back        g ⊙ ∂L/∂y and Σ_rows ∂L/∂y ⊙ (u − b): both tensors are read once

All sums are float32; what is stored in bfloat16 is rounded once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from reference.kernels.launch import on

NORMS = dict(ROWS=32, COLUMNS=128, num_warps=4)
TILE = dict(ROWS=32, COLUMNS=128, num_warps=4)
STRIP = 128  # rows whose gradient one program adds up


@triton.jit
def _products_kernel(
    w_ptr, a_ptr, b_ptr, squares_ptr, cross_ptr, N, K, R,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    row, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, RANK)
    there, live = row < N, k < R
    h = tl.zeros((ROWS, RANK), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    for start in range(0, K, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < K
        place = row.to(tl.int64)[:, None] * K + column[None, :]
        w = tl.load(w_ptr + place, there[:, None] & inside[None, :], other=0.0).to(tl.float32)
        a = tl.load(
            a_ptr + k[None, :] * K + column[:, None], inside[:, None] & live[None, :], other=0.0
        )  # (COLUMNS, RANK)
        squares += tl.sum(w * w, 1)
        h += tl.dot(w, a, input_precision="tf32x3")  # A·w, as exact as float32
    beta = tl.load(
        b_ptr + row[:, None] * R + k[None, :], there[:, None] & live[None, :], other=0.0
    )  # (ROWS, RANK)
    tl.store(squares_ptr + row, squares, there)
    tl.store(cross_ptr + row, tl.sum(h * beta, 1), there)


def products(W: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """‖w‖² and β·(A·w), (out,) each: W (out, in) of a half type, A (r, in), B (out, r) float32."""
    (N, K), R = W.shape, len(A)
    squares, cross = torch.empty(2, N, dtype=torch.float32, device=W.device)
    rank = max(16, triton.next_power_of_2(R))
    with on(W):
        _products_kernel[(-(N // -NORMS["ROWS"]),)](
            W.contiguous(), A.contiguous(), B.contiguous(), squares, cross, N, K, R,
            RANK=rank, **NORMS,
        )  # fmt: skip
    return squares, cross


@triton.jit
def _gain_kernel(
    u_ptr, gain_ptr, offset_ptr, y_ptr, M, N,
    SHIFT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    live = (row < M)[:, None] & (column < N)[None, :]
    place = row.to(tl.int64)[:, None] * N + column[None, :]
    gain = tl.load(gain_ptr + column, column < N, other=0.0)
    y = tl.load(u_ptr + place, live, other=0.0).to(tl.float32) * gain[None, :]
    if SHIFT:
        y += tl.load(offset_ptr + column, column < N, other=0.0)[None, :]
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), live)


def gain(u: Tensor, gain: Tensor, offset: Tensor | None) -> Tensor:
    """gain ⊙ u + offset in the dtype of u: u (n, out); gain, offset (out,) float32."""
    (M, N), u = u.shape, u.contiguous()
    y, other = torch.empty_like(u), gain if offset is None else offset
    grid = -(N // -TILE["COLUMNS"]), -(M // -TILE["ROWS"])
    with on(u):
        _gain_kernel[grid](u, gain.contiguous(), other, y, M, N, offset is not None, **TILE)
    return y


@triton.jit
def _back_kernel(
    grad_ptr, u_ptr, gain_ptr, bias_ptr, grad_u_ptr, sums_ptr, M, N,
    SHIFT: tl.constexpr, STRIP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < N
    gain = tl.load(gain_ptr + column, inside, other=0.0)
    bias = tl.zeros((COLUMNS,), tl.float32)
    if SHIFT:
        bias = tl.load(bias_ptr + column, inside, other=0.0).to(tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, STRIP, ROWS):
        row = tl.program_id(1) * STRIP + start + tl.arange(0, ROWS)
        live = (row < M)[:, None] & inside[None, :]
        place = row.to(tl.int64)[:, None] * N + column[None, :]
        grad = tl.load(grad_ptr + place, live, other=0.0).to(tl.float32)
        u = tl.load(u_ptr + place, live, other=0.0).to(tl.float32)
        scaled = grad * gain[None, :]
        tl.store(grad_u_ptr + place, scaled.to(grad_u_ptr.dtype.element_ty), live)
        total += tl.sum(grad * (u - bias[None, :]), 0)
    tl.store(sums_ptr + tl.program_id(1) * N + column, total, inside)


def back(grad: Tensor, u: Tensor, gain: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of u, (n, out) in its dtype, and of the gain, (out,) float32."""
    (M, N), grad, strips = u.shape, grad.contiguous(), -(len(u) // -STRIP)
    grad_u = torch.empty_like(grad)
    sums = torch.empty(strips, N, dtype=torch.float32, device=u.device)
    grid, other = (-(N // -TILE["COLUMNS"]), strips), gain if bias is None else bias
    with on(u):
        _back_kernel[grid](
            grad, u.contiguous(), gain.contiguous(), other.contiguous(), grad_u, sums, M, N,
            bias is not None, STRIP, **TILE,
        )  # fmt: skip
    return grad_u, sums.sum(0)
