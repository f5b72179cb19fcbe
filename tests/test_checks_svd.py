"""Answers about low rank that nobody listed: right ones in other dress pass, sly wrong ones are refused."""

import math

import numpy as np
import pytest
import torch

from course.checking import NotYet, mistaken
from course.checks import svd as check
from reference.lowrank import effective_rank, rank_for_energy, truncated_svd

in_its_own_dtype = mistaken(check.factors.reference, wide=lambda weight: weight)


@pytest.mark.parametrize(
    "judge, answer",
    [(check.factors, truncated_svd), (check.rank_for_energy, rank_for_energy), (check.effective_rank, effective_rank)],
    ids=["factors", "rank_for_energy", "effective_rank"],
)
def test_the_reference_module_passes(judge, answer):
    for seed in range(3):
        judge._judge(answer, seed)


def by_randomized_svd(oversampled, rounds=2):
    def answer(weight, rank):
        full = weight.float() if weight.itemsize < 4 else weight
        u, s, v = torch.svd_lowrank(full, q=min(rank + oversampled, *weight.shape), niter=rounds)
        root = s[:rank].sqrt()
        return (u[:, :rank] * root).to(weight.dtype), (root[:, None] * v.T[:rank]).to(weight.dtype)

    return answer


@pytest.mark.parametrize("oversampled", [0, 3, 5])
def test_an_approximate_decomposition_is_seen(oversampled):
    """With a few directions to spare it is exact on matrices of half a dozen singular values."""
    for seed in range(5):
        with pytest.raises(NotYet, match=r"B @ A|svd_lowrank starts from random directions"):
            check.factors._judge(by_randomized_svd(oversampled), seed)


def test_a_randomized_decomposition_that_has_converged_passes():
    for seed in range(5):
        check.factors._judge(by_randomized_svd(5, rounds=40), seed)


def in_numpy(s):
    """Returns numpy's own kind of number: float32 for a float32 spectrum."""
    p = s.numpy() / s.numpy().sum()
    p = p[p > 0]
    return np.exp(-(p * np.log(p)).sum())


def in_python(s):
    p = [value / sum(s.tolist()) for value in s.tolist()]
    return math.exp(-sum(value * math.log(value) for value in p if value))


def with_a_guard(s):
    """As people write it: the sum can't be zero, and the logarithm sees no zero."""
    p = s / (s.sum() + 1e-8)
    return torch.exp(-(p * torch.log(p + 1e-12)).sum())


@pytest.mark.parametrize("answer", [in_numpy, in_python, with_a_guard])
def test_other_right_effective_ranks_pass(answer):
    assert not isinstance(in_numpy(torch.ones(3)), float)
    for seed in range(20):
        check.effective_rank._judge(answer, seed)


@pytest.mark.parametrize("least", [1e-3, 1e-4, 1e-6])
def test_a_fixed_threshold_is_refused(least):
    for seed in range(20):
        with pytest.raises(NotYet):
            check.effective_rank._judge(lambda s: effective_rank(s[s > least]) if (s > least).any() else 0.0, seed)


def by_norms(s, share):
    return next(r for r in range(1, len(s) + 1) if s[:r].norm() ** 2 / s.norm() ** 2 >= share)


def by_roots(s, share):
    norms = [math.sqrt(sum(value**2 for value in s.tolist()[:r])) for r in range(1, len(s) + 1)]
    return next(r for r, norm in enumerate(norms, 1) if norm >= math.sqrt(share) * norms[-1])


def by_what_is_lost(s, share):
    return next(r for r in range(1, len(s) + 1) if (s[r:].norm() / s.norm()) ** 2 <= 1 - share)


def by_shares(s, share):
    p = s.square() / s.square().sum()
    return int((p.cumsum(0) < share).sum()) + 1


def by_search(s, share):
    kept = s.square().cumsum(0)
    return int(torch.searchsorted(kept, share * kept[-1])) + 1


@pytest.mark.parametrize("answer", [by_norms, by_roots, by_what_is_lost, by_shares, by_search])
def test_other_right_counts_pass(answer):
    """In float32, and in any order: no share is so near to what a rank keeps that rounding decides."""
    for seed in range(20):
        check.rank_for_energy._judge(answer, seed)


def update_rounded(difference, factors, update):
    """``keep_update`` in float32, but for one more rounding of one of its steps to the weight's dtype."""

    def answer(before, after, rank):
        def rounded(x, now):
            return x.to(before.dtype).float() if now else x

        b, a = truncated_svd(rounded(after.float() - before.float(), difference), rank)
        return (before.float() + rounded(rounded(b, factors) @ rounded(a, factors), update)).to(before.dtype)

    return answer


@pytest.mark.parametrize("step", range(3), ids=["difference", "factors", "update"])
def test_each_rounding_too_many_is_seen(step):
    for seed in range(10):
        with pytest.raises(NotYet, match="rounded more than once"):
            check.keep_update._judge(update_rounded(*(i == step for i in range(3))), seed)


def test_an_update_rounded_once_passes():
    for seed in range(10):
        check.keep_update._judge(update_rounded(False, False, False), seed)


def always_float32(weight, rank):
    b, a = truncated_svd(weight.float(), rank)
    return (b.to(weight.dtype), a.to(weight.dtype)) if weight.dtype is torch.bfloat16 else (b, a)


def half_forgotten(weight, rank):
    b, a = in_its_own_dtype(weight.float() if weight.dtype is torch.bfloat16 else weight, rank)
    return b.to(weight.dtype), a.to(weight.dtype)


@pytest.mark.parametrize(
    "answer, words", [(always_float32, "float64 weight came back in float32"), (half_forgotten, "float16 matrix.*not implemented")]
)
def test_factors_in_other_dtypes_are_looked_at(answer, words):
    for seed in range(3):
        with pytest.raises(NotYet, match=words):
            check.factors._judge(answer, seed)


def test_torchs_own_refusal_is_not_taken_for_an_unwritten_answer():
    with pytest.raises(NotYet, match="no SVD for 16-bit types: decompose"):
        check.factors(in_its_own_dtype)
    with pytest.raises(NotYet, match="nothing here yet"):
        check.keep_update(unwritten)


def unwritten(*arguments):
    raise NotImplementedError()


def test_nearest_is_strict():
    exact = torch.randn(200, dtype=torch.float64)
    rounded = exact.to(torch.bfloat16)
    assert check.nearest(rounded, exact)
    assert not check.nearest(torch.nextafter(rounded, torch.full_like(rounded, math.inf)), exact)


def upwards(weight, rank):
    """As eigh sorts: the largest of the kept pieces comes last."""
    full = weight.double()
    values, u = torch.linalg.eigh(full @ full.T)
    u, root = u[:, -rank:], values[-rank:].clamp(min=0) ** 0.25
    return (u * root).to(weight.dtype), ((u / root).T @ full).to(weight.dtype)


def half_of_the_smaller_side(out_features, in_features):
    return int(0.5 * min(out_features, in_features))


@pytest.mark.parametrize(
    "judge, answer, words",
    [(check.factors, upwards, "in another order"), (check.break_even, half_of_the_smaller_side, "half of the smaller side saves nothing")],
)
def test_usual_slips_are_named(judge, answer, words):
    for seed in range(5):
        with pytest.raises(NotYet, match=words):
            judge._judge(answer, seed)
