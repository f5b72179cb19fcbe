"""Exercise 4: the largest rank at which factors are smaller than the matrix."""

import math
import operator

import torch

from course.checking import Check, but


def largest_saving_rank(out_features: int, in_features: int, *, of_one_rank=operator.add, spared: int = 1, divide=operator.floordiv) -> int:
    """The worked answer: r·(out + in) < out·in, in whole numbers; fewer means at least one number spared."""
    return divide(out_features * in_features - spared, of_one_rank(out_features, in_features))


def by_search(out_features: int, in_features: int) -> int:
    return max(rank for rank in range(in_features) if rank * (out_features + in_features) < out_features * in_features)


def observe(answer, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    shapes = [(64, 64), (6, 3), (1, 5), (128, 512)]
    shapes += [tuple(torch.randint(20, 400, (2,), generator=g).tolist()) for _ in range(6)]
    return {f"a matrix {m} × {n}": answer(m, n) for m, n in shapes}


check = Check(
    task="the largest rank at which factors are smaller than the matrix",
    observe=observe,
    reference=largest_saving_rank,
    second=by_search,
    rtol=0,
    atol=0,
    misconceptions={
        "where out + in divides out·in, factors of that rank are as large as the matrix (6 × 3: rank 2 needs 18 numbers)": but(spared=0),
        "that is the largest rank the matrix can have: its factors need more numbers than the matrix itself": min,
        "half of the smaller side is right for square matrices alone: count r·(out + in) against out·in": lambda m, n: (min(m, n) - 1) // 2,
        "half of the smaller side saves nothing for a square matrix, and is not the border for others: count r·(out + in) against out·in": (
            lambda m, n: min(m, n) // 2
        ),
        "that is the first rank that does not save: you want the one before": but(spared=0, divide=lambda all, one: -(-all // one)),
        "return a whole number: a rank of 31.5 does not exist": but(spared=0, divide=operator.truediv),
        "you counted r² numbers for the factors: B has out·r and A has r·in": but(divide=lambda all, one: math.isqrt(all)),
        "you counted one factor: B has out·r numbers and A has r·in, together r·(out + in)": but(of_one_rank=max),
    },
)
