"""The remedy that costs nothing: after training, go back a part of the way.

    θ = (1 − t) θ₀ + t θ₁

between the weights before and after (WiSE-FT, Wortsman et al. 2022). For LoRA that is the
adapter's scale times t: (1 − t) W + t (W + s·B·A) = W + (t·s)·B·A.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from reference.arguments import check_number


def interpolate(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """(1 − share)·before + share·after, name by name: two ``state_dict``s of one model.

    A share of 0 or 1 gives one of them exactly. What is not floating point is ``after``'s.

    Raises:
        TypeError, ValueError: the share is not a number from 0 to 1, or names or shapes differ.
    """
    check_number("share", share, 0, 1)
    if set(before) != set(after):
        name = sorted(set(before) ^ set(after))[0]
        raise ValueError(f"before and after must be of one model: {name!r} is in one of them only")
    mixed = {}
    for name, end in after.items():
        start = before[name]
        if start.shape != end.shape:
            shapes = f"{tuple(start.shape)} before and {tuple(end.shape)} after"
            raise ValueError(f"{name!r} has the shape {shapes}")
        mixed[name] = torch.lerp(start, end, share) if end.is_floating_point() else end.clone()
    return mixed
