"""Several adapters made into one: by definition, and by the shortcut that changes the result.

What a weighted sum of adapters should be is plain: the updates are summed,

    ΔW = Σ_i w_i · ΔW_i = Σ_i w_i·s_i · B_i·A_i.

Stacking the factors gives just that, at rank Σ r_i, with nothing lost ("cat"); its best copy of a
smaller rank comes from a singular value decomposition ("svd"). The shortcut "linear" averages A's
and B's *apart*, which keeps the rank and is not a sum of updates: (a₁B₁ + a₂B₂)(a₁A₁ + a₂A₂) holds
a₁a₂(B₁A₂ + B₂A₁) too, products of one adapter's B with another's A, which nobody trained.

Other rules than the sum (TIES, DARE, pruning by magnitude: :mod:`reference.multi_lora.rules`) ask
which *entries* to take. Those of ΔW mean something. Those of A and B don't: −B and −A are the same
adapter, and give another result. So here a rule works on ΔW, unless told ``on="factors"``, which is
what peft's ``add_weighted_adapter`` does under the names "linear", "ties", "dare_linear",
"dare_ties" and "magnitude_prune" (its "..._svd" are the rules on ΔW).

The result has the scale 1. peft's has lora_alpha = r, which is the scale 1 by α/r; by rsLoRA's α/√r
it is √r, so every combination of rsLoRA adapters comes out √r too large there (0.21.2).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from reference.arguments import check_integer, check_number
from reference.lowrank import truncated_svd
from reference.multi_lora.factors import Adapter, Factors
from reference.multi_lora.rules import RULES, check_rule, merge_tensors

METHODS = ("cat", "svd", *RULES)


def combine(
    adapters: Sequence[Factors],
    weights: Sequence[float],
    method: str = "cat",
    rank: int | None = None,
    density: float | None = None,
    sign: str = "total",
    on: str = "update",
    generator: torch.Generator | None = None,
) -> Factors:
    """One layer's factors out of several adapters' ones for it.

    Args:
        adapters: of one layer; ranks may differ, except with ``on="factors"``.
        weights: a number for each, of any sign. The adapters' own scales are taken along.
        method: "cat", "svd", or a rule: "linear", "ties", "dare_linear", "dare_ties",
            "magnitude_prune".
        rank: of the result, of "svd" and of rules on the update; default: the largest of the
            adapters'. What is beyond it is cut off. "cat" has Σ r_i, a rule on factors r.
        density, sign, generator: see :func:`reference.multi_lora.rules.merge_tensors`.
        on: "update", or "factors" for peft's shortcut.

    Returns:
        Factors with the scale 1, in the dtype of the first adapter's.

    Raises:
        ValueError: no adapter; another number of weights; layers of other sizes; a setting that is
            unknown, missing or of no use to the method; a rank out of range, or ranks that differ
            where they may not.
        TypeError: a weight is not a number, an adapter not :class:`Factors`.
    """
    _check(adapters, weights, method, rank, density, sign, on)
    if on == "factors":
        return _on_factors(adapters, weights, method, density, sign, generator)
    if method in ("cat", "svd", "linear"):  # the sum: no ΔW is needed
        whole = _stack(adapters, weights)
        return whole if method == "cat" else _compress(whole, rank or max(a.r for a in adapters))
    delta = merged_update(adapters, weights, method, density, sign, generator)
    B, A = truncated_svd(delta, rank or min(*delta.shape, max(a.r for a in adapters)))
    dtype = adapters[0].A.dtype
    return Factors(A.to(dtype), B.to(dtype))


def merged_update(
    adapters: Sequence[Factors],
    weights: Sequence[float],
    method: str = "linear",
    density: float | None = None,
    sign: str = "total",
    generator: torch.Generator | None = None,
) -> Tensor:
    """ΔW (out, in) by a rule on the updates, dense and of any rank: what ``combine`` cuts down.

    Args, Raises: as for :func:`combine`; "cat" and "svd" are both "linear" before a cut.
    """
    _check(adapters, weights, method, None, density, sign, "update")
    rule = "linear" if method in ("cat", "svd") else method
    deltas = [adapter.delta() for adapter in adapters]
    return merge_tensors(deltas, list(weights), rule, density, sign, generator)


def combine_adapters(
    adapters: Sequence[Adapter], weights: Sequence[float], **settings
) -> dict[str, Factors]:
    """The same for whole adapters: layer's name -> factors. Settings: of :func:`combine`.

    A layer that an adapter leaves alone has no update there, which adds nothing to a sum.

    Raises:
        ValueError, TypeError: as for ``combine``, with the layer's name.
    """
    if len(adapters) != len(weights):
        raise ValueError(f"weights: {len(weights)} numbers for {len(adapters)} adapters")
    names, found = list(dict.fromkeys(name for adapter in adapters for name in adapter)), {}
    for name in names:
        have = [(a[name], w) for a, w in zip(adapters, weights, strict=True) if name in a]
        try:
            found[name] = combine([a for a, _ in have], [w for _, w in have], **settings)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
    if not found:
        raise ValueError("adapters must hold at least one layer between them")
    return found


def _stack(adapters: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Σ w_i·s_i·B_i·A_i as one product: A's below each other, B's side by side."""
    dtype = adapters[0].A.dtype
    A = torch.cat([a.A * (w * a.scaling) for a, w in zip(adapters, weights, strict=True)])
    B = torch.cat([a.B for a in adapters], 1)  # (out, Σr)
    return Factors(A.to(dtype), B.to(dtype))


