"""What became of simulated requests, in the measures by which a server is judged."""

import math
from dataclasses import dataclass

from reference.arguments import check_number
from reference.multi_lora.simulation.load import Asked


@dataclass(frozen=True)
class Outcome:
    """What happened.

    Attributes:
        requests: all, in the order in which they ended.
        seconds: from the start to the last token.
        loads: adapters that were fetched to the card, or merged.
        distinct: adapters in a step, on average.
        busy: share of the time in which a step or a merge ran.
    """

    requests: list[Asked]
    seconds: float
    loads: int
    distinct: float
    busy: float

    @property
    def per_second(self) -> float:
        """Requests served per second."""
        return len(self.requests) / self.seconds

    @property
    def hit_rate(self) -> float:
        """Share of the requests whose adapter was there."""
        return 1 - self.loads / len(self.requests)

    def first_token(self, share: float = 0.5) -> float:
        """Seconds from arrival to first token that this share of requests does not exceed."""
        return quantile([request.times[0] - request.arrived for request in self.requests], share)

    def between_tokens(self, share: float = 0.5) -> float:
        """Seconds from one token to the next; 0 where all requests wrote one token."""
        gaps = [b - a for r in self.requests for a, b in zip(r.times, r.times[1:], strict=False)]
        return quantile(gaps or [0.0], share)


def quantile(values: list[float], share: float) -> float:
    """The smallest of ``values`` that at least this share of them does not exceed.

    Raises:
        ValueError: there are none; the share is not from 0 to 1.
    """
    check_number("share", share, 0, 1)
    if not values:
        raise ValueError("values must hold at least one number, got none")
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
