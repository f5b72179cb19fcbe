"""Less memory still: checkpoints within what is computed again, on the best schedule there is.

With room for j layer inputs at a time, the first one included, N layers can be run backward however
large N is. The price is running layers more often. Put one checkpoint behind the first i layers:
they run once to get there, the N − i behind it have j − 1 places left, and then the first i have
all j again.

    t(N, j) = min over i of   i + t(i, j) + t(N − i, j − 1)        t(1, j) = 0
    t(N, 1) = N·(N − 1)/2

t counts the runs beyond the N that build the graph. Its closed form is t = r·N − C(j + r, j + 1),
with r the smallest number for which C(j + r, j) >= N: no layer runs more than r + 1 times, and r
grows with N as its j-th root. Griewank and Walther 2000, "Revolve"; the recursion is solved by
nesting, since a checkpoint inside a checkpoint works.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from math import comb

from torch import Tensor

from reference.arguments import check_integer
from reference.checkpointing.hooks import checkpoint_by_hooks
from reference.checkpointing.sequential import Layers, in_turn


def repetitions(layers: int, slots: int) -> int:
    """r, the most often that a layer runs beyond the run that builds its graph."""
    check_integer("layers", layers, 1)
    check_integer("slots", slots, 1)
    r = 0
    while comb(slots + r, slots) < layers:
        r += 1
    return r


def extra_runs(layers: int, slots: int) -> int:
    """t(N, j): runs of single layers beyond the N of an ordinary forward, at the least.

    Args:
        layers: N, 1 or more.
        slots: j, how many layer inputs there is room for, the first one's included; 1 or more.
    """
    r = repetitions(layers, slots)
    return r * layers - comb(slots + r, slots + 1)


@cache
def best_split(layers: int, slots: int) -> int:
    """i: behind how many of ``layers`` the next checkpoint goes; the fewest that are best."""
    check_integer("layers", layers, 2)
    check_integer("slots", slots, 1)
    if slots == 1:
        return layers - 1
    return min(range(1, layers), key=lambda i: _runs(layers, slots, i))


def _runs(layers: int, slots: int, i: int) -> int:
    return i + extra_runs(i, slots) + extra_runs(layers - i, slots - 1)


def checkpoint_binomial(
    layers: Layers, x: Tensor, slots: int, how: Callable = checkpoint_by_hooks
) -> Tensor:
    """``layers`` in turn; at most ``slots`` layer inputs and one layer's inside are kept at a time.

    Args:
        layers: each takes and returns a tensor.
        slots: 1 or more. From N on it is one checkpoint per layer.
        how: with ``checkpoint`` instead, backwards run inside backwards, and each level that is
            under way holds its result and the gradient of it, beside the slots.

    Raises:
        TypeError, ValueError: ``slots`` is no positive integer, or there are no layers.
    """
    layers = list(layers)
    check_integer("slots", slots, 1)
    check_integer("len(layers)", len(layers), 1)
    return _nested(layers, x, slots, how)


def _nested(layers: Sequence[Callable], x: Tensor, slots: int, how: Callable) -> Tensor:
    if len(layers) == 1:
        return in_turn(layers, x)
    i = best_split(len(layers), slots)
    x = how(partial(_nested, layers[:i], slots=slots, how=how), x)
    return _nested(layers[i:], x, slots - 1, how)
