"""Exercise 4: bytes that a gated MLP keeps for the backward pass."""

import operator
import random
from itertools import combinations

from course.checking import Check, Seen, but


def mlp_kept_bytes(
    tokens: int,
    hidden: int,
    mlp: int,
    number_bytes: int,
    trained: bool,
    adapted: set[str],
    *,
    keeps=operator.or_,  # of: the matrix is trained, it has an adapter
    readers_of_x=("gate_proj", "up_proj"),
    times=any,  # how often x is counted
    product=lambda hidden, mlp: mlp,
    inside: int = 3,  # gate, silu(gate), up
    output: int = 0,
    flows=lambda trained, adapted: True,  # a gradient, through the MLP
    each=lambda number_bytes: number_bytes,
) -> int:
    """The worked answer: a trained matrix or A keeps its input, x only once; silu keeps gate, and the product both its factors."""
    x = hidden * times(keeps(trained, name in adapted) for name in readers_of_x)
    of_down = product(hidden, mlp) * keeps(trained, "down_proj" in adapted)
    width = x + inside * mlp + of_down + output * hidden
    return tokens * width * each(number_bytes) * flows(trained, adapted)


def by_list(tokens: int, hidden: int, mlp: int, number_bytes: int, trained: bool, adapted: set[str]) -> int:
    kept = [mlp, mlp, mlp]
    if trained or "gate_proj" in adapted or "up_proj" in adapted:
        kept.append(hidden)
    if trained or "down_proj" in adapted:
        kept.append(mlp)
    return sum(tokens * width * number_bytes for width in kept)


def observe(answer, seed: int) -> Seen:
    rng = random.Random(seed)
    frozen = [(False, names) for count in range(4) for names in combinations(("gate_proj", "up_proj", "down_proj"), count)]
    for i, (trained, names) in enumerate([(True, ()), *frozen]):
        label = "trained in full" if trained else f"frozen, LoRA on {' and '.join(names) or 'none of its linears'}"
        tokens, hidden, mlp, number_bytes = rng.randint(5, 5000), rng.randint(50, 99), rng.randint(150, 400), (2, 4)[(seed + i) % 2]
        yield label, answer(tokens, hidden, mlp, number_bytes, trained, set(names))


check = Check(
    task="bytes that a gated MLP keeps for the backward pass",
    observe=observe,
    reference=mlp_kept_bytes,
    second=by_list,
    misconceptions={
        "a frozen linear layer keeps no input: its weight's gradient, which would need it, is not computed": but(keeps=lambda *_: True),
        "an adapter's A is trained, so it keeps the layer's input although the layer itself is frozen": but(keeps=lambda full, _: full),
        "gate_proj is not the only one that reads x: an adapter on up_proj keeps it too": but(readers_of_x=["gate_proj"]),
        "up_proj is not the only one that reads x: an adapter on gate_proj keeps it too": but(readers_of_x=["up_proj"]),
        "gate_proj and up_proj each read x: an adapter on one of them is enough to keep it": but(times=all),
        "silu(gate) is missing: the product silu(gate)·up keeps both factors, and silu keeps its own input": but(inside=2),
        "this MLP is gated: gate and silu(gate) are kept as well as up": but(inside=1),
        "gate_proj and up_proj read the same tensor: it is kept once": but(times=sum),
        "the output of down_proj is not kept: it is added to the residual stream, and a sum needs neither of its terms": but(output=1),
        "down_proj reads a tensor of width mlp, not hidden": but(product=lambda hidden, mlp: hidden),
        "nothing is kept only where no gradient flows; through a frozen MLP it flows on to the layers before": but(
            flows=lambda trained, adapted: trained or bool(adapted)
        ),
        "these are numbers, not bytes: multiply by number_bytes": but(each=lambda number_bytes: 1),
    },
    rtol=1e-9,
)
