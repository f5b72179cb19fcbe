"""A-GEM: take from a step what would undo the old task, to first order.

With g the gradient on the new task and g_ref that on a few old rows, a step along −g makes the old
rows worse where g·g_ref < 0. Then the part of g along g_ref is taken out:

    g − (g·g_ref / ‖g_ref‖²) · g_ref

What is left is orthogonal to g_ref: the old loss stands still, to first order and on those rows.
Chaudhry et al. 2019, "Efficient lifelong learning with A-GEM".
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def project_gradient(new: Sequence[Tensor], old: Sequence[Tensor]) -> list[Tensor]:
    """``new`` without its part against ``old``: both are lists of one tensor for each parameter.

    Where g·g_ref ≥ 0, or g_ref is zero, ``new`` is returned as it is.

    Raises:
        ValueError: the lists differ in length or shapes, or are empty.
    """
    shapes = [[tuple(g.shape) for g in gradients] for gradients in (new, old)]
    if not new or shapes[0] != shapes[1]:
        raise ValueError(f"new and old must have the same shapes, got {shapes[0]} and {shapes[1]}")
    pairs = list(zip(new, old, strict=True))
    along = torch.stack([(g * g_ref).sum() for g, g_ref in pairs]).sum()
    size = torch.stack([g_ref.square().sum() for g_ref in old]).sum()
    if along >= 0 or size == 0:
        return list(new)
    return [g - along / size * g_ref for g, g_ref in pairs]
