"""NF4 levels two at a time: a table in shared memory of the 256 pairs that a byte can stand for.

It is for :mod:`reference.kernels.nf4.vector`. A warp's 32 lanes look up at once, and shared memory
serves them at once if each asks another of its 32 banks. So the table is there 32 times: entry by
entry, a lane's copy in a bank of its own.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from reference.kernels.nf4.permute import four_words, plain_levels
from reference.nf4 import NF4_CODEBOOK

# Addresses: of all copies of the pairs, and of the levels of 8-bit scales.
PLACES = tl.constexpr("""{
    .shared .align 128 .b8 pairs[32768];
    .shared .align 128 .b8 dynamic[1024];
    mov.u32 $0, pairs;
    mov.u32 $1, dynamic;
}""")
# Addresses again, of this lane's copy. Look-ups are said to be pure, so that the compiler plans
# around them as around arithmetic. It may then move them, but not to before this, which stays
# behind the barrier.
OWN = tl.constexpr("""{
    .reg .b32 lane;
    mov.u32 lane, %laneid;
    mad.lo.u32 $0, lane, 4, $2;
    mov.u32 $1, $3;
}""")
STORE = tl.constexpr("st.shared.b32 [$1], $2; mov.u32 $0, 0;")
STORE_FOUR = tl.constexpr("st.shared.v4.b32 [$1], {$2, $2, $2, $2}; mov.u32 $0, 0;")
LOAD = tl.constexpr("ld.shared.f32 $0, [$1];")
# dp4a multiplies four bytes by four others and adds the products to a third operand. With 128 and
# three zeros it takes one byte out of a word and makes it the address of a pair.
LOOK_UP = tl.constexpr("""{
    .reg .b32 first, second, third, fourth;
    dp4a.u32.u32 first, $4, 0x00000080, $6;
    dp4a.u32.u32 second, $4, 0x00008000, $6;
    dp4a.u32.u32 third, $4, 0x00800000, $6;
    dp4a.u32.u32 fourth, $4, 0x80000000, $6;
    ld.shared.b32 $0, [first];
    ld.shared.b32 $1, [second];
    ld.shared.b32 $2, [third];
    ld.shared.b32 $3, [fourth];
}""")


@lru_cache
def pair_table(device: torch.device, dtype: torch.dtype) -> Tensor:
    """(256,) int32: two levels in ``dtype`` for each byte.

    The first code is in the byte's high four bits, the first level in the word's low half.
    """
    levels, byte = NF4_CODEBOOK.to(dtype), torch.arange(256)
    pairs = torch.stack([levels[byte >> 4], levels[byte & 15]], 1)  # (256, 2)
    return pairs.view(torch.int32).view(-1).to(device)


@triton.jit
def set_up(pairs_ptr, dynamic_ptr, DOUBLE: tl.constexpr, PTX: tl.constexpr):
    """Copy the tables into shared memory.

    Returns addresses: of this lane's pairs, 128 bytes apart, and of the levels of 8-bit scales.
    """
    if PTX:
        two: tl.constexpr = (tl.int32, tl.int32)
        part = tl.arange(0, 2048)  # eight for each pair
        pair = tl.load(pairs_ptr + part // 8)
        pairs, levels = tl.inline_asm_elementwise(
            PLACES, "=r,=r", [], two, is_pure=False, pack=1
        )  # fmt: skip
        tl.inline_asm_elementwise(
            STORE_FOUR, "=r,r,r", [pairs + 16 * part, pair], tl.int32, is_pure=False, pack=1
        )
        if DOUBLE:
            code = tl.arange(0, 256)
            given = [levels + 4 * code, tl.load(dynamic_ptr + code)]
            tl.inline_asm_elementwise(STORE, "=r,r,f", given, tl.int32, is_pure=False, pack=1)
        tl.debug_barrier()
        return tl.inline_asm_elementwise(
            OWN, "=r,=r,r,r", [pairs, levels], two, is_pure=False, pack=1
        )  # fmt: skip
    else:
        return 0, 0


@triton.jit
def look_up(words, pairs, levels_ptr, dtype: tl.constexpr, PTX: tl.constexpr):
    """Levels of eight codes a word, in order: (rows, words) int32 -> (rows, words, 8)."""
    if PTX:
        names: tl.constexpr = "=r,=r,=r,=r,r,r,r,r"
        twice = tl.join(words, words)  # as many elements as come out: two in each register
        kinds: tl.constexpr = (tl.int16, tl.int16, tl.int16, tl.int16)
        a, b, c, d = tl.inline_asm_elementwise(
            LOOK_UP, names, [twice, pairs], kinds, is_pure=True, pack=2
        )
        return four_words(a, b, c, d, dtype)
    else:
        return plain_levels(words, levels_ptr, dtype)


@triton.jit
def look_up_scales(codes, levels, dynamic_ptr, PTX: tl.constexpr):
    """Levels of the 8-bit codes of scales."""
    if PTX:
        return tl.inline_asm_elementwise(
            LOAD, "=f,r", [levels + 4 * codes], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.load(dynamic_ptr + codes)
