"""Exercise 2: a weighted sum of adapters that is one adapter again, exactly."""

import math

import torch
from torch import Tensor

from course.checking import Check, NotYet, Seen, but, unpacked

Factors = tuple[Tensor, Tensor, float]  # A (r, in), B (out, r), s


def weighted_sum(
    adapters: list[Factors],
    weights: list[float],
    *,
    share=lambda w, s: w * s,
    share_of_B=lambda w, s: 1.0,
    join=lambda As, Bs: (torch.cat(As), torch.cat(Bs, 1)),
    norm=lambda weights: weights,
) -> tuple[Tensor, Tensor]:
    """The worked answer: A's below each other, each times w·s; B's side by side."""
    weights = norm(weights)
    As = [share(w, s) * A for (A, _, s), w in zip(adapters, weights, strict=True)]
    Bs = [share_of_B(w, s) * B for (_, B, s), w in zip(adapters, weights, strict=True)]
    return join(As, Bs)


def by_B(adapters: list[Factors], weights: list[float]) -> tuple[Tensor, Tensor]:
    """The weights in B, and the adapters in another order."""
    pairs = list(zip(adapters, weights, strict=True))[::-1]
    return torch.cat([A for (A, _, _), _ in pairs]), torch.cat([w * s * B for (_, B, s), w in pairs], 1)


def added(As: list[Tensor], Bs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Factor to factor; where ranks differ, the shorter is filled up with zeros."""
    r = max(len(A) for A in As)
    A = sum(torch.cat([A, A.new_zeros(r - len(A), A.shape[1])]) for A in As)
    return A, sum(torch.cat([B, B.new_zeros(len(B), r - B.shape[1])], 1) for B in Bs)


def cut(As: list[Tensor], Bs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The best copy of the largest rank among them."""
    U, sigma, V = torch.linalg.svd(torch.cat(Bs, 1) @ torch.cat(As), full_matrices=False)
    r = max(map(len, As))
    return sigma[:r, None] * V[:r], U[:, :r]


def root(w: float, s: float) -> float:
    return math.sqrt(abs(w * s))


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)
    for ranks, weights in (((3, 3), [0.7, 0.3]), ((2, 4, 1), [1.0, 1.0, 0.5]), ((3, 2), [1.0, -0.5]), ((2,), [1.0])):
        adapters = [
            (torch.randn(r, 7, generator=g), torch.randn(8, r, generator=g), 0.5 + torch.rand(1, generator=g).item()) for r in ranks
        ]
        A, B = unpacked(answer(adapters, weights), "two tensors, A and B", Tensor, Tensor)
        what = f"of {len(ranks)} adapters of rank {', '.join(map(str, ranks))} with the weights {', '.join(map(str, weights))}"
        if not (A.dim() == B.dim() == 2 and len(A) == B.shape[1] and (len(B), A.shape[1]) == (8, 7)):
            raise NotYet(f"A is {tuple(A.shape)} and B {tuple(B.shape)}: of a layer (8, 7) A is (rank, 7) and B (8, rank)")
        yield f"B·A {what}", B @ A
        yield f"by how much the rank {what} is larger than all ranks together", max(0, len(A) - sum(ranks))


check = Check(
    task="a weighted sum of adapters as one adapter, exact for any ranks and signs",
    observe=observe,
    reference=weighted_sum,
    second=by_B,
    rtol=1e-4,
    atol=1e-5,
    misconceptions={
        "A was added to A and B to B: (B₁ + B₂)(A₁ + A₂) holds B₁A₂ and B₂A₁ too, which nobody trained; stack them instead": but(
            join=added
        ),
        'factor by factor with √w on each, as peft\'s "linear" does: the cross terms B₁A₂ and B₂A₁ remain; stack the factors': but(
            join=added, share=lambda w, s: math.copysign(root(w, s), w), share_of_B=root
        ),
        "the sum was cut to the rank of one adapter: that is the closest of this rank, and not exact; stacked, the rank is the sum": but(
            join=cut
        ),
        "the weight is in A and in B, so it counts squared: put it in one of them": but(
            share=lambda w, s: w * s, share_of_B=lambda w, s: w
        ),
        "weight and scale are in A and in B, so both count squared: put them in one of the two": but(share_of_B=lambda w, s: w * s),
        "the adapters' own scales are missing: ΔW is s·B·A, and the result has the scale 1": but(share=lambda w, s: w),
        "the weights have no effect: multiply each A, or each B, by its own": but(share=lambda w, s: s),
        "the scale counts twice: s belongs in A or in B, not in both": but(share_of_B=lambda w, s: s),
        "the sign of a negative weight got lost: √|w| on both sides loses it; multiply one side by w": but(share=root, share_of_B=root),
        "the weights were made to add up to one: a weighted sum takes them as they are": but(
            norm=lambda weights: [w / sum(weights) for w in weights]
        ),
        "the result is divided by how many adapters there are: that is a mean; the weights say how much of each": but(
            norm=lambda weights: [w / len(weights) for w in weights]
        ),
        "α/r of the new adapter was applied to it: its rank is the sum of ranks, and its scale must be 1": but(
            join=lambda As, Bs: (torch.cat(As) / sum(map(len, As)), torch.cat(Bs, 1))
        ),
    },
)
