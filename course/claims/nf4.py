"""What unit 04 states: integrals over the distribution of scaled values, facts of the format, and errors on the tiny model's weights.

Blocks of independent values have a known distribution after absmax scaling, so occupancy and errors need no sampling. Given the block's
largest absolute value m, the other values are independent and truncated to ±m; m itself lands on −1 or 1. An integral over u = x/m is a
sum over narrow cells, and one over m a mean over equally likely values of it.
"""

import functools
import math

import numpy as np
import torch
from safetensors.torch import load_file
from scipy.optimize import minimize_scalar
from scipy.special import ndtr, ndtri

from course import ROOT
from reference.blockwise import dequantize_blockwise, fp4_codebook, int_codebook, midpoints, quantize_blockwise, relative_rmse, scale_blocks
from reference.nf4 import NF4_CODEBOOK, OFFSET, dequantize_nf4, nearest_codes, quantize_nf4

CELLS, NODES = 8000, 400
NF4 = NF4_CODEBOOK.double().numpy()
INT4 = int_codebook(4).double().numpy()
FP4 = fp4_codebook().unique().double().numpy()
KEPT = (0, 7, 15)  # the codes of −1, 0 and 1

# share of values in (−x, x), and its inverse, for a variance of 1
INSIDE = {
    "normal": (lambda x: 2 * ndtr(x) - 1, lambda p: ndtri((1 + p) / 2)),
    "uniform": (lambda x: np.clip(x / math.sqrt(3), 0, 1), lambda p: p * math.sqrt(3)),
    "Laplace": (lambda x: -np.expm1(-x * math.sqrt(2)), lambda p: -np.log1p(-p) / math.sqrt(2)),
}


@functools.cache
def _largest(block_size: int, name: str = "normal") -> np.ndarray:
    """Equally likely values of a block's absmax: (NODES,)."""
    return INSIDE[name][1](((np.arange(NODES) + 0.5) / NODES) ** (1 / block_size))


@functools.cache
def _scaled(block_size: int, power: int, name: str = "normal") -> tuple[np.ndarray, np.ndarray]:
    """Places u in [−1, 1], and E[absmax^power; scaled value there]: the weight of an error in the unit of the values."""
    inside, m = INSIDE[name][0], _largest(block_size, name)[:, None]
    edges = np.linspace(0, 1, CELLS // 2 + 1)
    half = (np.diff(inside(edges * m)) / inside(m) * m**power).mean(0) / 2 * (1 - 1 / block_size)
    places = (edges[1:] + edges[:-1]) / 2
    atom = (m**power).mean() / (2 * block_size)
    return np.concatenate([[-1], -places[::-1], places, [1]]), np.concatenate([[atom], half[::-1], half, [atom]])


def _occupancy(block_size: int, levels: np.ndarray = NF4) -> np.ndarray:
    """Share of values in each bin, in percent."""
    places, weights = _scaled(block_size, 0)
    return 100 * np.bincount(np.searchsorted((levels[1:] + levels[:-1]) / 2, places), weights, len(levels))


def _error(levels: np.ndarray, block_size: int, power: int, name: str = "normal") -> float:
    """E|x − x̂|^power, nearest level."""
    places, weights = _scaled(block_size, power, name)
    restored = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, places)]
    return float((weights * np.abs(restored - places) ** power).sum())


def _rmse(levels: np.ndarray, name: str = "normal", block_size: int = 64) -> float:
    """Relative to the standard deviation, which is 1."""
    return math.sqrt(_error(levels, block_size, 2, name))


@functools.cache
def _best(block_size: int, power: int, kept: tuple[int, ...] = ()) -> np.ndarray:
    """Lloyd's iteration from NF4: levels to the weighted mean (power 2) or median (1) of their cells, but for those kept."""
    places, weights = _scaled(block_size, power)
    edges = np.concatenate([[-1], np.linspace(-1, 1, CELLS + 1), [1]])  # the outermost cells have no width: all of −1 and of 1
    return _lloyd(edges, places, weights, power, NF4, kept)


