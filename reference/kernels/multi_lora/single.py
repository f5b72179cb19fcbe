"""One adapter for all rows, where rows are few: an unmerged LoRA layer that generates.

    y = W·x + b + s·B·(A·x)      one row, W of 16 bits: base and adapter in two launches
    y += s·B·(A·x)               up to 16 rows, any base: two launches more

Written with torch, an update takes a cast, two products, a scale and a sum, and each launch takes
longer to begin than to run. For one row A is just r more rows of W: [A; W]·x is one launch. Then
B·h is added in another, which is launched in advance and has B on its way when h is there.
What :mod:`.grouped` must be told of the adapter and the rows is the same for every token, so it is
made once and found again.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from reference.kernels.launch import ahead, on
from reference.kernels.multi_lora.grouped import add_updates
from reference.kernels.multi_lora.tables import TILES, Plan, Table, together

FEW = TILES[0]  # rows of one tile
ROWS, WARPS = 2, 8  # rows of W for a program of the first launch: what was fastest on an H200
COLUMNS = 8192  # of W at once, where a row is not much longer
EXPAND = 256  # numbers of y for a program of the second launch, fewer beyond rank 64


@triton.jit
def product(x_ptr, m_ptr, row, live, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS,) of M·x, for some rows of M."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.static_range(0, K, COLUMNS):
        column = (start + tl.arange(0, COLUMNS))[None, :]
        x = tl.load(x_ptr + column, column < K, other=0.0)
        there = live[:, None] & (column < K)
        place = m_ptr + row.to(tl.int64)[:, None] * K + column
        m = tl.load(place, there, other=0.0, eviction_policy="evict_first")
        total += m.to(tl.float32) * x.to(tl.float32)
    return tl.sum(total, 1)


@triton.jit
def _stacked_kernel(
    x_ptr, w_ptr, a_ptr, h_ptr, sums_ptr, scale, N, R,
    K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """s·A·x by the first R programs, W·x by the others."""
    if AHEAD:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    if program < R:
        k = program + tl.arange(0, 1)
        tl.store(h_ptr + k, product(x_ptr, a_ptr, k, k < R, K, 1, COLUMNS) * scale, k < R)
    else:
        row = (program - R) * ROWS + tl.arange(0, ROWS)
        y = product(x_ptr, w_ptr, row, row < N, K, ROWS, COLUMNS)
        tl.store(sums_ptr + row, y, row < N)


@triton.jit
def _expand_kernel(
    b_ptr, bias_ptr, h_ptr, sums_ptr, y_ptr, N, R,
    RANK: tl.constexpr, COLUMNS: tl.constexpr, BIAS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    k, column = tl.arange(0, RANK), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    live = column < N
    there = live[:, None] & (k < R)[None, :]
    b = tl.load(b_ptr + column.to(tl.int64)[:, None] * R + k[None, :], there, other=0.0)
    bias = tl.zeros((COLUMNS,), tl.float32)
    if BIAS:
        bias += tl.load(bias_ptr + column, live, other=0.0).to(tl.float32)
    if AHEAD:
        tl.extra.cuda.gdc_wait()
    h = tl.load(h_ptr + k, k < R, other=0.0)
    y = tl.load(sums_ptr + column, live, other=0.0) + tl.sum(b.to(tl.float32) * h[None, :], 1)
    tl.store(y_ptr + column, (y + bias).to(y_ptr.dtype.element_ty), live)


def adapted_row(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float
) -> Tensor:
    """W·x + b + s·B·(A·x) of one row: sums in float32, rounded once.

    Args:
        x: (1, in), contiguous, 16 bits.
        weight, bias: (out, in), contiguous, and (out,), of its dtype.
        A, B: (r, in) and (out, r), contiguous, of its dtype or float32.
    """
    (N, K), R, early = weight.shape, len(A), ahead(x.device)
    h, sums = (torch.empty(n, dtype=torch.float32, device=x.device) for n in (R, N))
    y, columns = torch.empty(1, N, dtype=x.dtype, device=x.device), triton.next_power_of_2(K)
    if columns > COLUMNS:
        columns = COLUMNS // 2  # 11008 are three times 4096: less is left empty
    rank, more = max(16, triton.next_power_of_2(R)), {"launch_pdl": True} if early else {}
    out = min(EXPAND, EXPAND * 64 // rank)
    with on(x):
        _stacked_kernel[(R - (N // -ROWS),)](
            x, weight, A, h, sums, scaling, N, R, K, ROWS, columns, early, num_warps=WARPS
        )
        _expand_kernel[(-(N // -out),)](
            B, sums if bias is None else bias, h, sums, y, N, R,
            rank, out, bias is not None, early, num_warps=4, **more,
        )  # fmt: skip
    return y


@lru_cache(maxsize=4096)
def _table(
    a: int, b: int, r: int, scaling: float, dtype: torch.dtype, device: torch.device
) -> Table:
    """A table says where factors lie, so it is right for whatever lies there."""
    bits = torch.tensor(scaling, dtype=torch.float64).view(torch.int64).item()
    return Table(torch.tensor([[a, b, r, bits]], device=device), dtype, r, (), together(a, b, r))


@lru_cache(maxsize=64)
def _plan(rows: int, device: torch.device) -> Plan:
    return Plan([range(rows)], rows, 1, device)


def add_update(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> None:
    """y += s·B·(A·x), in place; dtypes as for :func:`.grouped.add_updates`.

    The first call of a layer puts its table on the device: in a CUDA graph it must be the second.

    Args:
        y, x: (n, out) and (n, in), contiguous.
        A, B: (r, in) and (out, r), contiguous.
    """
    table = _table(A.data_ptr(), B.data_ptr(), len(A), scaling, A.dtype, A.device)
    add_updates(y, x, table, _plan(len(x), x.device))
