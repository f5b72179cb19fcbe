"""What several exercises of unit 03 share: tensors clear of ties, how results are looked at, and parts of answers."""

import numbers

import torch
from torch import Tensor

TINY = 1e-14  # second moments of an optimizer are as small, and are quantized too


def off_the_borders(x: Tensor, scale: Tensor | float, margin: float = 0.03) -> Tensor:
    """``x`` with zeros where x / scale is next to a half."""
    share = x.double() / scale
    return torch.where((share - share.floor() - 0.5).abs() < margin, 0, x)


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
