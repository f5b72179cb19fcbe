"""A server's inner loop: one base, a batch of whoever is there, a token for each at a time.

    engine = Engine(served, pool, rows=32, kv_bytes=1 << 30)
    engine.submit(Request("sql", prompt, max_new_tokens=50))
    while engine.busy:
        for request in engine.step():    # those that have ended
            ...

A step admits what fits, reads the new prompts, and gives everybody else one more token ("continuous
batching": Yu et al. 2022, "Orca"). Each row goes through its own tenant's adapter.
"""

import time
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from reference.arguments import check_integer
from reference.llama.model import Llama
from reference.multi_lora.model import MultiLoRA
from reference.multi_lora.route import Route
from reference.multi_lora.serving.cache import KVCache, next_logits, padded, token_bytes
from reference.multi_lora.serving.graphs import DecodeGraphs
from reference.multi_lora.serving.pool import AdapterPool
from reference.multi_lora.serving.scheduler import Request, Scheduler


class Engine:
    """Serves requests over ``served.model``, a :class:`reference.llama.Llama`.

    Args:
        rows: requests in a batch at most.
        kv_bytes: for keys and values.
        ahead: tenants that wait whose adapters are fetched before their turn.
        cuda_graphs: give tokens from recorded steps (:mod:`.graphs`); prompts are read without.
        clock: seconds; for measurements.

    Raises:
        TypeError: the model is another one.
        ValueError: ``kv_bytes`` holds not one token.
    """

    def __init__(
        self,
        served: MultiLoRA,
        pool: AdapterPool,
        rows: int,
        kv_bytes: int,
        ahead: int = 2,
        cuda_graphs: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ):
        if not isinstance(served.model, Llama):
            kind = type(served.model).__name__
            raise TypeError(f"served.model must be a reference.llama.Llama, got {kind}")
        check_integer("ahead", ahead, 0)
        weight = served.model.model.embed_tokens.weight
        check_integer("kv_bytes", kv_bytes, token_bytes(served.model.shape, weight.dtype))
        slots = kv_bytes // token_bytes(served.model.shape, weight.dtype)
        self.served, self.pool, self.clock, self.ahead = served, pool, clock, ahead
        self.cache = KVCache(served.model.shape, slots, weight.dtype, weight.device)
        self.scheduler = Scheduler(pool, self.cache, rows)
        self.device = weight.device
        self.graphs = DecodeGraphs(served, self.cache) if cuda_graphs else None

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.order())

    def submit(self, request: Request) -> None:
        """Let a request wait for its turn. Raises: as :meth:`Scheduler.submit`."""
        self.scheduler.submit(request)
        request.submitted = self.clock()

    def step(self) -> list[Request]:
        """One token for each running request; returns those that have ended with it."""
        new = self.scheduler.admit()
        old = [request for request in self.scheduler.running if request not in new]
        for tenant in self.scheduler.order()[: self.ahead]:
            with suppress(ValueError, OSError):  # what is wrong is said when its turn has come
                if tenant is not None:
                    self.pool.prefetch(tenant)
        self._advance(old)
        self._advance(new)
        ended = [request for request in self.scheduler.running if request.done]
        for request in ended:
            self.scheduler.finish(request)
        return ended

    def run(self) -> list[Request]:
        """Steps until nobody waits; all that ended, in the order in which they did."""
        ended = []
        while self.busy:
            ended += self.step()
        return ended

    def _advance(self, batch: list[Request]) -> None:
        """The next token of each: from its prompt, or from the token before."""
        if not batch:
            return
        texts = [request.tokens[-1:] or request.prompt for request in batch]
        before = [len(r.prompt) + len(r.tokens) - 1 if r.tokens else 0 for r in batch]
        longest = max(b + len(t) for b, t in zip(before, texts, strict=True))
        slots = [request.slots[:longest] for request in batch]
        if self.graphs and all(request.tokens for request in batch):
            ids, held = [text[0] for text in texts], [request.held for request in batch]
            return self._give(batch, self.graphs.logits(ids, slots, before, held))
        slots = padded(slots, self.device)
        start, count = (torch.tensor(n, device=self.device) for n in (before, [*map(len, texts)]))
        self.served.use(Route([r.held and r.held.adapter for r in batch]))
        try:
            ids = padded(texts, self.device)
            logits = next_logits(self.served.model, self.cache, ids, slots, start, count)
        finally:
            self.served.use(None)
        self._give(batch, logits)

    def _give(self, batch: list[Request], logits: Tensor) -> None:
        tokens, now = logits.argmax(-1).tolist(), self.clock()
        for request, token in zip(batch, tokens, strict=True):
            request.tokens.append(token)
            request.times.append(now)
            self.scheduler.charge(request, 1)
