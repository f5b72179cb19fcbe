"""Parameters in buckets: what is stepped and copied at a time by the optimizer on the CPU."""

from collections.abc import Iterator, Sequence

from torch import nn

from reference.paging.lanes import Packed, pinned_bytes


class Bucket:
    """Some parameters of one group, with pinned host copies of values and gradients.

    Attributes:
        numbers: of the parameters, counted through all groups; keys of ``values``, ``gradients``.
    """

    def __init__(self, numbers: list[int], parameters: Sequence[nn.Parameter]):
        self.numbers, device = numbers, parameters[0].device
        packed = Packed({str(k): p for k, p in zip(numbers, parameters, strict=True)})
        memory = pinned_bytes(2 * packed.bytes, device).view(2, packed.bytes)
        values, gradients = (packed.views(half) for half in memory)
        self.values = {int(k): value for k, value in values.items()}
        self.gradients = {int(k): gradient for k, gradient in gradients.items()}


def buckets_of(
    parameters: Sequence[nn.Parameter], first: int, bucket_bytes: int
) -> Iterator[Bucket]:
    """Neighbours together until they hold ``bucket_bytes``; the first one has number ``first``."""
    start = 0
    for end in range(1, len(parameters) + 1):
        some = parameters[start:end]
        if end == len(parameters) or sum(p.nbytes for p in some) >= bucket_bytes:
            yield Bucket(list(range(first + start, first + end)), some)
            start = end
