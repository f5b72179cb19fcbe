"""Exercise 13.4: a kernel that was right for one size only."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from course.checking import Check, Seen, but
from course.checks.kernels.shared import AROUND, amid, poisoned, seen, traced


@triton.jit
def _kernel(
    x_ptr, out_ptr, columns, row_stride, column_stride, turns,
    TILE: tl.constexpr, MASK: tl.constexpr, ABSOLUTE: tl.constexpr, OTHER: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    best = tl.full((TILE,), float("-inf"), tl.float32)
    for turn in range(turns):
        column = turn * TILE + tl.arange(0, TILE)
        mask = column < columns if MASK else column >= 0
        x = tl.load(x_ptr + row * row_stride + column * column_stride, mask, other=OTHER).to(tl.float32)
        found = tl.abs(x) if ABSOLUTE else x
        best = tl.maximum(best, found) if KEEP else found
    tl.store(out_ptr + row, tl.max(best, 0))


def row_absmax(
    x: Tensor,
    out: Tensor,
    *,
    strides=lambda x: x.stride(),
    turns=lambda columns: -(-columns // 128),
    mask=True,
    absolute=True,
    other=0.0,
    keep=True,
    rows=lambda x: x.shape[0],
    copy=lambda x: x,
) -> None:
    """The worked answer: a program a row, in tiles of 128 columns, with the strides of x."""
    x = copy(x)
    _kernel[(rows(x),)](x, out, x.shape[1], *strides(x), turns(x.shape[1]), 128, mask, absolute, other, keep)


@triton.jit
def _whole(x_ptr, out_ptr, rows, columns, row_stride, column_stride, ROWS: tl.constexpr, TILE: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, TILE)[None, :]
    x = tl.load(x_ptr + row * row_stride + column * column_stride, (row < rows) & (column < columns), other=0.0)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(out_ptr + row, tl.max(tl.abs(x.to(tl.float32)), 1), row < rows)


def whole_rows(x: Tensor, out: Tensor) -> None:
    rows, columns = x.shape
    _whole[(triton.cdiv(rows, 4),)](x, out, rows, columns, *x.stride(), 4, triton.next_power_of_2(columns))


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)
    rows, columns = (int(torch.randint(3, 9, (1,), generator=g)), int(torch.randint(260, 400, (1,), generator=g)))
    x = torch.randn(8, 128, generator=g)
    cases = {
        "8 × 128, as before": amid(x),
        "5 × 60": amid(torch.randn(5, 60, generator=g)),
        f"{rows} × {columns}": amid(torch.randn(rows, columns, generator=g)),
        "2 × 1100": amid(torch.randn(2, 1100, generator=g)),
        "a part of wider rows, 6 × 70": torch.randn(6, 90 + AROUND, generator=g)[:, 10:80],
        "a transposed matrix, 5 × 37": amid(torch.randn(37, 5, generator=g)).T,
        "one value": amid(torch.randn(1, 1, generator=g)),
        "float16, 4 × 200": amid(torch.randn(4, 200, generator=g).half()),
    }
    for label, given in cases.items():
        given = given if given.stride() != (0, 0) else given.clone()
        given[::2, -1] -= 4.0  # the largest is often negative, and last, or first
        given[1::2, 0] -= 4.0
        out = poisoned(len(given))
        trace = traced(answer, given, out)
        yield from seen(trace, label, out, given)


check = Check(
    task="the largest absolute value of each row, whatever the sizes and strides",
    observe=observe,
    reference=row_absmax,
    second=whole_rows,
    misconceptions={
        "rows are taken to be 128 apart: pass x.stride(0) to the kernel": but(strides=lambda x: (128, 1)),
        "x is taken to be contiguous: rows are x.stride(0) apart, which need not be the number of columns": but(
            strides=lambda x: (x.shape[1], 1)
        ),
        "columns are taken to be neighbours: in a transposed matrix they are x.stride(1) apart": but(strides=lambda x: (x.stride(0), 1)),
        "only the first 128 columns are looked at: go on in a loop, or take a tile as wide as a row": but(turns=lambda columns: 1),
        "the last columns of a row are left out: the number of tiles is rounded down; use triton.cdiv": but(
            turns=lambda columns: columns // 128 or 1
        ),
        "each tile's values replace those before: keep the larger, tl.maximum(best, ...)": but(keep=False),
        "there is no mask: a row's tile goes on into the next row, and behind the end": but(mask=False),
        "that is the largest value, not the largest absolute one": but(absolute=False),
        "places behind the row hold −∞, whose absolute value is the largest of all: let them hold 0": but(other=float("-inf")),
        "x is copied to make it contiguous: that moves every byte twice more; pass the strides of x itself": but(
            copy=lambda x: x.contiguous()
        ),
        "only the 8 rows of the first size are done: launch one program per row of x": but(rows=lambda x: min(x.shape[0], 4)),
    },
)
