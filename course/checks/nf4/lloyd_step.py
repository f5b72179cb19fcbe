"""Exercise 6: one step of Lloyd's iteration."""

import math

import torch
from torch import Tensor

from course.checking import Check, Seen, but
from course.checks.blockwise_quantization.shared import near_a_midpoint
from reference.blockwise import midpoints
from reference.nf4 import NF4_CODEBOOK, normal_float_codebook


def weighted_mean(values: Tensor, weights: Tensor, more: float = 0.0) -> Tensor:
    return (weights.double() * values).sum() / (weights.double().sum() + more)


def lloyd_step(
    scaled: Tensor,
    weight: Tensor,
    levels: Tensor,
    kept: tuple[int, ...] = (),
    *,
    edges=midpoints,
    copy=torch.clone,
    fixed=lambda kept: kept,
    weigh=lambda weight: weight,
    centre=weighted_mean,
    empty=lambda level: level,
    after=lambda new: new,
) -> Tensor:
    """The worked answer: each level moves to the weighted mean of the values that are nearest to it."""
    codes = torch.bucketize(scaled, edges(levels))
    weight, new = weigh(weight), copy(levels)
    for code in set(range(len(levels))) - set(fixed(kept)):
        mine = codes == code
        new[code] = centre(scaled[mine], weight[mine]) if mine.any() else empty(levels[code])
    return after(new)


def by_sums(scaled: Tensor, weight: Tensor, levels: Tensor, kept: tuple[int, ...] = ()) -> Tensor:
    codes = (scaled[:, None] - levels).abs().argmin(1)
    mass = torch.zeros(len(levels), dtype=torch.float64).index_add(0, codes, weight.double())
    moment = torch.zeros(len(levels), dtype=torch.float64).index_add(0, codes, weight.double() * scaled.double())
    new = torch.where(mass > 0, moment / mass, levels.double()).float()
    new[list(kept)] = levels[list(kept)]
    return new


def weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    values, order = values.sort()
    mass = weights[order].cumsum(0)
    return values[(mass >= mass[-1] / 2).nonzero()[0].item()]


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)
    for label, levels, kept in (
        ("NF4's levels", NF4_CODEBOOK, ()),
        ("NF4's levels, with −1, 0 and 1 kept", NF4_CODEBOOK, (0, 7, 15)),
        ("32 levels, with codes 20 and 3 kept", normal_float_codebook(5), (20, 3)),
        ("NF4's levels, with codes 2, 9 and 12 kept", NF4_CODEBOOK, (2, 9, 12)),
    ):
        blocks = torch.randn(60, 64, generator=g) * (0.3 + 2 * torch.rand(60, 1, generator=g))
        absmax = blocks.abs().amax(1)
        scaled, weight = (blocks / absmax[:, None]).flatten(), absmax.square().repeat_interleave(64)
        yield label, answer(torch.where(near_a_midpoint(scaled, levels), 0, scaled), weight, levels.clone(), kept)
    scaled, weight = 0.3 * torch.rand(200, generator=g) + 0.1, 0.5 + torch.rand(200, generator=g)
    scaled = torch.where(near_a_midpoint(scaled, NF4_CODEBOOK), 0.25, scaled)
    yield "values that leave some levels unused", answer(scaled, weight, NF4_CODEBOOK.clone(), ())
    yield "weights of about 1e-20", answer(scaled, 1e-20 * weight, NF4_CODEBOOK.clone(), ())


check = Check(
    task="one step of Lloyd's iteration: weighted means, unused and kept levels where they were",
    observe=observe,
    reference=lloyd_step,
    second=by_sums,
    misconceptions={
        "the mean is not weighted: an error in a block of large values is larger in the weight's own unit; use weight": but(
            weigh=torch.ones_like
        ),
        "the weights were squared once more: they are absmax² already": but(weigh=torch.square),
        "the root of the weights was used: squared error wants absmax², which is what is passed in": but(weigh=torch.sqrt),
        "the weighted sum is divided by the number of values: divide it by the sum of the weights": but(
            centre=lambda values, weights: (weights * values).mean()
        ),
        "the weighted sum is divided by all weights: divide by the sum of the weights in the level's own bin": but(
            weigh=lambda weight: weight / weight.sum(), centre=lambda values, weights: (weights * values).sum()
        ),
        "each level moves to the weighted median: that is for absolute error; for squared error it is the weighted mean": but(
            centre=weighted_median
        ),
        "each level moves to the middle between its smallest and largest value: the squared error is least at the mean": but(
            centre=lambda values, weights: (values.min() + values.max()) / 2
        ),
        "each level moves to the median: that is for absolute error, and without weights; here it is the weighted mean": but(
            centre=lambda values, weights: values.median()
        ),
        "the kept levels moved too: the codes in kept stay where they are": but(fixed=lambda kept: ()),
        "codes 0, 7 and 15 stayed where they were, whatever `kept` says: only the codes in kept do": but(fixed=lambda kept: (0, 7, 15)),
        "a number was added to the sum of weights, or it has a least value: beside it the weights of small blocks are lost; divide by the "
        "sum itself": but(centre=lambda values, weights: weighted_mean(values, weights, more=1e-8)),
        "a level without values became NaN (0/0): leave it where it is": but(empty=lambda level: math.nan),
        "a level without values moved to zero: leave it where it is": but(empty=lambda level: 0.0),
        "the new levels were divided by their largest: Lloyd's step ends with the means": but(after=lambda new: new / new.abs().max()),
        "the levels that were passed in were changed: make a copy": but(copy=lambda levels: levels),
        "values were sorted into bins that begin at the levels: each goes to its nearest level": but(edges=lambda levels: levels[1:]),
    },
)
