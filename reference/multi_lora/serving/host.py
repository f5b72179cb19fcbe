"""Adapters in RAM: each packed into one run of pinned bytes, from which one copy takes it along.

What was read from disk can be read again, so the least recently used of these make room. What was
handed over as factors exists nowhere else, and stays until its tenant goes.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from reference.arguments import check_integer
from reference.multi_lora.factors import Adapter, Factors, read_factors
from reference.paging.lanes import Lane, Packed, pinned_bytes


@dataclass(eq=False)
class Held:
    """One version of one tenant's adapter.

    Attributes:
        source: the directory of its files; None if it was handed over as factors.
        nbytes: of all factors, packed; 0 until it was read for the first time.
        memory: (nbytes,) in RAM; None while it is not there.
        adapter: layer's name -> factors on the device; None while it is not there.
        arrived: the event of its copy to the device.
        users: how many requests have pinned it on the device.
    """

    name: str
    source: Path | None
    nbytes: int = 0
    memory: Tensor | None = None
    adapter: Adapter | None = None
    arrived: object = None
    users: int = 0
    packed: Packed | None = None
    scales: dict[str, float] = field(default_factory=dict)

    def views(self, memory: Tensor) -> dict[str, Factors]:
        """The adapter as it lies in ``memory``."""
        parts = self.packed.views(memory)
        return {
            name: Factors(parts[f"{name}.A"], parts[f"{name}.B"], scale)
            for name, scale in self.scales.items()
        }


class HostStore:
    """At most ``limit`` bytes of adapters.

    Args:
        device: that copies will go to; a GPU asks for pinned memory.
        dtype: of the factors; default: as they come.
        lane: that copies from here.

    Attributes:
        reads: how often files were read.
    """

    def __init__(self, limit: int, device: torch.device, dtype: torch.dtype | None, lane: Lane):
        check_integer("host_bytes", limit, 1)
        self.limit, self.device, self.dtype, self.lane = limit, device, dtype, lane
        self._held: OrderedDict[Held, None] = OrderedDict()  # least recently used first
        self.reads = 0

    @property
    def used(self) -> int:
        return sum(held.nbytes for held in self._held)

    def version(self, name: str, source: str | Path | Adapter) -> Held:
        """A new version: files are read when they are needed, factors packed at once.

        Raises:
            ValueError: there is no room for the factors.
        """
        if isinstance(source, (str, Path)):
            return Held(name, Path(source))
        self._keep(held := Held(name, None), source)
        return held

    def get(self, held: Held) -> Tensor:
        """Its bytes in RAM, read from disk if they are not there.

        Raises:
            FileNotFoundError, ValueError: the files are missing or broken; there is no room.
        """
        if held.memory is None:
            self._keep(held, read_factors(held.source))
            self.reads += 1
        self._held.move_to_end(held)
        return held.memory

    def forget(self, held: Held) -> None:
        """Let a version's bytes go."""
        self.lane.wait()  # a copy may still read them
        self._held.pop(held, None)
        held.memory = None

    def _keep(self, held: Held, adapter: Adapter) -> None:
        if self.dtype:
            adapter = {name: f.to(self.dtype) for name, f in adapter.items()}
        tensors = {}
        for name, f in adapter.items():
            tensors |= {f"{name}.A": f.A, f"{name}.B": f.B}
        packed = Packed(tensors)
        self._make_room(packed.bytes, held.name)
        held.memory = pinned_bytes(packed.bytes, self.device)
        for name, view in packed.views(held.memory).items():
            view.copy_(tensors[name])
        held.packed, held.nbytes = packed, packed.bytes
        held.scales = {name: f.scaling for name, f in adapter.items()}
        self._held[held] = None

    def _make_room(self, wanted: int, name: str) -> None:
        free, victims = self.limit - self.used, []
        for held in self._held:
            if free < wanted and held.source is not None:
                victims.append(held)
                free += held.nbytes
        if free < wanted:
            size = f"{wanted} bytes, and {free} of RAM can be had"
            raise ValueError(f"the adapter of {name!r} has {size}: give more host_bytes")
        for held in victims:
            self.forget(held)
