"""Answers that nobody listed: right ones in other dress pass, sly wrong ones are refused; and the trace that the judges look through."""

import pytest
import torch
from interpreted import COMPILES

if COMPILES:
    pytest.skip("see tests/interpreted.py", allow_module_level=True)
pytest.importorskip("triton", reason="Triton exists for Linux on x86-64")

import triton
import triton.language as tl

from course.checking import NotYet
from course.checks import kernels as check
from course.lab.kernel_trace import Trace
from reference import nf4


def refused(judge, answer, words: str) -> None:
    with pytest.raises(NotYet, match=words):
        judge(answer)


# ---- the trace


@triton.jit
def _add_kernel(x_ptr, out_ptr, n, TILE: tl.constexpr, ATOMIC: tl.constexpr):
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    share = tl.sum(tl.load(x_ptr + place, place < n, other=0.0), 0)
    if ATOMIC:
        tl.atomic_add(out_ptr, share)
    else:
        tl.store(out_ptr + tl.program_id(0), share)


@triton.jit
def _shift_kernel(x_ptr, TILE: tl.constexpr):
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(x_ptr + place, tl.load(x_ptr + place + TILE))


def test_atomics_and_own_places_are_no_conflict():
    x = torch.arange(50.0)
    for atomic, out in ((True, torch.zeros(1)), (False, torch.zeros(4))):
        with Trace() as trace:
            _add_kernel[(4,)](x, out, 50, 16, atomic)
        assert out.sum() == x.sum() and not trace.conflicts and not trace.outside
        assert (trace.launches, trace.programs, trace.largest) == (1, 4, 16)


def test_writing_what_another_reads_is_a_conflict_and_a_strayed_read_is_named():
    with Trace() as trace:
        _shift_kernel[(2,)](torch.arange(32.0), 16)
    assert trace.conflicts[0] == "programs 0 and 1 write and read x_ptr[16]"
    assert trace.outside == ["program 1 reads 16 places outside of the tensors that the kernel was given"]


def test_gaps_of_a_slice_are_outside():
    wide = torch.zeros(4, 10)
    with Trace() as trace:
        _shift_kernel[(1,)](wide[:, :4], 16)
    assert trace.outside and wide.sum() == 0 and trace.unread(wide[:, :4]) == 10


def test_the_interpreter_is_as_it_was_afterwards():
    from triton.runtime import interpreter

    before = interpreter.InterpreterBuilder.create_masked_load
    with pytest.raises(ZeroDivisionError), Trace():
        raise ZeroDivisionError
    assert interpreter.InterpreterBuilder.create_masked_load is before


def test_block_pointers_are_seen_too():
    @triton.jit
    def copy(x_ptr, out_ptr, n, TILE: tl.constexpr, CHECK: tl.constexpr):
        x = tl.make_block_ptr(x_ptr, (n,), (1,), (tl.program_id(0) * TILE,), (TILE,), (0,))
        out = tl.make_block_ptr(out_ptr, (n,), (1,), (tl.program_id(0) * TILE,), (TILE,), (0,))
        tl.store(out, tl.load(x, boundary_check=CHECK, padding_option="zero"), boundary_check=(0,))

    x, out = torch.rand(20), torch.zeros(20)
    with Trace() as trace:
        copy[(2,)](x, out, 20, 16, (0,))
    assert torch.equal(out, x) and not trace.outside and trace.unread(x) == trace.unwritten(out) == 0
    with Trace() as trace:
        copy[(2,)](x, out, 20, 16, ())
    assert trace.outside == ["program 1 reads 12 places outside of the tensors that the kernel was given"]


# ---- the judges


def test_torch_alone_is_no_kernel():
    def by_torch(packed, absmax, levels, out, block_size):
        codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[: out.numel()]
        out.copy_(levels[codes.int()] * absmax.repeat_interleave(block_size)[: out.numel()])

    refused(check.dequantize, by_torch, "no kernel was launched")


def test_a_kernel_for_show_is_seen():
    """It launches something, and torch writes the result."""

    def for_show(packed, absmax, levels, out, block_size):
        _add_kernel[(1,)](absmax, torch.zeros(1), 0, 16, True)
        codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[: out.numel()]
        out.copy_(levels[codes.int()] * absmax.repeat_interleave(block_size)[: out.numel()])

    refused(check.dequantize, for_show, "no kernel wrote, .*: expected 0, got 1024")


