"""Who is next: requests of many tenants, admitted by memory, with nobody starved.

A request is admitted when all that it can ever need is there: a place in the batch, slots for its
prompt and the most tokens that it may generate, and its adapter, pinned. So nothing that runs has
to be thrown out. Among the tenants that wait, the one that has been served fewest tokens is next
(Sheng et al. 2024, "Fairness in Serving Large Language Models"): one who sends a thousand requests
waits behind one who sends the first. If it does not fit, nobody overtakes it: small requests would
else keep a large one out for ever.
"""

from collections import deque
from dataclasses import dataclass, field

from reference.arguments import check_integer
from reference.multi_lora.route import known
from reference.multi_lora.serving.cache import KVCache
from reference.multi_lora.serving.pool import AdapterPool, Held, PoolFull


@dataclass(eq=False)
class Request:
    """What a tenant wants, and what became of it.

    Attributes:
        tenant: whose adapter; None is the base alone.
        prompt: token ids.
        max_new_tokens: the most that are generated.
        stop: a token that ends it.
        tokens: what was generated so far.
        times: seconds, of one clock: "submitted", "admitted", then one entry of ``tokens`` each.
    """

    tenant: str | None
    prompt: list[int]
    max_new_tokens: int
    stop: int | None = None
    tokens: list[int] = field(default_factory=list)
    held: Held | None = None
    slots: list[int] = field(default_factory=list)
    submitted: float = 0.0
    times: list[float] = field(default_factory=list)

    @property
    def done(self) -> bool:
        ended = bool(self.tokens) and self.tokens[-1] == self.stop
        return ended or len(self.tokens) >= self.max_new_tokens

    @property
    def most(self) -> int:
        """Tokens in the cache at its end, at most."""
        return len(self.prompt) + self.max_new_tokens


class Scheduler:
    """Requests that wait, and requests that run.

    Args:
        rows: requests in a batch at most.

    Attributes:
        served: tenant -> tokens, prompts' and generated ones.
    """

    def __init__(self, pool: AdapterPool, cache: KVCache, rows: int):
        check_integer("rows", rows, 1)
        self.pool, self.cache, self.rows = pool, cache, rows
        self.slots = cache.free
        self.running: list[Request] = []
        self.waiting: dict[str | None, deque[Request]] = {}
        self.served: dict[str | None, int] = {}

    def submit(self, request: Request) -> None:
        """Let a request wait.

        Raises:
            ValueError: its tenant is unknown, its prompt empty, or it could never be admitted.
        """
        if request.tenant is not None:
            known(request.tenant, self.pool.tenants)
        if not request.prompt:
            raise ValueError("prompt must hold at least one token")
        check_integer("max_new_tokens", request.max_new_tokens, 1)
        if request.most > self.slots:
            words = f"{len(request.prompt)} + {request.max_new_tokens} tokens"
            raise ValueError(f"the request may need {words}, the cache has {self.slots} slots")
        self._enter(request.tenant)
        self.waiting.setdefault(request.tenant, deque()).append(request)

    def _enter(self, tenant: str | None) -> None:
        """Who was away has saved up nothing: it starts level with the least served who is here."""
        here = {t for t, queue in self.waiting.items() if queue} | {r.tenant for r in self.running}
        if tenant not in here:
            least = min((self.served[t] for t in here), default=0)
            self.served[tenant] = max(self.served.get(tenant, 0), least)

    def order(self) -> list[str | None]:
        """Tenants that wait, the next one first."""
        return sorted(
            (t for t, queue in self.waiting.items() if queue), key=self.served.__getitem__
        )

    def admit(self) -> list[Request]:
        """Move requests that fit from waiting to running; these.

        Raises:
            ValueError: an adapter can't be loaded. Its request waits no longer, others are as they
                were.
        """
        found = []
        while len(self.running) < self.rows and (order := self.order()):
            request = self.waiting[order[0]][0]
            if request.most > self.cache.free:
                break
            try:
                if request.tenant is not None:
                    request.held = self.pool.acquire(request.tenant)
            except PoolFull:
                break
            except (ValueError, OSError):
                self.waiting[order[0]].popleft()
                raise
            self.waiting[order[0]].popleft()
            request.slots = self.cache.take(request.most)
            self.charge(request, len(request.prompt))
            self.running.append(request)
            found.append(request)
        return found

    def charge(self, request: Request, tokens: int) -> None:
        """Count what a tenant was served."""
        self.served[request.tenant] += tokens

    def finish(self, request: Request) -> None:
        """A running request has ended: its slots and its pin are free."""
        self.running.remove(request)
        self.cache.give(request.slots)
        if request.held is not None:
            self.pool.release(request.held)
        request.slots, request.held = [], None
