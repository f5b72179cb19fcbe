"""Other ways to write the NF4 kernels, to be measured beside those of the course (:mod:`benchmarks.kernel_limits`).

Each gives what the course's kernel gives. One that a measurement finds faster goes into ``reference/kernels/nf4``; the others go.

- quantize, loop: a program goes on from tile to tile, and the next tile is on its way while it encodes this one.
- dequantize, words: a thread reads four bytes and writes sixteen. So what it decodes is what it writes, and nothing goes through shared
  memory in between. Stream: what is written is marked as not needed again.
- one row, and few rows, ahead: a program first asks the second cache for all that it will read. That takes no registers, and memory is
  busy from the beginning, whatever the program does.
- few rows, stages: x reaches shared memory without registers in between, several steps before it is needed; its features are put in the
  order of the tensor cores by the addresses that are read. Scaled: scales are multiplied into the levels, two at a time in 16 bits, in
  place of the sums: half an instruction a weight, where sums of 64 rows take one and of 128 rows two; and the tensor cores can go on
  adding up. The weight is then rounded twice more. Blocks: so many in one step.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from reference.kernels.launch import PTX, counters, multiprocessors
from reference.kernels.nf4 import bfloat16 as nf4_bfloat16
from reference.kernels.nf4 import codes as nf4_codes
from reference.kernels.nf4 import rows as nf4_rows
from reference.kernels.nf4 import vector as nf4_vector
from reference.kernels.nf4.bfloat16 import cell_table, pair_codes
from reference.kernels.nf4.pairs import pair_table
from reference.kernels.nf4.permute import byte_table, look_up, own
from reference.kernels.nf4.scales import nested, read_scales, scale_tensors
from reference.nf4 import NF4Tensor

# ---- quantize


@triton.jit
def _quantize_kernel(
    pairs_ptr, packed_ptr, absmax_ptr, table_ptr, blocks, tiles, BLOCK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    tile = tl.program_id(0)
    block = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    table = tl.load(table_ptr + tl.arange(0, 32))
    byte = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    pair = tl.load(pairs_ptr + byte, (block < blocks)[:, None], other=0)
    for _ in range(tile, tiles, tl.num_programs(0)):
        ahead = block + tl.num_programs(0) * ROWS  # after the last tile: all masked
        next_byte = ahead[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
        next_pair = tl.load(pairs_ptr + next_byte, (ahead < blocks)[:, None], other=0)
        second = tl.max(pair & 0x7FFF7FFF, 1) & 0x7FFF0000
        largest = tl.maximum(second, tl.max((pair & 0x7FFF) << 16, 1))
        absmax = largest.to(tl.float32, bitcast=True)
        tl.store(absmax_ptr + block, absmax, block < blocks)
        divisor = tl.maximum(absmax, tl.full((ROWS,), 1e-38, tl.float32))
        inverse = tl.math.div_rn(tl.full((ROWS,), 1, tl.float32), divisor)[:, None]
        first = pair_codes((pair << 16).to(tl.float32, bitcast=True) * inverse, table)
        second = pair_codes((pair & -65536).to(tl.float32, bitcast=True) * inverse, table)
        tl.store(packed_ptr + byte, (first * 16 + second).to(tl.uint8), (block < blocks)[:, None])
        block, byte, pair = ahead, next_byte, next_pair


def quantize(weight: Tensor, block_size: int = 64, tile: int = 1024, warps: int = 1, programs: int = 16) -> NF4Tensor:
    """As the course's, for bfloat16 in whole blocks and without its check; ``programs`` for each multiprocessor."""
    flat = weight.detach().reshape(-1)
    n, blocks, rows = len(flat), len(flat) // block_size, max(1, tile // block_size)
    packed = torch.empty(n // 2, 1, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(blocks, device=flat.device)
    tiles = -(blocks // -rows)
    _quantize_kernel[(min(tiles, programs * multiprocessors(flat.device)),)](
        flat.view(torch.int32), packed, absmax, cell_table(flat.device), blocks, tiles, block_size, rows, num_warps=warps
    )
    return NF4Tensor(packed, absmax, weight.shape, weight.dtype, block_size)


# ---- dequantize


@triton.jit
def _dequantize_kernel(
    words_ptr, absmax_ptr, nested_ptr, offset_ptr, dynamic_ptr, levels_ptr, out_ptr, blocks,
    WORDS: tl.constexpr, ROWS: tl.constexpr, NESTED: tl.constexpr, DOUBLE: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = block < blocks
    # The compiler is told of no neighbours: else a thread would read four words, and hand three on.
    word = tl.max_contiguous(block[:, None] * WORDS + tl.arange(0, WORDS)[None, :], (1, 1))
    words = tl.load(words_ptr + word, live[:, None], other=0, eviction_policy="evict_first").to(tl.uint32, bitcast=True)
    absmax = read_scales(absmax_ptr, nested_ptr, offset_ptr, dynamic_ptr, block, live, NESTED, DOUBLE)
    halves = tl.join(words, words >> 16)
    bytes_ = tl.join(halves, halves >> 8)
    codes = ((tl.join(bytes_ >> 4, bytes_)) & 15).to(tl.int32)  # (ROWS, WORDS, 2, 2, 2)
    level = tl.gather(tl.load(levels_ptr + tl.arange(0, 16)), tl.ravel(codes), 0).reshape(ROWS, 8 * WORDS)
    place = block[:, None] * (8 * WORDS) + tl.arange(0, 8 * WORDS)[None, :]
    value = (level * absmax[:, None]).to(out_ptr.dtype.element_ty)
    if STREAM:
        tl.store(out_ptr + place, value, live[:, None], cache_modifier=".cs")
    else:
        tl.store(out_ptr + place, value, live[:, None])


def dequantize(q: NF4Tensor, stream: bool = False, tile: int = 2048, warps: int = 2) -> Tensor:
    """As the course's, for whole blocks."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.packed.device)
    blocks, rows = out.numel() // q.block_size, max(1, tile // q.block_size)
    _dequantize_kernel[(-(blocks // -rows),)](
        q.packed.view(-1).view(torch.int32), *scale_tensors(q), out, blocks, q.block_size // 8, rows, *nested(q), stream,
        num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return out


# ---- one row, few rows: ask the second cache first

PREFETCH = tl.constexpr("prefetch.global.L2 [$1]; mov.u32 $0, 0;")


@triton.jit
def _ask(begin_ptr, row_bytes, begin, bytes_, ROWS: tl.constexpr, LINES: tl.constexpr):
    """Of ROWS rows, the lines that hold ``bytes_`` bytes from ``begin`` on: LINES at a time."""
    row = tl.arange(0, ROWS)[:, None].to(tl.int64) * row_bytes
    for line in range(0, tl.cdiv(bytes_, LINES * 128)):
        byte = tl.minimum((line * LINES + tl.arange(0, LINES)) * 128, bytes_ - 1)[None, :]
        place = begin_ptr.to(tl.int64) + begin + row + byte
        tl.inline_asm_elementwise(PREFETCH, "=r,l", [place], tl.int32, is_pure=False, pack=1)


@triton.jit
def _vector_ahead_kernel(
    x_ptr, packed_ptr, absmax_ptr, nested_ptr, offset_ptr, dynamic_ptr, levels_ptr, pairs_ptr, bias_ptr, out_ptr, N, K_PAIRS,
    ODD: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, DOUBLE: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr,
    PTX: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """For a number of rows that 16 divides. The first tile: where programs have one each, that is all."""
    if PTX:
        row_bytes, tile = (2 * K_PAIRS + ODD) * (BLOCK // 2), tl.program_id(0).to(tl.int64)
        _ask(packed_ptr, row_bytes, tile * 16 * row_bytes, row_bytes, 16, 8 * W)
        if not DOUBLE:
            _ask(absmax_ptr, row_bytes, tile * 16 * (2 * K_PAIRS + ODD) * 4, 16 * (2 * K_PAIRS + ODD) * 4, 1, 32 * W)
    nf4_vector._vector_kernel(
        x_ptr, packed_ptr, absmax_ptr, nested_ptr, offset_ptr, dynamic_ptr, levels_ptr, pairs_ptr, bias_ptr, out_ptr, N, K_PAIRS,
        ODD, BLOCK, NESTED, DOUBLE, BIAS, EVEN, PTX, W,
    )  # fmt: skip


@triton.jit
def _rows_ahead_kernel(
    x_ptr, packed_ptr, absmax_ptr, nested_ptr, offset_ptr, dynamic_ptr, levels_ptr, table_ptr, bias_ptr, parts_ptr, arrived_ptr,
    out_ptr, M, N, K_BLOCKS, BLOCK: tl.constexpr, NESTED: tl.constexpr, DOUBLE: tl.constexpr, BIAS: tl.constexpr, PTX: tl.constexpr,
    ROWS_X: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """For a number of rows that ROWS divides."""
    if PTX:
        share = tl.cdiv(K_BLOCKS, tl.num_programs(1))
        first, own_rows = tl.program_id(1) * share, tl.program_id(0).to(tl.int64) * ROWS
        blocks = tl.maximum(tl.minimum(share, K_BLOCKS - first), 0)
        row_bytes = K_BLOCKS * (BLOCK // 2)
        _ask(packed_ptr, row_bytes, own_rows * row_bytes + first * (BLOCK // 2), blocks * (BLOCK // 2), ROWS, 32 * W // ROWS)
        if not DOUBLE:
            _ask(absmax_ptr, 4 * K_BLOCKS, (own_rows * K_BLOCKS + first) * 4, blocks * 4, ROWS, 32 * W // ROWS)
    nf4_rows._rows_kernel(
        x_ptr, packed_ptr, absmax_ptr, nested_ptr, offset_ptr, dynamic_ptr, levels_ptr, table_ptr, bias_ptr, parts_ptr, arrived_ptr,
        out_ptr, M, N, K_BLOCKS, BLOCK, NESTED, DOUBLE, BIAS, PTX, ROWS_X, ROWS, W,
    )  # fmt: skip


# ---- few rows in stages


@triton.jit
def _scaled(level, scale, PTX: tl.constexpr):
    """Levels times scales, in the 16 bits of the levels."""
    level, scale = tl.broadcast(level, scale)
    if PTX and level.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise("mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [level, scale], level.dtype, is_pure=True, pack=2)
    return level * scale


@triton.jit
def _stages_kernel(
    x_ptr, packed_ptr, absmax_ptr, levels_ptr, table_ptr, parts_ptr, arrived_ptr, out_ptr, M, N, K_BLOCKS,
    BLOCK: tl.constexpr, PTX: tl.constexpr, ROWS_X: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr,
    BLOCKS: tl.constexpr, STAGES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """As the course's for a few rows, with float32 scales, and a number of blocks that BLOCKS divides."""
    FEATURES: tl.constexpr = BLOCKS * BLOCK
    WORDS: tl.constexpr = FEATURES // 8
    table = (
        own(table_ptr, 0, PTX), own(table_ptr, 1, PTX), own(table_ptr, 2, PTX), own(table_ptr, 3, PTX),
        own(table_ptr, 4, PTX), own(table_ptr, 5, PTX), own(table_ptr, 6, PTX), own(table_ptr, 7, PTX),
    )  # fmt: skip
    begin, parts, steps = tl.program_id(0) * ROWS, tl.num_programs(1), K_BLOCKS // BLOCKS
    share = tl.cdiv(steps, parts)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, steps)
    row, row_x = begin + nf4_rows.row_order(tl.arange(0, ROWS), W), tl.arange(0, ROWS_X)
    live, live_x = row < N, row_x < M
    word = tl.multiple_of(tl.arange(0, WORDS)[None, :], (1, FEATURES // 32))
    read = tl.minimum(begin + tl.arange(0, ROWS), N - 1)
    words_ptr = packed_ptr + read[:, None].to(tl.int64) * (K_BLOCKS * (BLOCK // 8)) + word
    k = tl.arange(0, FEATURES)  # where the tensor cores have a feature: see nf4_rows.product
    feature = k // 2 % 4 * (FEATURES // 4) + k // 32 * 8 + k // 8 % 4 * 2 + k % 2
    feature = tl.max_contiguous(tl.multiple_of(feature, 2), 2)
    x_ptr += tl.minimum(row_x, M - 1)[:, None] * (K_BLOCKS * BLOCK) + feature[None, :]
    of_level = absmax_ptr + read[:, None] * K_BLOCKS + tl.arange(0, BLOCKS)[None, :]
    of_sum = absmax_ptr + tl.minimum(row, N - 1) * K_BLOCKS
    total = tl.zeros((ROWS, ROWS_X), tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        words = tl.load(words_ptr + step * WORDS)
        x = tl.load(x_ptr + step * FEATURES)
        level = look_up(words, table, levels_ptr, x.dtype, PTX)  # (ROWS, WORDS, 8)
        if SCALED:
            scale = tl.load(of_level + step * BLOCKS).to(x.dtype)  # (ROWS, BLOCKS)
            level = _scaled(level.reshape(ROWS, BLOCKS, BLOCK), scale[:, :, None], PTX)
        level = level.reshape(ROWS // (16 * W), 2, W, 8, 4, FEATURES // 32, 4, 2)
        level = level.permute(0, 2, 1, 3, 5, 6, 4, 7).reshape(ROWS, FEATURES)
        if SCALED:
            total = tl.dot(level, tl.trans(x), total)
        else:
            total += tl.dot(level, tl.trans(x)) * tl.load(of_sum + step)[:, None]

    place, mask = row_x[None, :] * N + row[:, None], live[:, None] & live_x[None, :]
    if parts > 1:
        tl.store(parts_ptr + tl.program_id(1) * M * N + place, total, mask)
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + tl.program_id(0), 1) != parts - 1:
            return
        tl.store(arrived_ptr + tl.program_id(0), 0)
        total = tl.zeros((ROWS, ROWS_X), tl.float32)
        for part in range(parts):
            total += tl.load(parts_ptr + part * M * N + place, mask, other=0.0, cache_modifier=".cg")
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask)


def stages(
    x: Tensor, q: NF4Tensor, scaled: bool = True, rows: int = 128, warps: int = 8, programs: int = 1, blocks: int = 1, ahead: int = 3
) -> Tensor:
    """``blocks`` in a step; ``ahead``: stages, of which one is used while the others arrive."""
    (M, K), (N, _), block = x.shape, q.shape, q.block_size
    rows_x, tiles = max(16, triton.next_power_of_2(M)), -(N // -rows)
    parts = max(1, min(programs * multiprocessors(x.device) // tiles, K // block // blocks))
    shares = torch.empty(parts, M, N, device=x.device) if parts > 1 else x
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    _stages_kernel[(tiles, parts)](
        x, q.packed.view(-1).view(torch.int32), q.absmax, scale_tensors(q)[-1], byte_table(x.device, x.dtype), shares,
        counters(tiles, x.device), out, M, N, K // block, block, PTX, rows_x, rows, warps, blocks, ahead, scaled, num_warps=warps,
    )  # fmt: skip
    return out


# ---- the course's own kernels in other sizes


def quantize_in(weight: Tensor, block_size: int = 64, tile: int = 1024, warps: int = 1) -> NF4Tensor:
    """For bfloat16."""
    with sizes(nf4_bfloat16.SIZES, tile=tile, num_warps=warps):
        return nf4_codes.quantize_nf4(weight, block_size, check=False)


def dequantize_in(q: NF4Tensor, tile: int = 2048, warps: int = 2) -> Tensor:
    with sizes(nf4_codes.DEQUANTIZE, tile=tile, num_warps=warps):
        return nf4_codes.dequantize_nf4(q)


@contextmanager
def sizes(settings: dict, **others) -> Iterator[None]:
    """Inside, a kernel is launched with other sizes."""
    before = dict(settings)
    settings.update(others)
    try:
        yield
    finally:
        settings.update(before)


def one_row(x: Tensor, q: NF4Tensor, ahead: bool = True, warps: int = 4, programs: int = 4) -> Tensor:
    """The kernel for one row; ``programs`` for each multiprocessor."""
    (N, K), block, tiles = q.shape, q.block_size, -(q.shape[0] // -nf4_vector.ROWS)
    each = -(tiles // -(programs * multiprocessors(x.device)))
    out = torch.empty(1, N, dtype=x.dtype, device=x.device)
    blocks, kernel = K // block, _vector_ahead_kernel if ahead else nf4_vector._vector_kernel
    kernel[(-(tiles // -each),)](
        x, q.packed.view(-1).view(torch.int32), *scale_tensors(q), pair_table(x.device, x.dtype), x, out, N, blocks // 2, blocks % 2,
        block, *nested(q), False, K % (warps * nf4_vector.FEATURES) == 0, PTX, warps,
        num_warps=warps, num_stages=1, maxnreg=nf4_vector.REGISTERS // (32 * warps * programs),
    )  # fmt: skip
    return out


def few_rows(x: Tensor, q: NF4Tensor, ahead: bool = False, rows: int = 64, warps: int = 4, programs: int = 4) -> Tensor:
    """The kernel for a few rows; ``rows`` of the weight for a program, a multiple of 16 for each warp."""
    (M, K), (N, _), block = x.shape, q.shape, q.block_size
    rows_x, tiles = max(16, triton.next_power_of_2(M)), -(N // -rows)
    parts = max(1, min(programs * multiprocessors(x.device) // tiles, K // block))
    shares = torch.empty(parts, M, N, device=x.device) if parts > 1 else x
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    kernel = _rows_ahead_kernel if ahead else nf4_rows._rows_kernel
    kernel[(tiles, parts)](
        x, q.packed.view(-1).view(torch.int32), *scale_tensors(q), byte_table(x.device, x.dtype), x, shares, counters(tiles, x.device),
        out, M, N, K // block, block, *nested(q), False, PTX, rows_x, rows, warps, num_warps=warps, num_stages=1,
    )  # fmt: skip
    return out


# ---- what is measured


def named(way: Callable, name: str, *sizes: tuple, **others) -> dict[str, Callable]:
    """Name with its sizes -> the way in these sizes."""
    return {f"{name} {' × '.join(map(str, each))}": partial(way, **others, **dict(zip(SIZES[way], each, strict=True))) for each in sizes}


SIZES = {
    quantize: ("tile", "warps", "programs"),
    quantize_in: ("tile", "warps"),
    dequantize: ("tile", "warps"),
    dequantize_in: ("tile", "warps"),
    one_row: ("warps", "programs"),
    few_rows: ("rows", "warps", "programs"),
    stages: ("rows", "warps", "programs", "blocks", "ahead"),
}
QUANTIZE = named(quantize, "loop", (1024, 1, 16), (1024, 1, 24), (2048, 2, 12))
QUANTIZE |= named(quantize_in, "ours", (512, 1), (1024, 2), (2048, 1))
DEQUANTIZE = named(dequantize, "words", (1024, 1), (2048, 2), (2048, 1), (4096, 4), stream=False)
DEQUANTIZE |= named(dequantize, "words, stream", (1024, 1), (2048, 2), stream=True)
DEQUANTIZE |= named(dequantize_in, "ours", (1024, 1), (1024, 2), (2048, 4), (4096, 4))
ONE_ROW = named(one_row, "ahead", (4, 4), (4, 3), (8, 2), ahead=True)
FEW_ROWS = named(few_rows, "ahead", (64, 4, 4), (64, 4, 6), (128, 8, 2), ahead=True)
FEW_ROWS |= named(stages, "stages", (64, 4, 4, 1, 3), (128, 8, 2, 1, 3), scaled=False)
FEW_ROWS |= named(stages, "scaled", (64, 4, 4, 1, 3), (64, 4, 4, 2, 3), (128, 8, 2, 1, 4), (128, 8, 2, 2, 3), scaled=True)
MORE_ROWS = named(few_rows, "ahead", (64, 4, 2), (128, 8, 1), ahead=True)  # 65 to 128
MORE_ROWS |= named(stages, "stages", (64, 4, 2, 1, 3), (128, 8, 1, 1, 4), scaled=False)
MORE_ROWS |= named(
    stages, "scaled", (64, 4, 2, 2, 3), (128, 8, 1, 1, 4), (128, 8, 1, 2, 3), (128, 4, 2, 1, 4), (256, 8, 1, 1, 4), scaled=True
)
