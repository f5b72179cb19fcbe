"""Low rank, of a matrix and of a training run: begin at :mod:`reference.lowrank.svd`."""

from reference.lowrank.subspace import RandomSubspace
from reference.lowrank.svd import (
    effective_rank,
    energy_captured,
    marchenko_pastur_edges,
    rank_for_energy,
    stable_rank,
    truncated_svd,
)

__all__ = [
    "RandomSubspace",
    "effective_rank",
    "energy_captured",
    "marchenko_pastur_edges",
    "rank_for_energy",
    "stable_rank",
    "truncated_svd",
]
