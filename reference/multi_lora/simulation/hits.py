"""How often a pool has what is asked for: a closed form, to check a simulation or to do without it.

A pool that drops the least recently used adapter keeps what was asked for within the last T
requests. T is such that just ``places`` different tenants are among them:

    Σ_k (1 − exp(−p_k·T)) = places        p_k: tenant k's share of the requests, ∝ k^(−zipf)

and a request of tenant k finds its adapter with the chance 1 − exp(−p_k·T). Che, Tung and Wang
2002.
"""

import math

from reference.arguments import check_integer, check_number


def expected_hits(tenants: int, zipf: float, places: int) -> float:
    """Share of the requests that find their adapter, in the long run.

    Raises:
        ValueError, TypeError: a count is below 1, ``zipf`` negative, or one is no number.
    """
    check_integer("tenants", tenants, 1)
    check_integer("places", places, 1)
    check_number("zipf", zipf, 0)
    if places >= tenants:
        return 1.0
    weights = [k**-zipf for k in range(1, tenants + 1)]
    total = sum(weights)
    shares = [weight / total for weight in weights]

    def kept(T: float) -> float:
        return sum(-math.expm1(-p * T) for p in shares)

    low, high = 0.0, 1.0
    while kept(high) < places:
        high *= 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) < places else (low, middle)
    return sum(p * -math.expm1(-p * high) for p in shares)
