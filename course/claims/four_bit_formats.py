"""What the map of 4-bit formats states: bits counted, and errors on weights for the formats that need no calibration data.

A quantizer here takes a matrix with a block in each row and returns what comes back of it. Each is written from its format's definition:
Q4_0 and Q4_K from llama.cpp's, MXFP4 from the OCP Microscaling specification 1.0, NVFP4 from NVIDIA's description, HQQ from Badri and
Shaji 2023. GPTQ and AWQ choose codes or scales by what calibration data make of them, so they have bits here and no error.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from course.claims.blockwise_quantization import CODEBOOKS, data
from course.lab import quantized
from reference.blockwise import dequantize_blockwise, midpoints, quantize_blockwise, relative_rmse

E2M1 = CODEBOOKS["E2M1"].sort().values * 6  # −6 … 6: the elements of MXFP4 and NVFP4
E4M3_LARGEST, E2M1_LARGEST = 448, 6


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """The nearest of sorted ``levels``; what lies beyond gets the outermost."""
    return levels[torch.bucketize(x, midpoints(levels))]


def divided(x: Tensor, by: Tensor) -> Tensor:
    """x / by, and 0 where ``by`` is 0."""
    return torch.where(by == 0, 0, x / torch.where(by == 0, 1, by))


def mxfp4(x: Tensor) -> Tensor:
    """E2M1 times a power of two: that of the block's largest value, less 2, E2M1's own largest exponent. Up to 8 is cut to 6."""
    absmax = x.abs().amax(1, keepdim=True)
    exponent = torch.frexp(absmax).exponent - 1  # floor(log2)
    scale = torch.ldexp(torch.ones_like(absmax), exponent - 2)
    return nearest(x / scale, E2M1) * scale


def nvfp4(x: Tensor) -> Tensor:
    """E2M1 times an E4M3 scale for each block times one float32 for the tensor, which puts the largest scale at 448."""
    absmax = x.abs().amax(1, keepdim=True)
    whole = absmax.max() / (E4M3_LARGEST * E2M1_LARGEST)
    scale = (absmax / E2M1_LARGEST / whole).to(torch.float8_e4m3fn).float() * whole
    return nearest(divided(x, scale), E2M1) * scale


def q4_0(x: Tensor) -> Tensor:
    """−8 … 7 times a float16 step, whose sign puts the value of largest magnitude at −8."""
    step = x.gather(1, x.abs().argmax(1, keepdim=True)) / -8
    codes = (divided(x, step) + 8.5).floor().clamp(0, 15) - 8
    return codes * step.half().float()


def steps_and_lows(x: Tensor) -> tuple[Tensor, Tensor]:
    """For each row the step and the lowest level, at most 0, of 16 even levels with little squared error.

    llama.cpp's search: 21 steps around (max − min)/15, each with the least squares fit of step and lowest level to the codes that it
    gives; large values weigh more.
    """
    weight = x.square().mean(1, keepdim=True).sqrt() + x.abs()
    low = x.amin(1, keepdim=True).clamp(max=0)
    width = x.amax(1, keepdim=True) - low
    best_step, best_low = width / 15, low
    codes = divided(x - low, best_step).round().clamp(0, 15)
    least = (weight * (codes * best_step + best_low - x).square()).sum(1, keepdim=True)
    total, total_x = weight.sum(1, keepdim=True), (weight * x).sum(1, keepdim=True)
    for tried in range(21):
        codes = divided((14 + 0.1 * tried) * (x - low), width).round().clamp(0, 15)
        c, cc, cx = ((weight * each).sum(1, keepdim=True) for each in (codes, codes * codes, codes * x))
        one_low = divided(cc * total_x - c * cx, total * cc - c * c)
        above = one_low > 0
        step = torch.where(above, divided(cx, cc), divided(total * cx - total_x * c, total * cc - c * c))
        one_low = one_low.clamp(max=0)
        error = (weight * (codes * step + one_low - x).square()).sum(1, keepdim=True)
        better = (error < least) & (total * cc - c * c > 0)
        best_step, best_low = torch.where(better, step, best_step), torch.where(better, one_low, best_low)
        least = torch.where(better, error, least)
    return best_step, best_low


def q4_k_fields(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What Q4_K stores of super-blocks, (n, 256): two float16 scales, (n, 1), 6-bit steps and lows, (n, 8), 4-bit codes, (n, 8, 32)."""
    steps, lows = (each.view(-1, 8) for each in steps_and_lows(x.reshape(-1, 32)))
    scales, stored = [], []
    for each in (steps, -lows):
        largest = each.amax(1, keepdim=True)
        stored.append(divided(63 * each, largest).round().clamp(max=63))
        scales.append((largest / 63).half().float())
    step, low = (scale * six for scale, six in zip(scales, stored, strict=True))
    codes = divided(x.view(-1, 8, 32) + low[..., None], step[..., None]).round().clamp(0, 15)
    return *scales, *stored, codes


