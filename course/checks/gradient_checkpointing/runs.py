"""Exercise 4: how often layers run with few places for checkpoints."""

import functools
import random

from course.checking import Check, Seen, but
from reference.checkpointing import extra_runs


def least_runs(
    layers: int, slots: int, *,
    alone=lambda n: n * (n + 1) // 2,
    advance=lambda i: i,
    front=lambda j: j,
    behind=lambda j: j - 1,
    splits=lambda n: range(1, n),
    total=lambda runs, n: runs,
    pick=min,
) -> int:  # fmt: skip
    """The worked answer: F(N, j) = min over i of i + F(i, j) + F(N − i, j − 1)."""

    @functools.cache
    def runs(n: int, j: int) -> int:
        if n == 1:
            return 1
        if j <= 1:
            return alone(n)
        return pick(advance(i) + runs(i, front(j)) + runs(n - i, behind(j)) for i in splits(n))

    return total(runs(layers, slots), layers)


def by_the_closed_form(layers: int, slots: int) -> int:
    return layers + extra_runs(layers, slots)


def observe(answer, seed: int) -> Seen:
    draw = random.Random(seed)
    cases = [(1, 1), (1, 3), (2, 1), (5, 1), (10, 3), (32, 5), (6, 9), (draw.randrange(20, 40), 2), (draw.randrange(30, 60), 4)]
    for layers, slots in cases:
        yield f"runs of {layers} layer{'s' * (layers > 1)} with {slots} place{'s' * (slots > 1)}", answer(layers, slots)


check = Check(
    task="the least number of layer runs for a backward with few places",
    observe=observe,
    reference=least_runs,
    second=by_the_closed_form,
    misconceptions={
        "getting to the checkpoint costs runs too: add i for the i layers in front of it": but(advance=lambda i: 0),
        "the layers behind the checkpoint have one place less: it holds their input": but(behind=lambda j: j),
        "the layers in front of the checkpoint have all places again: those behind are done by then": but(front=lambda j: j - 1),
        "these are the runs beyond the N that every forward makes: add the N": but(total=lambda runs, n: runs - n),
        "the checkpoint is always in the middle: try every place and take the best": but(splits=lambda n: [n // 2]),
        "with one place each layer is reached from the input anew: N + (N − 1) + … + 1 runs": but(alone=lambda n: 2 * n - 1),
        "this is the most that a schedule can take, not the least: minimize over the place of the checkpoint": but(pick=max),
    },
)
