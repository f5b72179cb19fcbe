"""What unit 04 states: integrals over the distribution of scaled values, facts of the format, and errors on the tiny model's weights.

Blocks of independent values have a known distribution after absmax scaling, so occupancy and errors need no sampling. Given the block's
largest absolute value m, the other values are independent and truncated to ±m; m itself lands on −1 or 1. An integral over u = x/m is a
sum over narrow cells, and one over m a mean over equally likely values of it.

Everywhere ``levels`` is a key of ``LEVELS``, ``values`` one of ``INSIDE``, and ``measure`` one of ``POWER``. Blocks have 64 values and the
values are normal, where nothing else is said.
"""

import functools
import math

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import ndtr, ndtri

from course.claims.blockwise_quantization import bits, data
from course.claims.shared import normal
from reference.blockwise import dequantize_blockwise, fp4_codebook, int_codebook, midpoints, quantize_blockwise, relative_rmse, scale_blocks
from reference.nf4 import NF4_CODEBOOK, OFFSET, dequantize_nf4, nearest_codes, quantize_nf4

CELLS, NODES = 8000, 400
NF4 = NF4_CODEBOOK.double().numpy()
LEVELS = {"NF4": NF4_CODEBOOK, "INT4": int_codebook(4), "FP4": fp4_codebook().unique()}
KEPT = (0, 7, 15)  # the codes of −1, 0 and 1
POWER = {"absolute": 1, "squared": 2}

# share of values in (−x, x), and its inverse, for a variance of 1
INSIDE = {
    "normal": (lambda x: 2 * ndtr(x) - 1, lambda p: ndtri((1 + p) / 2)),
    "uniform": (lambda x: np.clip(x / math.sqrt(3), 0, 1), lambda p: p * math.sqrt(3)),
    "Laplace": (lambda x: -np.expm1(-x * math.sqrt(2)), lambda p: -np.log1p(-p) / math.sqrt(2)),
}


@functools.cache
def _largest(block: int, values: str = "normal") -> np.ndarray:
    """Equally likely values of a block's absmax: (NODES,)."""
    return INSIDE[values][1](((np.arange(NODES) + 0.5) / NODES) ** (1 / block))


