"""Quantize bfloat16 two weights at a time: see :mod:`reference.kernels.nf4`.

Any float32 can be quantized as :mod:`reference.kernels.nf4.codes` does. A bfloat16 has eight
significant bits, which saves every second instruction:

- Two lie in 32 bits, and stay there. A bfloat16 is the upper half of a float32, so the high one
  needs a mask and the low one a shift.
- A bfloat16 over a bfloat16 takes few values, with a gap around each midpoint. Within its gap a
  midpoint may be moved, and every value stays on its side of it. So it is moved until its last four
  bits are the number of midpoints below: one table instead of two.
- The cell comes out of a sum with 1.5 · 2²³, whose last bits are the rounded number. A conversion
  would start at a quarter of the rate of other instructions.
- A value is above its midpoint if their difference is negative: its sign bit, and no choice.

The codes are the same, bit for bit, and not only nearly: ``cell_table`` computes all the scaled
values that there are, and places the moved midpoints between two of them.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from reference.blockwise import SMALLEST, midpoints
from reference.nf4 import NF4_CODEBOOK

CELLS = 32
SIZES = dict(tile=1024, num_warps=1)  # values in a tile, warps of a program: fastest on an H200
ROUND = tl.constexpr(12582912.0)  # 1.5 · 2²³: a small number comes out of the sum rounded
NEVER = 1.5  # the midpoint of a cell without one: no scaled weight is above it


def scaled_bfloat16() -> Tensor:
    """All values from 1/64 to 1.25, sorted, of a positive bfloat16 over another: float32.

    The kernel multiplies by a rounded inverse. Powers of two change neither the digits of the
    inverse nor those of the product, so 128 digits of each will do, except where the inverse is
    subnormal and has fewer; and where the divisor is ``SMALLEST`` in place of a tiny absmax.
    """
    digits = torch.arange(128, 256, dtype=torch.float64) / 128
    found = []
    for exponent in (0, 126, 127):  # of the absmax; of the last two, inverses are subnormal
        inverse = torch.ones(()) / (digits * 2.0**exponent).float()
        for less in range(8):  # the weight's exponent is so much less
            found.append((digits * 2.0 ** (exponent - less)).float()[:, None] * inverse)
    tiny = torch.arange(1, 128, dtype=torch.float64) * 2.0**-133  # subnormal bfloat16
    found.append(tiny.float() * (torch.ones(()) / torch.tensor(SMALLEST)))
    values = torch.cat([each.flatten() for each in found]).unique()
    return values[(values >= 1 / 64) & (values <= 1.25)]


@lru_cache
def cell_table(device: torch.device) -> Tensor:
    """(32,) int32, at n mod 32 of cell n = round(15 · scaled): the bits of its moved midpoint.

    The last four are the number of midpoints below the cell.

    Raises:
        ArithmeticError: a gap is too narrow.
    """
    between, values, entries = midpoints(NF4_CODEBOOK), scaled_bfloat16(), []
    for place in range(CELLS):
        n = (place + 16) % CELLS - 16
        edges = (torch.tensor([-0.5, 0.5]) + n) / 15
        below, above = torch.searchsorted(between, edges).tolist()
        if below == above:
            entries.append(torch.tensor(NEVER).view(torch.int32).item() | below)
            continue
        size = between[below].abs()
        # Above a midpoint means greater: a value that equals it is on the side towards −∞.
        i = torch.searchsorted(values, size, right=bool(between[below] > 0)).item()
        low, high = values[i - 1 : i + 1].view(torch.int32).tolist()
        moved = (low + 16) & -16 | below
        if not low < moved < high:
            gap = f"{values[i - 1].item()} and {values[i].item()}"
            raise ArithmeticError(f"no float32 between {gap} ends in the bits {below:04b}")
        entries.append(moved - (1 << 31) if between[below] < 0 else moved)
    return torch.tensor(entries, dtype=torch.int64).int().to(device)


@triton.jit
def pair_codes(scaled, table):
    """Codes of weights over their absmax."""
    cell = (scaled * 15 + ROUND).to(tl.int32, bitcast=True) & 31
    entry = tl.gather(table, tl.ravel(cell), 0).reshape(scaled.shape)
    short = entry.to(tl.float32, bitcast=True) - scaled  # negative above the midpoint
    return (entry & 15) + (short.to(tl.uint32, bitcast=True) >> 31).to(tl.int32)


@triton.jit
def _quantize_pairs_kernel(
    pairs_ptr, packed_ptr, absmax_ptr, bad_ptr, table_ptr, blocks,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    mask = (block < blocks)[:, None]
    byte = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    pair = tl.load(pairs_ptr + byte, mask, other=0)  # (ROWS, BLOCK/2): the first in the low half
    # As in the general kernel, without the sign bit. What the low half holds does not change the
    # order of the high halves.
    second = tl.max(pair & 0x7FFF7FFF, 1) & 0x7FFF0000
    largest = tl.maximum(second, tl.max((pair & 0x7FFF) << 16, 1))  # (ROWS,)
    tl.store(bad_ptr, 1, mask=tl.max(largest, 0) >= 0x7F800000)
    absmax = largest.to(tl.float32, bitcast=True)
    tl.store(absmax_ptr + block, absmax, block < blocks)
    divisor = tl.maximum(absmax, tl.full((ROWS,), 1e-38, tl.float32))
    inverse = tl.math.div_rn(tl.full((ROWS,), 1, tl.float32), divisor)[:, None]
    table = tl.load(table_ptr + tl.arange(0, 32))
    first = pair_codes((pair << 16).to(tl.float32, bitcast=True) * inverse, table)
    second = pair_codes((pair & -65536).to(tl.float32, bitcast=True) * inverse, table)
    tl.store(packed_ptr + byte, (first * 16 + second).to(tl.uint8), mask)


def takes(flat: Tensor) -> bool:
    """Whether ``quantize_pairs`` is for this: bfloat16 that begins where 32 bits may begin."""
    return flat.dtype == torch.bfloat16 and flat.data_ptr() % 4 == 0


def quantize_pairs(
    flat: Tensor, packed: Tensor, absmax: Tensor, bad: Tensor, blocks: int, block_size: int
) -> None:
    """Write codes and absmax of the whole blocks, and a one to ``bad`` for NaN or infinity."""
    rows = max(1, SIZES["tile"] // block_size)
    pairs = flat[: blocks * block_size].view(torch.int32)
    _quantize_pairs_kernel[(-(blocks // -rows),)](
        pairs, packed, absmax, bad, cell_table(flat.device), blocks, block_size, rows,
        num_warps=SIZES["num_warps"],
    )  # fmt: skip
