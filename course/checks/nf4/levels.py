"""Exercise 1: a normal float's levels."""

import torch
from scipy.special import ndtri
from scipy.stats import norm
from torch import Tensor

from course.checking import Check, Seen, but
from reference.nf4 import NF4_CODEBOOK, OFFSET


def normal_levels(
    negative: int,
    positive: int,
    offset: float,
    *,
    start=lambda offset: offset,
    grid=torch.float32,
    quantile=ndtri,
    take=lambda quantiles: quantiles[:-1],  # without Φ⁻¹(½) = 0
    sides=lambda below, above: (below, above),
    zeros=(0.0,),
    order=lambda levels: levels.sort().values,
    scale=lambda levels: levels / levels.max(),
    dtype=torch.float32,
) -> Tensor:
    """The worked answer: Φ⁻¹ of even probabilities on both sides of zero, divided by the largest."""
    probabilities = (torch.linspace(start(offset), 0.5, n + 1, dtype=grid).numpy() for n in (negative, positive))
    below, above = sides(*(take(quantile(p)) for p in probabilities))
    levels = order(torch.tensor([*-below, *zeros, *above], dtype=torch.float32))  # (negative + 1 + positive,)
    return scale(levels).to(dtype)


def by_ppf(negative: int, positive: int, offset: float) -> Tensor:
    below = norm.ppf(torch.linspace(offset, 0.5, negative + 1))[:-1]
    above = norm.ppf(torch.linspace(offset, 0.5, positive + 1))[:-1]
    levels = torch.cat([torch.tensor(-below).float(), torch.zeros(1), torch.tensor(above).flip(0).float()])
    return levels / levels[-1]


def on_one_grid(negative: int, positive: int, offset: float) -> Tensor:
    levels = ndtri(torch.linspace(1 - offset, offset, negative + positive + 1, dtype=torch.float64).numpy())
    return torch.tensor(levels / levels.max(), dtype=torch.float32)


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)
    nf4 = answer(7, 8, OFFSET)
    yield "7 levels below zero, 8 above, δ = 0.9677083", nf4
    for _ in range(2):
        negative = int(torch.randint(2, 6, (1,), generator=g))
        positive = negative + int(torch.randint(1, 5, (1,), generator=g))
        offset = 0.9 + 0.09 * torch.rand(1, generator=g).item()
        for below, above in ((negative, positive), (positive, negative)):
            yield f"{below} levels below zero, {above} above, δ = {offset:.4f}", answer(below, above, offset)
    if isinstance(nf4, Tensor) and nf4.dtype == torch.float32 and nf4.shape == NF4_CODEBOOK.shape:
        signed = bool((nf4 == 0).logical_and(nf4.signbit()).any())  # equality takes −0 for 0
        near = torch.allclose(nf4, NF4_CODEBOOK, rtol=0, atol=1e-6)
        yield "NF4's levels", "equal" if torch.equal(nf4, NF4_CODEBOOK) else "right to six digits" if near else "others"
        yield "the sign bit of zero", "set" if signed else "not set"


check = Check(
    task="a normal float's levels: quantiles on both sides, an exact zero, the largest 1, NF4's bit for bit",
    observe=observe,
    reference=normal_levels,
    second=by_ppf,
    rtol=1e-5,
    misconceptions={
        "the two sides are exchanged: the first count is that of the levels below zero": but(sides=lambda below, above: (above, below)),
        "the levels are in standard deviations: divide all of them by the largest": but(scale=lambda levels: levels),
        "zero is there three times: both sides end in Φ⁻¹(½) = 0; leave that one out on each side and put zero in once": but(
            zeros=(0.0,) * 3
        ),
        "there is no zero among the levels: add it, and use the two sides' own probabilities": on_one_grid,
        "the two sides are right, but zero is missing: neither side holds Φ⁻¹(½), so put zero in": but(zeros=()),
        "the levels are evenly spaced: it is the probabilities that are even; the levels are Φ⁻¹ of them": but(quantile=lambda p: p - 0.5),
        "the probabilities start at 1, and Φ⁻¹(1) is infinite: start at δ": but(start=lambda offset: 1.0),
        "these are middles between neighbouring quantiles, as in the paper's formula: take the quantiles themselves": but(
            take=lambda quantiles: (quantiles[1:] + quantiles[:-1]) / 2
        ),
        "δ is an argument: you used NF4's own 0.9677083 whatever `offset` says": but(start=lambda offset: OFFSET),
        "the levels fall: code 0 is to be the lowest": but(order=lambda levels: levels.sort(descending=True).values),
        "the levels are right but not in order: sort them, or a code says nothing about size": but(order=lambda levels: levels),
        "one side borrows the other's probabilities: each side has its own even steps from δ to ½": but(
            sides=lambda below, above: tuple(max(below, above, key=len)[: len(side)] for side in (below, above))
        ),
        "zero is −0.0, which is equal to 0 and has other bits: it is −Φ⁻¹(½), so keep the zero of the positive side, or put 0.0 in": but(
            zeros=(-0.0,)
        ),
        "the levels are right but not float32": but(dtype=torch.float64),
        "right to six digits, but not the table that everybody ships: that one's grid is torch.linspace in float32, its quantiles are "
        "scipy's (ndtri, norm.ppf) or taken in float64, rounded to float32 before all are divided": but(grid=torch.float64),
    },
)
