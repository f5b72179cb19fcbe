"""Rehearsal: keep some rows of the earlier task and mix them into the batches of the next.

Which rows to keep, if the stream is longer than the buffer and its length is not known? Reservoir
sampling (Vitter 1985, Algorithm R): the n-th row, counted from zero, gets a place drawn from
0 … n, and is kept if that place is inside the buffer. Then at any time each row that was seen is
in the buffer with the same probability, capacity / seen.

A fraction of old rows is not a whole number of rows: 10 % of 8 is 0.8. Rounding each batch would
give 12.5 % or nothing; here what was rounded away is carried on to the next batch.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from reference.arguments import check_integer, check_number


class ReplayBuffer:
    """A uniform sample, without repeats, of all rows that were added.

    Args:
        capacity: rows that are kept, at least 1.
        seed: decides which are kept and which are drawn.

    Attributes:
        rows: what is kept, each a tensor of the shape of one row.
        seen: how many rows were added.

    Raises:
        TypeError, ValueError: ``capacity`` or ``seed`` is no such integer.
    """

    def __init__(self, capacity: int, seed: int = 0) -> None:
        check_integer("capacity", capacity, 1)
        check_integer("seed", seed)
        self.capacity, self.seen = capacity, 0
        self.rows: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, rows: Tensor) -> None:
        """Offer every row of ``rows``, (count, ...), to the reservoir, in order.

        Raises:
            ValueError: rows of another shape or dtype than those before.
        """
        if self.rows and (rows.shape[1:], rows.dtype) != (self.rows[0].shape, self.rows[0].dtype):
            kept = f"{tuple(self.rows[0].shape)} of {self.rows[0].dtype}"
            raise ValueError(
                f"rows are {tuple(rows.shape[1:])} of {rows.dtype}, the buffer's {kept}"
            )
        for row in rows:
            place = torch.randint(self.seen + 1, (), generator=self._generator).item()
            self.seen += 1
            if len(self.rows) < self.capacity:
                self.rows.append(row.clone())
            elif place < self.capacity:
                self.rows[place] = row.clone()

    def sample(self, count: int) -> Tensor:
        """(count, ...) rows drawn uniformly from the buffer, without repeats if it holds enough.

        Raises:
            ValueError: the buffer is empty, or ``count`` is negative.
        """
        check_integer("count", count, 0)
        if not self.rows:
            raise ValueError("the buffer is empty: add rows before drawing from it")
        size = len(self.rows)
        if count <= size:
            chosen = torch.randperm(size, generator=self._generator)[:count]
        else:
            chosen = torch.randint(size, (count,), generator=self._generator)
        return (
            torch.stack([self.rows[i] for i in chosen.tolist()])
            if count
            else self.rows[0][None][:0]
        )


def mix_batches(
    new: Iterable[Tensor], old: Callable[[int], Tensor], fraction: float
) -> Iterator[Tensor]:
    """The batches ``new``, each with its last rows replaced by old ones; sizes stay as they are.

    Args:
        new: batches, each (rows, ...).
        old: ``old(count)`` gives so many old rows: a buffer's ``sample``.
        fraction: of all rows that are old, from 0 to 1, met as nearly as whole rows allow after
            every batch, and not only in the mean.

    Raises:
        TypeError, ValueError: ``fraction`` is not a number from 0 to 1, or the old rows have
            another shape than the new.
    """
    check_number("fraction", fraction, 0, 1)
    return _mixed(new, old, fraction)


def _mixed(
    new: Iterable[Tensor], old: Callable[[int], Tensor], fraction: float
) -> Iterator[Tensor]:
    owed = 0.0  # old rows that were rounded away so far
    for batch in new:
        owed += fraction * len(batch)
        count = min(int(owed + 0.5), len(batch))
        owed -= count
        if count == 0:
            yield batch
            continue
        rows = old(count).to(batch.device)
        if rows.shape[1:] != batch.shape[1:]:
            shapes = f"{tuple(rows.shape[1:])}, new ones {tuple(batch.shape[1:])}"
            raise ValueError(f"old rows have the shape {shapes}: cut or pad them to one length")
        yield torch.cat([batch[: len(batch) - count], rows])
