"""Sizes of programs by tile and rank: only speed depends on them, and it is measured.

A row of the table: tokens of a tile and columns of h; then of shrink the columns of ``in`` a step,
its warps and stages, programs to aim at for each multiprocessor, and most shares of ``in``; then of
expand the columns of ``out`` and its warps. More shares bring more of A at the same time, but each
program of expand adds all of them up again, so for a large h they are few.
"""

from dataclasses import dataclass
from functools import lru_cache

# tile, rank: shrink's columns, warps, stages, programs, shares; expand's columns, warps
TABLE = {
    (16, 16): (256, 4, 3, 2, 8, 256, 4),
    (16, 32): (256, 4, 3, 2, 4, 256, 4),
    (16, 64): (256, 4, 3, 1, 8, 256, 4),
    (32, 16): (256, 4, 3, 1, 4, 256, 4),
    (32, 32): (256, 4, 3, 4, 8, 256, 4),
    (32, 64): (256, 8, 3, 1, 4, 256, 4),
    (64, 16): (64, 4, 5, 2, 8, 128, 4),
    (64, 32): (64, 4, 5, 1, 8, 64, 4),
    (64, 64): (128, 4, 3, 1, 8, 128, 4),
}


@dataclass(frozen=True)
class Sizes:
    """Of both kernels; ``shrink`` and ``expand`` are arguments of theirs."""

    shrink: dict[str, int]
    expand: dict[str, int]
    programs: int
    shares: int

    def splits(self, tiles: int, columns: int, multiprocessors: int) -> int:
        """Shares of ``in``, a power of two, since each number is a kernel of its own.

        Args:
            tiles: that have tokens.
            columns: of x.
        """
        steps = -(columns // -self.shrink["COLUMNS"])
        wanted = min(steps, self.shares, self.programs * multiprocessors // tiles)
        return 1 << max(0, wanted.bit_length() - 1)


@lru_cache
def sizes(tile: int, rank: int, itemsize: int) -> Sizes:
    """What the table says; for ranks beyond it and for factors of four bytes, fewer columns.

    Args:
        rank: columns of h, a power of two from 16 on.
        itemsize: of the factors.
    """
    known = min(rank, 64)
    columns, warps, stages, programs, shares, out, out_warps = TABLE[tile, known]
    smaller = rank // known * itemsize // 2
    shrink = dict(COLUMNS=max(16, columns // smaller), num_warps=warps, num_stages=stages)
    expand = dict(COLUMNS=max(16, out // smaller), num_warps=out_warps)
    return Sizes(shrink, expand, programs, max(1, shares // (rank // known)))
