"""Exercise 4: a uniform sample of a stream whose length nobody knows."""

import torch
from torch import Tensor

from course.checking import Check, Seen, but

TRIALS, CAPACITY = 3000, 3


class Reservoir:
    """The worked answer: Algorithm R."""

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity, self.seen, self.rows = capacity, 0, []
        self.generator = torch.Generator().manual_seed(seed)

    def place(self) -> int:
        """Of the row that comes as number ``seen``, counted from zero."""
        return torch.randint(self.seen + 1, (), generator=self.generator).item()

    def full(self) -> bool:
        return len(self.rows) >= self.capacity

    def kept(self, row: Tensor) -> Tensor:
        return row.clone()

    def replace(self, place: int, row: Tensor) -> None:
        if place < self.capacity:
            self.rows[place] = self.kept(row)

    def add(self, row: Tensor) -> None:
        if not self.full():
            self.rows.append(self.kept(row))
        else:
            self.replace(self.place(), row)
        self.seen += 1


class ByPriorities:
    """Each row gets a random number, and the rows with the largest are kept: the same distribution by another way."""

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity, self.entries = capacity, []
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def rows(self) -> list[Tensor]:
        return [row for _, row in self.entries]

    def add(self, row: Tensor) -> None:
        self.entries.append((torch.rand((), generator=self.generator).item(), row.clone()))
        self.entries = sorted(self.entries, key=lambda entry: -entry[0])[: self.capacity]


def random_slot(self) -> int:
    return torch.randint(self.capacity, (), generator=self.generator).item()


def half_the_time(self) -> int:
    return random_slot(self) if torch.rand((), generator=self.generator) < 0.5 else self.capacity


def newest_window(self, place: int, row: Tensor) -> None:
    self.rows.pop(0)
    self.rows.append(self.kept(row))


def observe(answer, seed: int) -> Seen:
    buffer, counts = answer(CAPACITY, seed), []
    stream = torch.arange(12.0).view(12, 1)
    for i in range(12):
        given = stream[i].clone()
        buffer.add(given)
        given.fill_(-1)  # the caller goes on to use its own tensor
        counts.append(len(buffer.rows))
    yield "how many rows are kept after each of twelve", counts
    values = [float(row) for row in buffer.rows]
    yield "whether what is kept is unchanged when the caller's tensor changes", -1.0 not in values
    yield "whether no row is kept twice", len(set(values)) == len(values)
    kept = []
    for state in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(state)
            buffer = answer(CAPACITY, seed)
            for i in range(200):
                buffer.add(torch.tensor([float(i)]))
        kept.append([float(row) for row in buffer.rows])
    yield "whether the same seed keeps the same rows of two hundred", kept[0] == kept[1]
    for count in (4, 12):
        kept = torch.zeros(count)
        for trial in range(TRIALS):
            buffer = answer(CAPACITY, seed + trial)
            for i in range(count):
                buffer.add(stream[i])
            kept[torch.stack([row.detach() for row in buffer.rows]).flatten().long().clamp(0, count - 1)] += 1
        yield f"how often each of {count} rows is kept, as a share of {TRIALS:,} streams", kept / TRIALS


check = Check(
    task="a reservoir: every row of the stream is kept equally often",
    observe=observe,
    reference=Reservoir,
    second=ByPriorities,
    misconceptions={
        "the first rows are kept for ever: later ones must be able to replace them": but(replace=lambda self, place, row: None),
        "the newest rows are kept: that is a window, and the beginning of the stream is lost": but(replace=newest_window),
        "every row replaces another, at a random place: old rows die out. The n-th row (from zero) is kept with probability k/(n+1)": but(
            place=random_slot
        ),
        "a row is kept half of the time, however many came before: its chance must shrink as the stream grows": but(place=half_the_time),
        "the place is drawn from n numbers, one too few: the row that comes as n-th, counted from zero, is one of n + 1": but(
            place=lambda self: torch.randint(self.seen, (), generator=self.generator).item()
        ),
        "the place is drawn from one number too many: rows that come after the buffer is full are kept too rarely": but(
            place=lambda self: torch.randint(self.seen + 2, (), generator=self.generator).item()
        ),
        "the places come from torch's own generator, which everybody draws from: use one of your own, with the seed": but(
            place=lambda self: torch.randint(self.seen + 1, ()).item()
        ),
        "what is kept is the caller's own tensor, which may be changed later: keep a copy, row.clone()": but(kept=lambda self, row: row),
    },
    rtol=0.0,
    atol=0.06,
    rounds=1,
)
