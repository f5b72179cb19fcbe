"""Exercise 3: two codes in a byte."""

import torch
from torch import Tensor

from course.checking import Check, Seen, but


def pack(
    codes: Tensor,
    *,
    zero=7,
    fill=lambda codes, spare: [codes, spare],
    pair=lambda codes: (codes[::2], codes[1::2]),
    join=lambda first, second: first << 4 | second,
    dtype=torch.uint8,
) -> Tensor:
    """The worked answer: where n is odd the code of zero comes last, then neighbours share a byte."""
    spare = codes.new_full((len(codes) % 2,), zero)  # one code, or none
    return join(*pair(torch.cat(fill(codes, spare)))).to(dtype)  # ((n + 1) // 2,)


def one_by_one(codes: Tensor) -> Tensor:
    numbers = [*codes.tolist(), 7][: len(codes) + len(codes) % 2]
    return torch.tensor([numbers[i] << 4 | numbers[i + 1] for i in range(0, len(numbers), 2)], dtype=torch.uint8)


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)
    for n in (2, 64, 1, 65, 2 * int(torch.randint(40, 90, (1,), generator=g)) + 1):
        codes = torch.randint(0, 16, (n,), generator=g, dtype=torch.uint8)
        codes[-1] = (codes[-1] % 7) + 8  # not the spare code, and not its mirror image
        if n % 2 == 0:
            codes[0] = (codes[-1] + 3) % 8  # the two halves of a byte differ
        packed = answer(codes)
        yield f"{n} codes" if n > 1 else "a single code", packed
        if not isinstance(packed, Tensor) or packed.shape != ((n + 1) // 2,):
            return  # an answer without a place for a lone code fails here, before it raises for longer ones


check = Check(
    task="two codes a byte, the first in the high bits, odd lengths filled with the code of zero",
    observe=observe,
    reference=pack,
    second=one_by_one,
    misconceptions={
        "the nibbles are swapped: the first of two codes belongs in the high four bits, so that [1, −1] is 0xF0": but(
            join=lambda first, second: second << 4 | first
        ),
        "the last code of an odd length is lost: it has no partner, so append a 7 before you pair; 65 codes need 33 bytes": but(
            fill=lambda codes, spare: [codes[: len(codes) - len(spare)]]
        ),
        "the unused half of the last byte is 0, which is the code of −1: fill it with 7, the code of zero": but(zero=0),
        "the unused half of the last byte is 15, which is the code of 1: fill it with 7, the code of zero": but(zero=15),
        "a lone last code sits in the low bits: it is a first code too, so it goes into the high ones": but(
            fill=lambda codes, spare: [codes[:-1], spare, codes[-1:]]
        ),
        "a byte holds a code of the first half and one of the second half: it should hold two neighbours": but(
            pair=lambda codes: codes.chunk(2)
        ),
        "every code still has a byte of its own: two of them go into one": lambda codes: codes.clone(),
        "an even length got a byte more: fill up only if n is odd": but(
            fill=lambda codes, spare: [codes, codes.new_full((2 - len(spare),), 7)]
        ),
        "the filling came first, and every code moved by half a byte: append it at the end": but(fill=lambda codes, spare: [spare, codes]),
        "`+` binds tighter than `<<`: a << 4 + b shifts by 4 + b; write (a << 4) + b, or a << 4 | b": but(join=lambda a, b: a << 4 + b),
        "the bytes are right but not uint8": but(dtype=torch.int64),
    },
)
