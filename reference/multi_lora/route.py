"""A batch sorted by adapter: what all layers of a model share when each row names its own.

    rows       sql  —  clinic  sql            row numbers 0 1 2 3; — is the base alone
    distinct   [sql, clinic]
    groups     [[0, 3], [2]]                  row 1 is in none

A layer then multiplies group by group. Sorting is done once for a batch, on the host, where the
names are: no layer looks for anything.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Route:
    """The rows of a batch by what they use.

    Args:
        rows: for each row an object, or None for the base alone. Rows with the *same* object make a
            group.

    Attributes:
        rows: how many; None after :meth:`same`, which fits any batch.
        distinct: the objects, in the order in which they first appear.
        groups: row numbers of each, ascending.
    """

    def __init__(self, rows: Sequence[object | None]):
        self.rows: int | None = len(rows)
        self.distinct: list[object] = []
        self.groups: list[list[int]] = []
        place: dict[int, int] = {}
        for row, wanted in enumerate(rows):
            if wanted is None:
                continue
            if id(wanted) not in place:
                place[id(wanted)] = len(self.distinct)
                self.distinct.append(wanted)
                self.groups.append([])
            self.groups[place[id(wanted)]].append(row)
        self._on: dict[torch.device, list[Tensor]] = {}
        self._plans: dict[tuple, object] = {}

    @classmethod
    def same(cls, wanted: object) -> "Route":
        """All rows of any batch use one object."""
        route = cls([wanted])
        route.rows = None
        return route

    @property
    def whole(self) -> bool:
        """Whether one object has all rows."""
        return self.rows is None or (len(self.groups) == 1 and len(self.groups[0]) == self.rows)

    def indices(self, device: torch.device) -> list[Tensor]:
        """``groups`` on a device: copied there once, for all layers."""
        if device not in self._on:
            flat = torch.tensor([row for group in self.groups for row in group], device=device)
            self._on[device] = list(flat.split([len(group) for group in self.groups]))
        return self._on[device]

    def plan(self, rows: int, tokens: int, device: torch.device):
        """The groups as the kernels take them, for a batch of ``rows`` × ``tokens``; made once."""
        if (key := (rows, tokens, device)) not in self._plans:
            from reference.kernels.multi_lora import Plan

            groups = [list(range(rows))] if self.rows is None else self.groups
            self._plans[key] = Plan(groups, rows, tokens, device)
        return self._plans[key]

    def check(self, rows: int) -> None:
        """Raise unless a batch of ``rows`` rows is what this was made for."""
        if self.rows not in (None, rows):
            words = "select() adapters for these rows, one name or None for each"
            raise ValueError(f"the batch has {rows} rows, the selection {self.rows}: {words}")


@dataclass
class Planned:
    """A route for the kernels alone, whose plan is filled again for each batch."""

    filled: object
    whole = False  # who has which row changes

    def check(self, rows: int) -> None:
        """Raise unless a batch of ``rows`` rows is what the plan is for."""
        if rows != self.filled.rows:
            raise ValueError(f"the batch has {rows} rows, its plan {self.filled.rows}")

    def plan(self, rows: int, tokens: int, device: torch.device) -> object:
        return self.filled


def known(name: str, names: Collection[str]) -> str:
    """``name``, if it is one of ``names``."""
    if name not in names:
        some = ", ".join(map(repr, list(names)[:8])) or "none"
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise ValueError(f"no adapter {name!r}; there are: {some}{more}")
    return name


def chosen(rows: Sequence[str | None], table: Mapping[str, object]) -> list[object | None]:
    """What the names of ``rows`` stand for; None stays None."""
    return [None if name is None else table[known(name, table)] for name in rows]
