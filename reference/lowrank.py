"""Low rank: the best small copy of a matrix, how small it may be, and training inside a random subspace.

Every matrix is a sum of rank-one pieces ordered by size, W = Σ_i σ_i u_i v_iᵀ (the singular value decomposition), and no matrix of rank r
is closer to W than the sum of the first r pieces:

    ‖W − W_r‖_F² = σ_{r+1}² + … + σ_n²      (Eckart and Young 1936; Mirsky 1960: the same W_r is best in every unitarily invariant norm)

Written as two thin factors, W_r = B·A with B (out × r) and A (r × in), it needs r·(out + in) numbers instead of out·in: that is all that
LoRA takes from here. The second half of the file asks the same question without a matrix: how many numbers does a *whole training run*
need? It trains θ = θ0 + P·z with a fixed random P and only z free (Li et al. 2018, "Measuring the intrinsic dimension of objective
landscapes").
"""

import math
from typing import Any

import torch
from torch import Tensor, nn


def _check_matrix(weight: Tensor) -> None:
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        kind = str(weight.dtype) if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight must be a tensor of real floating-point numbers, got {kind}: convert it with .float()")
    if weight.ndim != 2:
        raise ValueError(f"weight must have two axes (out_features, in_features), got shape {tuple(weight.shape)}: flatten it first")
    if not torch.isfinite(weight).all():
        raise ValueError("weight holds NaN or infinite values: it has no singular value decomposition")


def _check_rank(rank: int, largest: int, name: str = "rank", smallest: int = 1) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"{name} must be an integer, got {rank!r}")
    if not smallest <= rank <= largest:
        raise ValueError(f"{name} must be between {smallest} and {largest}, got {rank}")


