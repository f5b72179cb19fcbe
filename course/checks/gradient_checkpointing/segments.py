"""Exercise 1: how many segments need the least memory."""

import math
import random
from collections.abc import Callable

from course.checking import Check, Seen, but, unpacked
from reference.checkpointing import activation_cost, optimal_segments


def best_segments(
    layers: int, input_bytes: int, layer_bytes: int, *,
    candidates: Callable[[int], range | list[int]] = lambda n: range(1, n + 1),
    longest=lambda n, k: -(-n // k),
    inputs=lambda n, k: k,
    inside=lambda n, longest: longest,
    chosen=lambda candidates, cost, ratio: min(candidates, key=cost),
) -> tuple[int, int]:  # fmt: skip
    """The worked answer."""

    def cost(k: int) -> int:
        return inputs(layers, k) * input_bytes + inside(layers, longest(layers, k)) * layer_bytes

    k = chosen(candidates(layers), cost, layer_bytes / input_bytes)
    return k, cost(k)


def by_the_reference(layers: int, input_bytes: int, layer_bytes: int) -> tuple[int, int]:
    ratio = layer_bytes / input_bytes
    k = optimal_segments(layers, ratio)
    return k, round(input_bytes * activation_cost(layers, k, ratio))


def by_root(candidates, cost, ratio) -> int:
    """The minimum of k·b + (N/k)·a over real k, rounded."""
    n = len(candidates)
    return min(n, max(1, round(math.sqrt(n * ratio))))


def observe(answer, seed: int) -> Seen:
    draw = random.Random(seed)
    cases = {
        "16 layers that keep as much as their input": (16, 4096, 4096),
        "60 layers that keep twice their input": (60, 1000, 2000),
        "32 layers that keep 17 times their input": (32, 2**20, 17 * 2**20),
        "64 layers that keep 19 times their input": (64, 2**20, 19 * 2**20),
        "one layer": (1, 100, 1700),
    }
    for _ in range(4):
        layers, ratio = draw.randrange(20, 120), draw.randrange(1, 12)
        cases[f"{layers} layers that keep {ratio} times their input"] = (layers, 512, 512 * ratio)
    for label, case in cases.items():
        k, count = unpacked(answer(*case), "the number of segments and the bytes", object, object)
        yield f"segments for {label}", k
        yield f"bytes for {label}", count


check = Check(
    task="the number of segments that needs the least memory, and its bytes",
    observe=observe,
    reference=best_segments,
    second=by_the_reference,
    misconceptions={
        "these are √N segments: right only where a layer keeps no more than its input; compare the bytes of all numbers of segments": but(
            chosen=lambda candidates, cost, ratio: max(1, round(math.sqrt(len(candidates))))
        ),
        "this is √(N·ρ), rounded: near the best, but the longest segment has a whole number of layers; compare the bytes of all": but(
            chosen=by_root
        ),
        "only numbers that divide N were tried: segments may differ by a layer, and the longest has ⌈N/k⌉": but(
            candidates=lambda n: [k for k in range(1, n + 1) if n % k == 0]
        ),
        "the longest segment has ⌈N/k⌉ layers, rounded up: N // k forgets the rest": but(longest=lambda n, k: n // k),
        "the insides of all segments are counted: only one segment at a time is there in full": but(inside=lambda n, longest: n),
        "the inputs of all layers are counted: only those of segments are kept": but(inputs=lambda n, k: n),
        "of several numbers of segments that need the same, the smallest was asked for": but(
            chosen=lambda candidates, cost, ratio: min(reversed(candidates), key=cost)
        ),
        "one layer's inside is counted, whatever the number of segments: a segment is run again as a whole": but(
            inside=lambda n, longest: 1
        ),
    },
)
