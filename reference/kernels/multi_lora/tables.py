"""What the grouped kernels are told of a batch: where factors lie, and which tokens use them.

The host sorts and counts, since the names are there. Both tables can be filled again in place, so
that a CUDA graph, which replays the same launches, serves other adapters and other rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

TILES = 16, 32, 64  # tokens; the first is the least that a tensor core takes
USUAL = 32  # tiles, where a plan will be filled again
FIELDS = 4  # of a table's entry


@dataclass
class Table:
    """Where the factors of one layer lie: for each adapter the addresses of A and B, r, s.

    Attributes:
        entries: (adapters, 4) int64 on the device; s as the bits of a float64.
        dtype: of all factors.
        rank: at least the largest.
        factors: what the addresses are of, which must not be freed.
        aligned: whether all of them are as :func:`aligned` says.
    """

    entries: Tensor
    dtype: torch.dtype
    rank: int
    factors: Sequence
    aligned: bool = False


def tables(layers: Sequence[Sequence], device: torch.device, room: int = 0) -> list[Table]:
    """A table for each layer, by one copy to the device.

    Args:
        layers: of each layer, one :class:`reference.multi_lora.Factors` or None an adapter: the
            same number everywhere.
        room: entries of a table at least, so that :func:`fill` can exchange adapters in it.

    Raises:
        ValueError: factors are not contiguous, on another device, or of different dtypes.
    """
    entries = _entries(layers, device, room)
    found = []
    for rows, factors in zip(entries.to(device), layers, strict=True):
        there = [f for f in factors if f is not None]
        dtype = there[0].A.dtype if there else torch.float32  # which fits every x
        rank, even = max((f.r for f in there), default=1), all(map(aligned, there))
        found.append(Table(rows, dtype, rank, list(factors), even))
    return found


def fill(table: Table, factors: Sequence) -> None:
    """Other adapters in the same table, in place: what a CUDA graph reads at its next replay.

    Raises:
        ValueError: there are more than it has room for, one of a larger rank than the graph was
            recorded for, or of another dtype, or one that is not ``aligned``.
    """
    there = [f for f in factors if f is not None]
    if len(factors) > len(table.entries):
        raise ValueError(f"{len(factors)} adapters for a table of {len(table.entries)}: give room")
    if any(width(f.r) > width(table.rank) or f.A.dtype != table.dtype for f in there):
        words = "was made for rank"
        raise ValueError(f"the table {words} {table.rank} and {table.dtype}: make another one")
    if table.aligned and not all(map(aligned, there)):
        words = "was made for ranks of 8, 16, 24, … and addresses of whole 16 bytes"
        raise ValueError(f"the table {words}: make another one")
    table.entries.copy_(_entries([factors], table.entries.device, len(table.entries))[0])
    table.factors = list(factors)


def _entries(layers: Sequence[Sequence], device: torch.device, room: int) -> Tensor:
    device = torch.empty(0, device=device).device  # "cuda" is one of them: "cuda:0"
    count = max([1, room, *(len(factors) for factors in layers)])  # an empty tile reads the first
    entries = torch.zeros(len(layers), count, FIELDS, dtype=torch.int64)
    scales = torch.zeros(len(layers), count, dtype=torch.float64)
    for i, factors in enumerate(layers):
        dtypes = {f.A.dtype for f in factors if f is not None}
        if len(dtypes) > 1:
            names = sorted(map(str, dtypes))
            raise ValueError(f"factors of one layer must be of one dtype, got {names}")
        for j, f in enumerate(factors):
            if f is None:
                continue
            if not (f.A.is_contiguous() and f.B.is_contiguous()) or f.A.device != device:
                raise ValueError(f"factors must be contiguous and on {device}, got {f.A.device}")
            entries[i, j, :3] = torch.tensor([f.A.data_ptr(), f.B.data_ptr(), f.r])
            scales[i, j] = f.scaling
    entries[:, :, 3] = scales.view(torch.int64)
    return entries


def aligned(f) -> bool:
    """Whether rows of these factors can be read 16 bytes at a time: a kernel is told in advance."""
    return together(f.A.data_ptr(), f.B.data_ptr(), f.r)


def together(a: int, b: int, r: int) -> bool:
    """The same for their addresses and rank."""
    return r % 8 == 0 and (a | b) % 16 == 0


def width(rank: int) -> int:
    """Columns of h: a power of two, of which a tensor core takes 16 or more."""
    return max(16, triton.next_power_of_2(rank))


class Plan:
    """Tokens of a batch sorted by adapter, and cut into tiles of one adapter each.

    Args:
        groups: row numbers of each adapter, as in :class:`reference.multi_lora.route.Route`.
        rows: of the batch.
        tokens: of each row.
        refilled: room for any other groups of such a batch, which :meth:`fill` puts in place.

    Attributes:
        order: (rows · tokens,) int32, tokens of the flattened batch by adapter.
        tiles: (most tiles, 3) int32: adapter, place in ``order``, tokens (0 where there is none).
        busy: how many tiles have tokens; of a plan to be refilled, at most ``USUAL`` are expected.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[int]],
        rows: int,
        tokens: int,
        device: torch.device,
        refilled: bool = False,
    ):
        self.rows, self.tokens, self.n = rows, tokens, rows * tokens
        longest = max((len(group) for group in groups), default=1) * tokens
        self.tile = next((tile for tile in TILES if tile >= longest), TILES[-1])
        self.order = torch.zeros(self.n, dtype=torch.int32, device=device)
        if refilled:  # worst case: each row has an adapter of its own
            most = rows * -(-tokens // self.tile)
            self.busy = min(most, USUAL)
        else:
            self.busy = most = max(1, sum(-(-len(g) * tokens // self.tile) for g in groups))
        self.tiles = torch.zeros(most, 3, dtype=torch.int32, device=device)
        self.fill(groups)

    def fill(self, groups: Sequence[Sequence[int]]) -> None:
        """Other groups of a batch of the same size, in place.

        Raises:
            ValueError: they need more tiles than the plan has.
        """
        order, tiles = [], []
        for adapter, group in enumerate(groups):
            start, count = len(order), len(group) * self.tokens
            for row in group:
                order += range(row * self.tokens, (row + 1) * self.tokens)
            tiles += [
                (adapter, start + i, min(self.tile, count - i)) for i in range(0, count, self.tile)
            ]
        if len(tiles) > len(self.tiles):
            words = f"{len(tiles)} tiles for a plan of {len(self.tiles)}"
            raise ValueError(f"{words}: make it with refilled=True")
        order += [0] * (self.n - len(order))
        tiles += [(0, 0, 0)] * (len(self.tiles) - len(tiles))
        self.order.copy_(torch.tensor(order, dtype=torch.int32))
        self.tiles.copy_(torch.tensor(tiles, dtype=torch.int32).view(-1, 3))
