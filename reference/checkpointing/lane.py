"""The way between a device and host memory: a stream for copies, buffers, and what travels.

All copies of a lane are on one stream, so they happen in the order in which they were started. That
is why a buffer can be used again at once: the next copy into it begins when the last one out of it
has ended.
"""

import torch
from torch import Tensor

from reference.checkpointing.pool import HostPool


class Lane:
    """A stream of its own and pinned buffers for a GPU; plain copies for a CPU."""

    def __init__(self, device: torch.device):
        self.device, on_gpu = device, device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if on_gpu else None
        self.pool = HostPool(pinned=on_gpu)

    def copy(self, to: Tensor, source: Tensor) -> "torch.cuda.Event | None":
        """Behind all that was started so far; returns the event of its end."""
        if self.stream is None:
            to.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            to.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, event: "torch.cuda.Event | None") -> None:
        """Whatever is computed from now on comes after ``event``."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)


class Offloaded:
    """A storage on the host, or on its way there or back.

    Attributes:
        tensor: what is leaving; None once it has left.
        content: its bytes on the device, (bytes,); None while they are on the host only.
        left: how many views of it autograd is still to ask for.
        used: all of them were asked for once; only a second backward needs it again.
    """

    def __init__(self, lane: Lane, tensor: Tensor):
        self.lane, self.tensor, self.version = lane, tensor, tensor._version
        self.left, self.used = 0, False
        self.content: Tensor | None = _bytes_of(tensor)
        self.size = len(self.content)
        self.buffer = lane.pool.take(self.size)
        self.moved = lane.copy(self.buffer, self.content)  # the event of the last copy's end

    def __del__(self) -> None:
        if hasattr(self, "buffer"):
            self.lane.pool.give(self.buffer)

    def let_go(self) -> None:
        """Leave the device's memory to others, who wait for the copy.

        Raises:
            RuntimeError: the tensor was changed in place, perhaps before it was copied.
        """
        if self.tensor is not None:
            self.landed()
            self.content = None

    def landed(self) -> None:
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} was changed in place while it was "
                "copied to the host: do without the in-place operation that follows it"
            )
        self.lane.wait(self.moved)
        self.tensor = None

    def fetch(self) -> None:
        """Start the copy back, unless the bytes are there or on their way."""
        if self.content is None:
            self.content = torch.empty(self.size, dtype=torch.uint8, device=self.lane.device)
            self.moved = self.lane.copy(self.content, self.buffer)

    def use(self, dtype: torch.dtype) -> Tensor:
        """The bytes as numbers, (items,), for what is computed from now on."""
        if self.tensor is not None:
            self.landed()
        self.lane.wait(self.moved)
        content, self.left = self.content, self.left - 1
        if self.left == 0:  # the last view keeps them alive; a second backward fetches them again
            self.content, self.left, self.used = None, 1, True
        return content[: self.size // dtype.itemsize * dtype.itemsize].view(dtype)


def _bytes_of(tensor: Tensor) -> Tensor:
    """The whole storage behind ``tensor``."""
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return flat.set_(tensor.untyped_storage())
