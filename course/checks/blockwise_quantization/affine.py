"""Exercise 2: a zero point."""

import math
import random

import torch
from torch import Tensor

from course.checking import Check, Seen, but, first_difference, unpacked
from course.checks.blockwise_quantization.shared import TINY, number, off_the_borders


def affine_uint8(
    x: Tensor,
    low: float,
    high: float,
    *,
    wide=lambda x, low, high: x.float(),
    ends=lambda x, low, high: (min(low, 0.0), max(high, 0.0)),
    step=lambda width: width / 255,
    zero=lambda low, scale: round(-low / scale),
    code=lambda x, low, scale, zero: (x / scale).round() + zero,
    stored=lambda codes: codes.clamp(0, 255).to(torch.uint8),
    given_scale=lambda scale: scale,
    given_zero=lambda zero: zero,
) -> tuple[Tensor, float, int]:
    """The worked answer: the range is widened to hold zero; a code is the nearest whole number of steps, plus that of zero."""
    x = wide(x, low, high)
    low, high = ends(x, low, high)
    scale = step(high - low)
    zero_point = zero(low, scale)
    return stored(code(x, low, scale, zero_point)), given_scale(scale), given_zero(zero_point)


def clamped_first(x: Tensor, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    ends = torch.tensor([low, 0.0, high], dtype=torch.float64)
    scale = (ends.max() - ends.min()) / 255
    zero_point = (0 - ends.min()).div(scale).round().long()
    inside = x.double().clamp(-zero_point * scale, (255 - zero_point) * scale)
    return (inside / scale + zero_point).round().to(torch.uint8), scale, zero_point


def observe(answer, seed: int) -> Seen:
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    sign = rng.choice([-1, 1])
    for name, dtype, kind in (
        ("a float32 tensor", torch.float32, "around zero"),
        ("a bfloat16 tensor", torch.bfloat16, "around zero"),
        ("a float32 tensor, measured range above zero", torch.float32, "above"),
        ("a float32 tensor, measured range below zero", torch.float32, "below"),
        (f"values of about {TINY:.0e}", torch.float32, "around zero"),
    ):
        step = rng.uniform(0.01, 0.05) * (TINY if "about" in name else 1)
        zero = {"around zero": rng.randint(30, 90), "above": 0, "below": 255}[kind]
        sign = -sign  # −low / scale lies once above and once below a whole number: cutting the fraction off is wrong for one of the two
        part = sign * rng.uniform(0.2, 0.35) if kind == "around zero" else 0.0
        low, high = -(zero + part) * step, (255 - zero - part) * step
        x = low + (high - low) * (torch.rand(6, 25, generator=g) * 1.2 - 0.1)  # a sixth of the values lies outside of the range
        x[:, 0] = 0
        x = off_the_borders(x.to(dtype), step)
        # the end at zero moves away from it: an answer has to widen the range again
        given = {"around zero": (low, high), "above": (0.1 * high, high), "below": (low, 0.1 * low)}[kind]
        result = unpacked(answer(x, *given), "(codes, scale, zero_point), with the codes as a tensor", Tensor, object, object)
        codes, scale, zero_point = result[0], *map(number, result[1:])
        yield f"codes of {name}", codes
        if "about" in name:  # not the scale itself: whatever was added to it, one message fits
            yield f"255 scales are the range of {name}", first_difference(scale, (high - low) / 255, 1e-4, 0) is None
        else:
            yield f"scale of {name}", scale
        yield f"zero_point of {name}", zero_point


check = Check(
    task="eight bits with a zero point, for a range measured before",
    observe=observe,
    reference=affine_uint8,
    second=clamped_first,
    misconceptions={
        "the range does not contain zero: widen it with min(low, 0) and max(high, 0), so that zero has a code": but(
            ends=lambda x, low, high: (low, high)
        ),
        "values outside of the range wrapped around in uint8: a value just above `high` came back as the lowest; clamp to 0 … 255": but(
            stored=lambda codes: codes.to(torch.int32).to(torch.uint8)
        ),
        "you clamped before adding the zero point: all negative values were cut to zero; add it, then clamp": but(
            code=lambda x, low, scale, zero: (x / scale).round().clamp(0, 255) + zero
        ),
        "zero_point is not a whole number: round it, else zero lies between two codes and does not come back as zero": but(
            zero=lambda low, scale: -low / scale, code=lambda x, low, scale, zero: (x / scale + zero).round()
        ),
        "you rounded (x − low) / scale: zero_point is rounded too, the two differ by part of a step; round x / scale, add zero_point": but(
            code=lambda x, low, scale, zero: ((x - low) / scale).round()
        ),
        "you divided the range by 256: 256 codes have 255 steps between them": but(step=lambda width: width / 256),
        "the sign of zero_point is wrong: it is the code that zero gets, between 0 and 255": but(given_zero=lambda zero: -zero),
        "zero_point lost its fraction: int() and // cut it off, which is one code too low half of the time; use round()": but(
            zero=lambda low, scale: math.floor(-low / scale)
        ),
        "x / scale was computed in the tensor's own 16-bit dtype and rounded twice: divide x.float()": but(wide=lambda x, low, high: x),
        "you clamped x to low and high as they were given: widen the range first, or clamp the codes to 0 … 255 instead": but(
            wide=lambda x, low, high: x.float().clamp(low, high)
        ),
        "your scale is the inverse of the right one: it multiplies codes − zero_point to give x back": but(given_scale=lambda s: 1 / s),
        "zero_point is in the unit of x: it is a code, so divide −low by the scale and round": but(
            zero=lambda low, scale: -low, code=lambda x, low, scale, zero: (x / scale).round() + round(zero / scale)
        ),
        "you took the range from x itself: it was measured before and given as low and high; x may go beyond it": but(
            ends=lambda x, low, high: (min(x.min().item(), 0.0), max(x.max().item(), 0.0))
        ),
        "that is a symmetric range, −m to m: the codes of the side that x does not use are wasted; go from low to high": but(
            ends=lambda x, low, high: (-max(abs(low), abs(high)), max(abs(low), abs(high)))
        ),
        "the fraction was cut off: round x / scale to the nearest whole number": but(
            code=lambda x, low, scale, zero: (x / scale).trunc() + zero
        ),
        "the codes are still floating-point numbers: convert them to torch.uint8": but(stored=lambda codes: codes.clamp(0, 255)),
        "the codes are int8: with a zero point they run from 0 to 255, which is torch.uint8": but(
            stored=lambda codes: codes.clamp(0, 255).to(torch.uint8).view(torch.int8)
        ),
        "codes and zero_point are 128 too low: that is the same format with signed codes; asked are 0 to 255, torch.uint8": but(
            stored=lambda codes: (codes.clamp(0, 255) - 128).to(torch.int8), given_zero=lambda zero: zero - 128
        ),
        "a number was added to the scale, or it has a least value: beside it a narrow range is lost; since `low` < `high`, no scale is "
        "0": but(step=lambda width: width / 255 + 1e-8),
    },
    atol=0,  # a scale may be tiny
)
