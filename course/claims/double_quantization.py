"""What unit 05 states: bits by formula and from real tensors, gigabytes of named models, errors on seeded weights."""

import functools
import math
import statistics
from collections.abc import Callable

import numpy as np
import torch
from scipy.special import ndtr
from torch import Tensor

from reference.blockwise import dequantize_blockwise, int_codebook, midpoints, quantize_blockwise, relative_rmse
from reference.double_quant import QuantizedScales, bits_per_parameter, dequantize_scales, dynamic_codebook, quantize_scales
from reference.model_shapes import LLAMA_2_7B, LLAMA_2_13B, LLAMA_2_70B, ModelShape
from reference.nf4 import NF4Tensor, dequantize_nf4, quantize_nf4

LLAMA_65B = ModelShape("LLaMA-65B", 8192, 80, 64, 64, 128, 22016, 32000)
SEEDS = (0, 1, 2)

# Bits


def plain_bits() -> float:
    """4 bits and a float32 scale for each 64 weights."""
    return 4 + 32 / 64


def scale_share() -> float:
    """Per cent of the stored bits that are scales, without double quantization."""
    return 100 * (32 / 64) / plain_bits()


def constant_bits() -> float:
    """8-bit scales for each 64 weights, a float32 for each 256 of them."""
    return 8 / 64 + 32 / (64 * 256)


def double_bits() -> float:
    return 4 + constant_bits()


def saved_bits() -> float:
    return plain_bits() - double_bits()


@functools.cache
def _counted() -> tuple[float, float]:
    q = quantize_nf4(_normal(0).view(1024, 1024))
    return bits_per_parameter(q), bits_per_parameter(q, quantize_scales(q.absmax))


def counted_bits() -> float:
    """From the bytes of the tensors of a 1024 × 1024 weight."""
    return _counted()[1]


def counted_saved_bits() -> float:
    plain, double = _counted()
    return plain - double


def block_32_bits() -> float:
    return 4 + 8 / 32 + 32 / (32 * 256)


def third_level_bits() -> float:
    """What quantizing the scales of the scales too would save, a weight."""
    return 32 / (64 * 256) - (8 / (64 * 256) + 32 / (64 * 256 * 256))


def third_level_7b_megabytes() -> float:
    return LLAMA_2_7B.linear_parameters * third_level_bits() / 8e6


def lowest_level() -> float:
    """Of the dynamic map, whose highest is 1."""
    return dynamic_codebook().min().item()


def map_bytes() -> int:
    """The 256 levels that a file in bitsandbytes' format carries for every weight."""
    return dynamic_codebook().nbytes


def break_even_blocks() -> int:
    """Blocks of 64 from which double quantization saves bytes in a file that carries the map."""
    blocks = 1
    while 4 * blocks <= blocks + 4 * math.ceil(blocks / 256) + 4 + map_bytes():
        blocks += 1
    return blocks


def break_even_weights() -> int:
    return 64 * break_even_blocks()


def break_even_width() -> float:
    """Width of the square layer with that many weights."""
    return math.sqrt(break_even_weights())


# Gigabytes


def _saved_gigabytes(shape: ModelShape) -> float:
    return shape.linear_parameters * saved_bits() / 8e9


def saved_7b_gigabytes() -> float:
    return _saved_gigabytes(LLAMA_2_7B)


def saved_13b_gigabytes() -> float:
    return _saved_gigabytes(LLAMA_2_13B)


def saved_65b_gigabytes() -> float:
    return _saved_gigabytes(LLAMA_65B)


def saved_70b_gigabytes() -> float:
    return _saved_gigabytes(LLAMA_2_70B)


def half_bit_65b_gigabytes() -> float:
    """What half a bit would be: all of the float32 scales."""
    return LLAMA_65B.linear_parameters * 0.5 / 8e9


def plain_7b_gigabytes() -> float:
    return LLAMA_2_7B.linear_parameters * plain_bits() / 8e9


def double_7b_gigabytes() -> float:
    return LLAMA_2_7B.linear_parameters * double_bits() / 8e9


def plain_13b_gigabytes() -> float:
    return LLAMA_2_13B.linear_parameters * plain_bits() / 8e9


def double_13b_gigabytes() -> float:
    return LLAMA_2_13B.linear_parameters * double_bits() / 8e9


def plain_65b_gigabytes() -> float:
    return LLAMA_65B.linear_parameters * plain_bits() / 8e9


def double_65b_gigabytes() -> float:
    return LLAMA_65B.linear_parameters * double_bits() / 8e9


def plain_70b_gigabytes() -> float:
    return LLAMA_2_70B.linear_parameters * plain_bits() / 8e9


def double_70b_gigabytes() -> float:
    return LLAMA_2_70B.linear_parameters * double_bits() / 8e9


# Scales of normal weights, exactly


@functools.cache
def _maximum(count: int = 64) -> tuple[float, float]:
    """Mean and standard deviation of the largest of ``count`` absolute values of N(0, 1)."""
    x = np.linspace(0, 9, 20_001)
    above = 1 - (2 * ndtr(x) - 1) ** count
    mean, square = np.trapezoid(above, x), np.trapezoid(2 * x * above, x)
    return float(mean), math.sqrt(square - mean**2)


