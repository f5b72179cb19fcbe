"""Exercise 2: the smallest rank that keeps a share of the energy."""

import math

import torch
from torch import Tensor

from course.checking import Check, Seen, but
from course.checks.svd.shared import as_given


def rank_for_energy(
    singular_values: Tensor, share: float, *, size=torch.square, measure=as_given, too_little=torch.lt, offset: int = 1
) -> int:
    """The worked answer: count the ranks that keep too little; the next one is enough."""
    kept = measure(size(singular_values.double()).cumsum(0))  # by rank 1, 2, …
    return int(too_little(kept, share * kept[-1]).sum()) + offset


def by_loop(singular_values: Tensor, share: float) -> int:
    energy = [value**2 for value in singular_values.tolist()]
    return next(rank for rank in range(1, len(energy) + 1) if math.fsum(energy[:rank]) >= share * math.fsum(energy))


def spectrum_away_from(shares: tuple[float, ...], n: int, g: torch.Generator) -> Tensor:
    """Decaying singular values of which no rank keeps one of ``shares`` so nearly that float32's rounding decides."""
    while True:
        s = (torch.linspace(0, -3, n).exp() * (0.8 + 0.4 * torch.rand(n, generator=g))).sort(descending=True).values
        kept = s.double().square().cumsum(0)
        if (kept[:, None] / kept[-1] - torch.tensor(shares)).abs().min() > 1e-5:
            return s


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)
    # A share that is reached exactly, not passed: its squares, sums and the norms of both are powers of two, exact in any order.
    yield "sixteen equal singular values, share 0.25", answer(torch.ones(16), 0.25)
    yield "one singular value, share 0.9", answer(torch.tensor([2.0]), 0.9)
    shares = (0.5, 0.9, 0.99)
    for n in (12, 30, 48):
        s = spectrum_away_from(shares, n, g)
        for share in shares:
            yield f"{n} decaying singular values, share {share}", answer(s, share)
    yield "the singular values 3, 2, 1, 1, 1, share 1", answer(torch.tensor([3.0, 2.0, 1.0, 1.0, 1.0]), 1.0)  # 9 + 4 + 3 = 16


check = Check(
    task="the smallest rank that keeps a share of the energy",
    observe=observe,
    reference=rank_for_energy,
    second=by_loop,
    rtol=0,
    atol=0,
    misconceptions={
        "you added up σ: energy is the sum of σ², because ‖W‖_F² = Σ σ²": but(size=as_given),
        "σ was squared twice: svdvals gives σ itself, so square once": but(size=lambda s: s**4),
        "one too few: you counted the ranks that fall short; the answer is the next one": but(offset=0),
        "one too many: a share that is reached exactly is enough (at least, not more than)": but(too_little=torch.le),
        "you compared the share with ‖W_r‖ / ‖W‖: energy is the square of that ratio": but(measure=torch.sqrt),
        "you started from the smallest singular value: the largest ones keep the most": but(size=lambda s: s.flip(0).square()),
        "you compared each σ with the largest one: energy is a share of the sum over all": (
            lambda singular_values, share: int((singular_values >= (1 - share) * singular_values.max()).sum())
        ),
    },
)
