"""lm-evaluation-harness's measures: worked by hand, and the numbers that the harness itself gave on the same questions."""

import json
import math
import random

import pytest

from course.lab import harness, instructions, models
from course.lab.harness import Item, score

ITEMS = [
    Item("q", ("yes", "certainly"), 0),  # −3 and −6: by the sum the first, by the character −1 and −0.67: the second
    Item("q", ("no", "never"), 1),  # −4 and −5: the first, and −2 and −1: the second
    Item("q", ("a", "b"), 1),  # a tie, which goes to the first
    Item("q", ("one", "two", "six"), 2),
]
VALUES = [(-3.0, -6.0), (-4.0, -5.0), (-1.0, -1.0), (-3.0, -2.0, -1.0)]


def test_worked_numbers():
    found = score(VALUES, ITEMS)
    assert found.right.tolist() == [True, False, False, True] and found.right_norm.tolist() == [False, True, False, True]
    assert (found.acc, found.acc_norm) == (0.5, 0.5)
    # s² = (4 · 0.25) / 3, stderr = √(s² / 4)
    assert found.acc_stderr == pytest.approx(math.sqrt(1 / 3 / 4), rel=1e-12)


def test_a_length_is_in_characters_and_without_the_space():
    items = [Item("", ("aé", "bcd"), 0)] * 2  # −2/2 against −2.9/3; bytes would make it −2/3 against −2.9/3, and a space −2/3 and −2.9/4
    assert score([(-2.0, -2.9)] * 2, items).acc_norm == 0.0


@pytest.mark.parametrize(
    ("values", "items"),
    [([(1.0,)], ITEMS[:1]), (VALUES[:3], ITEMS), ([(1.0, 2.0, 3.0)] * 2, ITEMS[:2]), ([(1.0, 2.0)] * 2, [Item("q", ("", "b"), 0)] * 2)],
)
def test_what_can_not_be_scored(values, items):
    with pytest.raises(ValueError, match=r"need log-probabilities|one each, none empty"):
        score(values, items)


def questions() -> list[Item]:
    """198 questions for the tiny model; the same were given to lm-evaluation-harness 0.4.13 as a custom task."""
    world, rng = instructions.world(), random.Random(0)
    items = []
    for question, answer in world.facts():
        others = sorted({other for _, other in world.facts() if other != answer})
        choices = [answer, *rng.sample(others, 3)]
        rng.shuffle(choices)
        items.append(Item(question, tuple(choices), choices.index(answer)))
    for _ in range(60):
        context = "repeat " + rng.choice(list(world.kinds()))
        choices = tuple(" ".join(rng.sample(sorted(world.kinds()), count)) for count in (1, 2, 3))
        items.append(Item(context, choices, rng.randrange(3)))
    return items


def test_equal_to_the_harness(tmp_path):
    """lm_eval 0.4.13, HFLM(add_bos_token=True), a YAML task with output_type multiple_choice and these choices gave these four numbers."""
    file = tmp_path / "items.jsonl"
    file.write_text("\n".join(json.dumps(item._asdict()) for item in questions()))
    found = harness.evaluate(*models.load("tiny"), harness.read(file))
    assert (found.acc, found.acc_norm) == (0.7676767676767676, 0.7525252525252525)
    assert found.acc_stderr == pytest.approx(0.03008862949021746, abs=1e-12)
    assert found.acc_norm_stderr == pytest.approx(0.03074630074212447, abs=1e-12)


def test_a_wrong_line_is_named(tmp_path):
    file = tmp_path / "items.jsonl"
    file.write_text('{"context": "a", "choices": ["b"], "gold": 1}\n')
    with pytest.raises(ValueError, match="line 1: needs context, choices and gold"):
        harness.read(file)