@triton.jit
def _copy_kernel(x_ptr, out_ptr, n, TILE: tl.constexpr):
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(out_ptr + place, tl.load(x_ptr + place, place < n), place < n)


def test_a_kernel_that_copies_what_torch_computed_is_seen():
    def launch(values, out):
        _copy_kernel[(triton.cdiv(out.numel(), 128),)](values, out, out.numel(), 128)

    def of_codes(packed, absmax, levels, out, block_size):
        codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[: out.numel()]
        launch((levels[codes.int()] * absmax.repeat_interleave(block_size)[: out.numel()]).to(out.dtype), out)

    refused(check.dequantize, of_codes, "no kernel read where they lie, 1024 .*: expected 0, got 512")
    refused(check.shrink, lambda x, A, out: launch(x.float() @ A.float().T, out), "no kernel read where they lie")

    def counted(codes, counts):
        _copy_kernel[(2,)](codes, torch.zeros(3, dtype=torch.uint8), 3, 2)
        counts += codes.int().bincount(minlength=16).int()

    refused(check.histogram, counted, "codes that no kernel read where they lie, of 1024: expected 0, got 1021")


def test_levels_and_blocks_are_those_that_are_given():
    worked = check.dequantize.reference
    refused(
        check.dequantize,
        lambda packed, absmax, levels, out, block_size: worked(packed, absmax, nf4.NF4_CODEBOOK.clone(), out, block_size),
        "the levels are those of NF4",
    )
    refused(
        check.dequantize,
        lambda packed, absmax, levels, out, block_size: worked(packed, absmax, levels, out, 2 * block_size),
        "blocks are counted in bytes",
    )


def test_the_largest_of_a_row_may_be_in_any_tile():
    @triton.jit
    def last_tile(x_ptr, out_ptr, columns, along, across, TILE: tl.constexpr):
        best = tl.zeros((TILE,), tl.float32)
        for start in range(0, columns, TILE):
            column = start + tl.arange(0, TILE)
            best = tl.abs(tl.load(x_ptr + tl.program_id(0) * along + column * across, column < columns, other=0.0).to(tl.float32))
        tl.store(out_ptr + tl.program_id(0), tl.max(best, 0))

    for seed in range(4):
        with pytest.raises(NotYet):
            check.row_absmax._judge(lambda x, out: last_tile[(len(x),)](x, out, x.shape[1], *x.stride(), 128), seed)


def test_a_load_of_many_rows_is_too_large_too():
    @triton.jit
    def tall(x_ptr, a_ptr, out_ptr, T, K, R):
        row, rank = tl.program_id(0) * 128 + tl.arange(0, 128), tl.program_id(1) * 16 + tl.arange(0, 16)
        total = tl.zeros((128, 16), tl.float32)
        for start in range(0, K, 64):
            k = start + tl.arange(0, 64)
            x = tl.load(x_ptr + row[:, None] * K + k[None, :], (row < T)[:, None] & (k < K)[None, :], other=0.0)
            a = tl.load(a_ptr + rank[:, None] * K + k[None, :], (rank < R)[:, None] & (k < K)[None, :], other=0.0)
            total += tl.dot(x, tl.trans(a))
        tl.store(out_ptr + row[:, None] * R + rank[None, :], total, (row < T)[:, None] & (rank < R)[None, :])

    grid = lambda x, A: (triton.cdiv(len(x), 128), triton.cdiv(len(A), 16))  # noqa: E731
    refused(check.shrink, lambda x, A, out: tall[grid(x, A)](x, A, out, *x.shape, len(A)), "fewer features, rows or ranks")


def test_nothing_written_is_said():
    refused(check.shrink, lambda x, A, out: _add_kernel[(1,)](x, torch.zeros(1), 1, 16, True), "change it in place")


def test_a_copy_made_contiguous_is_named():
    """Values and places are right; the exercise asks to read x where it lies."""

    @triton.jit
    def rows(x_ptr, out_ptr, columns, TILE: tl.constexpr):
        column = tl.arange(0, TILE)
        x = tl.load(x_ptr + tl.program_id(0) * columns + column, column < columns, other=0.0)
        tl.store(out_ptr + tl.program_id(0), tl.max(tl.abs(x), 0))

    refused(check.row_absmax, lambda x, out: rows[(len(x),)](x.float().contiguous(), out, x.shape[1], 2048), "where they lie|copied")


