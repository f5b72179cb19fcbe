"""What unit 04 states: integrals over the distribution of scaled values, facts of the format, and errors on the tiny model's weights.

Everywhere ``levels`` is a key of ``LEVELS``, ``values`` one of ``scaled.INSIDE``, and ``measure`` one of ``POWER``. Blocks have 64 values
and the values are normal, where nothing else is said.
"""

import functools
import math

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import ndtr, ndtri

from course.claims.blockwise_quantization import bits, data
from course.claims.shared import normal
from course.lab import scaled
from course.lab.scaled import NF4
from reference.blockwise import dequantize_blockwise, fp4_codebook, int_codebook, midpoints, quantize_blockwise, relative_rmse, scale_blocks
from reference.nf4 import NF4_CODEBOOK, OFFSET, dequantize_nf4, nearest_codes, quantize_nf4

LEVELS = {"NF4": NF4_CODEBOOK, "INT4": int_codebook(4), "FP4": fp4_codebook().unique()}
KEPT = (0, 7, 15)  # the codes of −1, 0 and 1
POWER = {"absolute": 1, "squared": 2}


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


def float64_grid_differs() -> int:
    """How many of NF4's 16 levels, whose probabilities are a float32 grid, are others on a float64 grid."""
    return int((_table(OFFSET).astype(np.float32) != NF4_CODEBOOK.numpy()).sum())


def _symmetric() -> np.ndarray:
    """Sixteen quantiles, eight on each side, no zero."""
    levels = ndtri(np.linspace(1 - OFFSET, OFFSET, 16))
    return levels / levels.max()


def zero_costs() -> float:
    """Squared error of NF4 above that of 16 symmetric levels without a zero, in percent."""
    return 100 * (scaled.error(NF4, 64, 2) / scaled.error(_symmetric(), 64, 2) - 1)


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
    places, weights = scaled.distribution(64, 2)
    error = weights * (NF4[scaled.nearest(NF4, places)] - places) ** 2
    return float(error[places < 0].sum() / error[places > 0].sum())


# The bins


def int4_outer_percent() -> float:
    """Of the values, in INT4's six outermost bins, three on each side."""
    shares = scaled.occupancy(int_codebook(4).double().numpy(), 64)
    return float(100 * (shares[:3].sum() + shares[-3:].sum()))


def absmax(what: str, block: int) -> float:
    """The "mean" or the "deviation" of a block's absmax, in standard deviations of the values, or the "spread": their ratio in per cent."""
    mean, deviation = scaled.largest(block).mean(), scaled.largest(block).std()
    return float({"mean": mean, "deviation": deviation, "spread": 100 * deviation / mean}[what])


def bin_percent(which: str, block: int) -> float:
    """Of the values, in the "fullest" or in the "emptiest" bin."""
    return float(100 * {"fullest": max, "emptiest": min}[which](scaled.occupancy(NF4, block)))


def entropy(block: int) -> float:
    """Of the codes, in bits."""
    p = scaled.occupancy(NF4, block)
    return float(-(p * np.log2(p)).sum())


def sampled_occupancy_agrees() -> bool:
    """Half a million normal values give the integral's shares to within 0.15 percentage points."""
    x = normal(1 << 19)
    shares = torch.bincount(nearest_codes(scale_blocks(x, 64)[0]).long(), minlength=16).double().numpy() / len(x)
    return bool(np.abs(shares - scaled.occupancy(NF4, 64)).max() < 0.0015)


def equal_bins_rmse() -> float:
    """Bins of exactly equal mass after scaling (full four bits of entropy), each with its best level."""
    places, mass = scaled.distribution(64, 0)
    _, weights = scaled.distribution(64, 2)
    code = np.minimum((16 * (mass.cumsum() - mass / 2)).astype(int), 15)
    levels = np.bincount(code, weights * places) / np.bincount(code, weights)
    return math.sqrt(float((weights * (levels[code] - places) ** 2).sum()))


# Errors


def mean_error(levels: str) -> float:
    """Mean |x − x̂| over the standard deviation."""
    return scaled.error(LEVELS[levels].double().numpy(), 64, 1)


def rmse(levels: str, values: str = "normal") -> float:
    """Root mean square error over the standard deviation; "tiny" values are all linear weights of the tiny model."""
    if values == "tiny":
        return relative_rmse(data("tiny"), dequantize_blockwise(quantize_blockwise(data("tiny"), LEVELS[levels], 64)))
    return math.sqrt(scaled.error(LEVELS[levels].double().numpy(), 64, 2, values))


def above_best(block: int, measure: str, keep_ends_and_zero: bool = False) -> float:
    """NF4's mean error above that of the best 16 levels, or of the best that keep −1, 0 and 1; in percent."""
    power, kept = POWER[measure], KEPT if keep_ends_and_zero else ()
    return 100 * (scaled.error(NF4, block, power) / scaled.error(scaled.best_levels(block, power, kept), block, power) - 1)


@functools.cache
def best_delta(block: int, measure: str) -> float:
    """The δ with the least mean error."""
    search = minimize_scalar(
        lambda d: scaled.error(_table(d), block, POWER[measure]), bounds=(0.9, 0.9999), method="bounded", options={"xatol": 1e-5}
    )
    return float(search.x)


def rule_delta(block: int, measure: str) -> float:
    """Bennett's rule: levels as dense as the density to the power 1/(1 + p), which is a normal √(1 + p) times as wide, out to absmax."""
    return float(ndtr(absmax("mean", block) / math.sqrt(1 + POWER[measure])))


def best_delta_leaves(block: int) -> float:
    """Absolute error of the recipe with the best δ above that of the best levels with −1, 0 and 1, in percent."""
    ours, least = _table(best_delta(block, "absolute")), scaled.best_levels(block, 1, KEPT)
    return 100 * (scaled.error(ours, block, 1) / scaled.error(least, block, 1) - 1)


def lloyd_max_rmse() -> float:
    """Sixteen levels for normal values without any blocks: Max's classic number."""
    edges = np.linspace(-8, 8, 2 * scaled.CELLS + 1)
    places, weights = (edges[1:] + edges[:-1]) / 2, np.diff(ndtr(edges))
    levels = scaled.lloyd(edges, places, weights, 2, ndtri((np.arange(16) + 0.5) / 16))
    return math.sqrt(float((weights * (levels[scaled.nearest(levels, places)] - places) ** 2).sum()))


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
