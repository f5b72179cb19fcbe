"""Host memory that copies from a GPU can go to without waiting, used again and again.

A copy between a GPU and ordinary memory goes through a buffer of the driver's, and the program
waits. *Pinned* memory, which the operating system never moves, is read by the GPU directly. Making
it is slow, about a second for a few GB, so what one step gives back the next one takes.
"""

from collections import defaultdict

import torch
from torch import Tensor

ALIGNED = 512  # bytes: a buffer begins where any dtype may begin


class HostPool:
    """Buffers of bytes, cut from slabs. torch rounds pinned memory up to a power of two: slabs are.

    Args:
        pinned: for copies from and to a GPU; without one ordinary memory does.
        slab_bytes: a power of two. A larger buffer gets a slab of its own size, rounded up to one.
    """

    def __init__(self, pinned: bool, slab_bytes: int = 1 << 26):
        if slab_bytes < ALIGNED or slab_bytes & (slab_bytes - 1):
            raise ValueError(f"slab_bytes must be a power of two from {ALIGNED}, got {slab_bytes}")
        self.pinned, self.slab_bytes = pinned, slab_bytes
        self.free: dict[int, list[Tensor]] = defaultdict(list)  # by their size
        self.rest = torch.empty(0, dtype=torch.uint8)  # of the last slab
        self.bytes = 0  # of all slabs

    def take(self, count: int) -> Tensor:
        """``count`` bytes, (count,) uint8; :meth:`give` them back."""
        size = -(count // -ALIGNED) * ALIGNED
        if self.free[size]:
            return self.free[size].pop()[:count]
        if size > len(self.rest):
            slab = max(self.slab_bytes, 1 << (size - 1).bit_length())
            self.rest = torch.empty(slab, dtype=torch.uint8, pin_memory=self.pinned)
            self.bytes += slab
        whole, self.rest = self.rest[:size], self.rest[size:]
        return whole[:count]

    def give(self, buffer: Tensor) -> None:
        """The next :meth:`take` of as many bytes gets them."""
        size = -(len(buffer) // -ALIGNED) * ALIGNED
        self.free[size].append(buffer.as_strided((size,), (1,)))
