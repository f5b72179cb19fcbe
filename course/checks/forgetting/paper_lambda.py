"""Exercise 3: the paper's λ for a library's."""

import math
import random

from course.checking import Check, Seen, but

REDUCTIONS = ("mean", "sum", "padded", "batch")


def of_mean(rows: int, batch: int) -> float:
    return 1.0


def of_sum(rows: int, batch: int) -> float:
    return float(rows)


def of_padded(rows: int, batch: int) -> float:
    return rows / (math.ceil(rows / batch) * batch)


def of_batch(rows: int, batch: int) -> float:
    return 1 / batch


def paper_lambda(
    lam: float,
    half: bool,
    reduction: str,
    rows: int,
    batch: int,
    *,
    mean=of_mean,
    total=of_sum,
    padded=of_padded,
    squared=of_batch,
    twice=lambda half: 1.0 if half else 2.0,
) -> float:
    """The worked answer: 2 where there is no ½, times the library's F over the mean of the rows' squares."""
    size = dict(zip(REDUCTIONS, (mean, total, padded, squared), strict=True))[reduction](rows, batch)
    return lam * twice(half) * size


def by_cases(lam: float, half: bool, reduction: str, rows: int, batch: int) -> float:
    if reduction == "sum":
        lam *= rows
    if reduction == "padded":
        lam = lam * rows / (batch * -(-rows // batch))
    if reduction == "batch":
        lam /= batch
    return lam if half else lam + lam


def observe(answer, seed: int) -> Seen:
    rng = random.Random(seed)
    for reduction in REDUCTIONS:
        for half in (True, False):
            batch = rng.choice([8, 16, 32])
            rows = batch * rng.randint(3, 9) + (rng.randint(1, 5) if reduction == "padded" else 0)
            lam = round(rng.uniform(0.3, 40), 3)
            name = f"{reduction}, {'with' if half else 'without'} the ½: λ = {lam}, {rows} rows, batches of {batch}"
            yield name, answer(lam, half, reduction, rows, batch)


check = Check(
    task="the paper's λ for a library's λ",
    observe=observe,
    reference=paper_lambda,
    second=by_cases,
    misconceptions={
        "the ½ goes the wrong way: a library without it penalises twice as much at the same λ, so the paper's λ is twice as large": but(
            twice=lambda half: 1.0 if half else 0.5
        ),
        "whether the library has the ½ makes no difference to your answer; it is a factor of 2": but(twice=lambda half: 1.0),
        "the ½ is taken into account where the library has it: the paper has it too": but(twice=lambda half: 0.5 if half else 1.0),
        "sum: a sum over rows is larger than the mean, so the paper needs a *larger* λ, times the rows": but(total=lambda n, b: 1 / n),
        "batch: the square of a mean of B gradients is about 1/B of the mean of their squares, not B times": but(
            squared=lambda n, b: float(b)
        ),
        "batch: it shrinks with the size of a batch, not with the number of rows": but(squared=lambda n, b: 1 / n),
        "batch: the variance of a mean of B is 1/B of one's, and F is a variance; you took 1/B²": but(squared=lambda n, b: 1 / b**2),
        "padded: the last, short batch counts as a whole one: round the number of batches up": but(padded=lambda n, b: n / (n // b * b)),
        "padded: the sum over rows is divided by batches · batch size, which is nearly the mean: the factor is near 1": but(
            padded=lambda n, b: 1 / (math.ceil(n / b) * b)
        ),
    },
)