def _compress(factors: Factors, rank: int) -> Factors:
    """The closest update of that rank, without ever forming ΔW.

    B = Q·R and Aᵀ = P·S with orthonormal columns in Q and P, so ΔW's singular values are those of
    R·Sᵀ, which is Σr × Σr.
    """
    wide = torch.promote_types(factors.A.dtype, torch.float32)
    Q, R = torch.linalg.qr(factors.B.to(wide))  # (out, k), (k, Σr)
    P, S = torch.linalg.qr(factors.A.T.to(wide))  # (in, k'), (k', Σr)
    inner = R @ S.T  # (k, k')
    left, right = truncated_svd(inner, min(rank, *inner.shape))
    return Factors((right @ P.T).to(factors.A.dtype), (Q @ left).to(factors.A.dtype))


def _on_factors(
    adapters: Sequence[Factors],
    weights: Sequence[float],
    method: str,
    density: float | None,
    sign: str,
    generator: torch.Generator | None,
) -> Factors:
    """The rule on A's, and for itself on B's: √|w·s| goes to each side, its sign to A."""
    scaled = [w * a.scaling for a, w in zip(adapters, weights, strict=True)]
    half = [math.sqrt(abs(w)) for w in scaled]
    signed = [-root if w < 0 else root for w, root in zip(scaled, half, strict=True)]
    A = merge_tensors([a.A for a in adapters], signed, method, density, sign, generator)
    B = merge_tensors([a.B for a in adapters], half, method, density, sign, generator)
    return Factors(A.to(adapters[0].A.dtype), B.to(adapters[0].A.dtype))


def _check(adapters, weights, method, rank, density, sign, on) -> None:
    if not adapters:
        raise ValueError("adapters must hold at least one, got none")
    for i, adapter in enumerate(adapters):
        if not isinstance(adapter, Factors):
            raise TypeError(f"adapters[{i}] must be Factors, got {type(adapter).__name__}")
        if adapter.sizes != adapters[0].sizes:
            both = f"{adapter.sizes} and {adapters[0].sizes}"
            raise ValueError(f"adapters[{i}] is of a layer of other sizes (out, in): {both}")
    if len(weights) != len(adapters):
        raise ValueError(f"weights: {len(weights)} numbers for {len(adapters)} adapters")
    for i, weight in enumerate(weights):
        check_number(f"weights[{i}]", weight)
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if on not in ("update", "factors"):
        raise ValueError(f"on must be 'update' or 'factors', got {on!r}")
    check_rule(method, density, sign)
    ranks = [adapter.r for adapter in adapters]
    if on == "factors":
        if method in ("cat", "svd"):
            raise ValueError(f"{method!r} is no rule for entries: leave out on='factors'")
        if len(set(ranks)) > 1:
            words = "on='factors' adds A to A, so ranks must be equal"
            raise ValueError(f"{words}, got {ranks}: use on='update'")
    if rank is not None:
        if on == "factors" or method == "cat":
            raise ValueError(f"rank={rank!r} has no use here: the factors' ranks give the result's")
        most = min(adapters[0].sizes)
        if method in ("svd", "linear"):
            most = min(most, sum(ranks))
        check_integer("rank", rank, 1, most)