@torch.no_grad()
def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The two thin factors whose product is the best approximation of ``weight`` among all matrices of rank at most ``rank``.

    Each factor gets the *square root* of every singular value, B = U_r·√S_r and A = √S_r·V_rᵀ: columns of B and rows of A are then equally
    long, which keeps both in range in 16 bits and gives gradient descent two factors of the same scale. A sign may move from a column of B
    to the row of A (u and v are defined up to a common sign); the product does not change.

    Args:
        weight: (out_features, in_features), any real floating dtype, on any device.
        rank: from 1 to min(out_features, in_features).

    Returns:
        ``(B, A)``, shapes (out_features, rank) and (rank, in_features), in the dtype and on the device of ``weight``. No gradient flows.

    Raises:
        TypeError: ``weight`` is not a floating-point tensor, or ``rank`` not an integer.
        ValueError: ``weight`` is not a matrix or holds NaN or infinity; ``rank`` is out of range.
    """
    _check_matrix(weight)
    _check_rank(rank, min(weight.shape))
    full = weight.float() if weight.itemsize < 4 else weight  # torch has no SVD for 16-bit types
    u, s, vh = torch.linalg.svd(full, full_matrices=False)  # (out, n), (n,), (n, in); s is sorted, largest first
    root = s[:rank].sqrt()
    b = u[:, :rank] * root  # (out, r)
    a = root[:, None] * vh[:rank]  # (r, in)
    return b.to(weight.dtype), a.to(weight.dtype)


def _scaled(singular_values: Tensor) -> Tensor:
    """Checked, in float64, largest first, divided by the largest: squares can then neither overflow nor vanish."""
    if not isinstance(singular_values, Tensor) or not singular_values.is_floating_point():
        raise TypeError(f"singular_values must be a tensor of real numbers from torch.linalg.svdvals, got {type(singular_values).__name__}")
    if singular_values.ndim != 1 or singular_values.numel() == 0:
        raise ValueError(f"singular_values must be a vector of at least one value, got shape {tuple(singular_values.shape)}")
    s = singular_values.detach().to("cpu", torch.float64)
    if not torch.isfinite(s).all() or (s < 0).any():
        raise ValueError("singular_values must be finite and not negative: pass torch.linalg.svdvals(weight), not eigenvalues")
    if s.max() == 0:
        raise ValueError("all singular values are zero: a zero matrix has no energy to share and no effective rank")
    return s.sort(descending=True).values / s.max()


def energy_captured(singular_values: Tensor, rank: int) -> float:
    """Share of the squared Frobenius norm that the best rank-``rank`` approximation keeps: Σ_{i≤r} σ_i² / Σ_i σ_i².

    Squares, because ‖W‖_F² = Σ σ_i²: one minus this share is the squared relative error of the approximation.

    Args:
        singular_values: all of them, shape (n,), in any order.
        rank: from 1 to n.

    Returns:
        A share in (0, 1].
    """
    energy = _scaled(singular_values).square()
    _check_rank(rank, len(energy))
    return min(1.0, (energy[:rank].sum() / energy.sum()).item())


def rank_for_energy(singular_values: Tensor, share: float) -> int:
    """The smallest rank whose best approximation keeps at least ``share`` (in (0, 1]) of the squared Frobenius norm."""
    energy = _scaled(singular_values).square().cumsum(0)
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}: 90 % is 0.9")
    return int((energy < share * energy[-1]).sum()) + 1


def effective_rank(singular_values: Tensor) -> float:
    """Roy and Vetterli's effective rank (2007): exp of the entropy of the singular values, p_i = σ_i / Σ_j σ_j, −Σ p_i ln p_i in nats.

    How many equally large singular values would be as spread out: n for the identity, 1 for a rank-one matrix, never more than the rank.
    The values themselves are made to sum to one, as in the paper, not their squares (with squares the number is never larger).

    Args:
        singular_values: all of them, shape (n,), in any order; zeros count nothing (0·ln 0 = 0).

    Returns:
        A number from 1 to n.
    """
    s = _scaled(singular_values)
    p = s / s.sum()
    return math.exp(torch.special.entr(p).sum().item())  # entr(p) = −p·ln p, and 0 at 0


def stable_rank(singular_values: Tensor) -> float:
    """‖W‖_F² / ‖W‖_2² = Σ σ_i² / σ_1² (Rudelson and Vershynin 2007): from 1 to the rank; one large singular value pulls it down to 1."""
    return _scaled(singular_values).square().sum().item()


def marchenko_pastur_edges(shape: tuple[int, int], std: float) -> tuple[float, float]:
    """Where the singular values of pure noise lie: std·|√m − √n| to std·(√m + √n), for an m × n matrix of independent entries.

    The law of Marchenko and Pastur (1967), exact as m and n grow. A singular value above the upper edge is no accident of noise this large.
    """
    m, n = (math.sqrt(side) for side in shape)
    return std * abs(m - n), std * (m + n)


class RandomSubspace(nn.Module):
    """A module whose parameters can move only inside a random d-dimensional subspace: θ = θ0 + P·z, and only z (d numbers) is trained.

    P (D × d, D the number of parameters of the module that require gradients) is fixed and has orthonormal columns, so that z and the step
    P·z are equally long and the gradient of z is Pᵀ·(gradient of θ). Two kinds:

    - ``"sparse"``: one non-zero in each row. Every parameter is dealt at random to one of d groups (sizes differ by at most one) and gets a
      random sign; a column is its group's signs over the root of the group's size. Groups don't overlap, so columns are orthonormal
      exactly, and P costs 5 bytes a parameter instead of 4·d. Not uniform over subspaces; unit 01 compares the two.
    - ``"dense"``: the Q of a Gaussian D × d matrix, a subspace drawn uniformly from all of them. The definition, for small modules.

    What it holds: the module with θ0, now frozen; z, the only trainable parameter; P in buffers that are not saved, since the seed gives P
    again. The result of a run is d numbers and a seed. P is drawn on the CPU: one seed gives one P on every device.

    Args:
        module: any module; its parameters that require gradients take part and are frozen, the others stay as they are.
        dimension: d, from 0 (nothing can move) to D.
        seed: decides P.
        projection: "sparse" or "dense".

    Raises:
        TypeError: ``module`` is not a module, ``dimension`` or ``seed`` not an integer.
        ValueError: nothing to train, ``dimension`` out of range, an unknown projection, a module that is already wrapped.
    """

    def __init__(self, module: nn.Module, dimension: int, seed: int = 0, projection: str = "sparse") -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        if any(isinstance(part, RandomSubspace) for part in module.modules()):
            raise ValueError("module is already inside a RandomSubspace: wrap the plain module")
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not trained:
            raise ValueError("module has no parameter that requires gradients: call module.requires_grad_(True) first")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an integer, got {seed!r}")
        if projection not in ("sparse", "dense"):
            raise ValueError(f"projection must be 'sparse' or 'dense', got {projection!r}")
        total = sum(p.numel() for p in trained.values())
        _check_rank(dimension, total, name="dimension", smallest=0)
        first = next(iter(trained.values()))
        dtype = torch.promote_types(first.dtype, torch.float32)  # small steps would be lost in 16 bits
        self.dimension, self.seed, self.projection, self.names = dimension, seed, projection, tuple(trained)
        self.z = nn.Parameter(torch.zeros(dimension, dtype=dtype, device=first.device))
        for name, buffer in self._draw(total, torch.Generator().manual_seed(seed)).items():
            self.register_buffer(name, buffer.to(first.device), persistent=False)
        self.module = module
        for p in trained.values():
            p.requires_grad_(False)

    def _draw(self, total: int, generator: torch.Generator) -> dict[str, Tensor]:
        d = self.dimension
        if self.projection == "dense":
            gaussian = torch.randn(total, d, generator=generator, dtype=self.z.dtype)
            return {"matrix": torch.linalg.qr(gaussian).Q}  # (D, d)
        group = torch.randperm(total, generator=generator) % max(d, 1)  # (D,): dealt like cards
        sign = torch.randint(0, 2, (total,), generator=generator, dtype=torch.int8) * 2 - 1  # (D,): −1 or 1
        size = group.bincount(minlength=d)[:d]  # (d,)
        return {"group": group.int(), "sign": sign, "scale": size.to(self.z.dtype).rsqrt()}

    def expand(self, z: Tensor) -> Tensor:
        """P·z, shape (D,): the step in the space of all trained parameters, in the order of ``names``."""
        if self.projection == "dense":
            return self.matrix @ z
        if self.dimension == 0:
            return z.new_zeros(len(self.group))
        return (self.scale * z).index_select(0, self.group) * self.sign

    def project(self, vector: Tensor) -> Tensor:
        """Pᵀ·vector, shape (d,), for ``vector`` of shape (D,): what the gradient of all parameters becomes for z."""
        if self.projection == "dense":
            return self.matrix.T @ vector
        if self.dimension == 0:
            return vector.new_zeros(0)
        return self.scale * torch.zeros_like(self.scale).index_add(0, self.group, vector * self.sign)

    def parameters_now(self) -> dict[str, Tensor]:
        """θ0 + P·z by parameter name, each in its own dtype; differentiable with respect to z."""
        start = [self.module.get_parameter(name) for name in self.names]
        steps = self.expand(self.z).split([p.numel() for p in start])
        return {name: (p + step.view_as(p)).to(p.dtype) for name, p, step in zip(self.names, start, steps, strict=True)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What ``module`` gives with parameters θ0 + P·z; ``module`` itself keeps θ0."""
        return torch.func.functional_call(self.module, self.parameters_now(), args, kwargs)
