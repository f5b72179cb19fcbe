"""Exercise 2: the dynamic map."""

import random

import torch
from torch import Tensor

from course.checking import Check, but


def dynamic_map(
    decades: int,
    *,
    parts=lambda decade, decades: 2**decade,
    inside=lambda edges: (edges[:-1] + edges[1:]) / 2,
    top=lambda decade, decades: 10.0 ** (decade - decades + 1),
    extra=(0.0, 1.0),
    signs=(1, -1),
    order=lambda levels: levels.sort().values,
) -> Tensor:
    """The worked answer: the centres of 1, 2, 4 … parts of each decade, the smallest first, with both signs; 0 and 1."""
    levels = [torch.tensor(extra)]
    for decade in range(decades):
        edges = torch.linspace(0.1, 1, parts(decade, decades) + 1)
        levels += [sign * top(decade, decades) * inside(edges) for sign in signs]
    return order(torch.cat(levels))


def in_plain_numbers(decades: int) -> Tensor:
    levels = {0.0, 1.0}
    for decade in range(decades):
        parts, largest = 2**decade, 10 ** (decade + 1 - decades)
        for k in range(parts):
            centre = largest * (0.1 + 0.9 * (k + 0.5) / parts)
            levels |= {centre, -centre}
    return torch.tensor(sorted(levels))


def middles(edges: Tensor) -> Tensor:
    """Of as many equal parts of [0, 1]."""
    parts = len(edges) - 1
    return (torch.arange(parts) + 0.5) / parts


def observe(answer, seed: int) -> dict:
    return {f"{decades} decades": answer(decades) for decades in (3, 7, random.Random(seed).choice([2, 4, 5, 6]))}


check = Check(
    task="the dynamic map, from its definition",
    observe=observe,
    reference=dynamic_map,
    second=in_plain_numbers,
    misconceptions={
        "these are the lower edges of the parts: the levels are their centres": but(inside=lambda edges: edges[:-1]),
        "these are the upper edges of the parts: the levels are their centres": but(inside=lambda edges: edges[1:]),
        "these are the edges of the parts, or points between them at even distances: the levels are the parts' centres": but(
            inside=lambda edges: torch.linspace(0.1, 1, len(edges) - 1)
        ),
        "the parts of a decade begin at zero: the decade from 0.1 to 1 begins at 0.1": but(inside=middles),
        "the parts of a decade are equal in ratio: cut it into parts of equal length": but(inside=lambda edges: 10 ** (middles(edges) - 1)),
        "−1 is a level and 1 is not: it is the other way round": but(extra=(0.0, -1.0)),
        "the levels fall: sort them from the smallest to the largest": but(order=lambda levels: levels.sort(descending=True).values),
        "the levels are sorted by size without their signs: sort them from the most negative to 1": but(
            order=lambda levels: levels.sort().values[levels.sort().values.abs().argsort(stable=True)]
        ),
        "the numbers of parts are the wrong way round: the decade of the largest numbers is cut into the most": but(
            parts=lambda decade, decades: 2 ** (decades - 1 - decade)
        ),
        "these levels are evenly spaced, as in INT8: every decade has its own spacing": lambda decades: torch.linspace(
            -1, 1, 2 ** (decades + 1)
        ),
        "the negative levels are missing: centred scales have both signs": but(signs=(1,)),
        "1 is missing: the largest value of a block is scaled to exactly 1": but(extra=(0.0,)),
        "zero is missing: without it a scale that equals the mean is moved": but(extra=(1.0,)),
        "one level too many: 0 and 1 complete the map to a power of two; there is no −1": but(extra=(0.0, 1.0, -1.0)),
        "the levels are not sorted: a search for the nearest needs them in order": but(order=lambda levels: levels),
        "the largest decade ends at 0.1: it should be the one from 0.1 to 1": but(top=lambda decade, decades: 10.0 ** (decade - decades)),
        "every decade has the same number of parts: it is 1, 2, 4 …, twice as many for each larger decade": but(
            parts=lambda decade, decades: 2 ** (decades - 1)
        ),
    },
    rtol=1e-5,
    atol=1e-12,
)