def test_one_size_only_is_refused():
    @triton.jit
    def fixed(x_ptr, out_ptr, TILE: tl.constexpr):
        x = tl.load(x_ptr + tl.program_id(0) * 128 + tl.arange(0, TILE))
        tl.store(out_ptr + tl.program_id(0), tl.max(tl.abs(x), 0))

    refused(check.row_absmax, lambda x, out: fixed[(8,)](x, out, 128), "outside|128")


def test_a_race_that_gives_right_counts_is_refused():
    @triton.jit
    def racing(codes_ptr, counts_ptr, n, TILE: tl.constexpr):
        place = tl.program_id(0) * TILE + tl.arange(0, TILE)
        found = tl.load(codes_ptr + place, place < n, other=99)
        for code in tl.static_range(16):
            tl.store(counts_ptr + code, tl.load(counts_ptr + code) + tl.sum((found == code).to(tl.int32), 0))

    refused(check.histogram, lambda codes, counts: racing[(triton.cdiv(len(codes), 32),)](codes, counts, len(codes), 32), "atomic_add")


def test_least_time_takes_a_list():
    def as_list(rows, n_in, n_out, bits, copy_rate, product_rate):
        moved = n_in * n_out * bits / 8 + 2 * rows * (n_in + n_out)
        both = moved / copy_rate, 2 * rows * n_in * n_out / product_rate
        return [moved, 1000 * max(both), ("memory", "products")[both.index(max(both))]]

    check.least_time(as_list)
    refused(check.least_time, lambda *given: as_list(*given)[:2], "returned 2 values")
    refused(check.least_time, lambda *given: (None, 1.0, "memory"), "number 1 of them is of type NoneType")


def test_the_worked_dequantize_is_the_references():
    x = torch.randn(333)
    q, out = nf4.quantize_nf4(x), torch.empty(333)
    check.dequantize.reference(q.packed.view(-1), q.absmax, nf4.NF4_CODEBOOK, out, 64)
    assert torch.equal(out, nf4.dequantize_nf4(q))


def test_tiles_of_64_rows_are_several_programs():
    @triton.jit
    def wide(x_ptr, a_ptr, out_ptr, T, K, R, RANKS: tl.constexpr):
        row, rank = tl.program_id(0) * 64 + tl.arange(0, 64), tl.arange(0, RANKS)
        total = tl.zeros((64, RANKS), tl.float32)
        for start in range(0, K, 32):
            k = start + tl.arange(0, 32)
            x = tl.load(x_ptr + row[:, None] * K + k[None, :], (row < T)[:, None] & (k < K)[None, :], other=0.0)
            a = tl.load(a_ptr + rank[:, None] * K + k[None, :], (rank < R)[:, None] & (k < K)[None, :], other=0.0)
            total = tl.dot(x, tl.trans(a), total)
        tl.store(out_ptr + row[:, None] * R + rank[None, :], total, (row < T)[:, None] & (rank < R)[None, :])

    check.shrink(lambda x, A, out: wide[(triton.cdiv(len(x), 64),)](x, A, out, *x.shape, len(A), max(16, triton.next_power_of_2(len(A)))))


def test_a_wider_tile_is_not_every_size():
    @triton.jit
    def tile(x_ptr, out_ptr, columns, along, across, TILE: tl.constexpr):
        column = tl.arange(0, TILE)
        x = tl.load(x_ptr + tl.program_id(0) * along + column * across, column < columns, other=0.0)
        tl.store(out_ptr + tl.program_id(0), tl.max(tl.abs(x.to(tl.float32)), 0))

    refused(check.row_absmax, lambda x, out: tile[(len(x),)](x, out, x.shape[1], *x.stride(), 512), "2 × 1100")
    check.row_absmax(lambda x, out: tile[(len(x),)](x, out, x.shape[1], *x.stride(), triton.next_power_of_2(x.shape[1])))


def test_masked_places_that_count_are_seen_in_the_sum():
    @triton.jit
    def counts_all(codes_ptr, counts_ptr, n, TILE: tl.constexpr):
        place = tl.program_id(0) * TILE + tl.arange(0, TILE)
        tl.atomic_add(counts_ptr + tl.load(codes_ptr + place, place < n, other=0).to(tl.int32), 1)

    answer = lambda codes, counts: counts_all[(triton.cdiv(len(codes), 512),)](codes, counts, len(codes), 512)  # noqa: E731
    refused(check.histogram, answer, "codes counted in all, of [0-9]+: expected [0-9]+, got 1024")
