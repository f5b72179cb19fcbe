"""Answers that nobody listed: right ones in other dress pass, sly wrong ones are refused. And the worked answers against the modules."""

import heapq
import math
import random
import statistics

import numpy as np
import pytest
import torch
from scipy import stats
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from course.checking import NotYet, mistaken
from course.checks import forgetting as check
from course.checks.forgetting.compare import compare, paths
from course.checks.forgetting.ewc import OnlineEWC
from course.checks.forgetting.fisher import a_model, fisher_diagonal
from course.checks.forgetting.paper_lambda import paper_lambda
from course.checks.forgetting.project import project
from course.checks.forgetting.reservoir import TRIALS, ByPriorities, Reservoir
from course.lab.forgetting import at_equal_learning
from reference import ewc as module
from reference.rehearsal import ReplayBuffer, project_gradient


def refused(judge, answer, words):
    with pytest.raises(NotYet, match=words):
        judge(answer)


# the Fisher


def by_vmap(model, x, y, estimator):
    """All rows and answers at once, by torch.func."""
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def log_p(p, row, c):
        return functional_call(model, p, (row[None],)).log_softmax(-1)[0].gather(0, c[None])[0]

    if estimator == "batch":
        found = grad(lambda p: F.cross_entropy(functional_call(model, p, (x,)), y))(trained)
        return {n: g**2 for n, g in found.items()}
    per_row = vmap(grad(log_p), (None, 0, 0))
    if estimator == "empirical":
        return {n: (g**2).mean(0) for n, g in per_row(trained, x, y).items()}
    p = model(x).softmax(-1).detach()
    total = {n: torch.zeros_like(v) for n, v in trained.items()}
    for c in range(p.shape[1]):
        for n, g in per_row(trained, x, torch.full_like(y, c)).items():
            total[n] += (p[:, c].view(-1, *[1] * (g.dim() - 1)) * g**2).mean(0)
    return total


def test_the_fisher_by_other_ways():
    for seed in range(3):
        check.fisher._judge(by_vmap, seed)
        check.fisher._judge(lambda m, x, y, e: module.fisher_diagonal(m, [(x, y)], e), seed)


def with_backward(model, x, y, estimator):
    """Right numbers, by .backward(): what was in .grad is gone."""
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return fisher_diagonal(model, x, y, estimator)


def test_a_fisher_that_is_nearly_right():
    refused(check.fisher, with_backward, "whether gradients that were there are still there")
    refused(check.fisher, mistaken(fisher_diagonal, which=lambda p: True), "raised|too many")
    refused(check.fisher, lambda m, x, y, e: {n: F.sqrt() for n, F in fisher_diagonal(m, x, y, e).items()}, "values differ|expected")
    refused(check.fisher, lambda m, x, y, e: list(fisher_diagonal(m, x, y, e).values()), "expected a dictionary")
    refused(check.fisher, lambda m, x, y, e: None, "expected a dictionary")


def test_the_worked_fisher_is_the_modules():
    g = torch.Generator().manual_seed(0)
    model, x, y = a_model(g), torch.randn(6, 4, generator=g), torch.randint(3, (6,), generator=g)
    for estimator in ("exact", "empirical", "batch"):
        ours, theirs = fisher_diagonal(model, x, y, estimator), module.fisher_diagonal(model, [(x, y)], estimator)
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-7)


# EWC


class InOneVector:
    def __init__(self, model, lam, gamma):
        if not lam >= 0:
            raise ValueError("lam")
        self.m, self.lam, self.gamma, self.F = model, lam, gamma, 0.0
        self.at = self.flat().detach()

    def flat(self):
        return torch.cat([p.flatten() for p in self.m.parameters()])

    def consolidate(self, fisher):
        self.F = self.gamma * self.F + torch.cat([fisher[n].flatten() for n, _ in self.m.named_parameters()])
        self.at = self.flat().detach().clone()

    def penalty(self):
        return 0.5 * self.lam * (self.F * (self.flat() - self.at) ** 2).sum()


def test_ewc_as_one_vector():
    for seed in range(3):
        check.ewc._judge(InOneVector, seed)


