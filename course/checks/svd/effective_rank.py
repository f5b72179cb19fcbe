"""Exercise 3: the effective rank of Roy and Vetterli."""

import math

import torch
from torch import Tensor

from course.checking import Check, but
from course.checks.svd.shared import as_given
from reference import lowrank


def effective_rank(
    singular_values: Tensor, *, normalise=lambda s: s / s.sum(), counted=lambda p: p[p > 0], log=torch.log, finish=torch.exp
) -> float:
    """The worked answer: exp of the entropy of p_i = σ_i / Σ σ, where zeros don't count."""
    p = counted(normalise(singular_values.double()))
    return finish(-(p * log(p)).sum()).item()


def by_product(singular_values: Tensor) -> float:
    """The same number as a product: Π p_i^(−p_i)."""
    p = [value / sum(singular_values.tolist()) for value in singular_values.tolist()]
    return math.prod(value**-value for value in p if value > 0)


def observe(answer, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    spectra = {
        "five equal singular values (not 1)": torch.full((5,), 3.0),
        "random singular values": torch.rand(9, generator=g) + 0.1,
        "a decaying float64 spectrum": torch.linspace(2, -4, 40, dtype=torch.float64).exp() * torch.rand(40, generator=g).double(),
        "a rank-one matrix (one singular value, then zeros)": torch.tensor([2.5, 0.0, 0.0, 0.0]),
        "singular values below 0.0001, as a small change of a weight has": 1e-4 * torch.linspace(0, -5, 30).exp(),
        "a spectrum that ends in zeros": torch.cat([torch.rand(6, generator=g) + 0.5, torch.zeros(3)]),
    }
    return {label: answer(s) for label, s in spectra.items()}


check = Check(
    task="the effective rank of Roy and Vetterli",
    observe=observe,
    reference=effective_rank,
    second=by_product,
    misconceptions={
        "you normalised σ²: the paper's p_i = σ_i / Σ σ uses the singular values themselves": but(normalise=lambda s: s**2 / (s**2).sum()),
        "you divided by the largest σ: the p_i must sum to one, so divide by the sum": but(normalise=lambda s: s / s.max()),
        "you divided by the root of Σ σ²: the p_i must sum to one, so divide by the sum": but(normalise=lambda s: s / s.norm()),
        "the singular values were not normalised: entropy needs p_i = σ_i / Σ σ": but(normalise=as_given),
        "that is the entropy itself: the effective rank is its exponential": but(finish=as_given),
        "the entropy is in bits (log2) but the exponential is base e: use the natural logarithm": but(log=torch.log2),
        "the entropy is in nats but you raised 2 to it: use exp": but(finish=torch.exp2),
        "the minus of the entropy is missing: −Σ p ln p": but(finish=lambda entropy: (-entropy).exp()),
        "that is the number of singular values above zero: the rank, not how evenly they are spread": lambda s: float((s > 0).sum()),
        "a singular value of zero gave NaN: 0·ln 0 counts as 0 (torch.special.entr, or leave zeros out)": but(counted=as_given),
        "singular values below a fixed size were left out: the effective rank must not change when the matrix is scaled; leave out zeros "
        "alone": but(normalise=lambda s: s[s > 1e-3] / s[s > 1e-3].sum()),
        "that is the stable rank, Σ σ² / σ_1²: another measure; here it is exp of the entropy": lowrank.stable_rank,
    },
)