def _lloyd(edges: np.ndarray, places: np.ndarray, weights: np.ndarray, power: int, start: np.ndarray, kept: tuple = ()) -> np.ndarray:
    mass, moment = np.concatenate([[0], weights.cumsum()]), np.concatenate([[0], (weights * places).cumsum()])
    levels, free = start.copy(), np.setdiff1d(np.arange(len(start)), kept)
    for _ in range(4000):
        cuts = (levels[1:] + levels[:-1]) / 2
        in_bin, moments = (np.diff(np.interp(cuts, edges, whole), prepend=0, append=whole[-1]) for whole in (mass, moment))
        centres = moments / in_bin if power == 2 else np.interp(in_bin.cumsum() - in_bin / 2, mass, edges)
        moved = np.abs(centres[free] - levels[free]).max()
        levels[free] = centres[free]
        if moved < 1e-8:
            break
    return levels


def _above(block_size: int, power: int, kept: tuple[int, ...] = ()) -> float:
    """How far NF4's error is above the least, in percent."""
    return 100 * (_error(NF4, block_size, power) / _error(_best(block_size, power, kept), block_size, power) - 1)


# The levels


def offset_from_15_and_16() -> float:
    """Mean of 1 − 1/(2·15) and 1 − 1/(2·16): the middles of the outermost of 15 and of 16 strips of equal mass."""
    return ((1 - 1 / 30) + (1 - 1 / 32)) / 2


def offset_is_that_average() -> bool:
    return round(offset_from_15_and_16(), 7) == OFFSET


def top_quantile() -> float:
    """Φ⁻¹(δ): the outermost level in standard deviations, before the division."""
    return float(ndtri(OFFSET))


def literal_formula_is_infinite() -> bool:
    """½(Q(i/17) + Q((i+1)/17)) for i = 0 … 15: the first is −∞, the others are finite."""
    i = np.arange(16)
    levels = (ndtri(i / 17) + ndtri((i + 1) / 17)) / 2
    return bool(np.isneginf(levels[0]) and np.isfinite(levels[1:]).all())


def _from_grid(dtype: torch.dtype) -> torch.Tensor:
    halves = [ndtri(torch.linspace(OFFSET, 0.5, n, dtype=dtype)[:-1].numpy()) for n in (8, 9)]
    levels = torch.tensor(np.sort(np.concatenate([-halves[0], [0], halves[1]])))
    return (levels / levels.max()).float()


def float64_grid_differs() -> int:
    """How many of the 16 levels."""
    return int((_from_grid(torch.float64) != NF4_CODEBOOK).sum())


def float64_grid_largest_difference() -> float:
    return (_from_grid(torch.float64) - NF4_CODEBOOK).abs().max().item()


def _symmetric() -> np.ndarray:
    """Sixteen quantiles, eight on each side, no zero."""
    levels = ndtri(np.linspace(1 - OFFSET, OFFSET, 16))
    return levels / levels.max()


def zero_costs() -> float:
    """Squared error of NF4 above that of 16 symmetric levels without a zero, in percent; normal, block 64."""
    return 100 * (_error(NF4, 64, 2) / _error(_symmetric(), 64, 2) - 1)


def smallest_symmetric_level() -> float:
    return float(_symmetric()[8])


def without_zero_pruned_becomes() -> float:
    """What a zero comes back as on average, in standard deviations: normal weights of which half were set to zero, block 64."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1 << 18, generator=g) * (torch.rand(1 << 18, generator=g) < 0.5)
    restored = dequantize_blockwise(quantize_blockwise(x, torch.tensor(_symmetric(), dtype=torch.float32), 64))
    return restored[x == 0].mean().item()


def negative_side_error() -> float:
    """Mean squared error of negative over that of positive values; normal, block 64."""
    places, weights = _scaled(64, 2)
    restored = NF4[np.searchsorted((NF4[1:] + NF4[:-1]) / 2, places)]
    error = weights * (restored - places) ** 2
    return float(error[places < 0].sum() / error[places > 0].sum())


# The bins


def mean_absmax_64() -> float:
    """In standard deviations."""
    return float(_largest(64).mean())


def mean_absmax_4096() -> float:
    return float(_largest(4096).mean())


def least_full_32() -> float:
    return float(_occupancy(32).min())


def most_full_32() -> float:
    return float(_occupancy(32).max())


def least_full_64() -> float:
    return float(_occupancy(64).min())


def most_full_64() -> float:
    return float(_occupancy(64).max())


def least_full_4096() -> float:
    return float(_occupancy(4096).min())


def most_full_4096() -> float:
    return float(_occupancy(4096).max())


def _entropy(block_size: int) -> float:
    p = _occupancy(block_size) / 100
    return float(-(p * np.log2(p)).sum())


def entropy_32() -> float:
    """Of the codes, in bits."""
    return _entropy(32)


def entropy_64() -> float:
    return _entropy(64)


def entropy_4096() -> float:
    return _entropy(4096)


def sampled_occupancy_agrees() -> bool:
    """Half a million normal values give the integral's shares to within 0.15 percentage points."""
    x = torch.randn(1 << 19, generator=torch.Generator().manual_seed(0))
    shares = torch.bincount(nearest_codes(scale_blocks(x, 64)[0]).long(), minlength=16).double().numpy() / len(x)
    return bool(np.abs(100 * shares - _occupancy(64)).max() < 0.15)


