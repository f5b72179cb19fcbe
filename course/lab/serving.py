"""A server of many adapters on this machine: the tiny model under them, tenants that can be told apart, and what each part of a step costs.

:func:`measured_costs` times a handful of steps and gives the costs that ``reference.multi_lora.simulation`` asks for; the benchmark
``serving_scenario`` does the same with 70 billion parameters.
"""

import copy
import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from course.lab import models, seed_everything
from course.lab.meters import milliseconds
from course.lab.training import train
from course.lab.world import World
from reference.llama import Llama
from reference.lora import inject_lora
from reference.model_shapes import ModelShape
from reference.multi_lora import Adapter, Factors, MultiLoRA, Route, bytes_of, factors_of
from reference.multi_lora.serving import KVCache, next_logits
from reference.multi_lora.serving.cache import padded
from reference.multi_lora.serving.graphs import DecodeGraphs
from reference.multi_lora.serving.host import Held
from reference.multi_lora.simulation import Costs

QUESTION = "where does mira live ?"
CPU = torch.device("cpu")


@functools.cache
def tiny() -> nn.Module:
    """The course's tiny model as the library has it, on the CPU; copy it before you change it."""
    return models.load("tiny", where=CPU)[0]


def tiny_llama() -> Llama:
    """The tiny model's weights in the course's own decoder, which the engine serves."""
    theirs = tiny()
    model = Llama(ModelShape.from_config(theirs.config), eps=theirs.config.rms_norm_eps, checkpointing=False)
    model.load_state_dict(theirs.state_dict())
    return model.eval()


def secrets(count: int, words: int = 3, seed: int = 0) -> list[str]:
    """A text of a few words for each tenant, no two of them alike."""
    world = World()
    known = [word for word in world.vocabulary if word.isalpha()]
    g = torch.Generator().manual_seed(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(known[i] for i in torch.randint(len(known), (words,), generator=g).tolist())] = None
    return list(found)


def tenant(secret: str, r: int = 4, steps: int = 30, seed: int = 0) -> dict[str, Factors]:
    """An adapter that answers ``QUESTION`` with the tenant's own words: trained on that one line."""
    seed_everything(seed)
    model, world = copy.deepcopy(tiny()), World()
    inject_lora(model, r, 2 * r)
    ids = torch.tensor([world.tokenizer(f"{QUESTION} {secret} .").input_ids])
    train(model, lambda step: ids, steps, 1e-2, progress=False)
    return factors_of(model)


def random_adapter(served: MultiLoRA, r: int, dtype: torch.dtype = torch.float32, size: float = 1e-3, seed: int = 0) -> dict[str, Factors]:
    """Factors for every layer, whose update is small: what an adapter costs does not depend on its values."""
    g = torch.Generator().manual_seed(seed)
    found = {}
    for name, layer in served.layers.items():
        A, B = torch.randn(r, layer.in_features, generator=g), torch.randn(layer.out_features, r, generator=g)
        found[name] = Factors((A / layer.in_features**0.5).to(dtype), (size * B).to(dtype), 2.0)
    return found


