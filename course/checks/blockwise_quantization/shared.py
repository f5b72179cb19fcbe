"""What several exercises of unit 03 share: tensors clear of ties, how results are looked at, and parts of answers."""

import numbers

import torch
from torch import Tensor
from torch.nn.functional import pad

from reference.blockwise import midpoints

TINY = 1e-14  # second moments of an optimizer are as small, and are quantized too


def off_the_borders(x: Tensor, scale: Tensor | float, margin: float = 0.03) -> Tensor:
    """``x`` with zeros where x / scale is next to a half."""
    share = x.double() / scale
    return torch.where((share - share.floor() - 0.5).abs() < margin, 0, x)


def near_a_midpoint(scaled: Tensor, levels: Tensor) -> Tensor:
    """Which values lie so close to the middle of two levels that two right answers may take either: bool, in the shape of ``scaled``."""
    return (scaled[..., None] - midpoints(levels.sort().values)).abs().amin(-1) < 1e-5  # float32 divides a hundred times more exactly


def off_the_midpoints(x: Tensor, levels: Tensor, block_size: int) -> Tensor:
    """``x`` with zeros where a value's share of its block's largest is next to the middle of two levels."""
    flat = x.flatten().clone()
    for block in flat.split(block_size):
        largest = block.double().abs().max().clamp(min=1e-38)
        block[near_a_midpoint(block.double() / largest, levels.double())] = 0
    return flat.view(x.shape)


def largest_is(sign: int, x: Tensor) -> Tensor:
    """``x`` with its largest absolute value made a little larger, and of this sign."""
    flat = x.flatten().clone()
    at = flat.abs().argmax()
    flat[at] = 1.25 * sign * flat[at].abs()
    return flat.view(x.shape)


def transposed(x: Tensor) -> Tensor:
    """The same values in the same places of the tensor, but not in memory: ``x.view(-1)`` raises, ``x.flatten()`` is right."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def number(value) -> object:
    """A tensor of one element or a number of numpy's as a number; anything else as it is."""
    if isinstance(value, numbers.Real) and not isinstance(value, (bool, int)):
        return float(value)
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def comes_back(x: Tensor, codes: Tensor, scale: Tensor | float, step: Tensor) -> bool:
    """Whether codes · scale is ``x`` again, but for half a step."""
    restored = codes.double() * scale
    return restored.shape == x.shape and bool(((x.double() - restored).abs() <= 0.51 * step).all())


def filled_up(flat: Tensor, block_size: int) -> tuple[Tensor, ...]:
    """Its blocks, the last one filled up with zeros."""
    return pad(flat, (0, -len(flat) % block_size)).split(block_size)


def as_if_even(share: Tensor, codebook: Tensor) -> Tensor:
    return ((share + 1) / 2 * (len(codebook) - 1)).round()


def level_below(share: Tensor, codebook: Tensor) -> Tensor:
    levels, order = codebook.sort(stable=True)
    return order[(torch.bucketize(share, levels, right=True) - 1).clamp(min=0)]


def level_above(share: Tensor, codebook: Tensor) -> Tensor:
    levels, order = codebook.sort(stable=True)
    return order[torch.bucketize(share, levels).clamp(max=len(levels) - 1)]
