"""NF4 levels out of registers, by instructions that permute bytes.

They are for :mod:`reference.kernels.nf4.rows`. prmt takes four of eight bytes; four bits say which:
three are a number, the fourth asks for the byte's sign in its place. A code has four bits, too, so
a word of eight codes is a list of places in a table. The table is cut in two: bit 3 of a code says
in which half to look.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from reference.nf4 import NF4_CODEBOOK

LOOK_UP = tl.constexpr("""{
    .reg .b32 places, up, first, second, upper, low, high;
    and.b32 places, $4, 0x77777777;
    shl.b32 up, $4, 4;
    prmt.b32 first, $4, up, 0x9d8c;                 // bit 3 of codes 1 0 3 2, each over a byte
    prmt.b32 second, $4, up, 0xbfae;                // of codes 5 4 7 6
    prmt.b32 low, $6, $8, places;                   // low bytes of their levels, if below 8
    prmt.b32 upper, $10, $12, places;               // and if not
    lop3.b32 low, low, upper, first, 0xd8;          // first ? upper : low
    prmt.b32 high, $14, $16, places;                // high bytes
    prmt.b32 upper, $18, $20, places;
    lop3.b32 high, high, upper, first, 0xd8;
    prmt.b32 $0, low, high, 0x4051;                 // levels of codes 0 and 1
    prmt.b32 $1, low, high, 0x6273;                 // of codes 2 and 3
    shr.u32 places, places, 16;
    prmt.b32 low, $6, $8, places;
    prmt.b32 upper, $10, $12, places;
    lop3.b32 low, low, upper, second, 0xd8;
    prmt.b32 high, $14, $16, places;
    prmt.b32 upper, $18, $20, places;
    lop3.b32 high, high, upper, second, 0xd8;
    prmt.b32 $2, low, high, 0x4051;
    prmt.b32 $3, low, high, 0x6273;
}""")
# The table is the same for all lanes. Loaded as such it would lie in registers that all share, from
# where every prmt has it copied first.
OWN = tl.constexpr("""{
    .reg .u32 lane;
    .reg .u64 place;
    mov.u32 lane, %laneid;
    mad.wide.u32 place, lane, 4, $1;
    ld.global.nc.b32 $0, [place];
}""")


@lru_cache
def byte_table(device: torch.device, dtype: torch.dtype) -> Tensor:
    """(8, 32) int32: low bytes of levels 0–7 and 8–15 in ``dtype``, then their high bytes.

    Four bytes are a word; each lane has a copy.
    """
    low_high = NF4_CODEBOOK.to(dtype).view(torch.uint8).view(16, 2).T.contiguous()
    return low_high.view(torch.int32).view(8, 1).repeat(1, 32).to(device)


@triton.jit
def own(table_ptr, i: tl.constexpr, PTX: tl.constexpr):
    """Word i of the table, in a register of each lane."""
    if PTX:
        place = (table_ptr + 32 * i).to(tl.int64)
        return tl.inline_asm_elementwise(
            OWN, "=r,l", [place], dtype=tl.int32, is_pure=True, pack=1
        )  # fmt: skip
    else:
        return 0


@triton.jit
def plain_levels(words, levels_ptr, dtype: tl.constexpr):
    """What ``look_up`` gives, in Triton alone.

    Bytes in a word are little-endian, the first of two codes is in the high four bits.
    """
    words = words.to(tl.uint32, bitcast=True)
    halves = tl.join(words, words >> 16)
    bytes_ = tl.join(halves, halves >> 8)
    level = tl.load(levels_ptr + (tl.join(bytes_ >> 4, bytes_) & 15).to(tl.int32)).to(dtype)
    return level.reshape(words.shape[0], words.shape[1], 8)


@triton.jit
def four_words(first, second, third, fourth, dtype: tl.constexpr):
    """What a look-up left in four registers, two levels each.

    Four times (rows, words, 2) int16 -> (rows, words, 8) of ``dtype``.
    """
    level = tl.join(tl.join(first, third), tl.join(second, fourth)).permute(0, 1, 3, 4, 2)
    level = level.to(dtype, bitcast=True)
    return level.reshape(first.shape[0], first.shape[1], 8)


@triton.jit
def look_up(words, table, levels_ptr, dtype: tl.constexpr, PTX: tl.constexpr):
    """Levels of eight codes a word, in order: (rows, words) int32 -> (rows, words, 8)."""
    if PTX:
        names: tl.constexpr = "=r,=r,=r,=r," + "r," * 17 + "r"
        twice = tl.join(words, words)  # as many elements as come out: two in each register
        given = [
            twice, table[0], table[1], table[2], table[3], table[4], table[5], table[6], table[7]
        ]  # fmt: skip
        kinds: tl.constexpr = (tl.int16, tl.int16, tl.int16, tl.int16)
        a, b, c, d = tl.inline_asm_elementwise(LOOK_UP, names, given, kinds, is_pure=True, pack=2)
        return four_words(a, b, c, d, dtype)
    else:
        return plain_levels(words, levels_ptr, dtype)
