"""Where each number of the optimizer's state lies: parameters end to end, cut into pages.

    page   = exp_avg of n numbers, exp_avg_sq of the same n      n = page_bytes / (2 · itemsize)
    piece  = a run of one parameter inside one page

A small parameter shares its page with others, a large one has pieces in many. A page has one dtype,
that of its parameters. Pieces begin at multiples of 64 numbers, so that every copy and every
vector instruction is aligned; what lies between them is zero and stays zero.

The number of bytes is a power of two, because torch's allocator of pinned memory rounds up to one:
a page of 129.5 MB would take 256.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from reference.arguments import check_integer

ALIGNMENT = 64  # numbers
LEAST_BYTES = 2 * 8 * ALIGNMENT  # one piece of float64


class Piece(NamedTuple):
    parameter: int  # its number, counted through all groups
    start: int  # first number within the flattened parameter
    offset: int  # first number within the page
    length: int


class Page:
    """A page at home, in host memory: ``host`` (2, n) and the ``pieces`` that fill it."""

    def __init__(self, page_bytes: int, dtype: torch.dtype, pinned: bool):
        self.size = page_bytes // (2 * dtype.itemsize)  # n
        self.host = torch.zeros(2, self.size, dtype=dtype, pin_memory=pinned)
        self.pieces: list[Piece] = []
        self.stored = None  # event: the last write-back is there

    @property
    def end(self) -> int:
        """The first place where a piece may begin."""
        if not self.pieces:
            return 0
        last = self.pieces[-1]
        return -(-(last.offset + last.length) // ALIGNMENT) * ALIGNMENT


class Layout:
    """All pages; grows with :meth:`add`.

    Args:
        page_bytes: a power of two.
        pinned: whether pages are in pinned memory, which a GPU can copy by itself.

    Attributes:
        pages: in the order of the parameters.
        places: parameter -> the pages and pieces that hold it.
    """

    def __init__(self, page_bytes: int, pinned: bool):
        check_page_bytes(page_bytes)
        self.page_bytes, self.pinned = page_bytes, pinned
        self.pages: list[Page] = []
        self.places: list[list[tuple[Page, Piece]]] = []
        self._open: dict[torch.dtype, Page] = {}

    def add(self, parameter: Tensor) -> None:
        """Give the next parameter its pieces, in the open page of its dtype and in new ones."""
        number, start, places = len(self.places), 0, []
        while start < parameter.numel():
            page = self._open.get(parameter.dtype)
            if page is None or page.end >= page.size:
                page = Page(self.page_bytes, parameter.dtype, self.pinned)
                self._open[parameter.dtype] = page
                self.pages.append(page)
            length = min(parameter.numel() - start, page.size - page.end)
            piece = Piece(number, start, page.end, length)
            page.pieces.append(piece)
            places.append((page, piece))
            start += length
        self.places.append(places)

    def read(self, number: int, moment: int, shape: Iterable[int]) -> Tensor:
        """``exp_avg`` (0) or ``exp_avg_sq`` (1) of a parameter: a copy in ordinary host memory."""
        places = self.places[number]
        parts = [page.host[moment, p.offset : p.offset + p.length] for page, p in places]
        return torch.cat(parts).view(shape) if parts else torch.empty(shape)

    def write(self, number: int, moment: int, values: Tensor | None) -> None:
        """The reverse of :meth:`read`; None writes zeros."""
        for page, piece in self.places[number]:
            home = page.host[moment, piece.offset : piece.offset + piece.length]
            if values is None:
                home.zero_()
            else:
                home.copy_(values.reshape(-1)[piece.start : piece.start + piece.length])


def check_page_bytes(page_bytes: int) -> None:
    """Raise unless it is a power of two that holds a piece."""
    check_integer("page_bytes", page_bytes, LEAST_BYTES)
    if page_bytes & (page_bytes - 1):
        below = 1 << (page_bytes.bit_length() - 1)
        wanted = f"must be a power of two, such as {below} or {2 * below}"
        raise ValueError(f"page_bytes {wanted}, got {page_bytes}")
