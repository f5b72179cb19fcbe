"""Paired intervals against scipy and against what they promise, and the rule that decides by them."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from course.lab import models, training
from course.lab.evaluation import (
    FULL,
    UNKNOWN,
    Interval,
    compare_answers,
    compare_losses,
    facts_right,
    recommend,
    sequence_divergence,
    sequence_losses,
    two_percent_rule,
    words_right,
)
from course.lab.quantized import quantized_copy
from course.lab.world import World


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    return models.load("tiny", where=torch.device("cpu"))[0]


def losses(n: int, shift: float, spread: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    hard = 2 + torch.rand(n, generator=g, dtype=torch.float64)  # what makes a text hard is in both
    return hard, hard + shift + spread * torch.randn(n, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("n, confidence", [(8, 0.95), (40, 0.9), (200, 0.99)])
def test_equal_lengths_give_the_paired_t_interval(n, confidence):
    one, two = losses(n, 0.03, 0.05, n)
    found, expected = compare_losses(one, two, confidence=confidence), stats.ttest_rel(two, one).confidence_interval(confidence)
    assert found.estimate == pytest.approx((two - one).mean().item(), rel=1e-9)  # the same sums in another order
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_pairing_takes_out_what_makes_a_text_hard():
    one, two = losses(64, 0.03, 0.01, 0)
    paired, unpaired = compare_losses(one, two), stats.ttest_ind(two, one).confidence_interval()
    assert paired.verdict(0.0) == "beyond" and unpaired.low < 0 < unpaired.high
    assert paired.high - paired.low < (unpaired.high - unpaired.low) / 10


def test_tokens_weigh_the_sequences():
    one, two = losses(30, 0.1, 0.2, 1)
    counts = torch.randint(5, 50, (30,), generator=torch.Generator().manual_seed(0))
    found = compare_losses(one, two, counts)
    assert found.estimate == pytest.approx((((two - one) * counts).sum() / counts.sum()).item(), rel=1e-12)
    equal, plain = compare_losses(one, two, torch.full((30,), 7)), compare_losses(one, two)
    assert (equal.low, equal.high) == pytest.approx((plain.low, plain.high), rel=1e-9)
    resampled = []
    for seed in range(2000):
        rows = torch.randint(30, (30,), generator=torch.Generator().manual_seed(seed))
        resampled.append((((two - one) * counts)[rows].sum() / counts[rows].sum()).item())
    low, high = torch.tensor(resampled).quantile(torch.tensor([0.025, 0.975])).tolist()
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.15 * (high - low))  # the bootstrap's own noise, and t against normal


def test_the_interval_holds_the_truth_as_often_as_it_says():
    held = [compare_losses(*losses(12, 0.03, 0.05, seed), confidence=0.9) for seed in range(800)]
    share = sum(i.low <= 0.03 <= i.high for i in held) / len(held)
    assert abs(share - 0.9) < 0.04  # four standard errors of 800 draws


def table(lost: int, gained: int, right: int, wrong: int) -> tuple[list[bool], list[bool]]:
    """Answers before and after with so many of each kind."""
    before = [True] * lost + [False] * gained + [True] * right + [False] * wrong
    return before, [False] * lost + [True] * gained + [True] * right + [False] * wrong


@pytest.mark.parametrize("n", [20, 60, 150])
@pytest.mark.parametrize("lost, gained", [(0.0, 0.0), (0.01, 0.0), (0.1, 0.0), (0.05, 0.03), (0.3, 0.1)])
def test_the_interval_of_answers_holds_the_truth_as_often_as_it_says(n, lost, gained):
    rng, held, known = random.Random(0), 0, {}
    for _ in range(500):
        draws = [rng.random() for _ in range(n)]
        counts = sum(d < lost for d in draws), sum(lost <= d < lost + gained for d in draws)
        if counts not in known:
            known[counts] = compare_answers(*table(*counts, n - sum(counts), 0))
        held += known[counts].low <= lost - gained <= known[counts].high
    assert held / 500 > 0.92  # 95 % promised, three standard errors of 500 draws


def test_without_any_change_the_interval_is_known():
    """Tango's interval for an empty table: ± z²/(n + z²)."""
    for n, confidence in ((20, 0.95), (320, 0.99)):
        z = stats.norm.ppf((1 + confidence) / 2)
        found = compare_answers(*table(0, 0, n - 5, 5), confidence=confidence)
        assert (found.estimate, found.low, found.high) == pytest.approx((0, -(z**2) / (n + z**2), z**2 / (n + z**2)), abs=1e-9)


