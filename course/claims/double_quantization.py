"""What unit 05 states: bits by formula and from real tensors, gigabytes of named models, errors on seeded weights.

``second`` is how many 8-bit scales share a float32 scale of their own, in double quantization; None means float32 scales, without it.
"""

import functools
import inspect
import math
import statistics

import torch
from torch import Tensor

from course.claims.blockwise_quantization import CODEBOOKS
from reference.blockwise import dequantize_blockwise, int_codebook, midpoints, quantize_blockwise, relative_rmse
from reference.double_quant import QuantizedScales, bits_per_parameter, dequantize_scales, dynamic_codebook, quantize_scales
from reference.memory import SHAPES
from reference.nf4 import NF4Tensor, dequantize_nf4, quantize_nf4

SEEDS = (0, 1, 2)

# Bits


def scale_bits(block: int = 64, second: int | None = 256) -> float:
    """Of scales, a weight."""
    return 32 / block if second is None else 8 / block + 32 / (block * second)


def bits(block: int = 64, second: int | None = 256) -> float:
    """A weight, scales included."""
    return 4 + scale_bits(block, second)


def scale_percent() -> float:
    """Of the stored bits that are scales, without double quantization."""
    return 100 * scale_bits(second=None) / bits(second=None)


@functools.cache
def counted_bits(double: bool = True) -> float:
    """A weight, from the bytes of the tensors of a 1024 × 1024 weight."""
    q = quantize_nf4(_weights("normal", 0).view(1024, 1024))
    return bits_per_parameter(q, quantize_scales(q.absmax)) if double else bits_per_parameter(q)


def saved_bits(counted: bool = False) -> float:
    """A weight, by double quantization."""
    return counted_bits(double=False) - counted_bits() if counted else bits(second=None) - bits()


def third_level_bits() -> float:
    """What quantizing the scales of the scales too would save, a weight."""
    return 32 / (64 * 256) - (8 / (64 * 256) + 32 / (64 * 256 * 256))


def third_level_mb(model: str) -> float:
    """The same for the linears of a model, MB."""
    return SHAPES[model].linear_parameters * third_level_bits() / 8e6


def lowest_level() -> float:
    """Of the dynamic map, whose highest is 1."""
    return dynamic_codebook().min().item()


def map_bytes() -> int:
    """The 256 levels that a file in bitsandbytes' format carries for every weight."""
    return dynamic_codebook().nbytes


def break_even(unit: str) -> float:
    """From where double quantization saves bytes in a file that carries the map.

    Args:
        unit: "blocks" of 64, "weights", or the "width" of a square layer.
    """
    blocks = 1
    while 4 * blocks <= blocks + 4 * math.ceil(blocks / 256) + 4 + map_bytes():
        blocks += 1
    return {"blocks": blocks, "weights": 64 * blocks, "width": math.sqrt(64 * blocks)}[unit]


# Gigabytes


def linears_gb(model: str, second: int | None = 256) -> float:
    """All linears of the decoder's layers."""
    return SHAPES[model].linear_parameters * bits(second=second) / 8e9


def scales_gb(model: str, second: int | None) -> float:
    """The scales of all these linears, one for each 64 weights."""
    return SHAPES[model].linear_parameters * scale_bits(second=second) / 8e9


def saved_gb(model: str) -> float:
    """By double quantization."""
    return scales_gb(model, None) - scales_gb(model, 256)


# Errors


def _weights(kind: str, seed: int) -> Tensor:
    """N(0, 1), (2²⁰,); with "outliers" one weight in 10,000 is 20 times as large."""
    normal = torch.randn(1 << 20, generator=torch.Generator().manual_seed(seed))
    if kind == "normal":
        return normal
    chosen = torch.rand(1 << 20, generator=torch.Generator().manual_seed(seed + 9)) < 1e-4
    return normal * torch.where(chosen, 20, 1)


@functools.cache
def _scales(kind: str, seed: int) -> Tensor:
    return quantize_nf4(_weights(kind, seed)).absmax


def _relative(restored: Tensor, absmax: Tensor) -> float:
    """Mean of |restored / absmax − 1| in per cent."""
    return 100 * (restored / absmax - 1).abs().mean().item()


