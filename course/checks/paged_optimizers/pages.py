"""Exercise 1: parameters laid end to end and cut into pages."""

import itertools
import random

from course.checking import Check, NotYet, but

Piece = tuple[int, int, int, int]
PIECE = ("parameter", "start", "offset", "length")


def cut(size: int, room: int, capacity: int) -> bool:
    """Whether a new page is begun: only where the last one is full."""
    return room == 0


def lay_out(
    sizes: list[int],
    capacity: int,
    *,
    new_page=cut,
    at_start=lambda room, size, capacity: room,  # what is left of the page for a parameter that begins
    rest=lambda size, start, length: start + length,  # where the parameter goes on
    piece=lambda number, start, offset, length, before: (number, start, offset, length),
    empty=False,
    finished=lambda pages, room: pages,
) -> list[list[Piece]]:
    """The worked answer; ``before`` counts the numbers of all earlier parameters."""
    pages, room, before = [], 0, 0
    for number, size in enumerate(sizes):
        start, room = 0, at_start(room, size, capacity)
        while start < size or (empty and size == start == 0):
            if new_page(size - start, room, capacity):
                pages.append([])
                room = capacity
            length = min(size - start, room)
            pages[-1].append(piece(number, start, capacity - room, length, before))
            start, room = rest(size, start, length), room - length
            if size == 0:
                break
        before += size
    return finished(pages, room)


def from_borders(sizes, capacity):
    """Borders of parameters and of pages on one line; between two neighbours lies a piece."""
    ends = list(itertools.accumulate(sizes))
    borders = sorted({0, *ends, *range(0, ends[-1], capacity)})
    pages = [[] for _ in range(-(-ends[-1] // capacity))]
    for left, right in itertools.pairwise(borders):
        number = next(i for i, end in enumerate(ends) if left < end)
        pages[left // capacity].append((number, left - (ends[number] - sizes[number]), left % capacity, right - left))
    return pages


def by_name(found):
    """Pages and pieces by number, and a piece's integers by name: a difference can then be told in words.

    Raises:
        NotYet: these are no pages of pieces of four.
    """
    if not isinstance(found, (list, tuple)):
        raise NotYet(f"your function returned {type(found).__name__}: return a list of pages, each a list of pieces")
    if found and isinstance(found[0], (list, tuple)) and found[0] and isinstance(found[0][0], int):
        raise NotYet("these are pieces without pages: return a list of pages, each a list of pieces")
    for page in found:
        if not isinstance(page, (list, tuple)):
            raise NotYet(f"a page is of type {type(page).__name__}: it is a list of pieces")
        for piece in page:
            if not isinstance(piece, (list, tuple)) or len(piece) != len(PIECE):
                raise NotYet(f"a piece is {piece!r}: it is four integers, ({', '.join(PIECE)})")
    return {
        f"page {i}": {f"piece {j}": dict(zip(PIECE, piece, strict=True)) for j, piece in enumerate(page)} for i, page in enumerate(found)
    }


def observe(answer, seed: int):
    draw = random.Random(seed)
    capacity = draw.choice((8, 16, 32))
    cases = {
        "three small parameters in one page": [2, 1, 3],
        "a parameter that ends with its page": [capacity, 2],
        "a parameter of three pages": [3, 3 * capacity],
        "two pages without a gap at the end": [3, 2 * capacity - 3],
        "many parameters": [draw.randrange(1, 3 * capacity) for _ in range(8)],
        "a parameter without numbers": [3, 0, draw.randrange(capacity, 3 * capacity), 0, 5],
    }
    for name, sizes in cases.items():
        yield f"{name}: sizes {sizes}, pages of {capacity}", by_name(answer(list(sizes), capacity))


check = Check(
    task="parameters cut into pages",
    observe=observe,
    reference=lay_out,
    second=from_borders,
    misconceptions={
        "every parameter begins a new page: let a small one share the page of the one before": but(at_start=lambda *_: 0),
        "a parameter that does not fit into what is left begins a new page, and the rest of the old page is wasted: cut the parameter": but(
            at_start=lambda room, size, capacity: room if size <= room else 0
        ),
        "the fourth number is where a piece ends: it is its length": but(
            piece=lambda number, start, offset, length, before: (number, start, offset, offset + length)
        ),
        "start and offset have changed places: first the place in the parameter, then the place in the page": but(
            piece=lambda number, start, offset, length, before: (number, offset, start, length)
        ),
        "start counts from the first number of all parameters: count from the beginning of this parameter": but(
            piece=lambda number, start, offset, length, before: (number, before + start, offset, length)
        ),
        "offset is the place in the parameter once more: it is where the piece begins in its page": but(
            piece=lambda number, start, offset, length, before: (number, start, start, length)
        ),
        "offset is 0 in every piece: a page may hold several, and a piece begins where the one before it ends": but(
            piece=lambda number, start, offset, length, before: (number, start, 0, length)
        ),
        "of a parameter that is cut only the first piece is there: go on until all its numbers have a place": but(
            rest=lambda size, start, length: size
        ),
        "every piece begins at 0 of its parameter: the next piece goes on where the last one ended": but(
            piece=lambda number, start, offset, length, before: (number, 0, offset, length)
        ),
        "there is an empty page after the last one: begin a page only when something comes into it": but(
            finished=lambda pages, room: [*pages, []] if room == 0 else pages
        ),
        "a parameter without numbers has a piece of length 0: it needs none": but(empty=True),
    },
)
