"""Exercise 13.2: counts without a race."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from course.checking import Check, Seen, but
from course.checks.kernels.shared import amid, conflicts, outside, traced


@triton.jit
def _kernel(codes_ptr, counts_ptr, n, turns, TILE: tl.constexpr, ATOMIC: tl.constexpr, MASK: tl.constexpr, REST: tl.constexpr):
    code = tl.arange(0, 16)
    hits = tl.zeros((16,), tl.int32)
    for turn in range(turns):
        place = (tl.program_id(0) * turns + turn) * TILE + tl.arange(0, TILE)
        mask = place < n if MASK else place >= 0
        found = tl.load(codes_ptr + place, mask, other=0)
        hit = found[:, None] == code[None, :]
        hits += tl.sum((hit if REST else hit & mask[:, None]).to(tl.int32), 0)
    if ATOMIC:
        tl.atomic_add(counts_ptr + code, hits)
    else:
        tl.store(counts_ptr + code, tl.load(counts_ptr + code) + hits)


def histogram(codes: Tensor, counts: Tensor, *, atomic=True, mask=True, rest=False, programs=lambda n: -(-n // 64), alone=False) -> None:
    """The worked answer: a program counts 64 codes in registers, and adds what it found atomically."""
    n = codes.numel()
    grid, turns = (1, programs(n)) if alone else (programs(n), 1)
    _kernel[(max(grid, 1),)](codes, counts, n, turns, 64, atomic, mask, rest)


@triton.jit
def _shares(codes_ptr, shares_ptr, n, TILE: tl.constexpr):
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    found = tl.load(codes_ptr + place, place < n, other=255)
    for code in tl.static_range(16):
        tl.store(shares_ptr + tl.program_id(0) * 16 + code, tl.sum((found == code).to(tl.int32), 0))


def by_shares(codes: Tensor, counts: Tensor) -> None:
    programs = triton.cdiv(codes.numel(), 128)
    shares = torch.zeros(programs, 16, dtype=torch.int32)
    _shares[(programs,)](codes, shares, codes.numel(), 128)
    counts += shares.sum(0, dtype=torch.int32)


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)
    odd = int(torch.randint(600, 900, (1,), generator=g)) | 1
    for n in (1024, odd, 3):
        codes, counts = amid(torch.randint(16, (n,), generator=g, dtype=torch.uint8)), amid(torch.zeros(16, dtype=torch.int32))
        trace = traced(answer, codes, counts)
        yield f"touched outside of the tensors, {n} codes", outside(trace)
        yield f"codes counted in all, of {n}", int(counts.sum())
        yield f"counts of {n} codes", counts.clone()
        yield f"a race between programs, {n} codes", conflicts(trace)
        yield f"codes that no kernel read where they lie, of {n}", trace.unread(codes)
        if n > 500:
            yield f"more than one program, {n} codes", trace.programs > 1


check = Check(
    task="a histogram that no two programs spoil for each other",
    observe=observe,
    reference=histogram,
    second=by_shares,
    misconceptions={
        "two programs read, add to and write the same counts: on a GPU one addition gets lost; add with tl.atomic_add, or give each "
        "program counts of its own": but(atomic=False),
        "one program does it all: that is no race, and no parallel work either; share the codes out": but(alone=True),
        "places behind the end are counted as code 0: what a masked load puts there is a code too": but(rest=True),
        "there is no mask: the last program counts what lies behind the codes": but(mask=False),
        "the last codes are not counted: the number of programs is rounded down; use triton.cdiv": but(programs=lambda n: n // 64),
    },
)
