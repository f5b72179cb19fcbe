"""Where the frozen weights of layers are while other layers compute: pinned memory, or files.

A store makes each frozen parameter a tensor at its home, and sends a layer's bytes to a slot on the
device. From pinned memory the GPU copies by itself. From a file a thread reads into a pinned buffer
first, since the GPU can copy from pinned memory only; meanwhile Python goes on.
"""

import shutil
import tempfile
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from reference.paging.lanes import Lane, Packed, pinned_bytes

Frozen = list[dict[str, nn.Parameter]]  # of each layer


class Slot:
    """Memory of the device for one layer.

    ``holds`` is (layer, versions of its weights) or None, ``ready()`` the event of the copy.
    """

    def __init__(self, count: int, device: torch.device):
        self.bytes = torch.empty(count, dtype=torch.uint8, device=device)
        self.holds: tuple[int, list[int]] | None = None
        self.ready: Callable[[], torch.cuda.Event | None] = lambda: None


class Memory:
    """Each layer is one run of pinned bytes, and a copy of it one call."""

    def __init__(self, frozen: Frozen, packed: list[Packed], device: torch.device, folder: None):
        if folder is not None:
            raise ValueError(f'folder is for store="disk", got {folder!r} with "cpu"')
        self.layers = []
        for parameters, layer in zip(frozen, packed, strict=True):
            home = pinned_bytes(layer.bytes, device)
            for name, view in layer.views(home).items():
                view.copy_(parameters[name].detach())
                parameters[name].data = view
            self.layers.append(home)

    def send(self, number: int, slot: Tensor, lane: Lane, free) -> Callable:
        """Begin to copy a layer into ``slot`` once ``free`` has happened.

        Returns:
            A function that gives the event of the copy's end.
        """
        home = self.layers[number]
        event = lane.copy(slot[: len(home)], home, free)
        return lambda: event


class Disk:
    """A safetensors file for each layer, mapped into memory: the system reads what is touched."""

    def __init__(
        self, frozen: Frozen, packed: list[Packed], device: torch.device, folder: str | Path | None
    ):
        self._temporary = None
        if folder is None:
            self._temporary = folder = tempfile.mkdtemp(prefix="offload-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.frozen, self.packed = frozen, packed
        Path(folder).mkdir(parents=True, exist_ok=True)
        for number, parameters in enumerate(frozen):
            path = Path(folder) / f"layer_{number:04d}.safetensors"
            save_file({name: p.detach().contiguous() for name, p in parameters.items()}, path)
            with safe_open(path, "pt", device="cpu") as file:
                for name, parameter in parameters.items():
                    parameter.data = file.get_tensor(name)
        largest = max(layer.bytes for layer in packed)
        self.buffers = [
            (pinned_bytes(largest, device), None) for _ in range(2)
        ]  # last copy's event
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="offload")
        weakref.finalize(self, self.reader.shutdown, wait=False)

    def send(self, number: int, slot: Tensor, lane: Lane, free) -> Callable:
        """As :meth:`Memory.send`; the function waits for the reading."""
        return self.reader.submit(self._read, number, slot, lane, free).result

    def _read(self, number: int, slot: Tensor, lane: Lane, free) -> "torch.cuda.Event | None":
        buffer, event = self.buffers[0]
        if event is not None:
            event.synchronize()  # the copy before the last one has left this buffer
        for name, view in self.packed[number].views(buffer).items():
            view.copy_(self.frozen[number][name].detach())
        count = self.packed[number].bytes
        event = lane.copy(slot[:count], buffer[:count], free)
        self.buffers = [self.buffers[1], (buffer, event)]
        return event


STORES = {"cpu": Memory, "disk": Disk}
