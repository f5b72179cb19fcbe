"""Exercise 5: a pass through layers whose weights are copied in while the layer before computes."""

import random

from course.checking import Check, but


def pass_seconds(
    weights: list[int],
    bits: float,
    tokens: int,
    operations: float,
    bandwidth: float,
    *,
    bytes_of=lambda count, bits: count * bits / 8,
    work=lambda count, tokens: 2 * count * tokens,
    first=lambda copies: copies[0],
    between=lambda compute, following: max(compute, following),
    last=lambda computes: computes[-1],
    rate=lambda bandwidth: bandwidth,
) -> float:
    """The worked answer: the first copy, then the longer of each computation and the next copy, then the last computation."""
    copies = [bytes_of(count, bits) / rate(bandwidth) for count in weights]
    computes = [work(count, tokens) / operations for count in weights]
    middle = sum(between(compute, following) for compute, following in zip(computes[:-1], copies[1:], strict=True))
    return first(copies) + middle + last(computes)


def by_events(weights, bits, tokens, operations, bandwidth):
    loaded = done = before = 0.0
    for count in weights:
        loaded = max(loaded, before) + bits * count / (8 * bandwidth)  # two slots: the layer before the last one is done
        before, done = done, max(loaded, done) + 2 * tokens * count / operations
    return done


def from_totals(weights, bits, tokens, operations, bandwidth):
    return max(sum(weights) * bits / 8 / bandwidth, 2 * tokens * sum(weights) / operations)


def without_slots(weights, bits, tokens, operations, bandwidth):
    loaded = done = 0.0
    for count in weights:
        loaded += bits * count / 8 / bandwidth
        done = max(loaded, done) + 2 * tokens * count / operations
    return done


def observe(answer, seed: int) -> dict:
    draw = random.Random(seed)
    operations, bandwidth = draw.uniform(3e14, 6e14), draw.uniform(2e10, 6e10)
    even = operations / bandwidth  # tokens at which 16-bit weights are copied as fast as used
    large, small = draw.randrange(10**8, 2 * 10**8), draw.randrange(10**7, 5 * 10**7)
    cases = {
        "one layer": ([large], 16, int(even / 3)),
        "four equal layers, few tokens": ([large] * 4, 16, 16),
        "four equal layers, many tokens": ([large] * 4, 16, int(3 * even)),
        "layers of different size": ([small, large, large // 2, small, large], 16, int(1.2 * even)),
        "a large layer after small ones": ([large, small, small, small, large], 16, int(1.1 * even)),
        "layers in 4.127 bits": ([large, small, large, large], 4.127, int(0.3 * even)),
    }
    return {
        f"{name}, {bits:g} bits, {tokens:,} tokens": answer(list(weights), bits, tokens, operations, bandwidth)
        for name, (weights, bits, tokens) in cases.items()
    }


check = Check(
    task="a pass through layers that are fetched",
    observe=observe,
    reference=pass_seconds,
    second=by_events,
    misconceptions={
        "nothing overlaps: while a layer computes the next one is copied, so the longer of the two counts": but(
            between=lambda compute, following: compute + following
        ),
        "that is the longer of two totals, or of each layer's own two times: what runs beside a layer's computation is the *next* layer's "
        "copy": from_totals,
        "the first copy is missing: nothing can be computed before it": but(first=lambda copies: 0.0),
        "the last layer's computation is missing: there is nothing left to copy beside it, but it takes its time": but(
            last=lambda computes: 0.0
        ),
        "bits were taken for bytes: divide by 8": but(bytes_of=lambda count, bits: count * bits),
        "one operation per weight and token: a product is a multiplication and an addition, so two": but(
            work=lambda count, tokens: count * tokens
        ),
        "the computation does not depend on the tokens: every token is multiplied with every weight": but(
            work=lambda count, tokens: 2 * count
        ),
        "the copies run ahead as far as they like: there are two slots, so a copy begins when the layer before the last one is done": (
            without_slots
        ),
        "the copy takes half as long: weights go one way only, so the rate is that of one direction": but(
            rate=lambda bandwidth: 2 * bandwidth
        ),
        "16 bits were assumed: copy `bits` of each weight": but(bytes_of=lambda count, bits: 2 * count),
    },
)
