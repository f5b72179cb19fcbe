"""Adapters in RAM: each packed into one run of pinned bytes, from which one copy takes it along.

What was read from disk can be read again, so the least recently used of these make room. What was
handed over as factors exists nowhere else, and stays until its tenant goes. An adapter is checked
against the model when it comes here, and not at every copy from here.
"""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from reference.arguments import check_integer
from reference.multi_lora.factors import Adapter, read_factors
from reference.multi_lora.model import MultiLoRA
from reference.multi_lora.serving.packed import Layout
from reference.paging.lanes import Lane, pinned_bytes


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
        layout: where its factors lie in ``memory``, and in its copy on the device.
    """

    name: str
    source: Path | None
    nbytes: int = 0
    memory: Tensor | None = None
    adapter: Adapter | None = None
    arrived: object = None
    users: int = 0
    layout: Layout | None = None


class HostStore:
    """At most ``limit`` bytes of adapters.

    Args:
        served: what adapters are for.
        device: that copies will go to; a GPU asks for pinned memory.
        dtype: of the factors; default: as they come.
        lane: that copies from here.

    Attributes:
        reads: how often files were read.
    """

    def __init__(
        self,
        served: MultiLoRA,
        limit: int,
        device: torch.device,
        dtype: torch.dtype | None,
        lane: Lane,
    ):
        check_integer("host_bytes", limit, 1)
        self.served, self.limit = served, limit
        self.device, self.dtype, self.lane = device, dtype, lane
        self._held: OrderedDict[Held, None] = OrderedDict()  # least recently used first
        self.reads = 0

    @property
    def used(self) -> int:
        return sum(held.nbytes for held in self._held)

    def version(self, name: str, source: str | Path | Adapter) -> Held:
        """A new version: files are read when they are needed, factors packed at once.

        Raises:
            TypeError, ValueError: the factors don't fit the model; there is no room for them.
        """
        if isinstance(source, (str, Path)):
            return Held(name, Path(source))
        self._keep(held := Held(name, None), source)
        return held

    def get(self, held: Held) -> Tensor:
        """Its bytes in RAM, read from disk if they are not there.

        Raises:
            FileNotFoundError, ValueError: the files are missing or broken, or don't fit the model;
                there is no room.
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
        adapter = self.served.check(adapter, held.name, anywhere=True)
        if self.dtype:
            adapter = {name: f.to(self.dtype) for name, f in adapter.items()}
        layout = Layout(adapter)
        self._make_room(layout.bytes, held.name)
        held.memory = pinned_bytes(layout.bytes, self.device)
        layout.write(adapter, held.memory)
        held.layout, held.nbytes = layout, layout.bytes
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
