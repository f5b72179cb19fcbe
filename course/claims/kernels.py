"""What unit 13 states: bytes counted on small tensors, lines of memory counted from addresses, and what was recorded of the kernels.

Most of its figures are those of unit 06's layer, and are claims of :mod:`course.claims.qlora`.
"""

import torch

from course.claims.qlora import kernel_ms, moved_bytes
from course.claims.shared import GPU, normal
from course.lab import recorded
from course.lab.traffic import MovedBytes
from reference.blockwise import midpoints
from reference.nf4 import NF4_CODEBOOK

LINE, WARP = 128, 32  # bytes that memory is fetched in; threads that run together


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


def lines_touched(stride: int, size: int) -> int:
    """Lines of memory that a warp touches where neighbouring threads read numbers of ``size`` bytes, ``stride`` numbers apart."""
    return len({thread * stride * size // LINE for thread in range(WARP)})


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