def test_the_interval_of_answers_is_the_score_tests():
    """At both ends the score test says z, with the share gained that is likeliest there: found by trying."""
    lost, gained, n = 12, 5, 60
    found = compare_answers(*table(lost, gained, n - lost - gained, 0))
    for difference, sign in ((found.low, 1), (found.high, -1)):
        shares = torch.linspace(1e-6, (1 - abs(difference)) / 2, 200_001, dtype=torch.float64)
        shares = shares[(shares + difference > 1e-9) & (2 * shares + difference < 1 - 1e-9)]
        likelihood = lost * (shares + difference).log() + gained * shares.log() + (n - lost - gained) * (1 - 2 * shares - difference).log()
        share = shares[likelihood.argmax()].item()
        z = (lost - gained - n * difference) / math.sqrt(n * (2 * share + difference * (1 - difference)))
        assert z == pytest.approx(sign * stats.norm.ppf(0.975), abs=1e-3)  # the grid's step


def test_large_samples_give_the_usual_interval():
    lost, gained, n = 300, 200, 5000
    found, d = compare_answers(*table(lost, gained, n - lost - gained, 0)), (lost - gained) / n
    half = stats.norm.ppf(0.975) * math.sqrt((lost + gained) / n - d**2) / math.sqrt(n)
    assert (found.low, found.high) == pytest.approx((d - half, d + half), abs=0.02 * half)


@pytest.mark.parametrize("lost, gained", [(9, 0), (0, 9)])
def test_all_or_nothing(lost, gained):
    found = compare_answers(*table(lost, gained, 0, 0))
    assert found.estimate == (1 if lost else -1) and -1 <= found.low < found.high <= 1


def test_no_change_in_few_questions_is_not_certainty():
    same = compare_answers([True] * 20, [True] * 20)
    assert same.estimate == 0 and same.verdict(0.02) == "unknown" and same.high > 0.15
    assert compare_answers([True] * 188, [True] * 188).verdict(0.02) == "unknown"
    assert compare_answers([True] * 189, [True] * 189).verdict(0.02) == "within"


@settings(max_examples=40)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=8, max_size=60))
def test_swapping_the_models_mirrors_the_interval(pairs):
    one, two = zip(*pairs, strict=True)
    there, back = compare_answers(one, two), compare_answers(two, one)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low), abs=1e-9)  # where a root is looked for
    assert there.low <= there.estimate <= there.high


def test_nats_as_a_share_of_perplexity():
    rise = Interval(0.02, 0.01, 0.03, 0.95, 50).rise
    assert (rise.estimate, rise.low, rise.high) == pytest.approx((math.exp(0.02) - 1, math.exp(0.01) - 1, math.exp(0.03) - 1))


def interval(low: float, high: float) -> Interval:
    return Interval((low + high) / 2, low, high, 0.95, 100)


WITHIN, BEYOND, OPEN = interval(-0.01, 0.02), interval(0.021, 0.05), interval(0.0, 0.03)


@pytest.mark.parametrize(
    "four, eight, choice, safe",
    [
        (WITHIN, WITHIN, "4-bit", "4-bit"),
        (BEYOND, WITHIN, "8-bit", "8-bit"),
        (BEYOND, BEYOND, FULL, FULL),
        (OPEN, WITHIN, UNKNOWN, "8-bit"),
        (OPEN, BEYOND, UNKNOWN, FULL),
        (BEYOND, OPEN, UNKNOWN, FULL),
        (WITHIN, OPEN, "4-bit", "4-bit"),
    ],
)
def test_the_rule_decides_by_intervals(four, eight, choice, safe):
    verdict = recommend({"4-bit": {"perplexity": four}, "8-bit": {"perplexity": eight}})
    assert (verdict.choice, verdict.safe) == (choice, safe)
    assert choice in str(verdict)


def test_one_measure_beyond_is_enough_and_all_must_be_within():
    assert recommend({"4-bit": {"perplexity": WITHIN, "facts": BEYOND}}).choice == FULL
    assert recommend({"4-bit": {"perplexity": WITHIN, "facts": OPEN}}).choice == UNKNOWN


