"""One row through a frozen layer *and* its adapter: other ways to launch it, measured beside the course's in :mod:`benchmarks.multi_lora`.

    y = W·x + s·B·(A·x)        x: one row, 16 bits; sums in float32, rounded once

The course's way (``reference/kernels/multi_lora/single.py``) is [A; W]·x, then W·x + B·h in a launch that begins in advance. Here are its
rivals, each in the sizes that were its best on an H200. In all of them A is just r more rows of W.

- "one launch": the first programs compute h and count up a flag. The others take rows of W; when their weights are on the way they look at
  the flag, and multiply B by h in passing. Programs start in the order of their numbers, and those of h wait for nobody, so nobody waits
  for ever. The last one sets the flag back, for the next launch.
- "shrink, then fused": h in a launch of its own, whose dependent launch starts at once ("programmatic dependent launch") and waits for h
  when its own weights are on the way.
- "base, then grouped": cuBLAS, then shrink and expand, as for several rows.

"base" is the first without an adapter: what the course's own product of a row would cost by itself.
"""

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from reference.kernels.multi_lora import single

INTERPRETED = triton.knobs.runtime.interpret
product = single.product


@triton.jit
def _fetched(x_ptr, m_ptr, row, live, start, K: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) of some rows of a matrix, and (1, COLUMNS) of x."""
    column = (start + tl.arange(0, COLUMNS))[None, :]
    x = tl.load(x_ptr + column, column < K, other=0.0)
    there = live[:, None] & (column < K)
    m = tl.load(m_ptr + row.to(tl.int64)[:, None] * K + column, there, other=0.0, eviction_policy="evict_first")
    return m, x


@triton.jit
def _shrunk(x_ptr, a_ptr, h_ptr, scale, program, R, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """s · some of h."""
    k = program * ROWS + tl.arange(0, ROWS)
    h = product(x_ptr, a_ptr, k, k < R, K, ROWS, COLUMNS) * scale
    tl.store(h_ptr + k, h, k < R)


@triton.jit
def _expanded(b_ptr, h_ptr, flag_ptr, row, live, R, RANK: tl.constexpr, FLAG: tl.constexpr, PDL: tl.constexpr):
    """(ROWS,) of B·h, when h is there."""
    k = tl.arange(0, RANK)
    there = live[:, None] & (k < R)[None, :]
    b = tl.load(b_ptr + row.to(tl.int64)[:, None] * R + k[None, :], there, other=0.0).to(tl.float32)  # (ROWS, RANK)
    if FLAG:
        while tl.load(flag_ptr, volatile=True) < R:
            pass
        # Who has seen h counts as well, so the last one knows that nobody waits any more.
        if tl.atomic_add(flag_ptr, 1, sem="acquire") == tl.num_programs(0) - 1:
            tl.store(flag_ptr, 0)
    elif PDL:
        tl.extra.cuda.gdc_wait()
    h = tl.load(h_ptr + k, k < R, other=0.0, cache_modifier=".cg")
    return tl.sum(b * h[None, :], 1)


@triton.jit
def _fused_kernel(
    x_ptr, w_ptr, a_ptr, b_ptr, h_ptr, flag_ptr, y_ptr, scale, N, R,
    K: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ADAPTED: tl.constexpr, FLAG: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """W·x + B·h. With FLAG h is computed here, by R programs that are first; else by a launch before."""
    first = R if FLAG else 0
    program = tl.program_id(0)
    if program < first:
        _shrunk(x_ptr, a_ptr, h_ptr, scale, program, R, K, 1, COLUMNS)
        tl.debug_barrier()  # all threads have stored before one of them says so
        tl.atomic_add(flag_ptr, 1, sem="release")
    else:
        row = (program - first) * ROWS + tl.arange(0, ROWS)
        live = row < N
        if COLUMNS >= K:  # while h is waited for, all of the weights are on their way
            m, x = _fetched(x_ptr, w_ptr, row, live, 0, K, COLUMNS)
            update = tl.zeros((ROWS,), tl.float32)
            if ADAPTED:
                update = _expanded(b_ptr, h_ptr, flag_ptr, row, live, R, RANK, FLAG, PDL)
            y = tl.sum(m.to(tl.float32) * x.to(tl.float32), 1) + update
        else:
            y = product(x_ptr, w_ptr, row, live, K, ROWS, COLUMNS)
            if ADAPTED:
                y += _expanded(b_ptr, h_ptr, flag_ptr, row, live, R, RANK, FLAG, PDL)
        tl.store(y_ptr + row, y.to(y_ptr.dtype.element_ty), live)


@triton.jit
def _shrink_kernel(
    x_ptr, a_ptr, h_ptr, scale, R, K: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    _shrunk(x_ptr, a_ptr, h_ptr, scale, tl.program_id(0), R, K, 1, COLUMNS)


class OneRow:
    """A frozen weight and one adapter, and the memory that a launch leaves as it found it.

    Args:
        weight, A, B: (out, in), (r, in) and (out, r), contiguous, of one type of 16 bits.
    """

    def __init__(self, weight: Tensor, A: Tensor, B: Tensor, scaling: float):
        self.weight, self.A, self.B, self.scaling = weight, A, B, scaling
        self.h = torch.empty(len(A), device=weight.device)
        self.flag = torch.zeros(1, dtype=torch.int32, device=weight.device)


def _sizes(layer: OneRow, columns: int | None) -> tuple[int, int, int, int, int]:
    (N, K), R = layer.weight.shape, len(layer.A)
    return N, K, R, max(16, triton.next_power_of_2(R)), columns or triton.next_power_of_2(K)


def _dependent() -> dict:
    """Options of a launch that may start before the one before it has ended."""
    return {} if INTERPRETED else {"launch_pdl": True}


def one_launch(layer: OneRow, x: Tensor, rows: int = 4, columns: int | None = None, warps: int = 8, base: bool = False) -> Tensor:
    """``columns`` at a time, default: whole rows; ``base``: without the adapter."""
    N, K, R, rank, columns = _sizes(layer, columns)
    R, y = 0 if base else R, x.new_empty(1, N)
    _fused_kernel[(R - (N // -rows),)](
        x, layer.weight, layer.A, layer.B, layer.h, layer.flag, y, layer.scaling, N, R, K, rank, rows, columns, not base,
        not base, False, num_warps=warps,
    )  # fmt: skip
    return y


def shrink_then_fused(layer: OneRow, x: Tensor, rows: int = 4, columns: int | None = None, warps: int = 8) -> Tensor:
    N, K, R, rank, columns = _sizes(layer, columns)
    y, ahead = x.new_empty(1, N), not INTERPRETED
    _shrink_kernel[(R,)](x, layer.A, layer.h, layer.scaling, R, K, columns, ahead, num_warps=4)
    _fused_kernel[(-(N // -rows),)](
        x, layer.weight, layer.A, layer.B, layer.h, layer.flag, y, layer.scaling, N, R, K, rank, rows, columns, True,
        False, ahead, num_warps=warps, **_dependent(),
    )  # fmt: skip
    return y


def base_then_grouped(layer: OneRow, x: Tensor) -> Tensor:
    y = nn.functional.linear(x, layer.weight)
    single.add_update(y, x, layer.A, layer.B, layer.scaling)
    return y


WAYS: dict[str, Callable[[OneRow, Tensor], Tensor]] = {
    "base, 1 × all, 4 warps": partial(one_launch, rows=1, warps=4, base=True),
    "one launch, 8 × 1024, 8 warps": partial(one_launch, rows=8, columns=1024),
    "shrink, then fused, 2 × all, 4 warps": partial(shrink_then_fused, rows=2, warps=4),
    "base, then grouped": base_then_grouped,
}
