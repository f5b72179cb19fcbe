"""Low rank: the best small copy of a matrix, and how small it may be.

Every matrix is a sum of rank-one pieces ordered by size, W = Σ_i σ_i u_i v_iᵀ (the singular value
decomposition), and no matrix of rank r is closer to W than the sum of the first r pieces:

    ‖W − W_r‖_F² = σ_{r+1}² + … + σ_n²

(Eckart and Young 1936; Mirsky 1960: the same W_r is best in every unitarily invariant norm.)
Written as two thin factors, W_r = B·A with B (out × r) and A (r × in), it needs r·(out + in)
numbers instead of out·in: that is all that LoRA takes from here. :mod:`reference.lowrank.subspace`
asks the same question without a matrix: how many numbers does a whole training run need?
"""

import math

import torch
from torch import Tensor

from reference.arguments import check_integer


@torch.no_grad()
def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The two thin factors whose product is, of rank at most ``rank``, closest to ``weight``.

    Each factor gets the *square root* of every singular value, B = U_r·√S_r and A = √S_r·V_rᵀ:
    columns of B and rows of A are then equally long, which keeps both in range in 16 bits and gives
    gradient descent two factors of the same scale. A sign may move from a column of B to the row of
    A (u and v are defined up to a common sign); the product does not change.

    Args:
        weight: (out_features, in_features), any real floating dtype, on any device.
        rank: from 1 to min(out_features, in_features).

    Returns:
        ``(B, A)``, shapes (out_features, rank) and (rank, in_features), in the dtype and on the
        device of ``weight``. No gradient flows.

    Raises:
        TypeError: ``weight`` is not a floating-point tensor, or ``rank`` not an integer.
        ValueError: ``weight`` is not a matrix or holds NaN or infinity; ``rank`` is out of range.
    """
    _check_matrix(weight)
    check_integer("rank", rank, 1, min(weight.shape))
    full = weight.float() if weight.itemsize < 4 else weight  # torch has no SVD for 16-bit types
    u, s, vh = torch.linalg.svd(full, full_matrices=False)  # (out, n), (n,) largest first, (n, in)
    root = s[:rank].sqrt()  # (r,)
    b = u[:, :rank] * root  # (out, r)
    a = root[:, None] * vh[:rank]  # (r, in)
    return b.to(weight.dtype), a.to(weight.dtype)


def energy_captured(singular_values: Tensor, rank: int) -> float:
    """Share of ‖W‖_F² that the best approximation of that rank keeps: Σ_{i≤r} σ_i² / Σ_i σ_i².

    Squares, because ‖W‖_F² = Σ σ_i²: one minus this share is the squared relative error of the
    approximation.

    Args:
        singular_values: all of them, shape (n,), in any order.
        rank: from 1 to n.

    Returns:
        A share in (0, 1].

    Raises:
        TypeError: no tensor of real numbers, or ``rank`` is not an integer.
        ValueError: not a vector of finite values, none negative, one above zero; ``rank`` is out of
            range.
    """
    energy = _scaled(singular_values).square()
    check_integer("rank", rank, 1, len(energy))
    return min(1.0, (energy[:rank].sum() / energy.sum()).item())


def rank_for_energy(singular_values: Tensor, share: float) -> int:
    """The smallest rank whose best approximation keeps at least ``share`` of ‖W‖_F².

    Args:
        singular_values: all of them, shape (n,), in any order.
        share: in (0, 1].

    Raises:
        TypeError, ValueError: as :func:`energy_captured`, or ``share`` is out of range.
    """
    energy = _scaled(singular_values).square().cumsum(0)
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}: 90 % is 0.9")
    return int((energy < share * energy[-1]).sum()) + 1


def effective_rank(singular_values: Tensor) -> float:
    """Roy and Vetterli's effective rank (2007): exp of the entropy of the singular values.

        p_i = σ_i / Σ_j σ_j,  effective rank = exp(−Σ p_i ln p_i)

    How many equally large singular values would be as spread out: n for the identity, 1 for a
    rank-one matrix, never more than the rank. The values themselves are made to sum to one, as in
    the paper, not their squares (with squares the number is never larger).

    Args:
        singular_values: all of them, shape (n,), in any order; zeros count nothing (0·ln 0 = 0).

    Returns:
        A number from 1 to n.

    Raises:
        TypeError, ValueError: as :func:`energy_captured`.
    """
    s = _scaled(singular_values)
    p = s / s.sum()
    return math.exp(torch.special.entr(p).sum().item())  # entr(p) = −p·ln p, and 0 at 0


def stable_rank(singular_values: Tensor) -> float:
    """‖W‖_F² / ‖W‖_2² = Σ σ_i² / σ_1² (Rudelson and Vershynin 2007), from 1 to the rank.

    One large singular value pulls it down to 1. Arguments and errors are those of
    :func:`effective_rank`.
    """
    return _scaled(singular_values).square().sum().item()


def marchenko_pastur_edges(shape: tuple[int, int], std: float) -> tuple[float, float]:
    """Where the singular values of pure noise lie: std·|√m − √n| to std·(√m + √n).

    For an m × n matrix of independent entries; the law of Marchenko and Pastur (1967), exact as m
    and n grow. A singular value above the upper edge is no accident of noise this large.
    """
    m, n = (math.sqrt(side) for side in shape)
    return std * abs(m - n), std * (m + n)


def _check_matrix(weight: Tensor) -> None:
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        kind = str(weight.dtype) if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(
            f"weight must be a tensor of real floating-point numbers, got {kind}: "
            "convert it with .float()"
        )
    if weight.ndim != 2:
        raise ValueError(
            "weight must have two axes (out_features, in_features), "
            f"got shape {tuple(weight.shape)}: flatten it first"
        )
    if not torch.isfinite(weight).all():
        raise ValueError(
            "weight holds NaN or infinite values: it has no singular value decomposition"
        )


def _scaled(singular_values: Tensor) -> Tensor:
    """Checked, in float64, largest first, over the largest: squares neither overflow nor vanish."""
    if not isinstance(singular_values, Tensor) or not singular_values.is_floating_point():
        raise TypeError(
            "singular_values must be a tensor of real numbers from torch.linalg.svdvals, "
            f"got {type(singular_values).__name__}"
        )
    if singular_values.ndim != 1 or singular_values.numel() == 0:
        raise ValueError(
            "singular_values must be a vector of at least one value, "
            f"got shape {tuple(singular_values.shape)}"
        )
    s = singular_values.detach().to("cpu", torch.float64)
    if not torch.isfinite(s).all() or (s < 0).any():
        raise ValueError(
            "singular_values must be finite and not negative: "
            "pass torch.linalg.svdvals(weight), not eigenvalues"
        )
    if s.max() == 0:
        raise ValueError(
            "all singular values are zero: a zero matrix has no energy and no effective rank"
        )
    return s.sort(descending=True).values / s.max()
