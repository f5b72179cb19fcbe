"""A few frames on the device for many pages in host memory: who is in, who must go, who waits.

A *frame* is a buffer of one page's size on the device. The table says which page is in which frame.
A page that is asked for and there is a **hit**. Otherwise a frame is emptied (**out**: its page is
copied home, if it was changed) and filled (**in**). Which page has to go is the policy's choice:

    lru         the one that was used longest ago
    mru         the one that was used last
    alternate   as lru, but every other step goes through the pages backwards

A step uses every page once, in order. Then "used longest ago" is "needed next": on N pages and
F < N frames LRU never has a hit. The other two keep about F pages from one step to the next. MRU
empties the frame that was just used, so a copy in must wait for the update and for the copy out.

Nothing here waits on the CPU. Three streams work at the same time, one copies in, one copies out,
one computes, and events hold them in order:

    in        waits for ``stored`` (the frame is empty, the page is at home), then gives ``loaded``
    compute   waits for ``loaded``, then gives ``done``
    out       waits for ``done``, then gives ``stored``
"""

from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from reference.paging.lanes import Lane, now, wait_here
from reference.paging.layout import Page

POLICIES = ("alternate", "mru", "lru")
REMEMBERED = 1 << 16  # events of the trace


class PageEvent(NamedTuple):
    step: int
    kind: str  # "hit", "in" or "out"
    page: int


class Frame:
    """Bytes on the device, and what the streams must know about them."""

    def __init__(self, page_bytes: int, device: torch.device):
        self.bytes = torch.empty(page_bytes, dtype=torch.uint8, device=device)
        self.changed = False
        self.loaded = self.stored = None
        self.done = now(device)  # before that the memory may still serve somebody else

    def view(self, page: Page) -> Tensor:
        """(2, n), as the page is at home."""
        return self.bytes.view(page.host.dtype).view(2, page.size)


class Pool:
    """At most ``most`` frames for ``pages``.

    Attributes:
        trace: the last events, a deque of :class:`PageEvent`.
        incoming, outgoing: the lanes. With the stream that computes in their place
            nothing overlaps.
    """

    def __init__(
        self, pages: list[Page], most: int, page_bytes: int, device: torch.device, policy: str
    ):
        self.pages, self.most, self.page_bytes = pages, most, page_bytes
        self.device, self.policy = device, policy
        self.incoming, self.outgoing = Lane(device), Lane(device)
        self.table: OrderedDict[int, Frame] = OrderedDict()  # page -> frame, last used at the end
        self.free: list[Frame] = []
        self.step = 0
        self.trace: deque[PageEvent] = deque(maxlen=REMEMBERED)

    def order(self) -> list[int]:
        """The pages in the order of this step."""
        backwards = self.policy == "alternate" and self.step % 2 == 0
        return list(range(len(self.pages)))[:: -1 if backwards else 1]

    @contextmanager
    def use(self, number: int) -> Iterator[Tensor]:
        """The page on the device, (2, n), to be read and changed by the current stream."""
        frame = self.table.get(number)
        if frame is None:
            frame = self._fetch(number)
        else:
            self._note("hit", number)
        self.table.move_to_end(number)
        wait_here(frame.loaded, self.device)
        frame.changed = True
        try:
            yield frame.view(self.pages[number])
        finally:
            frame.done = now(self.device)

    def _fetch(self, number: int) -> Frame:
        if not self.free:
            if len(self.table) < self.most:
                self.free.append(Frame(self.page_bytes, self.device))
            else:
                self._empty(
                    next(reversed(self.table) if self.policy == "mru" else iter(self.table))
                )
        page, frame = self.pages[number], self.free[-1]
        events = frame.done, frame.stored, page.stored
        frame.loaded = self.incoming.copy(frame.view(page), page.host, *events)
        frame.changed = False
        self.table[number] = self.free.pop()  # only now: after an error the table is as it was
        self._note("in", number)
        return frame

    def _empty(self, number: int) -> None:
        frame = self.table[number]
        if frame.changed:
            self._store(number, frame)
        self.free.append(self.table.pop(number))

    def _store(self, number: int, frame: Frame) -> None:
        page = self.pages[number]
        page.stored = frame.stored = self.outgoing.copy(page.host, frame.view(page), frame.done)
        frame.changed = False
        self._note("out", number)

    def flush(self) -> None:
        """Copy every changed page home and wait, so that the CPU can read all of them."""
        for number, frame in self.table.items():
            if frame.changed:
                self._store(number, frame)
        self.outgoing.wait()

    def forget(self) -> None:
        """Empty all frames without copying anything home: the CPU is about to write the pages."""
        self.incoming.wait()
        self.outgoing.wait()
        self.free += self.table.values()
        self.table.clear()

    def _note(self, kind: str, page: int) -> None:
        self.trace.append(PageEvent(self.step, kind, page))
