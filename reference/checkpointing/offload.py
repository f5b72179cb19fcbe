"""Activation offloading: what autograd keeps waits in host memory, and is back when it is needed.

    forward     compute   f1  f2  f3  …           copies        1→host  2→host  …
    backward    compute   …  f3'  f2'  f1'        copies   …  2→GPU  1→GPU

Nothing is computed twice; bytes travel instead. A GPU copies while it computes if the copies are on
a *stream* of their own and the host memory is pinned. Events order the two: a copy out waits until
the tensor is computed, the tensor's memory is given up when the copy is done, and an operation of
the backward waits until its tensor is back. Tensors come back before they are asked for, in the
reverse of the order in which they left.

``torch.autograd.graph.save_on_cpu`` copies on the compute stream, which then computes nothing. It
copies a tensor as often as it is kept (the input of q, k and v three times), and the weights too.
Here what travels is a storage, once, however many views of it are kept.
"""

import weakref
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reference.arguments import check_integer
from reference.checkpointing.lane import Lane, Offloaded


@dataclass(frozen=True)
class View:
    """What autograd holds in a tensor's place: its storage, and where it stands in the order."""

    whole: Offloaded
    order: list[weakref.ref]
    place: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class OffloadActivations(torch.autograd.graph.saved_tensors_hooks):
    """``with offload: loss = model(x)``, then ``loss.backward()`` outside; one for all steps.

    Values and gradients are those without it, bit for bit. On a CPU the same bookkeeping copies
    from memory to memory.

    Args:
        owner: the model. Its parameters and buffers stay where they are.
        min_bytes: what is smaller stays.
        ahead_bytes: how many bytes may be on their way out, or fetched before their use. That much
            GPU memory it takes; the more there is, the more of the copying is hidden.

    Raises:
        TypeError, ValueError: a number of bytes is no integer, or too small.
        RuntimeError: in a forward or backward, if a tensor was changed in place while it left.
    """

    def __init__(self, owner: nn.Module, min_bytes: int = 1 << 16, ahead_bytes: int = 1 << 28):
        check_integer("min_bytes", min_bytes, 1)
        check_integer("ahead_bytes", ahead_bytes, 0)
        self.owner, self.min_bytes, self.ahead_bytes = owner, min_bytes, ahead_bytes
        self.lanes: dict[torch.device, Lane] = {}
        self.staying: set[int] = set()  # the owner's storages
        self.known: dict[int, weakref.ref] = {}  # a storage that is alive -> its Offloaded
        self.order: list[weakref.ref] = []  # what this forward kept, one after the other
        self.leaving: deque[Offloaded] = deque()
        self.copied_bytes = 0  # in this forward
        super().__init__(self.pack, self.unpack)

    @property
    def host_bytes(self) -> int:
        """Host memory that the buffers take."""
        return sum(lane.pool.bytes for lane in self.lanes.values())

    def __enter__(self) -> "OffloadActivations":
        own = *self.owner.parameters(), *self.owner.buffers()
        self.staying = {tensor.untyped_storage()._cdata for tensor in own}
        self.let_go(most=0)  # what no backward asked for
        self.order, self.copied_bytes = [], 0
        super().__enter__()
        return self

    def pack(self, tensor: Tensor) -> Tensor | View:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.staying or storage.nbytes() < self.min_bytes:
            return tensor
        whole = self.known[key]() if key in self.known else None
        if whole is None or whole.version != tensor._version:
            whole = self.send(tensor)
            self.known[key] = weakref.ref(whole)
            weakref.finalize(storage, self.known.pop, key, None).atexit = False
        whole.left += 1
        self.order.append(weakref.ref(whole))
        form = tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()
        return View(whole, self.order, len(self.order) - 1, *form)

    def send(self, tensor: Tensor) -> Offloaded:
        """Start the copy out, and let go of what left first."""
        if tensor.device not in self.lanes:
            self.lanes[tensor.device] = Lane(tensor.device)
        whole = Offloaded(self.lanes[tensor.device], tensor)
        self.copied_bytes += whole.size
        self.leaving.append(whole)
        self.let_go(self.ahead_bytes)
        return whole

    def let_go(self, most: int) -> None:
        """Wait until at most so many bytes are on their way out."""
        while sum(each.size for each in self.leaving) > most:
            self.leaving.popleft().let_go()

    def unpack(self, kept: Tensor | View) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        kept.whole.fetch()
        ahead = {kept.whole: 0}  # what is to be on the device -> its bytes
        for place in range(kept.place - 1, -1, -1):
            other = kept.order[place]()
            if other is not None and not other.used and other not in ahead:
                ahead[other] = other.size
                if sum(ahead.values()) > self.ahead_bytes:
                    break
                other.fetch()
        return kept.whole.use(kept.dtype).as_strided(kept.size, kept.stride, kept.offset)
