"""What several checks of the unit use."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from course.checking import unwritten


def as_given(x: Any, *_: Any) -> Any:
    """A part left out."""
    return x


def or_torchs_refusal(answer: Callable, *arguments: Any) -> tuple[Any, str | None]:
    """The result, or what torch says of a dtype that an operation does not take."""
    try:
        return answer(*arguments), None
    except NotImplementedError as error:
        if unwritten(error):
            raise
        return None, str(error)


def nearest(weight: Tensor, exact: Tensor, slack: float = 1e-6) -> bool:
    """Is every number of ``weight`` a nearest one of its dtype to ``exact`` (float64)? The slack is float32's own rounding."""
    lower, upper = (torch.nextafter(weight, torch.full_like(weight, side)).double() for side in (-math.inf, math.inf))
    error = (weight.double() - exact).abs()
    return bool((error <= (lower - exact).abs() + slack).all() and (error <= (upper - exact).abs() + slack).all())


def with_singular_values(s: Tensor, shape: tuple[int, int], g: torch.Generator) -> Tensor:
    """A random matrix of that shape with the singular values ``s``, (min(shape),)."""
    u, v = (torch.linalg.qr(torch.randn(side, len(s), generator=g)).Q for side in shape)
    return (u * s) @ v.T
