"""Copies between host and device that nobody waits for: streams, events, pinned memory.

A copy runs beside the computation if three things are so: the host memory is pinned, the call is
``non_blocking``, and the copy is in another stream than the computation. Without the second stream
it is queued behind the computation, and the other two bring nothing.
"""

import mmap
import weakref

import torch
from torch import Tensor

SYSTEM_PAGE = mmap.PAGESIZE


class Lane:
    """A stream that copies. On a CPU there is none: the copy is made at once, by the caller."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, target: Tensor, source: Tensor, *events) -> "torch.cuda.Event | None":
        """Copy once all ``events`` have happened (None has); returns the event of its end."""
        if self.stream is None:
            target.copy_(source)
            return None
        for event in events:
            if event is not None:
                self.stream.wait_event(event)
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        return self.stream.record_event()

    def wait(self) -> None:
        """Let the CPU wait until all copies so far are made."""
        if self.stream is not None:
            self.stream.synchronize()


def now(device: torch.device) -> "torch.cuda.Event | None":
    """The event that all work given to the current stream so far is done; None on a CPU."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def wait_here(event: "torch.cuda.Event | None", device: torch.device) -> None:
    """Let the current stream wait for ``event``; the CPU goes on."""
    if event is not None:
        torch.cuda.current_stream(device).wait_event(event)


def pinned_bytes(count: int, device: torch.device) -> Tensor:
    """(count,) uint8 of host memory, pinned if ``device`` is a GPU.

    ``pin_memory`` would round up to a power of two; memory that is registered is as large as asked
    for.
    """
    if device.type != "cuda" or not count:
        return torch.empty(count, dtype=torch.uint8)
    # Whole pages of the system: two registrations may not share one.
    whole = -(-count // SYSTEM_PAGE) * SYSTEM_PAGE
    memory = torch.empty(whole + SYSTEM_PAGE, dtype=torch.uint8)
    start = -memory.data_ptr() % SYSTEM_PAGE
    cuda, address = torch.cuda.cudart(), memory.data_ptr() + start
    torch.cuda.check_error(int(cuda.cudaHostRegister(address, whole, 0)))
    weakref.finalize(memory.untyped_storage(), cuda.cudaHostUnregister, address)
    return memory[start : start + count]


class Packed:
    """Tensors end to end in one run of bytes, each at a multiple of 256."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.places, self.bytes = {}, 0
        for name, tensor in tensors.items():
            self.places[name] = (self.bytes, tensor.nbytes, tensor.dtype, tensor.shape)
            self.bytes += -(-tensor.nbytes // 256) * 256

    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """The tensors as they lie in ``memory``, (bytes,) uint8 or longer."""
        return {
            name: memory[start : start + count].view(dtype).view(shape)
            for name, (start, count, dtype, shape) in self.places.items()
        }
