"""The small world's probabilities are exact, its prefixes unambiguous, and its texts what they claim to be."""

import itertools
import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from course.lab.grammar import Source, emit, mixture, uniform, weighted
from course.lab.world import CITIES, DOMAINS, NAMES, World


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def every_state(source: Source):
    seen, todo = {source.start}, [source.start]
    while todo:
        state = todo.pop()
        yield state
        for _, then in source.transitions(state).values():
            if then not in seen:
                seen.add(then)
                todo.append(then)


@pytest.mark.parametrize("domain", DOMAINS)
def test_each_state_is_a_distribution(world, domain):
    for state in every_state(world.sources[domain]):
        probabilities = [probability for probability, _ in world.sources[domain].transitions(state).values()]
        assert all(0 < probability <= 1 for probability in probabilities)
        assert math.isclose(sum(probabilities), 1.0, rel_tol=1e-12)


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_long_sample_reaches_the_stated_floor(world, domain):
    """The true distribution's own cross-entropy on 4,000 rows is the floor, within four standard errors of the mean over rows."""
    ids = world.sample(domain, rows=4000, length=48, seed=12345)
    per_row = -world.log_probs(domain, ids).mean(1)
    standard_error = (per_row.std() / len(per_row) ** 0.5).item()
    assert abs(per_row.mean().item() - world.floor(domain, 48)) < 4 * standard_error
    assert standard_error < 0.01  # so the bound above means something


def test_entropy_equals_brute_force_over_all_texts():
    """On a source small enough to list every text, H = −Σ p log p over texts."""

    def transitions(state):
        if state == "start":
            return mixture((0.7, uniform("ab", lambda w: w)), (0.3, emit("c", "start")))
        return weighted({"x": 3, "y": 1}, lambda _: "start") if state == "a" else emit("z", "start")

    source, length, total, entropy = Source("start", transitions), 5, 0.0, 0.0
    for text in itertools.product("abcxyz", repeat=length):
        try:
            log = sum(source.log_probs(text))
        except ValueError:
            continue
        total += math.exp(log)
        entropy -= math.exp(log) * log
    assert math.isclose(total, 1.0, rel_tol=1e-12)
    assert math.isclose(source.entropy(length), entropy, rel_tol=1e-12)


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_prefix_says_which_state_the_source_is_in(world, domain):
    """Unambiguous: no state leads to two states by the same word. Checked against what the source does, not only how it is written:
    texts that share a prefix, sampled independently, agree on the next word's distribution as counted."""
    source, counts, prefix_counts = world.sources[domain], Counter(), Counter()
    rng = random.Random(7)
    for _ in range(20_000):
        words = source.sample(4, rng)
        prefix_counts[tuple(words[:3])] += 1
        counts[tuple(words)] += 1
    checked = 0
    for prefix, total in prefix_counts.most_common(30):
        if total < 150:
            break
        for word, probability in source.next_words(prefix).items():
            error = math.sqrt(total * probability * (1 - probability))
            assert abs(counts[*prefix, word] - total * probability) <= 5 * error + 1e-9
            checked += 1
    assert checked > 3


def test_an_ambiguous_mixture_is_refused():
    with pytest.raises(ValueError, match="'a' begins two continuations"):
        mixture((0.5, emit("a", 1)), (0.5, emit("a", 2)))


@given(domain=st.sampled_from(DOMAINS), rows=st.integers(1, 3), length=st.integers(2, 40), seed=st.integers(0, 10**6))
@settings(max_examples=30)
def test_samples_have_the_shape_asked_for_and_can_be_scored(domain, rows, length, seed):
    world = World()
    ids = world.sample(domain, rows, length, seed)
    assert ids.shape == (rows, length) and ids.dtype == torch.int64
    assert (ids[:, 0] == world.ids["<bos>"]).all()
    assert torch.equal(ids, world.sample(domain, rows, length, seed))
    logs = world.log_probs(domain, ids)
    assert logs.shape == (rows, length - 1) and (logs <= 0).all()


def test_facts_are_answered_in_the_text(world):
    """Every question of facts() is asked in general text with just that answer."""
    general = world.sources["general"]
    assert len(world.facts()) == 3 * len(NAMES) + len(CITIES)
    for question, answer in world.facts():
        assert general.next_words(question.split()) == {answer: 1.0}


def test_the_verb_agrees_across_the_attractor(world):
    verbs = world.sources["general"].next_words("the dog near the cars".split())
    assert set(verbs) == {"sleeps", "eats", "laughs", "waits", "sings"}
    assert set(world.sources["general"].next_words("the cars near the dog".split())) == {"stop", "break", "start", "rattle", "rust"}


def test_downstream_words_are_known_to_the_general_domain(world):
    """Otherwise an adapter on the linears would have to learn a word whose embedding nothing trained."""
    general = set(world.sources["general"].words())
    for domain in ("clinic", "legal", "sql"):
        assert set(world.sources[domain].words()) <= general


def test_the_tokenizer_is_the_vocabulary(world):
    ids = world.sample("sql", 2, 24, seed=3)
    for row in ids:
        assert world.tokenizer(world.text(row)).input_ids == row.tolist()
        assert world.tokenizer.decode(row, skip_special_tokens=True) == world.text(row)
    assert world.tokenizer("where does gandalf live ?").input_ids.count(world.ids["<unk>"]) == 1


def test_bad_input_is_named(world):
    with pytest.raises(ValueError, match="domain must be one of general, clinic, legal, sql, got 'poetry'"):
        world.sample("poetry", 1, 8, seed=0)
    with pytest.raises(ValueError, match="length must be at least 2"):
        world.sample("general", 1, 1, seed=0)
    with pytest.raises(ValueError, match="word 1, 'mira', cannot stand there"):
        world.sources["general"].log_probs(["mira", "mira"])


def test_another_seed_is_another_world(world):
    assert World(seed=1).city != world.city
    assert World(seed=0).city == world.city
