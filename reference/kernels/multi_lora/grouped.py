"""Every token's own update in two launches: Triton kernels over tokens sorted by adapter.

    shrink   h = A_a · x       a program: a tile of tokens of one adapter, a share of ``in``
    expand   y += s_a·B_a · h  a program: the same tile, a block of ``out``

A loop over adapters launches four kernels for each and waits for launches; gather + bmm copies an A
and a B for every token. Here the host sorts the tokens and cuts them into tiles that belong to one
adapter each, so a factor is read once for a tile, where it lies: a table holds the addresses. So
adapters need no common memory and no common rank. A program masks what is beyond its adapter's own
rank, and no byte of it is read.

``in`` is shared out where tiles are few, and expand adds the shares up. It is launched in advance
("programmatic dependent launch"): B and y are on their way when h is there.

Sums are float32, h stays float32: a half type's factors meet it as the sum of two half numbers,
which hold 16 of its 24 digits. Nothing is added atomically, so the same batch gives the same bits.

After SGMV (Chen et al. 2023, "Punica").
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from reference.kernels.launch import ahead, multiprocessors, on
from reference.kernels.multi_lora.sizes import sizes
from reference.kernels.multi_lora.tables import Plan, Table, width

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


# Triton's interpreter multiplies no bfloat16. As float32 the same numbers have the same products.
WIDEN = triton.knobs.runtime.interpret


@triton.jit
def _dot(a, b, WIDEN: tl.constexpr):
    """a · b with float32 sums, and in float32's precision if that is what they are."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _entry(table_ptr, tiles_ptr, order_ptr, TILE: tl.constexpr):
    """The tile's adapter, its place among the sorted tokens, the tokens, and which are there."""
    tile = tiles_ptr + 3 * tl.program_id(0)
    entry, start, count = table_ptr + 4 * tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    i = tl.arange(0, TILE)
    live = i < count
    token = tl.load(order_ptr + start + i, live, other=0).to(tl.int64)
    return entry, start + i, token, live, count


@triton.jit
def _factor(address_ptr, FACTOR: tl.constexpr, ALIGNED: tl.constexpr):
    """A or B. An address from a table says nothing of itself: without ``ALIGNED`` it is read number
    by number."""
    factor = tl.load(address_ptr).to(tl.pointer_type(FACTOR))
    if ALIGNED:
        factor = tl.multiple_of(factor, 16)
    return factor