def test_an_ewc_that_is_nearly_right():
    class SumOfTasks(OnlineEWC):
        """A penalty for each task, each with its own centre: another method."""

        def consolidate(self, fisher):
            self.parts = [*getattr(self, "parts", []), ({n: F.clone() for n, F in fisher.items()}, self.now())]
            self.fisher = fisher

        def penalty(self):
            if self.fisher is None:
                return torch.zeros(())
            named = dict(self.model.named_parameters())
            return self.lam / 2 * sum((F[n] * (named[n] - at[n]) ** 2).sum() for F, at in self.parts for n in F)

    class Borrowed(OnlineEWC):
        """Keeps the caller's own Fisher."""

        def consolidate(self, fisher):
            super().consolidate(fisher)
            if self.fisher and not hasattr(self, "second"):
                self.fisher, self.second = fisher, True

    refused(check.ewc, SumOfTasks, "the penalty right after the second task")
    refused(check.ewc, Borrowed, "the caller's own tensor")
    refused(check.ewc, mistaken(OnlineEWC, penalty=lambda self: OnlineEWC.penalty(self).item()), "")


# λ


def test_lambdas_by_definition():
    """The factor is the ratio of two sums that are taken here for real."""
    rows, batch = 37, 8
    squares = torch.rand(rows)
    mean, padded = squares.mean(), squares.sum() / (len(list(squares.split(batch))) * batch)
    assert paper_lambda(3.0, True, "padded", rows, batch) == pytest.approx(3.0 * (padded / mean).item())
    assert paper_lambda(3.0, False, "sum", rows, batch) == pytest.approx(6.0 * (squares.sum() / mean).item())