def q4_k(x: Tensor) -> Tensor:
    """16 even levels from a lowest one, for every 32 values; steps and lowest levels in 6 bits, under two float16 scales for 256 values."""
    of_steps, of_lows, steps, lows, codes = q4_k_fields(x)
    return ((of_steps * steps)[..., None] * codes - (of_lows * lows)[..., None]).view(x.shape)


def hqq(x: Tensor, p: float = 0.7, beta: float = 10.0, growth: float = 1.01, rounds: int = 20) -> Tensor:
    """16 even levels from min to max, and a zero point moved so that the error has a small p-norm: large errors are let be.

    Half-quadratic: the error is split into a few large entries, which a shrinkage finds, and a rest, whose mean moves the zero.
    """
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    step = (high - low) / 15
    zero = best = divided(-low, step)
    least = torch.inf
    for _ in range(rounds):
        codes = (divided(x, step) + zero).round().clamp(0, 15)
        error = x - (codes - zero) * step
        if error.abs().mean() >= least:
            break
        least, best = error.abs().mean(), zero
        large = error.sign() * (error.abs() - error.abs().pow(p - 1) / beta).clamp(min=0)
        zero, beta = (codes - divided(x - large, step)).mean(1, keepdim=True), beta * growth
    step, zero = step.half().float(), best.half().float()
    return ((divided(x, step) + zero).round().clamp(0, 15) - zero) * step


def codebook(levels: str) -> Callable[[Tensor], Tensor]:
    """Blocks of 64 with a float32 absmax."""
    return lambda x: dequantize_blockwise(quantize_blockwise(x, CODEBOOKS[levels], 64))


@dataclass(frozen=True)
class Format:
    """A way to store a weight in four bits and a bit.

    Attributes:
        block: values in a row of what ``restored`` takes.
        stored: beside the codes: (bits, for how many weights).
        restored: there and back again; None where calibration data decide.
    """

    block: int
    stored: tuple[tuple[int, int], ...]
    restored: Callable[[Tensor], Tensor] | None = None


FORMATS = {
    "INT4": Format(64, ((32, 64),), codebook("INT4")),
    "FP4": Format(64, ((32, 64),), codebook("FP4")),
    "NF4": Format(64, ((32, 64),), codebook("NF4")),
    "NF4+DQ": Format(64, ((8, 64), (32, 64 * 256)), lambda x: quantized.round_trip(x, "NF4+DQ")),
    "HQQ": Format(64, ((16 + 16, 64),), hqq),
    "Q4_0": Format(32, ((16, 32),), q4_0),
    "Q4_K": Format(256, ((6 + 6, 32), (16 + 16, 256)), q4_k),
    "MXFP4": Format(32, ((8, 32),), mxfp4),
    "NVFP4": Format(16, ((8, 16),), nvfp4),  # and one float32 for the tensor
    "GPTQ": Format(128, ((16 + 4, 128),)),
    "AWQ": Format(128, ((16 + 4, 128),)),
}


def bits(name: str) -> float:
    """Per weight of a large matrix: the code, and its share of scales, lowest levels and zero points."""
    return 4 + sum(each / weights for each, weights in FORMATS[name].stored)


@functools.cache
def error_percent(name: str, of: str) -> float:
    """Relative error of what comes back; ``of`` is what ``blockwise_quantization.data`` takes."""
    x = data(of).reshape(-1, FORMATS[name].block)
    return 100 * relative_rmse(x, FORMATS[name].restored(x))