@functools.cache
def scale_errors(levels: str, weights: str = "normal", centre: bool = True) -> list[float]:
    """Mean relative error of a scale in 8 bits, blocks of 256, of each seed; in percent.

    Args:
        levels: "dynamic", "INT8" or "E4M3" (an 8-bit float with four bits of exponent); the nearest of them is taken.
        weights: "normal" or "outliers".
        centre: the mean is taken off before.
    """
    codebook, found = {"dynamic": dynamic_codebook(), "INT8": int_codebook(8), "E4M3": CODEBOOKS["E4M3"]}[levels], []
    for seed in SEEDS:
        absmax = _scales(weights, seed)
        offset = absmax.mean() if centre else torch.zeros(())
        found.append(_relative(dequantize_blockwise(quantize_blockwise(absmax - offset, codebook, 256)) + offset, absmax))
    return found


def scale_error(levels: str, weights: str = "normal", centre: bool = True) -> float:
    """The mean of :func:`scale_errors` over the seeds."""
    return statistics.fmean(scale_errors(levels, weights, centre))


def int8_wins_on_normal_weights_in_every_seed() -> bool:
    """Not in the mean only."""
    pairs = zip(scale_errors("INT8"), scale_errors("dynamic"), strict=True)
    return all(int8 < dynamic for int8, dynamic in pairs)


def library_scale_error(second: int) -> float:
    """The same of normal weights with the codes that bitsandbytes gives, in blocks of ``second`` scales; one seed."""
    absmax = _scales("normal", 0)
    return _relative(dequantize_scales(quantize_scales(absmax, second)), absmax)


def _restored(block: int, double: bool) -> Tensor:
    q = quantize_nf4(_weights("normal", 0), block)
    if double:
        q = NF4Tensor(q.packed, dequantize_scales(quantize_scales(q.absmax)), q.shape, q.dtype, block)
    return dequantize_nf4(q)


@functools.cache
def rmse(block: int = 64, double: bool = True) -> float:
    """Of normal weights, over σ."""
    return relative_rmse(_weights("normal", 0), _restored(block, double))


def rmse_percent(block: int = 64, double: bool = True) -> float:
    """The same, in percent of σ."""
    return 100 * rmse(block, double)


def squares_add() -> bool:
    """NF4's error and that of the scales, added as independent ones, give the error of both to four digits."""
    together = math.hypot(rmse(double=False), relative_rmse(_restored(64, False), _restored(64, True)))
    return math.isclose(together, rmse(), rel_tol=1e-4)


def largest_weight_is_exact_only_with_float32_scales() -> bool:
    """Of each block of normal weights: with double quantization it is off in nearly all."""
    blocks = _weights("normal", 0).view(-1, 64)
    place = blocks.abs().argmax(1, keepdim=True)
    off = {double: (_restored(64, double).view(-1, 64) != blocks).gather(1, place).float().mean() for double in (False, True)}
    return bool(off[False] == 0 and off[True] > 0.95)


def no_offset_negative_percent() -> float:
    """Scales below zero if the offset is forgotten."""
    q = quantize_scales(_scales("normal", 0))
    without = dequantize_scales(QuantizedScales(q.codes, q.absmax, torch.zeros(()), q.block_size))
    return 100 * (without < 0).float().mean().item()


# bitsandbytes


def only_params_take_a_block_size() -> bool:
    """transformers' configuration and bitsandbytes' layer have no argument for it; Params4bit has."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import BitsAndBytesConfig

    without = all("blocksize" not in inspect.signature(call).parameters for call in (Linear4bit, BitsAndBytesConfig))
    return without and "blocksize" in inspect.signature(Params4bit.__new__).parameters


def table_levels() -> int:
    """Levels that the nearest of 65,536 evenly spaced points can give."""
    points = torch.arange(65_536, dtype=torch.float64) / 32_767.5 - 1
    return len(torch.bucketize(points, midpoints(dynamic_codebook().double())).unique())


def table_differs_percent() -> float:
    """Scales of normal weights whose code is not that of the nearest level."""
    absmax = torch.cat([_scales("normal", seed) for seed in SEEDS])
    nearest = quantize_blockwise(absmax - absmax.mean(), dynamic_codebook(), 256).codes
    return 100 * (nearest != quantize_scales(absmax).codes).float().mean().item()
