"""Exercise 13.5: LoRA's first product, x · Aᵀ, in tiles."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from course.checking import Check, Seen, but
from course.checks.kernels.shared import amid, poisoned, seen, traced

MOST = 2048  # numbers that one load may ask for


@triton.jit
def _kernel(
    x_ptr, a_ptr, out_ptr, T, K, R, turns,
    ROWS: tl.constexpr, RANKS: tl.constexpr, TILE: tl.constexpr, HALF: tl.constexpr, MASK: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    row, rank = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    there = (row < T)[:, None] & (rank < R)[None, :]
    total = tl.zeros((ROWS, RANKS), tl.float32)
    for turn in range(turns):
        k = turn * TILE + tl.arange(0, TILE)
        ok = k < K if MASK else k >= 0
        x = tl.load(x_ptr + row[:, None] * K + k[None, :], (row < T)[:, None] & ok[None, :], other=0.0)
        a = tl.load(a_ptr + rank[:, None] * K + k[None, :], (rank < R)[:, None] & ok[None, :], other=0.0)
        part = tl.sum(x.to(tl.float32)[:, None, :] * a.to(tl.float32)[None, :, :], 2)
        total = total + part if SUM else part
        if HALF:
            total = total.to(tl.float16).to(tl.float32)
    tl.store(out_ptr + row[:, None] * R + rank[None, :], total, there)


def shrink(
    x: Tensor,
    A: Tensor,
    out: Tensor,
    *,
    turns=lambda K: -(-K // 64),
    tile=64,
    half=False,
    mask=True,
    add=True,
    programs=lambda T: -(-T // 16),
    ranks=lambda R: -(-R // 16),
) -> None:
    """The worked answer: 16 rows and 16 ranks a program, along the features 64 at a time, sums in float32."""
    (T, K), R = x.shape, len(A)
    grid = (max(programs(T), 1), max(ranks(R), 1))
    _kernel[grid](x, A, out, T, K, R, turns(K) if tile == 64 else -(-K // tile), 16, 16, tile, half, mask, add)


@triton.jit
def _by_dot(x_ptr, a_ptr, out_ptr, T, K, R, RANKS: tl.constexpr):
    row, rank, k = tl.program_id(0) * 16 + tl.arange(0, 16), tl.arange(0, RANKS), tl.arange(0, 32)
    total = tl.zeros((16, RANKS), tl.float32)
    for start in range(0, K, 32):
        inside = start + k < K
        x = tl.load(x_ptr + row[:, None] * K + (start + k)[None, :], (row < T)[:, None] & inside[None, :], other=0.0)
        a = tl.load(a_ptr + rank[None, :] * K + (start + k)[:, None], (rank < R)[None, :] & inside[:, None], other=0.0)
        total += tl.dot(x, a)
    tl.store(out_ptr + row[:, None] * R + rank[None, :], total, (row < T)[:, None] & (rank < R)[None, :])


def by_dot(x: Tensor, A: Tensor, out: Tensor) -> None:
    (T, K), R = x.shape, len(A)
    _by_dot[(triton.cdiv(T, 16),)](x, A, out, T, K, R, max(16, triton.next_power_of_2(R)))


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)
    rows, features = int(torch.randint(17, 40, (1,), generator=g)), int(torch.randint(130, 250, (1,), generator=g))
    for T, K, R in ((130, 32, 16), (rows, features, 3), (1, 300, 17)):
        x, A = (amid(torch.randn(size, K, generator=g).half()) for size in (T, R))
        out = poisoned(T, R)
        trace = traced(answer, x, A, out)
        label = f"{T} rows of {K} features, r = {R}"
        yield from seen(trace, label, out, x, A)
        yield f"at most {MOST} numbers in a load, {label}", trace.largest <= MOST
        if T > 128:  # more rows than tl.dot takes in a load of so many numbers
            yield f"more than one program, {label}", trace.programs > 1


check = Check(
    task="x · Aᵀ in tiles, summed in float32",
    observe=observe,
    reference=shrink,
    second=by_dot,
    rtol=1e-5,
    atol=1e-4,
    misconceptions={
        "only the first tile of features is summed: go on in a loop": but(turns=lambda K: 1),
        "the last features are left out: the number of tiles is rounded down; use triton.cdiv": but(turns=lambda K: K // 64),
        "each tile's product replaces the sum so far: add it": but(add=False),
        "the sum is rounded to float16 at each tile: sum in float32": but(half=True),
        "the mask of the features is missing: behind the last one lies the next row": but(mask=False),
        "the last rows stay unwritten: the number of programs is rounded down; use triton.cdiv": but(programs=lambda T: T // 16),
        "only 16 ranks are computed: r may be larger than a tile": but(ranks=lambda R: 1),
        "a load asks for too many numbers: that is right here and fits no GPU; take fewer features, rows or ranks at a time": but(tile=512),
    },
)