@functools.cache
def _scaled(block: int, power: int, values: str = "normal") -> tuple[np.ndarray, np.ndarray]:
    """Places u in [−1, 1], and E[absmax^power; scaled value there]: the weight of an error in the unit of the values."""
    inside, m = INSIDE[values][0], _largest(block, values)[:, None]
    edges = np.linspace(0, 1, CELLS // 2 + 1)
    half = (np.diff(inside(edges * m)) / inside(m) * m**power).mean(0) / 2 * (1 - 1 / block)
    places = (edges[1:] + edges[:-1]) / 2
    atom = (m**power).mean() / (2 * block)
    return np.concatenate([[-1], -places[::-1], places, [1]]), np.concatenate([[atom], half[::-1], half, [atom]])


def _nearest(levels: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The index of the level that is nearest to each place."""
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, places)


def _error(levels: np.ndarray, block: int, power: int, values: str = "normal") -> float:
    """E|x − x̂|^power, nearest level."""
    places, weights = _scaled(block, power, values)
    return float((weights * np.abs(levels[_nearest(levels, places)] - places) ** power).sum())


@functools.cache
def _occupancy(block: int) -> np.ndarray:
    """Share of values in each of NF4's bins, in percent."""
    places, weights = _scaled(block, 0)
    return 100 * np.bincount(_nearest(NF4, places), weights, len(NF4))


@functools.cache
def _best(block: int, power: int, kept: tuple[int, ...] = ()) -> np.ndarray:
    """Lloyd's iteration from NF4: levels to the weighted mean (power 2) or median (1) of their cells, but for those kept."""
    places, weights = _scaled(block, power)
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


def _table(delta: float) -> np.ndarray:
    """NF4's recipe with this δ, on a float64 grid of probabilities."""
    below, above = (ndtri(np.linspace(delta, 0.5, n)[:-1]) for n in (8, 9))
    levels = np.sort(np.concatenate([-below, [0], above]))
    return levels / levels[-1]


def _off_float64_grid() -> np.ndarray:
    """How far NF4's levels, which are float32, are from those of a float64 grid."""
    return np.abs(_table(OFFSET).astype(np.float32) - NF4_CODEBOOK.numpy())


def float64_grid_differs() -> int:
    """How many of the 16 levels."""
    return int((_off_float64_grid() != 0).sum())


def float64_grid_largest_difference() -> float:
    """Between two levels, where the largest is 1."""
    return float(_off_float64_grid().max())


def _symmetric() -> np.ndarray:
    """Sixteen quantiles, eight on each side, no zero."""
    levels = ndtri(np.linspace(1 - OFFSET, OFFSET, 16))
    return levels / levels.max()


def zero_costs() -> float:
    """Squared error of NF4 above that of 16 symmetric levels without a zero, in percent."""
    return 100 * (_error(NF4, 64, 2) / _error(_symmetric(), 64, 2) - 1)


def smallest_symmetric_level() -> float:
    """Of the positive ones, where the largest is 1."""
    return float(_symmetric()[8])


def without_zero_pruned_becomes() -> float:
    """What a zero comes back as on average, in standard deviations: normal weights of which half were set to zero."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1 << 18, generator=g) * (torch.rand(1 << 18, generator=g) < 0.5)
    restored = dequantize_blockwise(quantize_blockwise(x, torch.tensor(_symmetric(), dtype=torch.float32), 64))
    return restored[x == 0].mean().item()


def negative_side_error() -> float:
    """Mean squared error of negative over that of positive values."""
    places, weights = _scaled(64, 2)
    error = weights * (NF4[_nearest(NF4, places)] - places) ** 2
    return float(error[places < 0].sum() / error[places > 0].sum())


# The bins


def absmax(what: str, block: int) -> float:
    """The "mean" or the "deviation" of a block's absmax, in standard deviations of the values, or the "spread": their ratio in per cent."""
    mean, deviation = _largest(block).mean(), _largest(block).std()
    return float({"mean": mean, "deviation": deviation, "spread": 100 * deviation / mean}[what])


def bin_percent(which: str, block: int) -> float:
    """Of the values, in the "fullest" or in the "emptiest" bin."""
    return float({"fullest": max, "emptiest": min}[which](_occupancy(block)))


def entropy(block: int) -> float:
    """Of the codes, in bits."""
    p = _occupancy(block) / 100
    return float(-(p * np.log2(p)).sum())


def sampled_occupancy_agrees() -> bool:
    """Half a million normal values give the integral's shares to within 0.15 percentage points."""
    x = normal(1 << 19)
    shares = torch.bincount(nearest_codes(scale_blocks(x, 64)[0]).long(), minlength=16).double().numpy() / len(x)
    return bool(np.abs(100 * shares - _occupancy(64)).max() < 0.15)


def equal_bins_rmse() -> float:
    """Bins of exactly equal mass after scaling (full four bits of entropy), each with its best level."""
    places, mass = _scaled(64, 0)
    _, weights = _scaled(64, 2)
    code = np.minimum((16 * (mass.cumsum() - mass / 2)).astype(int), 15)
    levels = np.bincount(code, weights * places) / np.bincount(code, weights)
    return math.sqrt(float((weights * (levels[code] - places) ** 2).sum()))


# Errors


def mean_error(levels: str) -> float:
    """Mean |x − x̂| over the standard deviation."""
    return _error(LEVELS[levels].double().numpy(), 64, 1)


def rmse(levels: str, values: str = "normal") -> float:
    """Root mean square error over the standard deviation; "tiny" values are all linear weights of the tiny model."""
    if values == "tiny":
        return relative_rmse(data("tiny"), dequantize_blockwise(quantize_blockwise(data("tiny"), LEVELS[levels], 64)))
    return math.sqrt(_error(LEVELS[levels].double().numpy(), 64, 2, values))


def above_best(block: int, measure: str, keep_ends_and_zero: bool = False) -> float:
    """NF4's mean error above that of the best 16 levels, or of the best that keep −1, 0 and 1; in percent."""
    power, kept = POWER[measure], KEPT if keep_ends_and_zero else ()
    return 100 * (_error(NF4, block, power) / _error(_best(block, power, kept), block, power) - 1)


@functools.cache
def best_delta(block: int, measure: str) -> float:
    """The δ with the least mean error."""
    search = minimize_scalar(
        lambda d: _error(_table(d), block, POWER[measure]), bounds=(0.9, 0.9999), method="bounded", options={"xatol": 1e-5}
    )
    return float(search.x)


def rule_delta(block: int, measure: str) -> float:
    """Bennett's rule: levels as dense as the density to the power 1/(1 + p), which is a normal √(1 + p) times as wide, out to absmax."""
    return float(ndtr(absmax("mean", block) / math.sqrt(1 + POWER[measure])))


def best_delta_leaves(block: int) -> float:
    """Absolute error of the recipe with the best δ above that of the best levels with −1, 0 and 1, in percent."""
    return 100 * (_error(_table(best_delta(block, "absolute")), block, 1) / _error(_best(block, 1, KEPT), block, 1) - 1)


def best_rmse() -> float:
    """Of the best 16 levels."""
    return math.sqrt(_error(_best(64, 2), 64, 2))


def lloyd_max_rmse() -> float:
    """Sixteen levels for normal values without any blocks: Max's classic number."""
    edges = np.linspace(-8, 8, 2 * CELLS + 1)
    places, weights = (edges[1:] + edges[:-1]) / 2, np.diff(ndtr(edges))
    levels = _lloyd(edges, places, weights, 2, ndtri((np.arange(16) + 0.5) / 16))
    return math.sqrt(float((weights * (levels[_nearest(levels, places)] - places) ** 2).sum()))


def shannon_rmse() -> float:
    """The least error that any code of as many bits a value as NF4's can have on normal values, 2^−bits standard deviations."""
    return 2 ** -bits("NF4")


def above_shannon() -> float:
    """NF4's error over that bound."""
    return rmse("NF4") / shannon_rmse()


# The format


def stored(what: str, count: int) -> int:
    """Of so many values, the "bytes" of the codes or the number of "scales"."""
    q = quantize_nf4(torch.zeros(count))
    return {"bytes": q.packed.nbytes, "scales": len(q.absmax)}[what]


def one_and_minus_one_pack_to_f0() -> bool:
    return quantize_nf4(torch.tensor([1.0, -1.0])).packed.item() == 0xF0


def swapped_nibbles_error() -> float:
    """RMSE over the standard deviation when a normal tensor's nibbles are read in the wrong order: √2, as if weights were unrelated."""
    x = normal(1 << 16)
    return relative_rmse(x, dequantize_nf4(quantize_nf4(x)).view(-1, 2).flip(1).reshape(-1))


def midpoint_goes_down() -> bool:
    return nearest_codes(midpoints(NF4_CODEBOOK)).tolist() == list(range(15))