def test_a_lambda_that_is_nearly_right():
    def rounded_down(lam, half, reduction, rows, batch):
        return paper_lambda(lam, half, reduction, rows // batch * batch if reduction == "padded" else rows, batch)

    refused(check.paper_lambda, rounded_down, "padded")
    refused(check.paper_lambda, lambda *a: torch.tensor([paper_lambda(*a)] * 2), "expected a number")
    for seed in range(3):
        check.paper_lambda._judge(lambda *a: np.float64(paper_lambda(*a)), seed)


# the reservoir


class ByHeap:
    def __init__(self, capacity, seed):
        self.k, self.rng, self.heap, self.n = capacity, random.Random(seed), [], 0

    @property
    def rows(self):
        return [row for *_, row in self.heap]

    def add(self, row):
        self.n += 1
        heapq.heappush(self.heap, (self.rng.random(), self.n, row.clone()))
        if len(self.heap) > self.k:
            heapq.heappop(self.heap)


class BySkips:
    """Keep with probability k/n, then throw one out at random."""

    def __init__(self, capacity, seed):
        self.k, self.rng, self.rows, self.n = capacity, random.Random(seed), [], 0

    def add(self, row):
        self.n += 1
        if len(self.rows) < self.k:
            self.rows.append(row.clone())
        elif self.rng.random() < self.k / self.n:
            self.rows[self.rng.randrange(self.k)] = row.clone()


@pytest.mark.parametrize("answer", [ByHeap, BySkips, None])
def test_other_reservoirs(answer):
    if answer is None:

        class OfRows(ReplayBuffer):
            def add(self, row):
                super().add(row[None])

        answer = OfRows
    for seed in range(3):
        check.reservoir._judge(answer, 1000 * seed)


def test_right_answers_are_not_refused_by_chance():
    """Two shares of so many streams differ by more than the tolerance once in ten thousand judgements or less."""
    error = math.sqrt(2 * 0.25 / TRIALS)
    assert 16 * 2 * stats.norm.sf(check.reservoir.atol / error) < 1e-4


def test_a_reservoir_that_is_nearly_right():
    class OneTooMany(Reservoir):
        def full(self):
            return len(self.rows) > self.capacity

    class NoRepeatedSlot(Reservoir):
        """Replaces the oldest slot in turn."""

        def replace(self, place, row):
            if place < self.capacity:
                self.rows[self.seen % self.capacity] = self.kept(row)

    class ByTheSharedGenerator(ByPriorities):
        """Draws from the generator that everybody draws from."""

        def __init__(self, capacity, seed):
            super().__init__(capacity, seed)
            self.generator = None

    refused(check.reservoir, OneTooMany, "how many rows are kept after each of twelve")
    refused(check.reservoir, mistaken(Reservoir, place=lambda self: 0), "")
    refused(check.reservoir, ByTheSharedGenerator, "torch's own generator")


# A-GEM


def test_other_projections():
    def by_norm(new, old):
        along = sum(torch.sum(a * b) for a, b in zip(new, old, strict=True))
        length = math.sqrt(sum((b**2).sum().item() for b in old))
        if along >= 0 or length == 0:
            return tuple(new)
        return tuple(g - along / length * (ref / length) for g, ref in zip(new, old, strict=True))

    for seed in range(3):
        check.project._judge(by_norm, seed)
        check.project._judge(project_gradient, seed)


def test_a_projection_that_is_nearly_right():
    def in_place(new, old):
        found = project(new, old)
        for g, value in zip(new, found, strict=True):
            g.copy_(value)
        return new

    def divides(new, old):
        along, size = sum((a * b).sum() for a, b in zip(new, old, strict=True)), sum((b**2).sum() for b in old)
        return [g - torch.clamp(along / size, max=0) * ref for g, ref in zip(new, old, strict=True)]

    refused(check.project, in_place, "changed in place")
    refused(check.project, divides, "an old gradient of zero")
    refused(check.project, mistaken(project, size=lambda old: 1.0), "values differ|expected")


# comparing


def test_comparing_by_numpy():
    def by_numpy(a, b, level):
        def read(new, old):
            new, old = np.array(new), np.array(old)
            below = np.flatnonzero(new <= level)
            if len(below) == 0:
                return None
            i = below[0]
            return np.interp(-level, [-new[i - 1], -new[i]], [old[i - 1], old[i]]) - old[0]

        one, other = ([read(*path) for path in runs] for runs in (a, b))
        if any(v is None for v in [*one, *other]):
            return {"a": None, "b": None, "low": None, "high": None, "less": "not reached"}
        d = np.array(one) - np.array(other)
        low, high = stats.t.interval(0.95, len(d) - 1, d.mean(), stats.sem(d))
        less = "a" if high < 0 else "b" if low > 0 else "not shown"
        return {"a": np.mean(one), "b": np.mean(other), "low": low, "high": high, "less": less}

    for seed in range(5):
        check.compare._judge(by_numpy, seed)


def test_a_comparison_that_is_nearly_right():
    def by_log(a, b, level):
        """Interpolates the logarithm of the loss: another line."""
        return compare(
            [([math.log(v) for v in new], old) for new, old in a], [([math.log(v) for v in new], old) for new, old in b], math.log(level)
        )

    refused(check.compare, by_log, "")
    refused(check.compare, mistaken(compare, quantile=lambda n: stats.norm.ppf(0.975)), "normal distribution")
    refused(check.compare, mistaken(compare, quantile=lambda n: stats.t.ppf(0.95, n - 1)), "one-sided")
    refused(check.compare, mistaken(compare, spread=lambda a, b, d: statistics.stdev(d) / len(d)), "by n")
    refused(check.compare, mistaken(compare, decide=lambda low, high, mean: "not shown"), "less")
    refused(check.compare, lambda *a: tuple(compare(*a).values()), "expected a dictionary")


def test_the_cases_of_comparing_are_what_they_say():
    for seed in range(5):
        seen = dict(check.compare.observe(compare, seed))
        assert [found["less"] for found in seen.values()] == ["a", "b", "not shown", "b", "not reached"]


def test_the_labs_crossing_is_the_worked_answers():
    runs = paths(torch.Generator().manual_seed(0), 4, 0.6, 0.1, torch.zeros(4), 0.3)
    read = [at_equal_learning(new, old, 0.8) - old[0] for new, old in runs]
    assert compare(runs, runs, 0.8)["a"] == pytest.approx(sum(read) / 4)
