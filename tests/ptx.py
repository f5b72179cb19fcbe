"""PTX, the GPU's assembly language, executed on the CPU: straight lines of the few instructions that the kernels' look-ups are made of."""

import re
from collections.abc import Iterator

import torch
from torch import Tensor


def permute(low: int, high: int, selectors: int) -> int:
    """prmt: four of eight bytes; bit 3 of a selector asks for the byte's sign, spread over all of it."""
    bytes_ = [(low >> 8 * i) & 255 for i in range(4)] + [(high >> 8 * i) & 255 for i in range(4)]
    result = 0
    for i in range(4):
        selector = (selectors >> 4 * i) & 15
        byte = bytes_[selector & 7]
        result |= ((255 if byte & 128 else 0) if selector & 8 else byte) << 8 * i
    return result


def dot(a: int, b: int, c: int) -> int:
    """dp4a: the products of four bytes with four bytes, and c."""
    return c + sum((a >> 8 * i & 255) * (b >> 8 * i & 255) for i in range(4))


def execute(program: str, registers: dict[str, int], memory: dict[int, int] | None = None) -> dict[str, int]:
    """What the program leaves in its registers; ``memory`` holds a word at each address."""
    operations = {
        "and": lambda a, b: a & b,
        "shl": lambda a, b: a << b & 0xFFFFFFFF,
        "shr": lambda a, b: a >> b,
        "prmt": permute,
        "dp4a": dot,
        "ld": lambda place: memory[place],
        # bit i of the last operand is the result for the bits (a, b, c) = i
        "lop3": lambda a, b, c, table: sum(((table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1))) & 1) << i for i in range(32)),
    }
    for line in re.sub(r"//.*|[{}]|\.reg.*", "", program).split(";"):
        if line.strip():
            name, operands = line.strip().split(None, 1)
            target, *sources = [operand.strip(" []") for operand in operands.split(",")]
            values = [registers[s] if s in registers else int(s, 0) for s in sources]
            registers[target] = operations[name.split(".")[0]](*values)
    return registers


def words_of_codes() -> Iterator[tuple[int, Tensor]]:
    """Words of eight codes, as they are packed, and their codes: all sixteen, then random ones."""
    codes = torch.cat([torch.arange(16), torch.randint(16, (16 * 30,))]).view(-1, 8)
    packed = (codes[:, 0::2] << 4 | codes[:, 1::2]).to(torch.uint8)  # the first of two codes in the high four bits
    for word, of_word in zip(packed.view(torch.int32).view(-1).tolist(), codes, strict=True):
        yield word & 0xFFFFFFFF, of_word
