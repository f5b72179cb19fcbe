"""AdamW on pages in one pass over memory, with the roundings of torch's own loop.

    read p, g, m, v; write p, m, v:  28 bytes per float32 number. The loop of torch reads and writes
    about 80, since each of its eight operations goes through memory.

A page holds pieces of many parameters. It is cut into tiles that lie in one piece each; a program
updates one tile, and one launch a whole page. Where p and g are is in a table, written for each
step: gradients are new tensors every time.

Every operation of the loop rounds its result to the dtype, and so does each line here. What the
compiler joins in torch's kernels, a product and the sum that follows in the *same* operation, is
written as fma; what it can't join, across operations, stays apart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from reference.kernels.launch import PTX, on

TILE = 2048  # numbers a program
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _sqrt(x, PTX: tl.constexpr):
    if PTX:  # Triton's own takes a subnormal number for zero
        return tl.inline_asm_elementwise("sqrt.rn.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return tl.sqrt_rn(x)


@triton.jit
def _divide(x, y, PTX: tl.constexpr):
    if PTX:
        return tl.inline_asm_elementwise(
            "div.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], tl.float32, True, 1
        )
    return tl.div_rn(x, y)


@triton.jit
def _update_kernel(
    page_ptr, tiles_ptr, pieces_ptr, scalars_ptr, size,
    ALIGNED: tl.constexpr, TILE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    T = page_ptr.dtype.element_ty
    tile = tl.program_id(0)
    piece = pieces_ptr + 5 * tl.load(tiles_ptr + 2 * tile)
    p_address, g_address = tl.load(piece), tl.load(piece + 1)
    offset, length, row = tl.load(piece + 2), tl.load(piece + 3), tl.load(piece + 4)
    if g_address != 0:  # else this parameter has no gradient in this step
        i = tl.load(tiles_ptr + 2 * tile + 1) + tl.arange(0, TILE)
        live = i < length
        p_ptr = p_address.to(tl.pointer_type(T)) + i
        g_ptr = g_address.to(tl.pointer_type(T)) + i
        m_ptr = page_ptr + offset + i
        v_ptr = m_ptr + size
        if ALIGNED:
            p_ptr, g_ptr = tl.multiple_of(p_ptr, 16), tl.multiple_of(g_ptr, 16)
            m_ptr, v_ptr = tl.multiple_of(m_ptr, 16), tl.multiple_of(v_ptr, 16)
        p, g = tl.load(p_ptr, live).to(tl.float32), tl.load(g_ptr, live).to(tl.float32)
        m, v = tl.load(m_ptr, live).to(tl.float32), tl.load(v_ptr, live).to(tl.float32)
        scalars = scalars_ptr + 7 * row
        weight1, weight2 = tl.load(scalars + 1), tl.load(scalars + 3)
        p = (p * tl.load(scalars)).to(T).to(tl.float32)
        near, far = tl.fma(weight1, g - m, m), tl.fma(m - g, 1 - weight1, g)
        m = tl.where(weight1 < 0.5, near, far).to(T)  # torch's lerp starts at the nearer end
        v = (v * tl.load(scalars + 2)).to(T).to(tl.float32)
        v = tl.fma(weight2, g * g, v).to(T)
        d = _sqrt(v.to(tl.float32), PTX).to(T).to(tl.float32)
        d = (d * tl.load(scalars + 4)).to(T).to(tl.float32)
        d = (d + tl.load(scalars + 5)).to(T).to(tl.float32)
        p = tl.fma(tl.load(scalars + 6), _divide(m.to(tl.float32), d, PTX), p).to(T)
        tl.store(p_ptr, p, live)
        tl.store(m_ptr, m, live)
        tl.store(v_ptr, v, live)


@dataclass
class Tables:
    """What stays from step to step: which tiles a page has, on the device."""

    tiles: list[Tensor]  # of each page (tiles, 2), int32: piece, first number within it
    pieces: int  # of all pages

    @classmethod
    def of(cls, pages: Sequence, device: torch.device) -> "Tables":
        """Of pages as :mod:`reference.paging.layout` makes them."""
        tiles, count = [], 0
        for page in pages:
            starts = [torch.arange(0, piece.length, TILE) for piece in page.pieces]
            owners = [torch.full_like(start, count + k) for k, start in enumerate(starts)]
            count += len(page.pieces)
            found = torch.stack([torch.cat(owners), torch.cat(starts)], 1).int()
            tiles.append(found.to(device))
        return cls(tiles, count)


class PageUpdates:
    """The updates of one step: ``updates(number of the page, its moments)``.

    Args:
        tables: of ``pages``.
        parameters, gradients: contiguous; parameters without a gradient are left as they are.
        numbers: of each gradient, the seven scalars of :class:`reference.paging.update.Numbers`.
    """

    def __init__(
        self,
        tables: Tables,
        pages: Sequence,
        parameters: Sequence[Tensor],
        gradients: Mapping[int, Tensor],
        numbers: Mapping[int, tuple],
    ):
        self.tables, self.gradients = tables, gradients
        kinds = {by: row for row, by in enumerate(dict.fromkeys(numbers.values()))}
        addresses = {
            number: (parameters[number].data_ptr(), gradient.data_ptr(), kinds[numbers[number]])
            for number, gradient in gradients.items()
        }
        rows = []
        for page in pages:
            width = page.host.itemsize
            for number, start, offset, length in page.pieces:
                p, g, row = addresses.get(number, (0, 0, 0))
                skip = start * width
                rows.append((p + skip, g + skip if g else 0, offset, length, row))
        self.aligned = all(p % 16 == 0 and g % 16 == 0 for p, g, *_ in rows)
        device = tables.tiles[0].device
        self.pieces = _upload(torch.tensor(rows, dtype=torch.int64), device)
        self.scalars = _upload(torch.tensor(list(kinds), dtype=torch.float32), device)  # (kinds, 7)
        for row, by in enumerate(kinds):
            # On a GPU torch divides by a number as it multiplies by its inverse: by this one.
            self.scalars[row, 4:5].fill_(1).div_(by.correction)

    def __call__(self, number: int, moments: Tensor) -> None:
        tiles = self.tables.tiles[number]
        with on(moments):
            _update_kernel[(len(tiles),)](
                moments, tiles, self.pieces, self.scalars, moments.shape[1],
                self.aligned, TILE, PTX, num_warps=8, enable_fp_fusion=False,
            )  # fmt: skip


def _upload(table: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for it."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