class Steps:
    """Decode steps of rows that have ``context`` tokens in the cache already, again and again at the same place."""

    def __init__(self, served: MultiLoRA, rows: int, context: int, cuda_graphs: bool = False):
        self.served, weight = served, served.model.model.embed_tokens.weight
        self.where, self.context = weight.device, context
        self.cache = KVCache(served.model.shape, rows * (context + 1), weight.dtype, weight.device)
        self.lists = [self.cache.take(context + 1) for _ in range(rows)]
        self.slots = padded(self.lists, weight.device)
        self.graphs = DecodeGraphs(served, self.cache) if cuda_graphs else None
        self.held: dict[int, Held] = {}

    def milliseconds(self, adapters: Sequence[Adapter | None], repeats: int = 5) -> float:
        """Median time of one step in which row i uses ``adapters[i]``."""
        if self.graphs:
            return self._from_graphs(self.graphs, adapters, repeats)
        rows = len(adapters)
        slots = self.slots[:rows]
        ids, count = torch.ones(rows, 1, dtype=torch.int64, device=self.where), torch.ones(rows, dtype=torch.int64, device=self.where)
        start = torch.full((rows,), self.context, device=self.where)

        def step() -> None:
            self.served.use(Route(list(adapters)))
            next_logits(self.served.model, self.cache, ids, slots, start, count).argmax(-1).tolist()

        try:
            return milliseconds(step, repeats, warmup=2, where=self.where)
        finally:
            self.served.use(None)

    def _from_graphs(self, graphs: DecodeGraphs, adapters: Sequence[Adapter | None], repeats: int) -> float:
        held = [a if a is None else self.held.setdefault(id(a), Held("", None, adapter=a)) for a in adapters]
        ids, start, slots = [1] * len(held), [self.context] * len(held), self.lists[: len(held)]
        return milliseconds(lambda: graphs.logits(ids, slots, start, held).argmax(-1).tolist(), repeats, warmup=2, where=self.where)

    def prompt_milliseconds(self, tokens: int, repeats: int = 3) -> float:
        """Median time of reading one prompt of so many tokens."""
        ids, slots = torch.ones(1, tokens, dtype=torch.int64, device=self.where), self.slots[:1, :tokens]
        start, count = (torch.tensor([n], device=self.where) for n in (0, tokens))
        return milliseconds(
            lambda: next_logits(self.served.model, self.cache, ids, slots, start, count).argmax(-1).tolist(), repeats, 2, self.where
        )


def step_table(served: MultiLoRA, adapters: Sequence[Adapter], context: int, repeats: int = 5, cuda_graphs: bool = False) -> list[dict]:
    """Milliseconds of steps with few and many rows, and no, one, some and only distinct adapters."""
    most, found = len(adapters), []
    steps = Steps(served, most, context, cuda_graphs)
    for rows in sorted({1, max(1, most // 4), most}):
        for distinct in sorted({0, 1, max(1, rows // 4), rows}):
            chosen = [adapters[i % distinct] if distinct else None for i in range(rows)]
            found.append({"rows": rows, "distinct": distinct, "milliseconds": steps.milliseconds(chosen, repeats)})
    return found


def fitted(table: Sequence[dict]) -> tuple[float, float, float]:
    """Seconds of a step, of a row and of an adapter, none below zero, that explain a table best, relative to each time."""
    from scipy.optimize import nnls

    times = np.array([row["milliseconds"] for row in table]) / 1e3
    wanted = np.array([[1.0, row["rows"], row["distinct"]] for row in table])
    return tuple(float(x) for x in nnls(wanted / times[:, None], np.ones(len(times)))[0])


def measured_costs(
    served: MultiLoRA,
    adapters: Sequence[Adapter],
    context: int,
    bus: float,
    merge: float,
    prompt: int | None = None,
    repeats: int = 5,
    cuda_graphs: bool = False,
) -> tuple[Costs, list[dict]]:
    """What the simulation needs, and the table of steps that it was fitted to.

    Args:
        adapters: on the device; as many as rows in the largest batch.
        context: tokens of a request that are in the cache.
        bus, merge: measured elsewhere: bytes per second, seconds.
        prompt: tokens of the prompt that is timed; default: ``context``.
        cuda_graphs: steps as the engine's of that setting.
    """
    table = step_table(served, adapters, context, repeats, cuda_graphs)
    base, row, adapter = fitted(table)
    prompt = prompt or context
    reading = Steps(served, 1, prompt).prompt_milliseconds(prompt) / 1e3
    return Costs(base, row, adapter, max(0.0, reading - base) / prompt, bus, merge), table


def copy_rate(served: MultiLoRA, adapter: Adapter, repeats: int = 9) -> float:
    """Bytes per second at which a pool fetches an adapter from RAM, its bookkeeping included."""
    from reference.multi_lora.serving import AdapterPool

    size = bytes_of(adapter)
    pool, turn = AdapterPool(served, size, 4 * size), iter(range(1 << 30))
    for name in ("a", "b"):
        pool.register(name, adapter)
    time = milliseconds(lambda: pool.release(pool.acquire("ab"[next(turn) % 2])), repeats, 2, pool.device)
    return size / (time / 1e3)
