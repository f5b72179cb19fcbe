"""Which entries of several updates go into the merged one: rules for lists of tensors.

    linear            Σ_i w_i·t_i                      task arithmetic
    magnitude_prune   the same, of each t_i only the largest entries
    dare_linear       the same, each entry kept with probability ``density`` and divided by it
    ties              of the largest entries, those whose sign is the majority's, averaged
    dare_ties         the same, entries dropped as in DARE

What all but the first fear is interference: entries of different tasks at one place that pull in
opposite directions. TIES lets the stronger side win, and divides by how many stand on it: so with
two adapters that agree, weights 1 and 1 give their mean, not their sum. The sign is elected before
weights are applied, as in peft. DARE leaves each entry's expected value what it was, and makes
collisions rare.

Task arithmetic: Ilharco et al. 2023. TIES: Yadav et al. 2023. DARE: Yu et al. 2024.
"""

import torch
from torch import Tensor

from reference.arguments import check_number

RULES = ("linear", "magnitude_prune", "ties", "dare_linear", "dare_ties")
SIGNS = ("total", "frequency")


def check_rule(rule: str, density: float | None, sign: str) -> None:
    """Raise unless ``density`` is given where the rule drops entries, and nowhere else."""
    drops = rule in RULES and rule != "linear"
    if drops and density is None:
        raise ValueError(f"{rule!r} drops entries: density must say which share stays, in (0, 1]")
    if not drops and density is not None:
        raise ValueError(f"{rule!r} keeps every entry: leave out density={density!r}")
    if density is not None:
        check_number("density", density, 0, 1)
        if density == 0:
            raise ValueError("density must be above 0, which would keep nothing, got 0")
    if sign not in SIGNS:
        raise ValueError(f"sign must be one of {SIGNS}, got {sign!r}")


def merge_tensors(
    tensors: list[Tensor],
    weights: list[float],
    rule: str = "linear",
    density: float | None = None,
    sign: str = "total",
    generator: torch.Generator | None = None,
) -> Tensor:
    """One tensor out of several of a shape, in float32 or wider.

    Args:
        weights: a number for each.
        rule: one of ``RULES``.
        density: the share of entries that stays, in (0, 1]; of all rules but "linear". Of n entries
            pruning by magnitude keeps the largest int(density · n).
        sign: what elects TIES' sign at a place: the "total" of the entries, or how many have it
            ("frequency"). A draw is plus.
        generator: of DARE's draws; default: torch's own.

    Raises:
        ValueError: a setting is unknown, missing or of no use to the rule.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {RULES}, got {rule!r}")
    check_rule(rule, density, sign)
    if rule in ("magnitude_prune", "ties"):
        tensors = [keep_largest(tensor, density) for tensor in tensors]
    elif rule in ("dare_linear", "dare_ties"):
        tensors = [drop_and_rescale(tensor, density, generator) for tensor in tensors]
    stacked = torch.stack(tensors)  # (adapters, ...)
    column = torch.tensor(weights, device=stacked.device).view(-1, *[1] * (stacked.dim() - 1))
    weighted = stacked * column
    if rule in ("ties", "dare_ties"):
        agrees = stacked.sign() == elected_sign(stacked, sign)  # never where an entry is zero
        return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    return weighted.sum(0)


def keep_largest(tensor: Tensor, density: float) -> Tensor:
    """The int(density · n) largest entries by absolute value, zeros elsewhere."""
    if density == 1:
        return tensor
    kept = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    mask = torch.zeros_like(tensor).flatten()
    mask[kept] = 1
    return tensor * mask.view(tensor.shape)


def drop_and_rescale(
    tensor: Tensor, density: float, generator: torch.Generator | None = None
) -> Tensor:
    """Each entry with probability ``density``, divided by it; zeros elsewhere."""
    if density == 1:
        return tensor
    mask = torch.bernoulli(torch.full_like(tensor, density), generator=generator)
    return tensor * mask / density


def elected_sign(stacked: Tensor, sign: str = "total") -> Tensor:
    """+1 or −1 for every place of (adapters, ...)."""
    votes = (stacked if sign == "total" else stacked.sign()).sum(0)
    return torch.where(votes >= 0, 1, -1)
