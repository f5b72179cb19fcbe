"""Exercise 1: eight bits and a scale."""

import math
from operator import truediv

import torch
from torch import Tensor

from course.checking import Check, Seen, but, unpacked
from course.checks.blockwise_quantization.shared import TINY, comes_back, largest_is, number, off_the_borders, transposed


def guarded(absmax: Tensor, steps: int) -> Tensor:
    """A scale; ``steps`` is the largest code, 127 for eight bits."""
    return torch.where(absmax == 0, 1, absmax) / steps


def int8(codes: Tensor, low: int = -128, high: int = 127) -> Tensor:
    return codes.clamp(low, high).to(torch.int8)  # what torch makes of a number beyond is not defined


def wrapped(codes: Tensor) -> Tensor:
    return codes.to(torch.int32).to(torch.int8)


def absmax_int8(
    x: Tensor,
    *,
    wide=Tensor.float,
    largest=lambda x: x.abs().max(),
    steps=127,
    scale=guarded,
    rounded=torch.round,
    stored=int8,
    returned=lambda scale: scale,
) -> tuple[Tensor, Tensor]:
    """The worked answer: the scale is the largest absolute value over 127, a code the nearest whole number of scales."""
    x = wide(x)
    step = scale(largest(x), steps)
    return stored(rounded(x / step)), returned(step)


def by_distance(x: Tensor) -> tuple[Tensor, float]:
    wide = x.double()
    largest = max(wide.max().item(), -wide.min().item()) or 1.0
    steps = torch.arange(-127, 128)
    nearest = (wide.flatten()[:, None] * 127 / largest - steps).abs().argmin(1)  # (n,)
    return steps[nearest].to(torch.int8).view(x.shape), largest / 127


def from_min_to_max(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.float()
    scale = torch.where(x.any(), x.max() - x.min(), 255) / 255
    return ((x - x.min()) / scale - 128).round().clamp(-128, 127).to(torch.int8), scale


def within_127(codes: Tensor) -> Tensor:
    return int8(codes, -127)


def harder_in_16_bits(x: Tensor, g: torch.Generator) -> Tensor:
    """``x`` (16 bits) such that a step rounded to its dtype always shows in the scale, and a quotient rounded to bfloat16 in the codes."""
    flat = x.flatten().clone()
    at = flat.abs().argmax()
    tops = flat[at] * torch.linspace(1, 1.25, 100, dtype=x.dtype)
    steps = tops.abs().double() / 127
    flat[at] = tops[(steps.to(x.dtype) / steps - 1).abs() > 5e-4][0]  # five times what a check lets pass
    step = flat[at].abs().double() / 127
    values = (torch.linspace(64.5, 125.5, 1000).double() * step).to(x.dtype).unique()  # up there bfloat16 counts in half steps
    values = off_the_borders(values, step)
    twice = values[(values / step.float()).round() != (values.double() / step).round()]
    others = torch.randperm(flat.numel() - 1, generator=g)[:3]
    flat[others + (others >= at)] = twice[torch.randint(len(twice), (3,), generator=g)]
    return flat.view(x.shape)


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)
    for name, shape, dtype, sign, size in (
        ("a float32 matrix, largest value negative", (7, 9), torch.float32, -1, 0.7),
        ("a float32 vector, largest value positive", (50,), torch.float32, 1, 0.7),
        ("a bfloat16 matrix", (12, 11), torch.bfloat16, -1, 0.7),
        ("a transposed float16 tensor of three dimensions", (3, 5, 4), torch.float16, 1, 0.7),
        # nothing that is added to their scale is small beside it
        (f"values of about {TINY:.0e}", (30,), torch.float32, 1, TINY),
    ):
        x = largest_is(sign, size * torch.randn(shape, generator=g)).to(dtype)
        if dtype == torch.bfloat16:
            x = harder_in_16_bits(x, g)
        step = x.double().abs().max() / 127
        x = off_the_borders(x, step)
        if name.startswith("a transposed"):
            x = transposed(x)
        codes, scale = unpacked(answer(x.clone()), "a pair, (codes, scale), with the codes as a tensor", Tensor, object)
        scale = number(scale)
        back = isinstance(scale, float) and comes_back(x, codes, scale, step)
        yield f"codes of {name}", codes
        # not the scale itself where values are tiny: whatever was added, one message fits
        yield (f"codes · scale gives {name} back", back) if size == TINY else (f"scale of {name}", scale)
        if not back:
            return
    codes, scale = answer(torch.zeros(4, 3))
    yield "codes of a tensor of zeros", codes
    yield "the scale of a tensor of zeros is a positive, finite number", bool(0 < number(scale) < math.inf)


check = Check(
    task="eight bits from the largest absolute value, and back",
    observe=observe,
    reference=absmax_int8,
    second=by_distance,
    misconceptions={
        "the scale comes from x.max(): the value with the largest magnitude may be negative, so take x.abs().max()": but(
            largest=torch.max, stored=within_127
        ),
        "the scale comes from x.max(), and values below −x.max() wrapped around in int8: take x.abs().max()": but(
            largest=torch.max, stored=wrapped
        ),
        "you divided by 128 and clamped: there is no code 128, so the largest positive value is cut; use 127 steps on both sides": but(
            steps=128
        ),
        "you divided by 128: the largest positive value gets the code 128, which wraps around to −128 in int8; use 127": but(
            steps=128, stored=wrapped
        ),
        "you divided by 255, the steps of the whole range: on each side of zero there are 127": but(steps=255, stored=within_127),
        "the fraction was cut off: .to(torch.int8) truncates towards zero; call .round() first": but(rounded=torch.trunc),
        "you took the floor: that pulls every value down by half a step on average; use .round()": but(rounded=torch.floor),
        "your scale is the inverse of the right one: it multiplies the codes to give x back, so it is absmax / 127": but(
            returned=torch.reciprocal
        ),
        "you returned absmax as the scale: a code counts steps, and a step is absmax / 127": but(returned=lambda scale: 127 * scale),
        "you divided in the tensor's own 16-bit dtype: the scale itself is then rounded to a few digits; convert x to float32 first": but(
            wide=lambda x: x, stored=within_127
        ),
        "the scale is right, but x / scale was computed in the tensor's own 16-bit dtype and rounded twice: divide x.float()": but(
            wide=lambda x: x,
            largest=lambda x: x.float().abs().max(),  # a float32 scale of no dimension does not widen a 16-bit tensor
        ),
        "you spread the codes from the smallest to the largest value: that needs a zero point (exercise 2); here zero has the code 0": (
            from_min_to_max
        ),
        "the codes are still floating-point numbers: convert them to torch.int8, else nothing is saved": but(stored=lambda codes: codes),
        "a tensor of zeros has absmax 0, by which nothing can be divided (0 / 0 is NaN): give it some positive scale, such as 1": but(
            scale=truediv
        ),
        "a number was added to the scale, or it has a least value: beside it tiny values are lost; replace a scale of 0 and no other": but(
            scale=lambda absmax, steps: absmax / steps + 1e-8
        ),
    },
    atol=0,  # a scale may be tiny
)
