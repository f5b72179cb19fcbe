"""Adding small numbers to a bfloat16 number without losing them.

bfloat16 is the upper half of a float32: its range, and 8 significant bits. Above 1 its numbers are
2⁻⁷ apart, so 1 + 0.003 rounds back to 1, and a thousand such steps move nothing. Two ways out:

    stochastic    round(w + u) up with the probability of the part that is cut off:
                  E[round(x)] = x, so what is lost in one step is made up for by others
    Kahan         c keeps what rounding took:  y = u + c;  w' = round(w + y);  c = y − (w' − w)

The first needs random numbers and no memory, the second two bytes per weight. Gupta et al. 2015,
"Deep learning with limited numerical precision"; Kahan 1965; Zamirai et al. 2020, "Revisiting
BFloat16 training".
"""

import torch
from torch import Tensor

CUT = 16  # low bits of a float32 that bfloat16 has not


def stochastic_round(
    x: Tensor, generator: torch.Generator | None = None, noise: Tensor | None = None
) -> Tensor:
    """``x`` in bfloat16, up or down at random, so that its mean is ``x``.

    Seen as an integer, a float32 grows with its size. Its low 16 bits are cut off; a random number
    below 2¹⁶ that is less than them rounds away from zero. Infinities and NaN stay; what is above
    the largest bfloat16 may become infinite, as rounding to nearest does.

    Args:
        x: float32, any shape.
        generator: of the random numbers.
        noise: int32 from 0 to 2¹⁶ − 1, of x's shape, in place of random numbers.

    Raises:
        TypeError: ``x`` is not float32.
        ValueError: ``noise`` has another shape or dtype.
    """
    if x.dtype != torch.float32:
        raise TypeError(f"x must be float32, got {x.dtype}")
    if noise is None:
        noise = torch.empty_like(x, dtype=torch.int32).random_(0, 1 << CUT, generator=generator)
    elif noise.shape != x.shape or noise.dtype != torch.int32:
        raise ValueError(
            f"noise must be int32 of shape {tuple(x.shape)}, got {noise.dtype} {tuple(noise.shape)}"
        )
    bits = x.contiguous().view(torch.int32)
    low = bits & ((1 << CUT) - 1)
    up = (noise < low).int() << CUT
    rounded = ((bits - low) + up).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).bfloat16()  # the rest is exact: low bits are 0


def add_stochastic_(
    weight: Tensor, update: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """weight ← round(weight + update) at random, in place; ``weight`` is bfloat16."""
    _check(weight, update)
    return weight.copy_(stochastic_round(weight.float() + update.float(), generator))


def add_kahan_(weight: Tensor, lost: Tensor, update: Tensor) -> Tensor:
    """weight ← round(weight + update + lost), and ``lost`` ← what the rounding took; both in place.

    Args:
        weight, lost: bfloat16 of one shape; ``lost`` begins at 0.
        update: what to add.
    """
    _check(weight, update)
    _check(lost, update)
    wanted = update.float() + lost.float()
    new = (weight.float() + wanted).bfloat16()
    lost.copy_(wanted - (new.float() - weight.float()))
    return weight.copy_(new)


def _check(weight: Tensor, update: Tensor) -> None:
    if weight.dtype != torch.bfloat16:
        raise TypeError(f"weight and lost must be bfloat16, got {weight.dtype}")
    if weight.shape != update.shape:
        raise ValueError(
            f"update must have the shape {tuple(weight.shape)}, got {tuple(update.shape)}"
        )
