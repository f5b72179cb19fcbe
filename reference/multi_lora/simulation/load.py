"""What a simulated server is asked for, and what its work costs."""

import random
from bisect import bisect
from dataclasses import dataclass, field
from itertools import accumulate

from reference.arguments import check_integer, check_number


@dataclass(frozen=True)
class Costs:
    """Seconds, and bytes per second.

    Attributes:
        base, row, adapter: of a step, of one row of it, of one distinct adapter in it.
        token: of one token of a prompt.
        bus: bytes per second from RAM to the card.
        merge: to put another adapter into the weights.

    Raises:
        ValueError: one is negative, or nothing takes any time.
    """

    base: float
    row: float = 0.0
    adapter: float = 0.0
    token: float = 0.0
    bus: float = float("inf")
    merge: float = 0.0

    def __post_init__(self) -> None:
        for name in ("base", "row", "adapter", "token", "merge"):
            check_number(name, getattr(self, name), 0)
        if not self.base + self.row + self.adapter:
            raise ValueError("base, row and adapter are all 0: a step must take time")
        if not self.bus > 0:
            raise ValueError(f"bus must be above 0 bytes per second, got {self.bus!r}")


@dataclass(frozen=True)
class Load:
    """What arrives.

    Attributes:
        tenants: how many there are.
        rate: requests per second, of all of them together.
        zipf: tenant k sends a share ∝ k^(−zipf) of the requests; 0 is the same for all.
        prompt, new: tokens of a request, read and written.
        adapter_bytes: of each adapter.

    Raises:
        ValueError, TypeError: a count is below 1, or a number negative; the rate is 0.
    """

    tenants: int
    rate: float
    zipf: float = 1.0
    prompt: int = 0
    new: int = 1
    adapter_bytes: int = 0

    def __post_init__(self) -> None:
        for name, least in (("tenants", 1), ("new", 1), ("prompt", 0), ("adapter_bytes", 0)):
            check_integer(name, getattr(self, name), least)
        for name in ("rate", "zipf"):
            check_number(name, getattr(self, name), 0)
        if self.rate == 0:
            raise ValueError("rate must be above 0, or no request ever arrives; got 0")


@dataclass(eq=False)
class Asked:
    """A request: whose, when it arrived, when its adapter is there, when each token came."""

    tenant: int
    arrived: float
    ready: float = 0.0
    times: list[float] = field(default_factory=list)


def arrivals(load: Load, count: int, seed: int = 0) -> list[Asked]:
    """``count`` requests as they arrive: a Poisson process. Tenant 0 sends most.

    One seed sends the same tenants at every rate.
    """
    check_integer("count", count, 1)
    who, when = random.Random(f"tenants {seed}"), random.Random(f"times {seed}")
    shares = list(accumulate((k + 1) ** -load.zipf for k in range(load.tenants)))
    found, now = [], 0.0
    for _ in range(count):
        now += when.expovariate(load.rate)
        tenant = min(bisect(shares, who.random() * shares[-1]), load.tenants - 1)
        found.append(Asked(tenant, now))
    return found