def test_the_point_would_decide_otherwise():
    """An estimate of 1.5 % that may as well be 3 % is no licence."""
    assert OPEN.estimate < 0.02 and recommend({"4-bit": {"perplexity": OPEN}}).choice == UNKNOWN


def test_how_many_more_would_decide():
    needed = OPEN.needed(0.02)
    assert needed == 900  # the half width is three times the margin
    smaller = Interval(OPEN.estimate, OPEN.estimate - 0.0049, OPEN.estimate + 0.0049, 0.95, needed)
    assert smaller.verdict(0.02) == "within"
    assert interval(0.0, 0.04).needed(0.02) is None and interval(-0.1, 0.1).needed(0.02) is None
    said = str(recommend({"4-bit": {"perplexity": OPEN}}))
    assert "about 900 items would decide" in said and max(map(len, said.splitlines())) <= 80


def test_losses_of_sequences_average_to_the_cross_entropy(tiny, world):
    ids = world.sample("clinic", 20, 24, seed=5)
    found = sequence_losses(tiny, ids, rows_at_once=7)
    assert found.shape == (20,) and not tiny.training
    assert found.mean().item() == pytest.approx(training.cross_entropy(tiny, ids), rel=1e-5)  # float32 sums
    assert found[3].item() == pytest.approx(training.cross_entropy(tiny, ids[3:4]), rel=1e-5)


def test_facts_one_by_one_are_the_accuracy(tiny, world):
    broken = quantized_copy(tiny, "INT2")
    assert facts_right(broken, world).double().mean().item() == pytest.approx(training.fact_accuracy(broken, world))
    assert facts_right(broken, world).double().mean().item() < 1


def test_divergence_is_zero_for_the_same_model_and_orders_the_formats(tiny, world):
    ids = world.sample("general", 16, 32, seed=5)
    assert sequence_divergence(tiny, tiny, ids).abs().max().item() < 1e-12
    means = [sequence_divergence(quantized_copy(tiny, kind), tiny, ids).mean().item() for kind in ("INT8", "NF4", "INT4", "INT2")]
    assert means == sorted(means)


def test_words_are_asked_where_only_one_can_follow(tiny, world):
    ids = world.sample("general", 24, 32, seed=5)
    certain = world.log_probs("general", ids) > -1e-9
    assert words_right(tiny, ids, certain).all()
    assert not words_right(tiny, ids, torch.ones_like(certain)).any()  # nobody knows who is spoken of next
    assert words_right(tiny, ids, torch.zeros_like(certain)).all()
    assert not words_right(quantized_copy(tiny, "INT2"), ids, certain).all()


def test_the_whole_rule_on_the_tiny_model(tiny, world):
    ids = world.sample("general", 256, 32, seed=5)
    certain = world.log_probs("general", ids) > -1e-9
    measures = {"perplexity": lambda m: sequence_losses(m, ids), "words": lambda m: words_right(m, ids, certain)}
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    assert two_percent_rule(tiny, measures).choice == "4-bit"
    assert two_percent_rule(tiny, measures, formats={"2-bit": "INT2", "8-bit": "INT8"}).choice == "8-bit"
    few = two_percent_rule(tiny, {"facts": lambda m: facts_right(m, world)[:20]})
    assert few.choice == UNKNOWN and "more items are needed" in str(few)
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: compare_losses([1.0] * 9, [1.0] * 8), "same items"),
        (lambda: compare_losses([1.0] * 7, [1.0] * 7), "at least 8"),
        (lambda: compare_losses([1.0] * 8, [math.nan] * 8), "NaN"),
        (lambda: compare_losses([1.0] * 8, [1.0] * 8, [1] * 7), "tokens"),
        (lambda: compare_losses([1.0] * 8, [1.0] * 8, confidence=95), "confidence"),
        (lambda: compare_answers([True] * 3, [True] * 3), "at least 8"),
        (lambda: recommend({}), "at least one measure"),
        (lambda: recommend({"4-bit": {"perplexity": WITHIN}}, tolerance=-1), "tolerance"),
        (lambda: two_percent_rule(nn.Linear(4, 4), {}), "measures is empty"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
