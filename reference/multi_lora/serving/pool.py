"""Where a thousand adapters lie when the GPU holds fifty: device, RAM, disk.

    disk  --read-->  RAM (pinned)  --one copy-->  device          the least recently used goes first

Space is counted in bytes. Slots of one size, made for the largest rank, would give a rank-8 adapter
the room of a rank-64 one: an eighth of the customers for the same memory. Each adapter is packed
into one run of bytes, so that a swap is one copy at the speed of the bus, in a stream of its own:
while it runs, the others are served. Nothing in a swap is done layer by layer: an adapter is
checked when it arrives, and its tensors are made when a layer looks at them.

What a running request uses is pinned. It is never evicted, and ``replace`` makes a new version
beside it: the request ends with the version with which it began. Tensors that somebody still has
after the end keep their values; only the pool no longer counts them.
"""

import weakref
from collections import OrderedDict
from pathlib import Path

import torch

from reference.arguments import check_integer
from reference.multi_lora.factors import Adapter
from reference.multi_lora.model import MultiLoRA
from reference.multi_lora.route import known
from reference.multi_lora.serving.host import Held, HostStore
from reference.multi_lora.serving.packed import PackedAdapter
from reference.paging.lanes import Lane, now, wait_here


class PoolFull(RuntimeError):
    """All that is on the device is in use: wait until a request ends."""


class AdapterPool:
    """Adapters by tenant, of which some are on the device.

    Args:
        served: the model; every adapter is checked against its layers once, when it arrives: from
            disk, when it is read.
        device_bytes, host_bytes: for adapters, on the device and in RAM.
        dtype: of the factors on the device and in RAM; default: as they come.

    On a GPU, use it from one stream, in which the adapters are used, too.

    Attributes:
        host: what is in RAM: :class:`reference.multi_lora.serving.host.HostStore`.
        counts: "hits", "loads" (copies to the device), "evictions", "bytes" (copied).
    """

    def __init__(
        self,
        served: MultiLoRA,
        device_bytes: int,
        host_bytes: int,
        dtype: torch.dtype | None = None,
    ):
        check_integer("device_bytes", device_bytes, 1)
        self.served, self.device_bytes = served, device_bytes
        self.device = next(iter(served.layers.values())).base.weight.device
        self.lane = Lane(self.device)
        self.tenants: dict[str, Held] = {}
        self._device: OrderedDict[Held, None] = OrderedDict()  # least recently used first
        self.host = HostStore(served, host_bytes, self.device, dtype, self.lane)
        self.counts = dict(hits=0, loads=0, evictions=0, bytes=0)
        # No copy may outlive its memory; when all ends, nobody gets that any more.
        weakref.finalize(self, self.lane.wait).atexit = False

    @property
    def device_used(self) -> int:
        return sum(held.nbytes for held in self._device)

    @property
    def resident(self) -> list[str]:
        """Tenants whose adapters are on the device, least recently used first."""
        return [held.name for held in self._device if self.tenants.get(held.name) is held]

    # ---- tenants

    def register(self, name: str, source: str | Path | Adapter) -> None:
        """A new tenant, by the directory of peft's files, or by factors, which stay in RAM.

        Raises:
            TypeError, ValueError: the name is taken; the factors don't fit the model, or into the
                RAM that is left.
        """
        if name in self.tenants:
            raise ValueError(f"there is a tenant {name!r}: replace() its adapter, or remove() it")
        self.tenants[name] = self.host.version(name, source)

    def replace(self, name: str, source: str | Path | Adapter) -> None:
        """A new version: requests that begin from now on get it; those that run keep theirs.

        Raises: as :meth:`register`, and then the old version stays.
        """
        old, new = self.tenants[known(name, self.tenants)], self.host.version(name, source)
        self.tenants[name] = new
        self._retire(old)

    def remove(self, name: str) -> None:
        """Forget a tenant. Requests that run keep its adapter until they end."""
        self._retire(self.tenants.pop(known(name, self.tenants)))

    def _retire(self, held: Held) -> None:
        if not held.users:
            self._drop(held)
        self.host.forget(held)

    # ---- use

    def acquire(self, name: str) -> Held:
        """The tenant's current version, on the device and pinned: ``release`` it in the end.

        Raises:
            FileNotFoundError, ValueError: the tenant is unknown; its files are missing or broken,
                or don't fit the model; the adapter is larger than the whole pool.
            PoolFull: what would have to go is in use.
        """
        held = self.tenants[known(name, self.tenants)]
        self.counts["hits"] += held.adapter is not None
        self._load(held)
        wait_here(held.arrived, self.device)
        held.users += 1
        self._device.move_to_end(held)
        return held

    def release(self, held: Held) -> None:
        """A request has ended. A version that was replaced goes with its last one."""
        if not held.users:
            raise ValueError(f"the adapter of {held.name!r} is released more often than acquired")
        held.users -= 1
        if not held.users and self.tenants.get(held.name) is not held:
            self._drop(held)

    def prefetch(self, name: str) -> bool:
        """Begin to copy a tenant's adapter to the device; whether there was room."""
        try:
            self._load(self.tenants[known(name, self.tenants)])
        except PoolFull:
            return False
        return True

    def evict(self, name: str) -> None:
        """Take a tenant's adapter from the device.

        Raises:
            ValueError: it is in use, or not there.
        """
        held = self.tenants[known(name, self.tenants)]
        if held.users:
            raise ValueError(f"the adapter of {name!r} is in use by {held.users}: wait for the end")
        if held.adapter is None:
            raise ValueError(f"the adapter of {name!r} is not on the device")
        self._drop(held)

    def _drop(self, held: Held) -> None:
        # Work to come in this stream may get the memory next. A copy that nobody waited for, as
        # prefetch makes it, must have been made by then.
        wait_here(held.arrived, self.device)
        self._device.pop(held, None)
        held.adapter = held.arrived = None

    def _load(self, held: Held) -> None:
        if held.adapter is not None:
            return
        packed = self.host.get(held)
        if held.nbytes > self.device_bytes:
            size = f"{held.nbytes} bytes, the pool {self.device_bytes}"
            raise ValueError(f"the adapter of {held.name!r} has {size}: give it more device_bytes")
        self._make_room(held.nbytes)
        memory = torch.empty(held.nbytes, dtype=torch.uint8, device=self.device)
        # The allocator's memory may still be read by earlier work of this stream: the copy waits.
        held.arrived = self.lane.copy(memory, packed, now(self.device))
        held.adapter = PackedAdapter(held.layout, memory)
        self._device[held] = None
        self.counts["loads"] += 1
        self.counts["bytes"] += held.nbytes

    def _make_room(self, wanted: int) -> None:
        free, victims = self.device_bytes - self.device_used, []
        for held in self._device:
            if free < wanted and not held.users:
                victims.append(held)
                free += held.nbytes
        if free < wanted:
            raise PoolFull(f"{wanted} bytes wanted, {free} can be freed; the rest is in use")
        for held in victims:
            self._drop(held)
            self.counts["evictions"] += 1
