"""Exact bytes of tensors, on any device: every storage that torch's operations hand out is counted until it is freed.

The resident memory of a process says little about a small model on a CPU, where allocators keep what they got. Counting storages is exact
and the same on every machine. Not counted: what an operation allocates and frees inside itself, and what existed before.
"""

import math
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """``with LiveBytes() as live: ...``; then ``live.bytes`` are there now, and ``live.peak`` was the highest sum.

    Args:
        most: a cap on the bytes. What goes beyond it raises a MemoryError, as a device would that is full.
    """

    def __init__(self, most: float = math.inf) -> None:
        super().__init__()
        self.bytes, self.peak, self.most = 0, 0, most
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in tree_iter((args, kwargs)) if isinstance(tensor, Tensor)}  # a view is no news
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage.nbytes() and storage._cdata not in self._sizes and storage._cdata not in given:
                    self._sizes[storage._cdata] = storage.nbytes()
                    self.bytes += storage.nbytes()
                    self.peak = max(self.peak, self.bytes)
                    weakref.finalize(storage, self._freed, storage._cdata)
        if self.bytes > self.most:
            raise MemoryError(f"{self.bytes:,} bytes are there, more than the cap of {self.most:,}")
        return result

    def _freed(self, key: int) -> None:
        self.bytes -= self._sizes.pop(key, 0)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind ``tensors``, each counted once however many views there are of it."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def module_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return storage_bytes([*module.parameters(), *module.buffers()])


class SavedForBackward(torch.autograd.graph.saved_tensors_hooks):
    """``with SavedForBackward(model) as saved: loss = ...``; then ``saved.tensors`` is what autograd kept, each storage once.

    Args:
        owner: its own parameters and buffers are left out: they would be there anyway.
    """

    def __init__(self, owner: nn.Module | None = None) -> None:
        own = [] if owner is None else [*owner.parameters(), *owner.buffers()]
        known = {tensor.untyped_storage()._cdata for tensor in own}
        self.tensors: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage()._cdata not in known:
                known.add(tensor.untyped_storage()._cdata)
                self.tensors.append(tensor)
            return tensor

        super().__init__(keep, lambda tensor: tensor)

    def __enter__(self) -> "SavedForBackward":
        super().__enter__()
        return self

    @property
    def bytes(self) -> int:
        return storage_bytes(self.tensors)