def scale_mean() -> float:
    return _maximum()[0]


def scale_deviation() -> float:
    return _maximum()[1]


def scale_spread_percent() -> float:
    return 100 * scale_deviation() / scale_mean()


# Errors


def _normal(seed: int, count: int = 1 << 20) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def _outliers(seed: int) -> Tensor:
    """One weight in 10,000 is 20 times as large."""
    chosen = torch.rand(1 << 20, generator=torch.Generator().manual_seed(seed + 9)) < 1e-4
    return _normal(seed) * torch.where(chosen, 20, 1)


@functools.cache
def _scales(draw: Callable, seed: int) -> Tensor:
    return quantize_nf4(draw(seed)).absmax


def _relative(restored: Tensor, absmax: Tensor) -> float:
    """Mean of |restored / absmax − 1| in per cent."""
    return 100 * (restored / absmax - 1).abs().mean().item()


@functools.cache
def _error(draw: Callable, name: str, centre: bool) -> float:
    """Mean over the seeds, with blocks of 256."""
    codebook = dynamic_codebook() if name == "dynamic" else int_codebook(8)
    found = []
    for seed in SEEDS:
        absmax = _scales(draw, seed)
        offset = absmax.mean() if centre else torch.zeros(())
        found.append(_relative(dequantize_blockwise(quantize_blockwise(absmax - offset, codebook, 256)) + offset, absmax))
    return statistics.fmean(found)


def dynamic_normal() -> float:
    return _error(_normal, "dynamic", True)


def dynamic_normal_uncentred() -> float:
    return _error(_normal, "dynamic", False)


def int8_normal() -> float:
    return _error(_normal, "INT8", True)


def dynamic_outliers() -> float:
    return _error(_outliers, "dynamic", True)


def int8_outliers() -> float:
    return _error(_outliers, "INT8", True)


def int8_wins_on_normal_weights_in_every_seed() -> bool:
    """Not in the mean only."""
    levels, int8, wins = dynamic_codebook(), int_codebook(8), []
    for seed in SEEDS:
        absmax = _scales(_normal, seed)
        offset = absmax.mean()
        errors = [
            _relative(dequantize_blockwise(quantize_blockwise(absmax - offset, codebook, 256)) + offset, absmax)
            for codebook in (levels, int8)
        ]
        wins.append(errors[1] < errors[0])
    return all(wins)


@functools.cache
def _rmse(block_size: int, double: bool) -> float:
    weight = _normal(0)
    q = quantize_nf4(weight, block_size)
    if double:
        q = NF4Tensor(q.packed, dequantize_scales(quantize_scales(q.absmax)), q.shape, q.dtype, block_size)
    return relative_rmse(weight, dequantize_nf4(q))


def rmse_plain() -> float:
    """RMSE over σ, N(0, 1), blocks of 64."""
    return _rmse(64, False)


def rmse_plain_percent() -> float:
    return 100 * rmse_plain()


def rmse_double() -> float:
    return _rmse(64, True)


def rmse_block_32_double() -> float:
    return _rmse(32, True)


def squares_add() -> bool:
    """NF4's error and that of the scales, added as independent ones, give the error of both to four digits."""
    weight = _normal(0)
    q = quantize_nf4(weight)
    plain = dequantize_nf4(q)
    both = dequantize_nf4(NF4Tensor(q.packed, dequantize_scales(quantize_scales(q.absmax)), q.shape, q.dtype, 64))
    together = math.hypot(relative_rmse(weight, plain), relative_rmse(plain, both))
    return math.isclose(together, relative_rmse(weight, both), rel_tol=1e-4)


def no_offset_negative_percent() -> float:
    """Scales below zero if the offset is forgotten."""
    q = quantize_scales(_scales(_normal, 0))
    without = dequantize_scales(QuantizedScales(q.codes, q.absmax, torch.zeros(()), q.block_size))
    return 100 * (without < 0).float().mean().item()


def _second_level_error(block_size: int) -> float:
    absmax = _scales(_normal, 0)
    return _relative(dequantize_scales(quantize_scales(absmax, block_size)), absmax)


def second_64_error() -> float:
    return _second_level_error(64)


def second_256_error() -> float:
    return _second_level_error(256)


def second_1024_error() -> float:
    return _second_level_error(1024)


def second_64_bits() -> float:
    return 4 + 8 / 64 + 32 / (64 * 64)


def second_1024_bits() -> float:
    return 4 + 8 / 64 + 32 / (64 * 1024)


# bitsandbytes' table on a CPU


def table_levels() -> int:
    """Levels that the nearest of 65,536 evenly spaced points can give."""
    points = torch.arange(65_536, dtype=torch.float64) / 32_767.5 - 1
    return len(torch.bucketize(points, midpoints(dynamic_codebook().double())).unique())


def table_differs_percent() -> float:
    """Scales of normal weights whose code is not that of the nearest level."""
    absmax = torch.cat([_scales(_normal, seed) for seed in SEEDS])
    nearest = quantize_blockwise(absmax - absmax.mean(), dynamic_codebook(), 256).codes
    return 100 * (nearest != quantize_scales(absmax).codes).float().mean().item()
