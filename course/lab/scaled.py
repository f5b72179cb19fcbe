"""Values after absmax scaling, without sampling: how many fall where, the error of any levels, and the levels of least error.

Blocks of independent values have a known distribution after absmax scaling, so occupancy and errors need no sampling. Given the block's
largest absolute value m, the other values are independent and truncated to ±m; m itself lands on −1 or 1. An integral over u = x/m is a
sum over narrow cells, and one over m a mean over equally likely values of it.

Everywhere ``block`` is the number of values in a block, ``values`` a key of ``INSIDE``, and an error is |x − x̂|^power in the unit of the
values, whose variance is 1.
"""

import functools
import math

import numpy as np
from scipy.special import ndtr, ndtri

from reference.nf4 import NF4_CODEBOOK

CELLS, NODES = 8000, 400
NF4 = NF4_CODEBOOK.double().numpy()

# share of values in (−x, x), and its inverse, for a variance of 1
INSIDE = {
    "normal": (lambda x: 2 * ndtr(x) - 1, lambda p: ndtri((1 + p) / 2)),
    "uniform": (lambda x: np.clip(x / math.sqrt(3), 0, 1), lambda p: p * math.sqrt(3)),
    "Laplace": (lambda x: -np.expm1(-x * math.sqrt(2)), lambda p: -np.log1p(-p) / math.sqrt(2)),
}


@functools.cache
def largest(block: int, values: str = "normal") -> np.ndarray:
    """Equally likely values of a block's absmax: (NODES,)."""
    return INSIDE[values][1](((np.arange(NODES) + 0.5) / NODES) ** (1 / block))


@functools.cache
def distribution(block: int, power: int = 0, values: str = "normal") -> tuple[np.ndarray, np.ndarray]:
    """Places u in [−1, 1], and E[absmax^power; scaled value there]: the weight of an error in the unit of the values.

    With power 0 it is the share of values there. The first and the last place are −1 and 1, where the largest value of each block lands.
    """
    inside, m = INSIDE[values][0], largest(block, values)[:, None]
    edges = np.linspace(0, 1, CELLS // 2 + 1)
    half = (np.diff(inside(edges * m)) / inside(m) * m**power).mean(0) / 2 * (1 - 1 / block)
    places = (edges[1:] + edges[:-1]) / 2
    atom = (m**power).mean() / (2 * block)
    return np.concatenate([[-1], -places[::-1], places, [1]]), np.concatenate([[atom], half[::-1], half, [atom]])


def nearest(levels: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The index of the level that is nearest to each place."""
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, places)


def error(levels: np.ndarray, block: int, power: int, values: str = "normal") -> float:
    """E|x − x̂|^power, nearest level."""
    places, weights = distribution(block, power, values)
    return float((weights * np.abs(levels[nearest(levels, places)] - places) ** power).sum())


def occupancy(levels: np.ndarray, block: int) -> np.ndarray:
    """Share of normal values in each level's bin."""
    places, weights = distribution(block)
    return np.bincount(nearest(levels, places), weights, len(levels))


@functools.cache
def best_levels(block: int, power: int, kept: tuple[int, ...] = ()) -> np.ndarray:
    """Sixteen levels of least error for normal values, by Lloyd's iteration from NF4; the codes in ``kept`` stay where NF4 has them."""
    places, weights = distribution(block, power)
    edges = np.concatenate([[-1], np.linspace(-1, 1, CELLS + 1), [1]])  # the outermost cells have no width: all of −1 and of 1
    return lloyd(edges, places, weights, power, NF4, kept)


def lloyd(edges: np.ndarray, places: np.ndarray, weights: np.ndarray, power: int, start: np.ndarray, kept: tuple = ()) -> np.ndarray:
    """Levels to the weighted mean (power 2) or median (power 1) of their bins, again and again.

    Args:
        edges: of the cells, (cells + 1,).
        places: the cells' middles, (cells,).
        weights: of an error in each cell, (cells,).
        start: levels, rising.
        kept: codes of levels that stay.
    """
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
