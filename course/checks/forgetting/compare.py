"""Exercise 6: which of two methods forgets less, at equal learning."""

import math
import statistics

import torch
from scipy.stats import norm, t

from course.checking import Check, Seen, but
from course.checks.qlora.shared import entries
from course.lab.forgetting import at_equal_learning, mean_of

Path = tuple[list[float], list[float]]  # losses along a run: on the new task, on the old one


def first_crossing(new: list[float], level: float) -> int | None:
    return next((i for i, value in enumerate(new) if value <= level), None)


def last_crossing(new: list[float], level: float) -> int | None:
    return next((i for i in range(len(new) - 1, 0, -1) if new[i - 1] > level >= new[i]), None)


def between(new: list[float], old: list[float], i: int, level: float) -> float:
    share = (new[i - 1] - level) / (new[i - 1] - new[i])
    return old[i - 1] + share * (old[i] - old[i - 1])


def compare(
    runs_a: list[Path],
    runs_b: list[Path],
    level: float,
    *,
    crossing=first_crossing,
    read=between,
    start=lambda old: old[0],
    unreached=lambda new, old: None,
    spread=lambda a, b, differences: statistics.stdev(differences) / math.sqrt(len(differences)),
    quantile=lambda n: t.ppf(0.975, n - 1),
    decide=lambda low, high, mean: "a" if high < 0 else "b" if low > 0 else "not shown",
) -> dict[str, float | str | None]:
    """The worked answer: forgetting where the level is first reached, seed by seed, and a paired interval."""

    def forgotten(path: Path) -> float | None:
        new, old = path
        i = crossing(new, level)
        return unreached(new, old) if i is None else read(new, old, i, level) - start(old)

    a, b = [forgotten(path) for path in runs_a], [forgotten(path) for path in runs_b]
    if None in a or None in b:
        return {"a": None, "b": None, "low": None, "high": None, "less": "not reached"}
    differences = [one - other for one, other in zip(a, b, strict=True)]
    mean = statistics.fmean(differences)
    half = quantile(len(a)) * spread(a, b, differences)
    low, high = mean - half, mean + half
    return {"a": statistics.fmean(a), "b": statistics.fmean(b), "low": low, "high": high, "less": decide(low, high, mean)}


def by_the_lab(runs_a: list[Path], runs_b: list[Path], level: float) -> dict:
    forgotten = []
    for runs in (runs_a, runs_b):
        read = [(at_equal_learning(*path, level), path[1][0]) for path in runs]
        if any(loss is None for loss, _ in read):
            return dict.fromkeys(("a", "b", "low", "high")) | {"less": "not reached"}
        forgotten.append([loss - before for loss, before in read])
    found = mean_of([a - b for a, b in zip(*forgotten, strict=True)])
    less = "not shown" if found.low <= 0 <= found.high else "a" if found.mean < 0 else "b"
    return {"a": mean_of(forgotten[0]).mean, "b": mean_of(forgotten[1]).mean, "low": found.low, "high": found.high, "less": less}


def two_samples(a: list[float], b: list[float], differences: list[float]) -> float:
    return math.sqrt((statistics.variance(a) + statistics.variance(b)) / len(a))


def paths(g: torch.Generator, seeds: int, slope: float, noise: float, shared: torch.Tensor, ends: float) -> list[Path]:
    """Runs that go down to ``ends`` and forget ``slope`` for each nat learned, with a bump up near the end."""
    found = []
    for seed in range(seeds):
        new = torch.linspace(3.0, ends, 7) + 0.02 * torch.rand(7, generator=g)
        new = torch.cat([new, new[-1:] + 0.7, new[-1:] + 0.01])
        learned = 3.0 - torch.linspace(3.0, ends, 7)
        start = 0.3 + 0.2 * torch.rand((), generator=g)
        rate = slope + shared[seed] + noise * torch.randn((), generator=g)
        old = start + rate * torch.cat([learned, learned[-1:] + 0.6, learned[-1:] + 1.0]) ** 2 / 3
        old[0] = start
        found.append((new.tolist(), old.tolist()))
    return found


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)
    keys = ("a", "b", "low", "high", "less")
    cases = (
        ("a forgets less, and seeds that are hard are hard for both", (0.5, 0.8), 0.02, 0.5, (0.3, 0.3)),
        ("b forgets less", (0.9, 0.6), 0.03, 0.3, (0.3, 0.3)),
        ("a forgets a little less in the mean, and seeds differ more", (0.60, 0.62), 0.25, 0.1, (0.3, 0.3)),
        ("a learns far less by the end", (0.8, 0.5), 0.03, 0.3, (0.72, 0.1)),
    )
    for name, slopes, noise, common, ends in cases:
        seeds = int(torch.randint(4, 8, (), generator=g))
        shared = common * torch.rand(seeds, generator=g)
        a, b = (paths(g, seeds, slope, noise, shared, end) for slope, end in zip(slopes, ends, strict=True))
        yield f"{name} ({seeds} seeds, level 0.8)", entries(answer(a, b, 0.8), *keys)
    a, b = (paths(g, 5, 0.5, 0.02, torch.zeros(5), end) for end in (0.3, 1.2))
    yield "b never comes down to the level", entries(answer(a, b, 0.8), *keys)


check = Check(
    task="which of two methods forgets less where both have learned as much",
    observe=observe,
    reference=compare,
    second=by_the_lab,
    misconceptions={
        "you compare the ends of the runs, where a method that learns less looks better: read where the new loss reaches the level": but(
            crossing=lambda new, level: len(new) - 1 if min(new) <= level else None, read=lambda new, old, i, level: old[i]
        ),
        "you took the *last* time that a run comes down to the level. It could have stopped earlier: take the first": but(
            crossing=last_crossing
        ),
        "you read the old loss at the next measurement. Interpolate: the level was crossed between two of them": but(
            read=lambda new, old, i, level: old[i]
        ),
        "you return the old loss itself. What was forgotten is its rise above the start of the run": but(start=lambda old: 0.0),
        "the interval is that of two separate samples. Seeds are pairs: subtract seed by seed first": but(spread=two_samples),
        "the spread is not divided by √n: the interval is about the mean, not about single seeds": but(
            spread=lambda a, b, differences: statistics.stdev(differences)
        ),
        "the deviation is taken with n: use n − 1, since the mean was taken from the same numbers": but(
            spread=lambda a, b, differences: statistics.pstdev(differences) / math.sqrt(len(differences))
        ),
        "the spread is divided by n: the standard error of a mean is stdev/√n": but(
            spread=lambda a, b, differences: statistics.stdev(differences) / len(differences)
        ),
        "Student's t has n − 1 degrees of freedom, not n": but(quantile=lambda n: t.ppf(0.975, n)),
        "1.96 is the normal distribution's. With a few seeds take Student's t": but(quantile=lambda n: norm.ppf(0.975)),
        "the interval is one-sided: with 2.5 % left out at each end the quantile is that of 0.975": but(
            quantile=lambda n: t.ppf(0.95, n - 1)
        ),
        "you decide by the mean alone. Where the interval holds zero nothing is shown": but(
            decide=lambda low, high, mean: "a" if mean < 0 else "b"
        ),
        "the signs are mixed up: a − b below zero says that *a* forgot less": but(
            decide=lambda low, high, mean: "b" if high < 0 else "a" if low > 0 else "not shown"
        ),
        'a run that never reaches the level was read at its end. It can\'t be compared there: say "not reached"': but(
            unreached=lambda new, old: old[-1] - old[0]
        ),
    },
)