def equal_bins_rmse() -> float:
    """Bins of exactly equal mass after scaling (full four bits of entropy), each with its best level; normal, block 64."""
    places, mass = _scaled(64, 0)
    _, weights = _scaled(64, 2)
    code = np.minimum((16 * (mass.cumsum() - mass / 2)).astype(int), 15)
    levels = np.bincount(code, weights * places) / np.bincount(code, weights)
    return math.sqrt(float((weights * (levels[code] - places) ** 2).sum()))


# Errors


def nf4_mean_error() -> float:
    """Mean |x − x̂| on N(0, 1), block 64."""
    return _error(NF4, 64, 1)


def int4_mean_error() -> float:
    return _error(INT4, 64, 1)


def fp4_mean_error() -> float:
    return _error(FP4, 64, 1)


def nf4_rmse() -> float:
    """Root mean square error over the standard deviation, N(0, 1), block 64."""
    return _rmse(NF4)


def int4_rmse() -> float:
    return _rmse(INT4)


def fp4_rmse() -> float:
    return _rmse(FP4)


def nf4_rmse_uniform() -> float:
    return _rmse(NF4, "uniform")


def int4_rmse_uniform() -> float:
    return _rmse(INT4, "uniform")


def fp4_rmse_uniform() -> float:
    return _rmse(FP4, "uniform")


def nf4_rmse_laplace() -> float:
    return _rmse(NF4, "Laplace")


def int4_rmse_laplace() -> float:
    return _rmse(INT4, "Laplace")


def fp4_rmse_laplace() -> float:
    return _rmse(FP4, "Laplace")


@functools.cache
def _tiny() -> torch.Tensor:
    """All linear weights of the tiny model, in one vector."""
    weights = load_file(ROOT / "course" / "lab" / "data" / "tiny" / "model.safetensors")
    return torch.cat([weights[name].float().flatten() for name in sorted(weights) if "_proj" in name])


def _tiny_rmse(codebook: torch.Tensor) -> float:
    return relative_rmse(_tiny(), dequantize_blockwise(quantize_blockwise(_tiny(), codebook, 64)))


def nf4_rmse_tiny() -> float:
    return _tiny_rmse(NF4_CODEBOOK)


def int4_rmse_tiny() -> float:
    return _tiny_rmse(int_codebook(4))


def fp4_rmse_tiny() -> float:
    return _tiny_rmse(fp4_codebook())


def squared_free_64() -> float:
    """NF4's mean squared error above that of the best 16 levels, in percent."""
    return _above(64, 2)


def squared_free_256() -> float:
    return _above(256, 2)


def squared_free_1024() -> float:
    return _above(1024, 2)


def squared_free_4096() -> float:
    return _above(4096, 2)


def squared_kept_64() -> float:
    """The same, among levels that keep −1, 0 and 1."""
    return _above(64, 2, KEPT)


def squared_kept_256() -> float:
    return _above(256, 2, KEPT)


def squared_kept_1024() -> float:
    return _above(1024, 2, KEPT)


def squared_kept_4096() -> float:
    return _above(4096, 2, KEPT)


def absolute_free_64() -> float:
    """NF4's mean absolute error above that of the best 16 levels, in percent."""
    return _above(64, 1)


def absolute_free_256() -> float:
    return _above(256, 1)


def absolute_free_1024() -> float:
    return _above(1024, 1)


def absolute_free_4096() -> float:
    return _above(4096, 1)


def absolute_kept_64() -> float:
    return _above(64, 1, KEPT)


