"""What unit 13 states: bytes counted on small tensors, sectors of memory counted from addresses, and what was recorded of the kernels.

Most of its figures are those of unit 06's layer, and are claims of :mod:`course.claims.qlora`.
"""

import statistics

import torch

from course.claims import double_quantization
from course.claims.qlora import copy_rate, kernel_ms, moved_bytes, reading_ms
from course.claims.shared import GPU, normal
from course.lab import recorded
from course.lab.traffic import MovedBytes
from reference.blockwise import midpoints
from reference.memory import SHAPES
from reference.nf4 import NF4_CODEBOOK

SECTOR, WARP = 32, 32  # bytes that memory is fetched in; threads that run together
REGISTERS, WARPS = 65536, 64  # of a multiprocessor of an H100


def first_bytes(who: str) -> float:
    """Bytes per weight to decode eight-bit codes to bfloat16: of the "torch" operators, or those that "must" move."""
    if who == "must":
        return 1 + 4 / 64 + 2
    from reference.kernels.first import dequantize_with_torch

    codes = normal(256, 1024).mul(40).clamp(-127, 127).to(torch.int8)
    steps = torch.ones(codes.numel() // 64)
    with MovedBytes() as moved:
        dequantize_with_torch(codes, steps, 64, torch.bfloat16)
    return moved.bytes / codes.numel()


def sectors_touched(stride: int, size: int = 4) -> int:
    """Sectors of memory that a warp touches where neighbouring threads read numbers of ``size`` bytes, ``stride`` numbers apart."""
    return len({thread * stride * size // SECTOR for thread in range(WARP)})


def times_the_traffic(stride: int, size: int = 4) -> float:
    """What such a read fetches, over what neighbours fetch."""
    return sectors_touched(stride, size) / sectors_touched(1, size)


def floor_percent(work: str, who: str = "ours", rows: int | None = None, device: str = GPU) -> float:
    """The floor over the time that was measured."""
    return 100 * kernel_ms(work, "floor", rows, device) / kernel_ms(work, who, rows, device)


def times_the_floor(work: str, who: str, device: str = GPU) -> float:
    """The time that was measured over the floor."""
    return 100 / floor_percent(work, who, device=device)


def product_rate(device: str = GPU) -> float:
    """Operations per second, in 10¹², that a product with 8,192 rows of bf16 reaches."""
    side = recorded.load("nf4_kernels", device)["result"]["side"]
    return 2 * 8192 * side**2 / (1e9 * kernel_ms("linear", "bf16 weights", 8192, device))


def times_the_bytes(work: str) -> float:
    """What plain torch's operators move to "quantize" or "dequantize" NF4, over what must move."""
    return moved_bytes(work) / 2.5625


def cells_hold_one_midpoint() -> int:
    """The most midpoints in one of 32 cells of [−1, 1]; of 16 cells it is two."""
    edges = (torch.arange(33) - 16.5) / 15
    return int(torch.searchsorted(midpoints(NF4_CODEBOOK), edges).diff().max())


def generated(what: str, bits: float | None = None, model: str = "Llama-2-7B", device: str = GPU) -> float:
    """To generate a token: the "GB" of weights that are read, or how many "tokens" per second a copy's rate allows.

    ``bits`` per weight of the linear layers, by default those of NF4 with double quantization; the head has 16.
    """
    shape, bits = SHAPES[model], bits or double_quantization.bits()
    gigabytes = (shape.linear_parameters * bits / 8 + 2 * shape.embedding) / 1e9
    return gigabytes if what == "GB" else copy_rate(device) / gigabytes


def fused_rows() -> int:
    """Rows of x up to which the layer decodes on the way."""
    from reference.kernels.nf4 import FUSED_ROWS

    return FUSED_ROWS


def one_row_registers() -> int:
    """Registers per thread of the kernel for one row."""
    from reference.kernels.nf4.vector import OPTIONS

    return OPTIONS["maxnreg"]


def warps_that_fit() -> int:
    """Of that kernel, in a multiprocessor."""
    return min(WARPS, REGISTERS // (WARP * one_row_registers()))


def occupancy_percent() -> float:
    return 100 * warps_that_fit() / WARPS


def registers_for_full_occupancy() -> int:
    """Per thread."""
    return REGISTERS // (WARP * WARPS)


# What was aimed at and what else was tried, on an H200

WORTH = 3  # per cent: a kernel that gains less for more lines is not worth them


def worth_percent() -> float:
    return WORTH


def _limit(work: str, rows: int | None = None) -> dict:
    return recorded.row("kernel_limits", "h200", work=work, rows=rows)


def reached_percent(work: str, rows: int | None = None) -> float:
    """The floor over our time; from 16 rows on, the time with bf16 weights over ours."""
    return 100 * _limit(work, rows)["reached"]


def bar_percent(work: str, rows: int | None = None) -> float:
    """What it was meant to be before it was measured."""
    return 100 * _limit(work, rows)["bar"]


def best_percent(work: str, rows: int | None = None) -> float:
    """What the fastest of all ways reaches, ours or a candidate."""
    return 100 * _limit(work, rows)["reached by the fastest"]


def tried(work: str, rows: int | None = None) -> int:
    """How many candidates gave the right numbers and were timed."""
    return len(_speeds(work, rows))


def speed(work: str, kind: str = "", rows: int | None = None) -> float:
    """Our time over that of the fastest candidate whose name begins with ``kind``: above 1 it is faster than ours."""
    return max(value for way, value in _speeds(work, rows).items() if way.startswith(kind))


def slowest(work: str, kind: str = "", rows: int | None = None) -> float:
    """As :func:`speed`, of the slowest."""
    return min(value for way, value in _speeds(work, rows).items() if way.startswith(kind))


def gain_percent(work: str, rows: int | None = None) -> float:
    """By how much the fastest candidate is faster than ours; below 0 if all are slower."""
    return 100 * (speed(work, rows=rows) - 1)


def _speeds(work: str, rows: int | None) -> dict[str, float]:
    row = _limit(work, rows)
    return {each["way"]: row["ours"] / each["ms"] for each in row["candidates"] if "ms" in each}


def only_the_loop_is_worth_its_lines() -> bool:
    """Of all candidates for all works, those that gain ``WORTH`` or more are one, a loop for quantize."""
    rows = recorded.load("kernel_limits", "h200")["result"]["rows"]
    found = {way for row in rows for way, value in _speeds(row["work"], row.get("rows")).items() if value >= 1 + WORTH / 100}
    return len(found) == 1 and found.pop().startswith("loop")


def reading_percent(device: str = "h200") -> float:
    """The floor of the layer with one row, over the time in which a launch only reads the same bytes."""
    return 100 * kernel_ms("linear", "floor", 1, device) / reading_ms(device)


def grouped(peer: str = "vLLM", what: str = "median") -> float:
    """A peer's time over that of the grouped kernels, over all that was measured: "median", "least"; "cells" and those "below 1"."""
    ratios = [cell["milliseconds"][peer] / cell["milliseconds"]["ours"] for cell in recorded.load("multi_lora", "h200")["result"]["cells"]]
    if what in ("cells", "below 1"):
        return sum(ratio < 1 for ratio in ratios) if what == "below 1" else len(ratios)
    return {"median": statistics.median, "least": min}[what](ratios)


def largest_float16() -> float:
    return torch.finfo(torch.float16).max
