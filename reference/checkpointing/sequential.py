"""A chain of layers in segments: only what goes into a segment is kept.

Let N layers keep a bytes each and the tensor between two layers take b bytes. In k segments of at
most ⌈N/k⌉ layers, the inputs of all segments are kept, and one segment at a time is there in full:

    k·b + ⌈N/k⌉·a          least near k = √(N·ρ),  ρ = a/b

If a layer keeps no more than its input, ρ = 1, that is √N segments, and 2·√N tensors instead of N:
memory grows *as* √N (Chen et al. 2016). A transformer's layer keeps ρ = 10 to 40 times its input.
Then √(N·ρ) is near N or above it, and every layer should be a segment of its own.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from reference.arguments import check_integer, check_number
from reference.checkpointing.checkpoint import checkpoint

Layers = nn.Sequential | Sequence[Callable]


def segment_sizes(layers: int, segments: int) -> list[int]:
    """How many layers each segment has: as equal as can be, the larger ones first.

    Raises:
        TypeError: one of them is not an integer.
        ValueError: ``segments`` is not from 1 to ``layers``.
    """
    check_integer("layers", layers, 1)
    check_integer("segments", segments, 1, layers)
    size, more = divmod(layers, segments)
    return [size + 1] * more + [size] * (segments - more)


def activation_cost(layers: int, segments: int, ratio: float = 1.0) -> float:
    """Tensors that are there at the height of a step, in units of a layer's input.

    Args:
        ratio: ρ, the bytes that a layer keeps over those of its input.
    """
    check_number("ratio", ratio, 0)
    return segments + ratio * max(segment_sizes(layers, segments))


def optimal_segments(layers: int, ratio: float = 1.0) -> int:
    """How many segments need the least memory; of several, the fewest.

    Args:
        ratio: ρ, the bytes that a layer keeps over those of its input.

    Raises:
        TypeError, ValueError: ``layers`` is no positive integer, ``ratio`` is no number from 0 on.
    """
    check_integer("layers", layers, 1)
    return min(range(1, layers + 1), key=lambda k: activation_cost(layers, k, ratio))


def checkpoint_sequential(
    layers: Layers, x: Tensor, segments: int, how: Callable[..., Any] = checkpoint
) -> Tensor:
    """``layers`` in turn, in checkpointed segments; the same values and gradients.

    The last segment is not checkpointed: its backward comes first, so it would be computed again
    at once. That saves a forward of it, and costs no memory at the height.

    Args:
        layers: each takes and returns a tensor.
        segments: from 1 to the number of layers. With 1 nothing is checkpointed.
        how: :func:`checkpoint`, or another that is called so.

    Raises:
        TypeError: ``segments`` is not an integer.
        ValueError: it is out of range, or there are no layers.
    """
    layers, start = list(layers), 0
    *sizes, last = segment_sizes(len(layers), segments)
    for size in sizes:
        x = how(partial(in_turn, layers[start : start + size]), x)
        start += size
    return in_turn(layers[start : start + last], x)


def in_turn(layers: Sequence[Callable], x: Tensor) -> Tensor:
    """Each layer on what the one before it returned."""
    for layer in layers:
        x = layer(x)
    return x
