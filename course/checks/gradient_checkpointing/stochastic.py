"""Exercise 6: float32 to bfloat16 by stochastic rounding."""

import math

import torch
from torch import Tensor

from course.checking import Check, Seen, but

LOW = (1 << 16) - 1


def to_int(x: Tensor) -> Tensor:
    return x.view(torch.int32)


def as_float(bits: Tensor) -> Tensor:
    return bits.view(torch.float32)


def stochastic_round(
    x: Tensor, noise: Tensor, *,
    seen=to_int, low=lambda bits: bits & LOW, up=lambda noise, low, bits: noise < low, finish=lambda rounded, x: rounded.bfloat16(),
    rounds=torch.isfinite,
) -> Tensor:  # fmt: skip
    """The worked answer."""
    bits = seen(x)
    rest = low(bits)
    rounded = as_float(bits - (bits & LOW) + up(noise, rest, bits).int() * (LOW + 1))
    return finish(torch.where(rounds(x), rounded, x), x)


def by_spacing(x: Tensor, noise: Tensor) -> Tensor:
    """Without bits: the neighbour below in size, the distance to the next one, and where x lies between them. In float64, exactly."""
    wide = x.double()
    exponent = torch.frexp(x.abs()).exponent.clamp(min=-125) - 8  # bfloat16 keeps 8 bits; its smallest numbers are 2^-133 apart
    spacing = torch.ldexp(torch.ones_like(wide), exponent)
    below = torch.floor(wide.abs() / spacing)
    share = wide.abs() / spacing - below  # of the way to the next
    rounded = (below + (noise < share * (LOW + 1))) * spacing
    return torch.where(x.isfinite(), torch.copysign(rounded, wide), wide).float().bfloat16()


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)

    def noise(count: int) -> Tensor:
        return torch.randint(0, LOW + 1, (count,), generator=g, dtype=torch.int32)

    positive = torch.rand(200, generator=g) + 0.5
    yield "positive numbers", answer(positive, noise(200))
    yield "negative numbers", answer(-positive, noise(200))
    exact = torch.randn(50, generator=g).bfloat16().float()
    yield "numbers that bfloat16 holds exactly, noise 0", answer(exact, torch.zeros(50, dtype=torch.int32))
    edge = as_float(to_int(exact) | 1234)
    yield "noise equal to what is cut off", answer(edge, torch.full((50,), 1234, dtype=torch.int32))
    yield "noise one below what is cut off", answer(edge, torch.full((50,), 1233, dtype=torch.int32))
    sizes = torch.randn(100, generator=g) * torch.exp2(torch.randint(-60, 60, (100,), generator=g).float())
    yield "numbers of all sizes", answer(sizes, noise(100))
    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0, 3.0e38])
    yield "infinities, NaN, zero and a very large number", answer(special, torch.full((5,), LOW, dtype=torch.int32))
    nans = as_float(torch.tensor([0x7F800001, 0x7FFFFFFF], dtype=torch.int32))  # cut off, one is an infinity; a step up, the other is −0
    yield "NaNs whose low bits are set", answer(nans, torch.tensor([LOW, 0], dtype=torch.int32))


def toward_plus(noise: Tensor, low: Tensor, bits: Tensor) -> Tensor:
    """Up means toward +∞: for negative numbers that is the one nearer to zero."""
    return torch.where(bits < 0, (noise >= low) & (low > 0), noise < low)


check = Check(
    task="float32 to bfloat16, up or down by the random bits",
    observe=observe,
    reference=stochastic_round,
    second=by_spacing,
    misconceptions={
        "that is rounding to nearest: whether it goes up depends on the noise": but(up=lambda noise, low, bits: low > 1 << 15),
        "the low bits are cut off and nothing goes up: that rounds every number toward zero": but(
            up=lambda noise, low, bits: torch.zeros_like(noise, dtype=torch.bool)
        ),
        "up where the noise is below what is cut off, not where it is equal: a number that bfloat16 holds exactly must stay": but(
            up=lambda noise, low, bits: noise <= low
        ),
        "that is up where noise + rest reaches 2^16: the same probability, but the exercise asks for noise < rest": but(
            up=lambda noise, low, bits: noise + low > LOW
        ),
        "up and down are swapped: a number that is nearly the upper neighbour should nearly always go up": but(
            up=lambda noise, low, bits: noise >= low
        ),
        "up means away from zero, also for negative numbers: the sign is a bit of its own": but(up=toward_plus),
        "the number was converted to an integer: look at its bits instead, x.view(torch.int32)": but(seen=lambda x: x.to(torch.int32)),
        "bfloat16 lacks the low 16 bits of a float32: another number of bits is compared with the noise": but(
            low=lambda bits: bits & ((1 << 13) - 1)
        ),
        "a NaN whose low bits are set became a number or an infinity: what is not finite has to stay": but(
            rounds=lambda x: torch.ones_like(x, dtype=torch.bool)
        ),
        "the result is float32: convert it to bfloat16, which loses nothing more": but(finish=lambda rounded, x: rounded),
        "half of the numbers go up, whatever is cut off: the probability is what is cut off over 2^16": but(
            up=lambda noise, low, bits: noise < 1 << 15
        ),
    },
)
