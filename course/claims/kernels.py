"""What unit 13 states: bytes counted on small tensors, sectors of memory counted from addresses, and what was recorded of the kernels.

Most of its figures are those of unit 06's layer, and are claims of :mod:`course.claims.qlora`.
"""

import torch

from course.claims import double_quantization
from course.claims.qlora import copy_rate, kernel_ms, moved_bytes
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


def largest_float16() -> float:
    return torch.finfo(torch.float16).max
