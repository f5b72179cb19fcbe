"""Decode steps recorded once and replayed: one launch for a whole model.

A step of one token a row is thousands of launches, and with few rows the GPU waits for them. A CUDA
graph replays them all as one. It replays *the same* ones: same sizes, same addresses. So all that
changes from step to step lies in memory of its own, which is filled before the replay:

    ids, slots, start   the batch, padded to a power of two rows and of slots
    plan                which rows use which adapter
    entries             where each adapter's factors lie, its rank and scale, for every layer

A row that pads writes to slot 0 and uses no adapter. A graph is recorded for each size that occurs
and each width of rounded ranks. An adapter may come, go, and be in any rows. The base's weights
must stay where they lay: after ``to`` or ``merge_delta``, make a new engine.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reference.multi_lora.factors import Factors, common_dtype
from reference.multi_lora.model import MultiLoRA
from reference.multi_lora.on_gpu import kernels, kernels_for
from reference.multi_lora.route import Planned, Route
from reference.multi_lora.serving.cache import KVCache, next_logits
from reference.multi_lora.serving.host import Held

HALF = (torch.float16, torch.bfloat16)
SLOTS = 64  # of the smallest size


def bucket(count: int, least: int = 1) -> int:
    """The power of two that is at least both."""
    return max(least, 1 << (count - 1).bit_length())


class Step:
    """What a step of ``rows`` rows and ``slots`` slots reads, and its graph.

    Args:
        rank, dtype, aligned: of the factors; 0, None and False without adapters.
    """

    def __init__(self, served: MultiLoRA, rows: int, slots: int, rank: int, dtype, aligned, device):
        whole = dict(dtype=torch.int64, device=device)
        self.ids, self.slots = torch.zeros(rows, 1, **whole), torch.zeros(rows, slots, **whole)
        self.start, self.count = torch.zeros_like(self.ids[:, 0]), torch.ones_like(self.ids[:, 0])
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None
        self.there: list | None = None  # whose addresses ``entries`` holds
        self.rank = rank
        if rank:
            sizes = len(served.layers), rows, 4
            self.entries = torch.zeros(sizes, **whole)
            self.tables = [kernels().Table(part, dtype, rank, (), aligned) for part in self.entries]
            self.plan = kernels().Plan([[0]], rows, 1, device, refilled=True)

    def fill(self, ids: list[int], slots: list[list[int]], start: list[int]) -> None:
        more, width = len(self.ids) - len(ids), self.slots.shape[1]
        padded = [row + [0] * (width - len(row)) for row in slots] + [[0] * width] * more
        self.ids.copy_(torch.tensor(ids + [0] * more)[:, None])
        self.slots.copy_(torch.tensor(padded))
        self.start.copy_(torch.tensor(start + [0] * more))


class DecodeGraphs:
    """Next logits of running requests, from graphs on a GPU with 16-bit weights.

    Elsewhere the same memory is filled, and read without a graph.
    """

    def __init__(self, served: MultiLoRA, cache: KVCache):
        self.served, self.cache, self.device = served, cache, cache.k.device
        self.by_kernels = kernels_for(self.device) and cache.k.dtype in HALF
        self.records = self.by_kernels and self.device.type == "cuda"
        self.steps: dict[tuple, Step] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.records else None
        self._known: dict[Held, Entry] = {}

    def logits(
        self, ids: list[int], slots: list[list[int]], start: list[int], held: Sequence[Held | None]
    ) -> Tensor:
        """(B, V) after one more token of each row; overwritten by the next call.

        Args:
            ids, slots, start: as for :func:`.cache.next_logits`, as lists.
            held: each row's adapter.
        """
        distinct = list(dict.fromkeys(h for h in held if h is not None))
        rank, *_ = kind = self._kind(distinct)
        key = (bucket(len(ids)), bucket(max(map(len, slots)), SLOTS), *kind)
        if key not in self.steps:
            self.steps[key] = Step(self.served, *key, self.device)
        step = self.steps[key]
        step.fill(ids, slots, start)
        if rank:
            step.plan.fill([[i for i, h in enumerate(held) if h is one] for one in distinct])
            self._fill_entries(step, distinct)
        by_layers = bool(distinct) and not rank  # what no table holds
        if by_layers or step.graph is None:
            try:
                self._use(step, held)
                if by_layers or not self.records:
                    return self._run(step)[: len(ids)]
                self._record(step)
            finally:
                self.served.use(None)
        step.graph.replay()
        return step.logits[: len(ids)]

    def _use(self, step: Step, held: Sequence[Held | None]) -> None:
        """Let the layers read this step's tables, or, without kernels, the rows' own adapters."""
        if step.rank:
            for layer, table in zip(self.served.layers.values(), step.tables, strict=True):
                layer.use_table(Planned(step.plan), table)
        else:
            rows = [h and h.adapter for h in held] + [None] * (len(step.ids) - len(held))
            self.served.use(Route(rows))

    def _run(self, step: Step) -> Tensor:
        batch = step.ids, step.slots, step.start, step.count
        return next_logits(self.served.model, self.cache, *batch)

    def _record(self, step: Step) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run(step)  # what is compiled or made at the first call
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            step.logits = self._run(step)
        step.graph = graph

    # ---- where adapters lie

    def _kind(self, distinct: list[Held]) -> tuple[int, torch.dtype | None, bool]:
        """Columns of h, dtype, whether all are aligned; (0, …) if the kernels don't take them."""
        known = [self._entry(held) for held in distinct] if self.by_kernels else []
        dtypes = {entry.dtype for entry in known}
        if len(dtypes) != 1 or not dtypes <= {self.cache.k.dtype, torch.float32}:
            return 0, None, False
        rank, even = max(entry.rank for entry in known), all(entry.aligned for entry in known)
        return bucket(rank, 16), dtypes.pop(), even

    def _fill_entries(self, step: Step, distinct: list[Held]) -> None:
        """One copy for all layers, and none if the adapters are those of the step before."""
        found = [self._entry(held).layers for held in distinct]
        if step.there is None or [id(e) for e in found] != [id(e) for e in step.there]:
            step.entries[:, : len(found)].copy_(torch.stack(found, 1))  # (layers, adapters, 4)
            step.there = found

    def _entry(self, held: Held) -> "Entry":
        """Made once for as long as an adapter lies where it lies.

        It is packed in one run, so where its first factor lies tells where all of them do.
        """
        address = next(iter(held.adapter.values())).A.data_ptr()
        entry = self._known.get(held)
        if entry is None or entry.address != address:
            known = {h: e for h, e in self._known.items() if h.adapter is not None}
            entry = Entry.of(address, [held.adapter.get(name) for name in self.served.layers])
            self._known = known | {held: entry}
        return entry


@dataclass(eq=False)
class Entry:
    """An adapter in the tables.

    Attributes:
        layers: (layers, 4) int64: addresses of A and B, r, s as bits; zeros where it has none.
    """

    address: int
    layers: Tensor
    rank: int
    dtype: torch.dtype | None
    aligned: bool

    @classmethod
    def of(cls, address: int, factors: Sequence[Factors | None]) -> "Entry":
        rows = [[f.A.data_ptr(), f.B.data_ptr(), f.r] if f else [0, 0, 0] for f in factors]
        scales = torch.tensor([f.scaling if f else 0 for f in factors], dtype=torch.float64)
        layers = torch.cat([torch.tensor(rows), scales.view(torch.int64)[:, None]], 1)
        even = all(r % 8 == 0 and (a | b) % 16 == 0 for a, b, r in rows)
        return cls(address, layers, max(row[2] for row in rows), common_dtype(factors), even)