@triton.jit
def _shrink_kernel(
    x_ptr, h_ptr, table_ptr, tiles_ptr, order_ptr, n, K, SPLITS: tl.constexpr,
    FACTOR: tl.constexpr, ALIGNED: tl.constexpr, WIDEN: tl.constexpr, AHEAD: tl.constexpr,
    TILE: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    if AHEAD:
        tl.extra.cuda.gdc_launch_dependents()
    entry, place, token, live, count = _entry(table_ptr, tiles_ptr, order_ptr, TILE)
    R, split = tl.load(entry + 2), tl.program_id(1)
    if count * R > 0:  # else the tile or the adapter is empty
        a_ptr = _factor(entry, FACTOR, ALIGNED)
        k = tl.arange(0, RANK)
        h = tl.zeros((TILE, RANK), tl.float32)
        for start in range(split * COLUMNS, K, SPLITS * COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = column < K
            x = tl.load(
                x_ptr + token[:, None] * K + column[None, :],
                live[:, None] & inside[None, :],
                other=0.0,
            )  # (TILE, COLUMNS)
            a = tl.load(
                a_ptr + k[None, :] * K + column[:, None],
                inside[:, None] & (k < R)[None, :],
                other=0.0,
            )  # (COLUMNS, RANK)
            h += _dot(x.to(FACTOR), a, WIDEN)
        row = split.to(tl.int64) * n + place
        tl.store(h_ptr + row[:, None] * RANK + k[None, :], h, live[:, None] & (k < R)[None, :])


@triton.jit
def _expand_kernel(
    h_ptr, y_ptr, table_ptr, tiles_ptr, order_ptr, n, N, SPLITS: tl.constexpr,
    FACTOR: tl.constexpr, ALIGNED: tl.constexpr, WIDEN: tl.constexpr, AHEAD: tl.constexpr,
    EXACT: tl.constexpr,
    TILE: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    entry, place, token, live, count = _entry(table_ptr, tiles_ptr, order_ptr, TILE)
    R = tl.load(entry + 2)
    if count * R > 0:
        b_ptr = _factor(entry + 1, FACTOR, ALIGNED)
        if ALIGNED:
            R = tl.multiple_of(R, 8)
        scale = tl.load(entry + 3).to(tl.float64, bitcast=True).to(tl.float32)
        k, column = tl.arange(0, RANK), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        b = tl.load(
            b_ptr + column[None, :].to(tl.int64) * R + k[:, None],
            (column < N)[None, :] & (k < R)[:, None],
            other=0.0,
        )  # (RANK, COLUMNS)
        out = y_ptr + token[:, None] * N + column[None, :]
        mask = live[:, None] & (column < N)[None, :]
        y = tl.load(out, mask, other=0.0)
        there = live[:, None] & (k < R)[None, :]
        share = h_ptr + place[:, None] * RANK + k[None, :]
        if AHEAD:
            tl.extra.cuda.gdc_wait()
        h = tl.zeros((TILE, RANK), tl.float32)
        for split in tl.static_range(SPLITS):  # unrolled, so that one need not wait for another
            h += tl.load(share + tl.cast(n, tl.int64) * (split * RANK), there, other=0.0)
        high = h.to(FACTOR)
        update = _dot(high, b, WIDEN)  # (TILE, COLUMNS)
        if not EXACT:
            update += _dot((h - high.to(tl.float32)).to(FACTOR), b, WIDEN)
        tl.store(out, (y.to(tl.float32) + update * scale).to(y_ptr.dtype.element_ty), mask)


def add_updates(y: Tensor, x: Tensor, table: Table, plan: Plan, splits: int | None = None) -> None:
    """y_t += s·B·(A·x_t) by each token's own adapter, in place; a token without one stays.

    Args:
        y, x: (n, out) and (n, in), contiguous, of one dtype: the factors', or a half type under
            float32 factors.
        splits: shares of ``in``, whose sums expand adds up; default: enough to fill the GPU.
    """
    (n, N), K, rank = y.shape, x.shape[1], width(table.rank)
    if not (y.is_contiguous() and x.is_contiguous()) or len(x) != n or n != plan.n:
        shapes = f"{tuple(y.shape)} and {tuple(x.shape)}"
        raise ValueError(f"y and x must be contiguous, of {plan.n} tokens; got {shapes}")
    if x.dtype != y.dtype or table.dtype not in (x.dtype, torch.float32):
        words = f"x is {x.dtype}, y {y.dtype}, the factors {table.dtype}"
        raise ValueError(f"{words}: x and y must be alike, and the factors like them or float32")
    size, early = sizes(plan.tile, rank, table.dtype.itemsize), ahead(x.device)
    splits = splits or size.splits(plan.busy, K, multiprocessors(x.device))
    h = torch.empty(splits, n, rank, dtype=torch.float32, device=x.device)
    where = table.entries, plan.tiles, plan.order
    same = dict(FACTOR=TYPES[table.dtype], ALIGNED=table.aligned, WIDEN=WIDEN, AHEAD=early)
    same |= dict(TILE=plan.tile, RANK=rank)
    exact = table.dtype == torch.float32  # h needs no splitting
    grid = len(plan.tiles), -(N // -size.expand["COLUMNS"])
    more = {"launch_pdl": True} if early else {}
    with on(x):
        _shrink_kernel[len(plan.tiles), splits](x, h, *where, n, K, splits, **same, **size.shrink)
        _expand_kernel[grid](h, y, *where, n, N, splits, EXACT=exact, **same, **size.expand, **more)
