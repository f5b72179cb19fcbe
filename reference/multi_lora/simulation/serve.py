"""Ten thousand tenants before there is a card: a server's queue, batch and adapters, no model.

A decode step gives every running request one token. It takes

    step = base + row · rows + adapter · distinct + token · prompt tokens read in it

``base`` is the reading of the weights, which all rows share; ``adapter`` the reading of one more
adapter's factors; ``row`` what else grows with rows. An adapter that is not on the card comes over
the bus, one after another, while the card goes on with the others. The least recently used one that
no request uses makes room. This is :mod:`reference.multi_lora.serving` with seconds in the place of
tensors. Its answers are as good as the costs that it is given, so measure these.

Two ways to serve are compared:

    unmerged    rows of all tenants share a batch
    merged      one tenant's adapter is in the weights, and all rows are its own; the next tenant
                waits until they have ended and the weights are changed

With one tenant, one row and one token this is the queue M/D/1, whose mean wait is known:
ρ·S / (2·(1 − ρ)) at a service of S seconds and a load ρ (Pollaczek 1930, Khinchine 1932).
"""

from collections import OrderedDict, deque

from reference.arguments import check_integer
from reference.multi_lora.simulation.load import Asked, Costs, Load, arrivals
from reference.multi_lora.simulation.outcome import Outcome


class Unmerged:
    """Adapters on the card, least recently used first, and how many requests use each."""

    def __init__(self, load: Load, costs: Costs, pool_bytes: int, warm: bool):
        if pool_bytes < max(1, load.adapter_bytes):
            words = f"pool_bytes must hold an adapter of {load.adapter_bytes} bytes"
            raise ValueError(f"{words}, got {pool_bytes}")
        self.places = pool_bytes // load.adapter_bytes if load.adapter_bytes else load.tenants
        self.copy = load.adapter_bytes / costs.bus  # seconds
        there = range(min(self.places, load.tenants)) if warm else ()
        self.users: OrderedDict[int, int] = OrderedDict.fromkeys(reversed(there), 0)
        self.arrives = dict.fromkeys(there, 0.0)
        self.bus_free, self.loads, self.adapter = 0.0, 0, costs.adapter

    def admit(self, waiting: deque[Asked], running: list[Asked], rows: int, now: float) -> float:
        """Move requests from waiting to running; the time after it."""
        while waiting and len(running) < rows and self.take(waiting[0], now):
            running.append(waiting.popleft())
        return now

    def take(self, request: Asked, now: float) -> bool:
        """Have its adapter there or on its way; False if what would have to go is in use."""
        tenant = request.tenant
        if tenant not in self.users:
            if len(self.users) == self.places:
                idle = next((other for other, users in self.users.items() if not users), None)
                if idle is None:
                    return False
                del self.users[idle], self.arrives[idle]
            self.bus_free = max(now, self.bus_free) + self.copy
            self.users[tenant], self.arrives[tenant] = 0, self.bus_free
            self.loads += 1
        self.users[tenant] += 1
        self.users.move_to_end(tenant)
        request.ready = self.arrives[tenant]
        return True

    def release(self, request: Asked) -> None:
        self.users[request.tenant] -= 1


class Merged:
    """One tenant at a time."""

    def __init__(self, costs: Costs):
        self.seconds, self.tenant, self.loads, self.adapter = costs.merge, None, 0, 0.0

    def admit(self, waiting: deque[Asked], running: list[Asked], rows: int, now: float) -> float:
        """As above. A tenant's later requests join only while nobody else waits."""
        if not waiting or (running and any(each.tenant != self.tenant for each in waiting)):
            return now
        if not running and waiting[0].tenant != self.tenant:
            self.tenant, now, self.loads = waiting[0].tenant, now + self.seconds, self.loads + 1
        mine = [request for request in waiting if request.tenant == self.tenant]
        for request in mine[: rows - len(running)]:
            waiting.remove(request)
            running.append(request)
        return now

    def release(self, request: Asked) -> None:
        """Its adapter stays until another tenant's is merged."""


def simulate(
    load: Load,
    costs: Costs,
    rows: int,
    pool_bytes: int = 1,
    requests: int = 10_000,
    how: str = "unmerged",
    seed: int = 0,
    warm: bool = False,
) -> Outcome:
    """Serve ``requests`` requests, first come, first served.

    Args:
        rows: of a batch at most.
        pool_bytes: for adapters on the card; "merged" has none there.
        how: "unmerged" or "merged".
        warm: begin with the adapters on the card of those who ask most; else with none.

    Raises:
        ValueError: the pool holds no adapter; ``how`` is unknown; a count is below 1.
    """
    check_integer("rows", rows, 1)
    if how not in ("unmerged", "merged"):
        raise ValueError(f"how must be 'unmerged' or 'merged', got {how!r}")
    serving = Merged(costs) if how == "merged" else Unmerged(load, costs, pool_bytes, warm)
    coming = deque(arrivals(load, requests, seed))
    waiting, running, ended = deque(), [], []
    now = worked = distinct = 0.0
    steps = 0
    while coming or waiting or running:
        if not (running or waiting):
            now = max(now, coming[0].arrived)
        while coming and coming[0].arrived <= now:
            waiting.append(coming.popleft())
        before, now = now, serving.admit(waiting, running, rows, now)
        worked += now - before
        batch = [request for request in running if request.ready <= now]
        if not batch:  # all that run wait for the bus
            now = min(request.ready for request in running)
            continue
        different = len({request.tenant for request in batch})
        prompts = load.prompt * sum(not request.times for request in batch)
        step = costs.base + costs.row * len(batch) + serving.adapter * different
        step += costs.token * prompts
        now, worked = now + step, worked + step
        distinct, steps = distinct + different, steps + 1
        for request in batch:
            request.times.append(now)
            if len(request.times) == load.new:
                running.remove(request)
                serving.release(request)
                ended.append(request)
    return Outcome(ended, now, serving.loads, distinct / steps, worked / now)
