"""AdamW's update of a run of numbers, as torch's own loop makes it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor


class Numbers(NamedTuple):
    """The scalars of one update: they are the same for all numbers of a parameter."""

    decay: float  # 1 − η·wd
    weight1: float  # 1 − β₁
    beta2: float
    weight2: float  # 1 − β₂
    correction: float  # √(1 − β₂ᵗ)
    eps: float
    step: float  # −η / (1 − β₁ᵗ)

    @classmethod
    def of(cls, group: Mapping[str, Any], t: float) -> "Numbers":
        """At step ``t`` = 1, 2, …, with the settings of a group of the optimizer."""
        lr, (beta1, beta2) = group["lr"], group["betas"]
        decay = 1 - lr * group["weight_decay"]
        step = -lr / (1 - beta1**t)
        correction = (1 - beta2**t) ** 0.5
        return cls(decay, 1 - beta1, beta2, 1 - beta2, correction, group["eps"], step)


def plain_update(p: Tensor, g: Tensor, m: Tensor, v: Tensor, by: Numbers) -> None:
    """Parameter p, gradient g and moments m, v, all of one shape; p, m and v change in place.

    The operations of torch.optim.AdamW(foreach=False, fused=False), in their order: another order
    rounds otherwise.
    """
    p.mul_(by.decay)
    m.lerp_(g, by.weight1)
    v.mul_(by.beta2).addcmul_(g, g, value=by.weight2)
    denominator = (v.sqrt() / by.correction).add_(by.eps)
    p.addcdiv_(m, denominator, value=by.step)
