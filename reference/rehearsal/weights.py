"""The remedy that costs nothing: after training, go back a part of the way.

    θ = (1 − α) θ₀ + α θ₁

between the weights before and after (WiSE-FT, Wortsman et al. 2022). For LoRA that is the
adapter's scale times α: (1 − α) W + α (W + s·B·A) = W + (α·s)·B·A.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from reference.arguments import check_number


def interpolate(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """(1 − α)·before + α·after, name by name: two ``state_dict``s of one model. 0 and 1 are exact.

    What is not floating point is taken from ``after``.

    Raises:
        TypeError, ValueError: α is not a number from 0 to 1, or names or shapes differ.
    """
    check_number("alpha", alpha, 0, 1)
    if set(before) != set(after):
        name = sorted(set(before) ^ set(after))[0]
        raise ValueError(f"before and after must be of one model: {name!r} is in one of them only")
    mixed = {}
    for name, end in after.items():
        start = before[name]
        if start.shape != end.shape:
            shapes = f"{tuple(start.shape)} before and {tuple(end.shape)} after"
            raise ValueError(f"{name!r} has the shape {shapes}")
        mixed[name] = torch.lerp(start, end, alpha) if end.is_floating_point() else end.clone()
    return mixed