def absolute_kept_256() -> float:
    return _above(256, 1, KEPT)


def absolute_kept_1024() -> float:
    return _above(1024, 1, KEPT)


def absolute_kept_4096() -> float:
    return _above(4096, 1, KEPT)


def _table(delta: float) -> np.ndarray:
    """NF4's recipe with another δ."""
    below, above = (ndtri(np.linspace(delta, 0.5, n)[:-1]) for n in (8, 9))
    levels = np.sort(np.concatenate([-below, [0], above]))
    return levels / levels[-1]


@functools.cache
def _best_delta(block_size: int, power: int) -> float:
    """The δ with the least error on normal values."""
    search = minimize_scalar(
        lambda d: _error(_table(d), block_size, power), bounds=(0.9, 0.9999), method="bounded", options={"xatol": 1e-5}
    )
    return float(search.x)


def _rule_delta(block_size: int, power: int) -> float:
    """Bennett's rule: levels as dense as the density to the power 1/(1 + p), which is a normal √(1 + p) times as wide, out to absmax."""
    return float(ndtr(_largest(block_size).mean() / math.sqrt(1 + power)))


def best_delta_absolute_64() -> float:
    return _best_delta(64, 1)


def rule_delta_absolute_64() -> float:
    return _rule_delta(64, 1)


def best_delta_absolute_4096() -> float:
    return _best_delta(4096, 1)


def rule_delta_absolute_4096() -> float:
    return _rule_delta(4096, 1)


def best_delta_squared_64() -> float:
    return _best_delta(64, 2)


def rule_delta_squared_64() -> float:
    return _rule_delta(64, 2)


def best_delta_leaves_4096() -> float:
    """Absolute error of the recipe with the best δ above that of the best levels with −1, 0 and 1, in percent; blocks of 4096."""
    return 100 * (_error(_table(_best_delta(4096, 1)), 4096, 1) / _error(_best(4096, 1, KEPT), 4096, 1) - 1)


def best_rmse_64() -> float:
    """Of the best 16 levels for blocks of 64."""
    return math.sqrt(_error(_best(64, 2), 64, 2))


def lloyd_max_rmse() -> float:
    """Sixteen levels for normal values without any blocks: Max's classic number."""
    edges = np.linspace(-8, 8, 2 * CELLS + 1)
    places, weights = (edges[1:] + edges[:-1]) / 2, np.diff(ndtr(edges))
    levels = _lloyd(edges, places, weights, 2, ndtri((np.arange(16) + 0.5) / 16))
    return math.sqrt(float((weights * (levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, places)] - places) ** 2).sum()))


def shannon_rmse() -> float:
    """The least error that any code of 4.5 bits a value can have on normal values: 2^−4.5 standard deviations."""
    return 2**-4.5


def above_shannon() -> float:
    """NF4's error at 4.5 bits over that bound."""
    return nf4_rmse() / shannon_rmse()


# The format


def bits_64() -> float:
    """A weight, with a float32 scale for every 64."""
    q = quantize_nf4(torch.zeros(64 * 64))
    return 8 * (q.packed.nbytes + q.absmax.nbytes) / (64 * 64)


def bits_32() -> float:
    q = quantize_nf4(torch.zeros(64 * 64), 32)
    return 8 * (q.packed.nbytes + q.absmax.nbytes) / (64 * 64)


def bits_4096() -> float:
    q = quantize_nf4(torch.zeros(64 * 64), 4096)
    return 8 * (q.packed.nbytes + q.absmax.nbytes) / (64 * 64)


def bytes_of_65() -> int:
    return quantize_nf4(torch.zeros(65)).packed.nbytes


def scales_of_65() -> int:
    return len(quantize_nf4(torch.zeros(65)).absmax)


def one_and_minus_one_pack_to_f0() -> bool:
    return quantize_nf4(torch.tensor([1.0, -1.0])).packed.item() == 0xF0


def swapped_nibbles_error() -> float:
    """RMSE over the standard deviation when a normal tensor's nibbles are read in the wrong order: √2, as if weights were unrelated."""
    x = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    return relative_rmse(x, dequantize_nf4(quantize_nf4(x)).view(-1, 2).flip(1).reshape(-1))


def midpoint_goes_down() -> bool:
    return nearest_codes(midpoints(NF4_CODEBOOK)).tolist() == list(range(15))
