"""Exercise 3: a scale for each row."""

import math
import random
from operator import truediv

import torch
from torch import Tensor

from course.checking import Check, Seen, but, unpacked
from course.checks.blockwise_quantization.absmax import guarded, int8, wrapped
from course.checks.blockwise_quantization.shared import TINY, comes_back, largest_is, off_the_borders


def quantize_rows(
    weight: Tensor,
    bits: int,
    *,
    wide=Tensor.float,
    largest=lambda weight: weight.abs().amax(1, keepdim=True),
    steps=lambda bits: 2 ** (bits - 1) - 1,
    scale=guarded,
    rounded=torch.round,
    stored=lambda codes, steps: int8(codes),
    returned=lambda scales, steps: scales,
) -> tuple[Tensor, Tensor]:
    """The worked answer: a row's scale is its largest absolute value over the largest code."""
    weight = wide(weight)
    scales = scale(largest(weight), steps(bits))  # (out, 1)
    return stored(rounded(weight / scales), steps(bits)), returned(scales, steps(bits))


def row_by_row(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    codes, scales = [], []
    for row in weight.double():
        scale = max(abs(value) for value in row.tolist()) / (2 ** (bits - 1) - 1) or 1.0
        codes.append([round(value / scale) for value in row.tolist()])
        scales.append([scale])
    return torch.tensor(codes, dtype=torch.int8), torch.tensor(scales)


def steps_of(weight: Tensor, bits: int) -> Tensor:
    return weight.double().abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)


def observe(answer, seed: int) -> Seen:
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    first = rng.choice([4, 5, 6])  # not 3: its 2^bits − 1 is the 7 of four bits, and the two mistakes would look the same
    for out, inside, dtype, bits in (
        (8, 8, torch.float32, first),
        (5, 13, torch.float32, rng.choice([bits for bits in (2, 3, 4, 5, 6) if bits != first])),
        (12, 7, torch.bfloat16, rng.choice([4, 7, 8])),  # not 2: a bfloat16 scale would be exact
    ):
        weight = torch.randn(out, inside, generator=g) * torch.logspace(-1, 1, out)[:, None]  # rows of different size
        weight = torch.stack([largest_is((-1) ** i, row) for i, row in enumerate(weight, 1)]).to(dtype)
        weight = off_the_borders(weight, step := steps_of(weight, bits))
        codes, scales = unpacked(answer(weight.clone(), bits), "a pair of tensors, (codes, scales)", Tensor, Tensor)
        name = f"a {out} × {inside} {str(dtype).removeprefix('torch.')} weight, {bits} bits"
        yield f"scales of {name}", scales
        yield f"codes of {name}", codes
        if scales.shape != (out, 1) or not comes_back(weight, codes, scales, step):
            return
    weight = torch.randn(6, 9, generator=g)
    weight[2] = 0
    weight[4] *= TINY
    weight = off_the_borders(weight, step := steps_of(weight, bits))
    codes, scales = answer(weight.clone(), bits)
    back = comes_back(weight[4], codes[4], scales[4], step[4])
    yield f"codes of a row of values of about {TINY:.0e}", codes[4]
    yield f"codes · scales gives a row of about {TINY:.0e} back", back
    if not back:
        return
    yield "codes of a row of zeros", codes[2]
    yield "the scale of a row of zeros is positive and finite", bool(0 < scales[2] < math.inf)


check = Check(
    task="one scale for each output row",
    observe=observe,
    reference=quantize_rows,
    second=row_by_row,
    misconceptions={
        "your scales belong to the columns: for one scale a row, take the maximum *along* the row, over dim 1": but(
            largest=lambda weight: weight.abs().amax(0, keepdim=True)
        ),
        "this is one scale for the whole tensor: take the maximum over dim 1 only": but(largest=lambda w: w.abs().max().expand(len(w), 1)),
        "the scales have shape (out,): on a square weight they would multiply columns, without an error; keep dim 1, shape (out, 1)": but(
            returned=lambda scales, steps: scales.flatten()
        ),
        "the scales come from the largest signed value of a row: take the absolute value first": but(
            largest=lambda weight: weight.amax(1, keepdim=True), stored=lambda codes, steps: wrapped(codes)
        ),
        "the scales come from the largest signed value of a row, and what lies below its opposite was cut: take the absolute value "
        "first": but(largest=lambda weight: weight.amax(1, keepdim=True), stored=lambda codes, steps: int8(codes, -steps, steps)),
        "you divided by 2^(bits − 1): the largest code on both sides is 2^(bits − 1) − 1": but(steps=lambda bits: 2 ** (bits - 1)),
        "you divided by 2^(bits − 1) and clamped: the largest positive values are cut by a step; use 2^(bits − 1) − 1 on both sides": but(
            steps=lambda bits: 2 ** (bits - 1), stored=lambda codes, steps: int8(codes, -steps, steps - 1)
        ),
        "you divided by 127 whatever `bits` says: the largest code is 2^(bits − 1) − 1": but(steps=lambda bits: 127),
        "you divided by 2^bits − 1, the steps of the whole range: on each side of zero there are 2^(bits − 1) − 1": but(
            steps=lambda bits: 2**bits - 1
        ),
        "the fraction was cut off: round before you convert to int8": but(rounded=torch.trunc),
        "you took the floor, which moves every weight down by half a step on average: use round": but(rounded=torch.floor),
        "you returned the largest values of the rows: a scale is one step, the largest value over 2^(bits − 1) − 1": but(
            returned=lambda scales, steps: scales * steps
        ),
        "the scales were computed in the weight's own 16-bit dtype, which rounds them: start from weight.float()": but(
            wide=lambda w: w, returned=lambda scales, steps: scales.float()
        ),
        "the scales are in the weight's own 16-bit dtype: start from weight.float(), they are to be float32": but(wide=lambda w: w),
        "your scales are the inverses of the right ones: a scale multiplies codes to give weights back": but(returned=lambda s, _: 1 / s),
        "the codes are still floating-point numbers: convert them to torch.int8": but(stored=lambda codes, steps: codes),
        "a row of zeros has absmax 0, and 0 / 0 is NaN: give such a row some positive scale": but(scale=truediv),
        "a number was added to the scales, or they have a least value: beside it a row of tiny values is lost; replace scales of 0 "
        "only": but(scale=lambda absmax, steps: absmax / steps + 1e-8),
    },
    atol=0,  # a scale may be tiny
)
