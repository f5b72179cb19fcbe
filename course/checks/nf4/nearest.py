"""Exercise 2: the nearest level's code."""

import torch
from torch import Tensor

from course.checking import Check, Seen, but
from course.checks.blockwise_quantization.shared import as_if_even, near_a_midpoint, transposed
from reference.blockwise import midpoints


def nearest(
    scaled: Tensor,
    levels: Tensor,
    *,
    value=lambda scaled: scaled,
    edges=midpoints,
    up=False,
    result=lambda codes, levels: codes.byte(),
) -> Tensor:
    """The worked answer: how many midpoints lie strictly below each value."""
    return result(torch.bucketize(value(scaled), edges(levels), right=up), levels)


def by_distance(scaled: Tensor, levels: Tensor) -> Tensor:
    return (scaled[..., None].double() - levels.double()).abs().argmin(-1).to(torch.uint8)


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)
    for count, shape, largest, layout in ((16, (40, 7), 1, ""), (5, (90,), 3, ""), (256, (3, 4, 50), 1, ", transposed")):
        inner = (torch.randperm(9999, generator=g)[: count - 2] - 4999) / 5000  # no two are equal: either code would be right
        levels = largest * torch.cat([torch.tensor([-1.0, 1.0]), inner]).sort().values
        scaled = 0.6 * largest * torch.randn(shape, generator=g)  # some beyond the outermost levels
        scaled = torch.where(near_a_midpoint(scaled, levels), levels[0], scaled)
        label = f"codes of {count} levels from −{largest} to {largest}, values of shape {tuple(shape)}{layout}"
        yield label, answer(transposed(scaled) if layout else scaled, levels)
    levels = (torch.randperm(63, generator=g)[:16].sort().values - 31) / 32  # multiples of 1/32: midpoints are exact
    yield "codes of values on a midpoint (the lower of the two)", answer(midpoints(levels), levels)
    yield "codes of the levels themselves", answer(levels.clone(), levels)


check = Check(
    task="the nearest level's code, for any levels, the lower one on a tie",
    observe=observe,
    reference=nearest,
    second=by_distance,
    misconceptions={
        "a value exactly between two levels gets the upper code: ties go to the lower one (count midpoints strictly below)": but(up=True),
        "you take the level below each value: that is rounding down; the nearest changes at the midpoint between two levels": but(
            edges=lambda levels: levels[1:], up=True
        ),
        "you take the level above each value: that is rounding up; the nearest changes at the midpoint between two levels": but(
            edges=lambda levels: levels[:-1]
        ),
        "the codes are those of evenly spaced levels: use the levels that are passed in": (
            lambda scaled, levels: as_if_even(scaled, levels).clamp(0, len(levels) - 1).byte()
        ),
        "you return the levels: the code is the level's index": but(result=lambda codes, levels: levels[codes]),
        "the codes are right but not uint8: a code of at most 256 levels fits a byte": but(result=lambda codes, levels: codes),
        "the codes are right but flattened: keep the shape of the values": but(result=lambda codes, levels: codes.byte().flatten()),
        "the codes count from the largest level down: code 0 is the lowest level": but(
            result=lambda codes, levels: (len(levels) - 1 - codes).byte()
        ),
        "the sign is lost: values below zero got the code of their absolute value": but(value=torch.abs),
        "the codes count the levels below a value, so they start at 1 and lag behind: count the midpoints": but(
            edges=lambda levels: levels, up=True
        ),
    },
)
